"""Megatron checkpoints that mtt writes: bits, padding, arguments, and what is refused."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mtt_convert
from mtt_convert import LayoutError, MTTError, UnsupportedError, UsageError
from mtt_convert.cli import main
from tests.convert.surgery import Golden, snapshot

LLAMA = "mcore/llama/tp2pp2vpp2/torch"
GPT = "mcore/gpt/tp2pp2/torch"
QWEN = "mcore/qwen/tp2pp2/torch"
LEGACY = "legacy/core_v0.12.0-llama-tp2pp2"
EMBEDDING = "embedding.word_embeddings.weight"
Convert = Callable[..., Path]


@pytest.fixture
def convert(tmp_path: Path) -> Convert:
    """Convert into a folder named after the layout, and return it."""

    def run(source: Path, name: str = "out", **options: object) -> Path:
        mtt_convert.convert(source, tmp_path / name, **options)  # type: ignore[arg-type]
        return tmp_path / name

    return run


def rank_file(root: Path, tp: int = 0, pp: int | None = None) -> Path:
    (folder,) = [path for path in root.iterdir() if path.name.startswith(("iter_", "release"))]
    suffix = "" if pp is None else f"_{pp:03d}"
    return folder / f"mp_rank_{tp:02d}{suffix}" / "model_optim_rng.pt"


def load(path: Path) -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


@pytest.mark.parametrize("source", [LLAMA, GPT, QWEN, LEGACY])
@pytest.mark.parametrize(
    ("to", "layout"),
    [
        ("torch", {}),
        ("torch", {"tp": 4, "pp": 2}),
        ("torch", {"tp": 2, "pp": 2, "vpp": 2, "transformer_impl": "local"}),
        ("torch_dist", {"tp": 2, "pp": 4}),
        ("torch_dist", {}),
    ],
)
def test_every_layout_holds_the_same_bits(golden: Golden, convert: Convert, source, to, layout):
    out = convert(golden(source), to=to, tokenizer="none", **layout)
    comparison = mtt_convert.diff(golden(source), out)
    assert comparison.num_equal > 0
    assert not comparison.differences
    assert not mtt_convert.verify(out).problems

    before, after = mtt_convert.open_checkpoint(golden(source)), mtt_convert.open_checkpoint(out)
    assert (after.layout.tp, after.layout.pp) == (layout.get("tp", 1), layout.get("pp", 1))
    assert after.iteration == before.iteration
    assert after.architecture.vocab_size == (
        before.architecture.vocab_size or before.architecture.padded_vocab_size
    )


def test_a_chain_of_layouts_gives_the_files_of_the_direct_conversion(
    golden: Golden, convert: Convert
):
    direct = convert(golden(LLAMA), "direct", tokenizer="none")
    step = convert(golden(LLAMA), "a", to="torch", tp=2, pp=2)
    step = convert(step, "b", to="torch", tp=4, pp=1)
    step = convert(step, "c", to="torch_dist", tp=1, pp=2, max_shard_size="100KB")
    chained = convert(step, "hf", tokenizer="none")
    ours, theirs = snapshot(direct), snapshot(chained)
    different = {name for name in ours if ours[name] != theirs.get(name)}
    assert ours.keys() == theirs.keys()
    # The card and the manifest name the source.
    assert different == {"README.md", "mtt_manifest.json"}


@pytest.mark.parametrize("to", ["torch", "torch_dist"])
def test_the_same_input_gives_the_same_bytes(golden: Golden, convert: Convert, to):
    first = snapshot(convert(golden(GPT), "a", to=to, tp=2, num_workers=1))
    second = snapshot(convert(golden(GPT), "b", to=to, tp=2, num_workers=2))
    assert first == second


def test_python_and_torch_read_the_files(golden: Golden, convert: Convert):
    out = convert(golden(GPT), to="torch", tp=2, pp=2, transformer_impl="local")
    for tp in (0, 1):
        for pp in (0, 1):
            path = rank_file(out, tp, pp)
            assert zipfile.ZipFile(path).testzip() is None
            content = load(path)
            args = content["args"]
            assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (2, 2)
            assert args.rank == pp * 2 + tp
            assert (content["checkpoint_version"], content["iteration"]) == (3.0, 10)
    first, last = load(rank_file(out, 1, 0))["model"], load(rank_file(out, 1, 1))["model"]
    assert torch.equal(first[EMBEDDING], last["output_layer.weight"])


def test_layers_are_numbered_within_their_stage(golden: Golden, convert: Convert):
    out = convert(golden("mcore/llama_6l/pp2_layout/torch"), to="torch", pp=2,
                  pipeline_model_parallel_layout="Et*2|t|t*2|tL")  # fmt: skip
    layers = []
    for pp in (0, 1):
        content = load(rank_file(out, pp=pp))
        assert "model" not in content
        for chunk in ("model0", "model1"):
            names = content[chunk]
            layers.append({int(n.split(".")[2]) for n in names if n.startswith("decoder.layers")})
    assert layers == [{0, 1}, {0, 1}, {0}, {0}]
    theirs = golden("mcore/llama_6l/pp2_layout/torch")
    assert not mtt_convert.diff(out, theirs).differences


def test_a_stage_may_be_empty(golden: Golden, convert: Convert):
    out = convert(golden("mcore/llama_6l/pp2_layout/torch"), to="torch", pp=4,
                  pipeline_model_parallel_layout="E|t*6||L")  # fmt: skip
    assert load(rank_file(out, pp=2))["model"] == {}
    assert not mtt_convert.diff(out, golden("mcore/llama_6l/pp2_layout/torch")).differences


# Vocabulary


def rows(root: Path) -> torch.Tensor:
    return load(rank_file(root))["model"][EMBEDDING]


def test_padding_rows_are_kept_and_new_ones_are_zeros(golden: Golden, convert: Convert):
    source = rows(convert(golden(LLAMA), "same", to="torch"))
    assert source.shape[0] == 512
    wide = convert(golden(LLAMA), "wide", to="torch", make_vocab_size_divisible_by=600)
    assert torch.equal(rows(wide)[:512], source)
    assert rows(wide).shape[0] == 600
    assert not rows(wide)[512:].any()


def test_the_true_size_survives_and_returns(golden: Golden, convert: Convert):
    wide = convert(golden(LLAMA), "wide", to="torch", make_vocab_size_divisible_by=600)
    assert load(rank_file(wide))["args"].mtt["vocab_size"] == 500
    again = convert(wide, "again", to="torch", make_vocab_size_divisible_by=128)
    assert torch.equal(rows(again), rows(convert(golden(LLAMA), "same", to="torch")))
    narrow = convert(wide, "narrow", to="torch", make_vocab_size_divisible_by=10)
    assert rows(narrow).shape[0] == 500
    assert mtt_convert.open_checkpoint(narrow).architecture.vocab_size == 500


def test_keep_returns_to_where_it_began(golden: Golden, convert: Convert):
    keep = {"to": "torch", "vocab_padding": "keep"}
    wide = convert(golden(LLAMA), "wide", tp=8, **keep)
    assert load(rank_file(wide))["model"][EMBEDDING].shape[0] * 8 == 1024
    again = convert(wide, "again", **keep)
    assert torch.equal(rows(again), rows(convert(golden(LLAMA), "same", **keep)))


def test_hugging_face_and_back_in_the_same_layout(golden: Golden, convert: Convert):
    """Every tensor of every rank, with the padding rows kept."""
    layout = {"to": "torch", "tp": 2, "pp": 2, "transformer_impl": "local"}
    first = convert(golden(GPT), "first", **layout)
    folder = convert(first, "hf", vocab_padding="keep", tokenizer="none")
    again = convert(folder, "again", **layout)
    for tp in (0, 1):
        for pp in (0, 1):
            a = load(rank_file(first, tp, pp))["model"]
            b = load(rank_file(again, tp, pp))["model"]
            assert list(a) == list(b)
            assert all(a[n] is b[n] is None or torch.equal(a[n], b[n]) for n in a)


# Arguments


def test_the_arguments_of_the_source_are_carried(golden: Golden, convert: Convert):
    source = mtt_convert.open_checkpoint(golden(LLAMA)).args
    args = vars(load(rank_file(convert(golden(LLAMA), to="torch")))["args"])
    assert args["lr_decay_style"] == source["lr_decay_style"]
    assert args["transformer_impl"] == source["transformer_impl"] == "local"
    assert args["virtual_pipeline_model_parallel_size"] is None
    assert args["no_save_optim"] is args["no_save_rng"] is True
    assert args["norm_epsilon"] == args["layernorm_epsilon"] == source["layernorm_epsilon"]


def test_a_legacy_source_is_written_as_megatron_core(golden: Golden, convert: Convert):
    out = convert(golden(LEGACY), to="torch", tokenizer="none")
    content = load(rank_file(out))
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in content["model"]
    assert content["args"].use_legacy_models is False
    before = mtt_convert.open_checkpoint(golden(LEGACY)).architecture
    after = mtt_convert.open_checkpoint(out).architecture
    differing = {
        name
        for name in before.__dataclass_fields__
        if getattr(before, name) != getattr(after, name)
    }
    assert differing <= {"vocab_size", "padded_vocab_size"}


def test_objects_in_arguments_are_not_carried(golden: Golden, convert: Convert):
    """A stranger's checkpoint may name anything; what mtt writes names nothing of it."""
    out = convert(golden(LLAMA), to="torch")
    pickled = zipfile.ZipFile(rank_file(out)).read("model_optim_rng/data.pkl")
    modules = set(re.findall(rb"c([\w.]+)\n[\w.]+\n", pickled))
    assert modules == {b"argparse", b"collections", b"torch", b"torch._utils"}


def launch_words(root: Path) -> list[str]:
    script = f'source "{root}/megatron_args.sh" && printf "%s\\n" "${{MEGATRON_ARGS[@]}}"'
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


@pytest.mark.parametrize(
    ("source", "expected", "absent"),
    [
        (LLAMA, "--swiglu --disable-bias-linear --untie-embeddings-and-output-weights "
                "--group-query-attention --no-bias-gelu-fusion", "--squared-relu --add-qkv-bias"),
        (GPT, "--no-bias-gelu-fusion",
              "--rotary-base --swiglu --disable-bias-linear --num-query-groups"),
        (QWEN, "--qk-layernorm --add-qkv-bias --disable-bias-linear", "--apply-layernorm-1p"),
        ("mcore/nemotron/tp2pp1/torch", "--apply-layernorm-1p --squared-relu", "--swiglu"),
        ("mcore/gpt_bf16/tp2pp2/torch", "--bf16", "--fp16"),
    ],
)  # fmt: skip
def test_the_launch_arguments(golden: Golden, convert: Convert, source, expected, absent):
    out = convert(golden(source), to="torch", tp=2, pp=2)
    words = launch_words(out)
    assert set(expected.split()) <= set(words)
    assert not set(absent.split()) & set(words)
    values = dict(itertools.pairwise(words))
    architecture = mtt_convert.open_checkpoint(out).architecture
    assert values["--num-layers"] == str(architecture.num_layers)
    assert values["--padded-vocab-size"] == str(architecture.padded_vocab_size)
    assert values["--tensor-model-parallel-size"] == "2"
    assert values["--load"] == str(out)
    assert int(values["--vocab-size"]) + 1 == 500


def test_the_tokenizer_travels(golden: Golden, convert: Convert):
    sample = Path(__file__).parents[2] / "convert" / "sample"
    out = convert(sample, to="torch", tp=2)
    names = {path.name for path in (out / "tokenizer").iterdir()}
    assert {"vocab.json", "merges.txt", "tokenizer_config.json"} <= names
    assert f"{out}/tokenizer" in launch_words(out)
    back, direct = snapshot(convert(out, "back")), snapshot(convert(sample, "direct"))
    assert back.keys() == direct.keys()
    assert {name for name in back if back[name] != direct[name]} <= {
        "README.md",
        "mtt_manifest.json",
    }


# Refusals, before anything is written


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"tp": 3}, LayoutError, "1, 2, 4, 8"),
        ({"pp": 3}, LayoutError, "1, 2, 4"),
        ({"ep": 2}, LayoutError, "--ep 1"),
        ({"tp": 2, "etp": 4}, UsageError, "none"),
        ({"pp": 2, "vpp": 2, "pipeline_model_parallel_layout": "Ett|ttL"}, UsageError, "1, the"),
        ({"transformer_impl": "apex"}, UsageError, "transformer_engine or local"),
        ({"make_vocab_size_divisible_by": 0}, UsageError, "1 or more"),
        ({"dtype": "int8"}, UsageError, "bfloat16"),
        ({"max_shard_size": "many", "to": "torch_dist"}, UsageError, "5GB"),
        ({"model_type": "llama"}, UsageError, ""),
    ],
)
def test_what_cannot_be_is_refused(golden: Golden, convert: Convert, tmp_path, options, error,
                                   words):  # fmt: skip
    with pytest.raises(error) as caught:
        convert(golden(LLAMA), **{"to": "torch", **options})
    assert words in (caught.value.expected or "")
    assert not (tmp_path / "out").exists()


def test_a_layout_is_only_for_megatron(golden: Golden, convert: Convert, capsys, tmp_path):
    with pytest.raises(UsageError, match="only for a Megatron target"):
        convert(golden(LLAMA), tp=2)
    assert main(["convert", str(golden(LLAMA)), str(tmp_path / "out"), "--pp", "2"]) == 2
    assert "--to torch" in capsys.readouterr().err


def test_what_megatron_cannot_say_is_refused(golden: Golden, convert: Convert):
    """A gate with GELU is a model, but no argument of Megatron-Core's builds it."""
    checkpoint = mtt_convert.open_checkpoint(golden(LLAMA))
    from dataclasses import replace

    odd = replace(checkpoint, architecture=replace(checkpoint.architecture, activation="gelu"))
    with pytest.raises(UnsupportedError) as caught:
        mtt_convert.plan_conversion(odd, to="torch")
    assert caught.value.found == "gated_linear_unit = True"


@pytest.mark.parametrize("to", ["torch", "torch_dist"])
def test_a_failed_run_leaves_nothing(golden: Golden, tmp_path, monkeypatch, to):
    from mtt_convert.target import FolderSink

    def fail(*arguments: object) -> None:
        raise MTTError("the disk is gone")

    monkeypatch.setattr(FolderSink, "file_done", fail)
    with pytest.raises(MTTError, match="the disk is gone"):
        mtt_convert.convert(golden(LLAMA), tmp_path / "out", to=to, tp=2)
    assert not (tmp_path / "out").exists()


def test_overwrite_replaces_an_earlier_checkpoint_and_nothing_else(golden: Golden, convert):
    out = convert(golden(LLAMA), to="torch", tp=4)
    (out / "mine.txt").write_text("mine")
    (out / "iter_0000010" / "mine.txt").write_text("mine")
    with pytest.raises(mtt_convert.TargetError):
        convert(golden(LLAMA), to="torch", tp=2)
    again = convert(golden(LLAMA), to="torch", tp=2, overwrite=True)
    assert sorted(path.name for path in (again / "iter_0000010").iterdir()) == [
        "mine.txt", "mp_rank_00", "mp_rank_01",
    ]  # fmt: skip
    assert (again / "mine.txt").read_text() == "mine"
    assert not mtt_convert.diff(again, golden(LLAMA)).differences


def test_a_failed_overwrite_puts_the_old_one_back(golden: Golden, convert, monkeypatch):
    out = convert(golden(LLAMA), to="torch", tp=4)
    before = snapshot(out)
    from mtt_convert.target import FolderSink

    def fail(*arguments: object) -> None:
        raise MTTError("the disk is gone")

    monkeypatch.setattr(FolderSink, "finish", fail)
    with pytest.raises(MTTError, match="the disk is gone"):
        convert(golden(LLAMA), to="torch_dist", tp=2, overwrite=True)
    assert snapshot(out) == before


def test_verify_finds_a_flipped_bit_anywhere(golden: Golden, convert: Convert):
    out = convert(golden(LLAMA), to="torch_dist", tp=2)
    path = out / "iter_0000010" / "__1_0.distcp"
    data = path.read_bytes()
    for position in range(0, len(data), 997):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        assert mtt_convert.verify(out).problems, position
    path.write_bytes(data)
    assert not mtt_convert.verify(out).problems


# The command line


def test_the_dry_run_writes_nothing(golden: Golden, tmp_path, capsys):
    words = ["convert", str(golden(LLAMA)), str(tmp_path / "out"), "--to", "torch", "--tp", "2"]
    assert main([*words, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "iter_0000010/mp_rank_01/model_optim_rng.pt" in text
    assert "megatron_args.sh" in text
    assert not (tmp_path / "out").exists()


def test_json(golden: Golden, tmp_path, capsys):
    words = ["convert", str(golden(LLAMA)), str(tmp_path / "out"), "--to", "torch_dist"]
    assert main([*words, "--tensor-model-parallel-size", "2", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["status"] == "ok"
    assert set(body["hashes"]) == {f"iter_0000010/__{rank}_0.distcp" for rank in (0, 1)}
    assert not body["warnings"]
