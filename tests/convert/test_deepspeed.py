"""DeepSpeed's checkpoints: trackers, layouts, moved modules, drifted copies, separate tensors."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mtt_convert
from mtt_convert.errors import (
    CorruptError,
    IncompleteError,
    InconsistentError,
    MTTError,
    NotACheckpointError,
    UnsupportedError,
    UsageError,
)
from mtt_convert.reading import FileReader
from tests.convert.derived import (
    copied,
    digest,
    edited,
    layer_files,
    read,
    resharded,
    whole_module,
    write,
)
from tests.convert.golden_cases import OTHER_FORMATS, Case
from tests.convert.surgery import Golden, refused, run

GPT2 = "legacy/megatron-deepspeed-346b89a6-2021-gpt2-tp1pp1"
GPT2_TP2 = "legacy/megatron-deepspeed-6acc370a-gpt2-tp2pp2"
LLAMA = "legacy/megatron-deepspeed-6acc370a-llama-tp2pp1"
BLOOM = "legacy/bigscience-8387ae17-bloom-tp2pp1"
UNIVERSAL = "legacy/universal-6acc370a-gpt2-from-ZERO1bf16-tp2dp2"
SINCE_2023 = "legacy/megatron-deepspeed-6acc370a-ZERO1bf16-gpt2-tp1pp1dp2"
NO_PIPELINE = "legacy/megatron-deepspeed-6acc370a-NOPIPE-gpt2-tp2pp1"
TAG = "global_step100"
NAME = "layer_{:02d}-model_{:02d}-model_states.pt"
STATES = "mp_rank_{:02d}_model_states.pt"
SAID = {
    "num_attention_heads": 4,
    "layernorm_epsilon": 1e-5,
    "bias_gelu_fusion": False,
    "layernorm_zero_centered_gamma": False,
    "untie_embeddings_and_output_weights": False,
}
Digest = Callable[[str], str]


@pytest.fixture(scope="module")
def digest_of(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Digest:
    """The hash of what a golden becomes, converted once."""
    return cache(lambda name: digest(golden(name), tmp_path_factory.mktemp("golden") / "hf"))


@pytest.fixture
def root(golden: Golden, tmp_path: Path) -> Path:
    """A copy of a checkpoint of two ranks and two stages."""
    return copied(golden(GPT2_TP2), tmp_path / "root")


@pytest.mark.parametrize("tp", [2, 4])
def test_any_number_of_ranks(tp: int, golden: Golden, digest_of: Digest, tmp_path: Path) -> None:
    root = resharded(golden(GPT2), tmp_path / "root", tp)
    assert digest(root, tmp_path / "hf") == digest_of(GPT2)


@pytest.mark.parametrize("shift", [-1, 4, 200])
def test_modules_may_be_numbered_otherwise(
    shift: int, golden: Golden, digest_of: Digest, tmp_path: Path
) -> None:
    """Numbers moved between releases; from 100 on they have three digits."""
    root = copied(golden(GPT2), tmp_path / "root")
    for (module, rank), path in layer_files(root / TAG).items():
        if module > 1:
            path.rename(path.with_name("moved-" + NAME.format(module + shift, rank)))
    for path in (root / TAG).glob("moved-*"):
        path.rename(path.with_name(path.name.removeprefix("moved-")))
    assert digest(root, tmp_path / "hf") == digest_of(GPT2)


def test_files_without_a_rank(golden: Golden, digest_of: Digest, tmp_path: Path) -> None:
    """Topologies of two axes have no -model_00 in their names."""
    root = copied(golden(GPT2), tmp_path / "root")
    for (module, _), path in layer_files(root / TAG).items():
        path.rename(path.with_name(f"layer_{module:02d}-model_states.pt"))
    assert digest(root, tmp_path / "hf") == digest_of(GPT2)


def test_without_rank_files_the_user_says_the_rest(
    golden: Golden, digest_of: Digest, tmp_path: Path
) -> None:
    root = copied(golden(GPT2), tmp_path / "root")
    for path in (root / TAG).glob("mp_rank_*"):
        path.unlink()
    said = {**SAID, "vocab_size": 497}
    assert digest(root, tmp_path / "hf", overrides=said) == digest_of(GPT2)


@pytest.mark.parametrize("name", [GPT2, SINCE_2023, UNIVERSAL])
@pytest.mark.parametrize("end", [0, -1])
def test_a_layer_missing_at_an_end_without_rank_files(
    name: str, end: int, golden: Golden, tmp_path: Path
) -> None:
    """Nothing else says how many layers there are, and so the rest would look whole."""
    root = copied(golden(name), tmp_path / "root")
    for path in root.rglob("mp_rank_*"):
        path.unlink()
    mtt_convert.open_checkpoint(root, overrides=SAID)
    if name == UNIVERSAL:
        number = sorted(int(p.name[0]) for p in (root / "zero").glob("*.mlp.*"))[end]
        for path in (root / "zero").glob(f"{number}.*"):
            shutil.rmtree(path)
    else:
        layers = sorted(p for (n, _), p in layer_files(root / TAG).items() if "mlp" in str(read(p)))
        layers[end].unlink()
    says = "the first or the last layer"
    refused(root, tmp_path / "out", IncompleteError, overrides=SAID, says=says)


def test_a_head_missing_without_rank_files(golden: Golden, tmp_path: Path) -> None:
    """Its file is gone, or there never was one: only the user knows."""
    root = copied(golden(LLAMA), tmp_path / "root")
    for path in [*root.rglob("layer_07*"), *root.rglob("mp_rank_*")]:
        path.unlink()
    said = {name: value for name, value in SAID.items() if not name.startswith(("untie", "bias"))}
    said |= {"swiglu": True, "position_embedding_type": "rope", "max_position_embeddings": 32}
    said |= {"rotary_base": 10000, "rotary_percent": 1.0, "use_rope_scaling": False}
    name = "untie_embeddings_and_output_weights"
    says = f"--set {name}=True"
    refused(root, tmp_path / "out", UsageError, overrides=said, says=says)
    untied = {**said, name: True}
    says = "output_layer.weight"
    refused(root, tmp_path / "out", IncompleteError, overrides=untied, says=says)


def test_ranks_in_each_others_place(golden: Golden, tmp_path: Path) -> None:
    root = copied(golden(NO_PIPELINE), tmp_path / "root")
    paths = [root / TAG / f"mp_rank_{rank:02d}_model_states.pt" for rank in (0, 1)]
    paths[0].rename(tmp_path / "first")
    paths[1].rename(paths[0])
    (tmp_path / "first").rename(paths[1])
    refused(root, tmp_path / "out", InconsistentError, says="holds the file of another rank")


@pytest.mark.parametrize("kept", ["latest", "latest_checkpointed_iteration.txt", None])
def test_either_tracker_leads_to_the_tag(kept: str | None, root: Path) -> None:
    for tracker in ("latest", "latest_checkpointed_iteration.txt"):
        if tracker != kept:
            (root / tracker).unlink()
    checkpoint = mtt_convert.open_checkpoint(root)
    assert checkpoint.folder == str(root / TAG)
    assert checkpoint.iteration == 100


def test_trackers_that_name_different_folders(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / TAG, root / "global_step200")
    (root / "latest").write_text("global_step200")
    refused(root, tmp_path / "out", UsageError, says="global_step100 in latest_checkpointed")
    assert mtt_convert.open_checkpoint(root, iteration=200).iteration == 200
    (root / "latest").write_text("global_step300")
    assert mtt_convert.open_checkpoint(root).iteration == 100


def test_iterations_are_chosen_as_megatrons_are(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / TAG, root / "global_step200")
    assert mtt_convert.open_checkpoint(root).iterations == (100, 200)
    assert mtt_convert.open_checkpoint(root, iteration=200).iteration == 200
    assert mtt_convert.open_checkpoint(root / "global_step200").iteration == 200
    refused(root, tmp_path / "out", IncompleteError, iteration=300, says="no iteration 300")


def test_a_tag_of_any_name(root: Path) -> None:
    (root / TAG).rename(root / "best")
    (root / "latest").write_text("best\n")
    checkpoint = mtt_convert.open_checkpoint(root)
    assert (checkpoint.folder, checkpoint.iteration) == (str(root / "best"), 100)


@pytest.mark.parametrize("text", ["", "..", "/etc", "../other", "a" * 300, "global_step300"])
def test_a_tracker_that_names_no_folder(text: str, root: Path, tmp_path: Path) -> None:
    (root / "latest_checkpointed_iteration.txt").unlink()
    (root / "latest").write_text(text)
    refused(root, tmp_path / "out", IncompleteError)


def test_a_tag_without_files(root: Path, tmp_path: Path) -> None:
    shutil.rmtree(root / TAG)
    (root / TAG).mkdir()
    refused(root, tmp_path / "out", NotACheckpointError)


@pytest.mark.parametrize(
    ("module", "rank", "says"),
    [
        (3, 1, "layer_03-model_01"),
        (1, 0, "layer_01-model_00"),
        (6, 1, "layer_06-model_01"),
        (4, None, "module 4"),
        (1, None, "embedding.word_embeddings.weight"),
        (2, None, "decoder.layers.3."),
        (5, None, "decoder.layers.3."),
        (6, None, "decoder.final_layernorm"),
    ],
)
def test_a_missing_file(
    module: int, rank: int | None, says: str, root: Path, tmp_path: Path
) -> None:
    for number in (0, 1) if rank is None else (rank,):
        (root / TAG / NAME.format(module, number)).unlink()
    refused(root, tmp_path / "out", IncompleteError, says=says)


def test_all_files_of_a_rank_missing(root: Path, tmp_path: Path) -> None:
    for path in (root / TAG).glob("layer_*-model_01-*"):
        path.unlink()
    refused(root, tmp_path / "out", IncompleteError, says="layer_01-model_01")


def test_files_of_another_run(root: Path, golden: Golden, tmp_path: Path) -> None:
    shutil.copy(root / TAG / NAME.format(3, 1), root / TAG / NAME.format(3, 2))
    refused(root, tmp_path / "out", IncompleteError, says="layer_01-model_02")
    (root / TAG / NAME.format(3, 2)).unlink()
    with edited(root / TAG / "mp_rank_01_model_states.pt") as states:
        states["iteration"] = 99
    refused(root, tmp_path / "out", InconsistentError, says="iteration")


@pytest.mark.parametrize("content", [b"", b"x" * 100, None])
def test_a_damaged_file(content: bytes | None, root: Path, tmp_path: Path) -> None:
    path = root / TAG / NAME.format(4, 0)
    if content is None:
        write([1, 2], path)
    else:
        path.write_bytes(content)
    refused(root, tmp_path / "out", CorruptError)


def test_files_in_each_other_s_place(root: Path, tmp_path: Path) -> None:
    for rank in (0, 1):
        shutil.copy(root / TAG / NAME.format(6, rank), root / TAG / NAME.format(3, rank))
    refused(root, tmp_path / "out", IncompleteError, says="a layer in module 3")
    for rank in (0, 1):
        shutil.copy(root / TAG / NAME.format(4, rank), root / TAG / NAME.format(3, rank))
    assert mtt_convert.open_checkpoint(root)  # as good a layer as any


def test_one_parameter_in_two_modules(root: Path, tmp_path: Path) -> None:
    for rank in (0, 1):
        with edited(root / TAG / NAME.format(6, rank)) as state:
            state["position_embeddings.weight"] = torch.zeros(32, 64)
    refused(root, tmp_path / "out", InconsistentError, says="position_embeddings")


# ---- copies


NORM = "input_layernorm.weight"


def _drifted(root: Path) -> tuple[torch.Tensor, torch.Tensor]:
    path = root / TAG / NAME.format(4, 1)
    with edited(path) as state:
        state[NORM] = state[NORM] + torch.linspace(0.0, 0.01, 64)
    return read(root / TAG / NAME.format(4, 0))[NORM], read(path)[NORM]


def _norm_of(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")["model.layers.1.input_layernorm.weight"]


def test_drifted_copies_are_averaged(golden: Golden, tmp_path: Path) -> None:
    root = copied(golden(BLOOM), tmp_path / "root")
    first, second = _drifted(root)
    result = mtt_convert.convert(root, tmp_path / "hf", tokenizer="none")
    assert any("1 parameter differs" in w and "mean" in w for w in result.conversion.warnings)
    mean = ((first.double() + second.double()) / 2).float()
    assert torch.equal(_norm_of(tmp_path / "hf"), mean)
    assert mtt_convert.verify(tmp_path / "hf").problems == ()
    assert mtt_convert.diff(root, tmp_path / "hf").differences == ()
    with pytest.raises(InconsistentError, match="copies of"):
        mtt_convert.diff(root, tmp_path / "hf", replicated="error")
    other = mtt_convert.diff(root, tmp_path / "hf", replicated="first")
    assert [item.kind for item in other.differences] == ["values"]
    assert "1 parameter differs" in other.notes[0]
    direct = mtt_convert.from_megatron(root, tokenizer="none")
    assert torch.equal(direct.model.layers[1].input_layernorm.weight, mean)


def test_the_first_copy_or_none(golden: Golden, tmp_path: Path) -> None:
    root = copied(golden(BLOOM), tmp_path / "root")
    first, _ = _drifted(root)
    refused(root, tmp_path / "out", InconsistentError, replicated="error", says="average")
    mtt_convert.convert(root, tmp_path / "hf", tokenizer="none", replicated="first")
    assert torch.equal(_norm_of(tmp_path / "hf"), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_means_of_half_precision_are_rounded_once(
    dtype: torch.dtype, golden: Golden, tmp_path: Path
) -> None:
    root = copied(golden(BLOOM), tmp_path / "root")
    for path in layer_files(root / TAG).values():
        with edited(path) as state:
            for name, value in state.items():
                state[name] = value.to(dtype)
    first, second = _drifted(root)
    second = second.to(dtype)
    with edited(root / TAG / NAME.format(4, 1)) as state:
        state[NORM] = second
    mtt_convert.convert(root, tmp_path / "hf", tokenizer="none")
    mean = ((first.double() + second.double()) / 2).to(dtype)
    assert torch.equal(_norm_of(tmp_path / "hf"), mean)


def test_equal_copies_are_not_computed_with(
    golden: Golden, digest_of: Digest, tmp_path: Path
) -> None:
    hashes = {
        digest(golden(BLOOM), tmp_path / policy, replicated=policy)
        for policy in ("error", "first", "average")
    }
    assert hashes == {digest_of(BLOOM)}


def test_megatrons_own_copies_must_be_equal(golden: Golden, tmp_path: Path) -> None:
    """The default is an error there: copies are exact in Megatron-LM."""
    root = copied(golden("legacy/v2.6-ckptver3-gpt2-tp2pp2"), tmp_path / "root")
    path = root / "iter_0000100/mp_rank_01_000/model_optim_rng.pt"
    with edited(path) as content:
        encoder = content["model"]["language_model"]["encoder"]
        encoder["layers.0.input_layernorm.weight"] += 1
    refused(root, tmp_path / "out", InconsistentError, says="--replicated first")
    mtt_convert.convert(root, tmp_path / "hf", tokenizer="none", replicated="average")


# ---- other spellings


@pytest.mark.parametrize("tp", [1, 2])
def test_separate_queries_and_keys(
    tp: int, golden: Golden, digest_of: Digest, tmp_path: Path
) -> None:
    """Before 2023-11: `query` [heads, hn] and `key_value` [groups, 2, hn], on each rank."""
    root = copied(golden(LLAMA), tmp_path / "root")
    for (module, rank), path in layer_files(root / TAG).items():
        if rank >= tp:
            path.unlink()
            continue
        state = whole_module(golden(LLAMA) / TAG, module) if tp == 1 else read(path)
        if 2 <= module <= 5:
            rows = state.pop("self_attention.query_key_value.weight").view(2 // tp, 4, 16, 64)
            state["self_attention.query.weight"] = rows[:, :2].reshape(-1, 64)
            state["self_attention.key_value.weight"] = rows[:, 2:].reshape(-1, 64)
        write(state, path)
    if tp == 1:
        (root / TAG / STATES.format(1)).unlink()
        with edited(root / TAG / STATES.format(0)) as states:
            states["mp_world_size"] = states["args"].tensor_model_parallel_size = 1
    assert digest(root, tmp_path / "hf") == digest_of(LLAMA)
    checkpoint = mtt_convert.open_checkpoint(root)
    assert "before 2023-11" in checkpoint.generation
    assert any("by paired" in line for line in checkpoint.evidence)


@pytest.mark.parametrize("marked", [True, False])
def test_universal_with_a_gate(
    marked: bool, golden: Golden, digest_of: Digest, tmp_path: Path
) -> None:
    """Halves merged on their own, or ranks one after another where older code knew no halves."""
    tag = golden(LLAMA) / TAG
    root = tmp_path / "root"
    zero = root / f"{TAG}_universal" / "zero"
    for (module, rank), path in layer_files(tag).items():
        if rank:
            continue
        states = [read(path), read(tag / NAME.format(module, 1))]
        for name in states[0]:
            parts = [state[name] for state in states]
            content: dict[str, Any] = {}
            if any(word in name for word in ("norm", "bias")) or name == "weight":
                content["param"] = parts[0]
            elif "dense." in name or "4h_to_h" in name:
                content |= {"param": torch.cat(parts, 1), "cat_dim": 1}
            elif "h_to_4h" in name and marked:
                halves = [part.chunk(2) for part in parts]
                merged = torch.cat([half[k] for k in (0, 1) for half in halves])
                content |= {"param": merged, "param_n_sub_params": 2}
            else:
                content |= {"param": torch.cat(parts), "cat_dim": 0}
            if "word_embeddings" in name or "lm_head" in name:
                content |= {"param": content["param"][:497], "vocab_tensor": True}
            write(content, zero / f"{module}.{name}" / "fp32.pt")
    shutil.copy(tag / "mp_rank_00_model_states.pt", zero.parent)
    (root / "latest_universal").write_text(zero.parent.name)
    assert digest(root, tmp_path / "hf") == digest_of(LLAMA)
    (zero.parent / "mp_rank_00_model_states.pt").unlink()
    error = UsageError if marked else IncompleteError
    says = "shapes do not say" if marked else "how many ranks hold gate and up in turn"
    refused(root, tmp_path / "out", error, says=says)


def test_a_parameter_without_weights(golden: Golden, tmp_path: Path) -> None:
    root = copied(golden(UNIVERSAL), tmp_path / "root")
    (root / "zero/3.mlp.dense_4h_to_h.weight/fp32.pt").unlink()
    refused(root, tmp_path / "out", IncompleteError, says="3.mlp.dense_4h_to_h.weight")
    shutil.rmtree(root / "zero/3.mlp.dense_4h_to_h.weight")
    refused(root, tmp_path / "out", IncompleteError, says="decoder.layers.1.mlp.linear_fc2.weight")


def test_experts_are_refused(root: Path, tmp_path: Path) -> None:
    (root / TAG / "layer_3_expert_0_mp_rank_00_model_states.pt").write_bytes(b"")
    refused(root, tmp_path / "out", UnsupportedError, says="mixture of experts")


def test_zero_3_is_refused_by_name(root: Path, tmp_path: Path) -> None:
    tag = root / TAG
    for path in [*tag.glob("layer_*"), *tag.glob("mp_rank_*")]:
        path.unlink()
    write({"module": {}}, tag / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    refused(root, tmp_path / "out", UnsupportedError, says="ds_to_universal")


def test_a_model_without_pipeline_needs_all_ranks(golden: Golden, tmp_path: Path) -> None:
    name = NO_PIPELINE
    root = copied(golden(name), tmp_path / "root")
    path = root / TAG / "mp_rank_01_model_states.pt"
    path.unlink()
    refused(root, tmp_path / "out", IncompleteError, says="mp_rank_01_model_states.pt")
    for rank in (0, 1, 2):
        write(
            read(golden(name) / TAG / "mp_rank_00_model_states.pt"),
            path.with_name(f"mp_rank_{rank:02d}_model_states.pt"),
        )
    refused(root, tmp_path / "out", InconsistentError, says="mp_rank_02_model_states.pt")


def test_rank_files_alone_hold_no_model(root: Path, tmp_path: Path) -> None:
    for path in (root / TAG).glob("layer_*"):
        path.unlink()
    refused(root, tmp_path / "out", IncompleteError, says="layer_*-model_states.pt")


# ---- all of them


@pytest.mark.parametrize("case", OTHER_FORMATS, ids=str)
def test_opening_reads_no_weight(
    case: Case, golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(FileReader, "read_into", refuse)
    checkpoint = mtt_convert.open_checkpoint(golden(case.path), **case.options)
    mtt_convert.plan_conversion(checkpoint, tokenizer="none")


INSPECTED = {
    "legacy/v1.0-ckptver0-gpt2-tp2pp1": (
        "Megatron-LM v1.0 to v2.0 (2020)",
        "no checkpoint_version: rows of query_key_value by block",
    ),
    "legacy/git-d763f54a21-ckptver1-gpt2-tp2pp1": ("checkpoint_version 1.0", "by element"),
    "legacy/v2.6-ckptver3-gpt2-tp2pp2": (
        "Megatron-LM v2.1 to 23.08 (2021 to 2023)",
        "checkpoint_version 3.0: rows of query_key_value by head",
    ),
    "legacy/core_v0.12.0-gpt2-tp1pp2": ("Megatron-LM from 2023-09 (core_v0.4) to core_v0.16",),
    GPT2: (
        "deepspeed_layers",
        "6 layer_*-model_states.pt files",
        "layers in modules 3 to 6 (Megatron-DeepSpeed to 2023-07, or BigScience)",
    ),
    GPT2_TP2: ("layers in modules 2 to 5 (Megatron-DeepSpeed since 2023-07)", "TP2 x PP2"),
    BLOOM: ("BigScience's Megatron-DeepSpeed", "names like word_embeddings.norm.bias", "alibi"),
    "legacy/megatron-deepspeed-6acc370a-NOPIPE-gpt2-tp2pp1": (
        "deepspeed_module",
        "2 mp_rank_*_model_states.pt files with a module, nested names",
    ),
    "legacy/megatron-deepspeed-6acc370a-ZERO1bf16-gpt2-tp1pp1dp2": ("optimizer (1)",),
    "legacy/megatron-deepspeed-main4efb479d-CATQKV-gpt2-tp1pp1": (
        "argument ds_sequence_parallel_fpdt: rows of query_key_value by block",
    ),
    UNIVERSAL: ("deepspeed_universal", "52 folders with fp32.pt in zero", "497 rows, 497"),
    "legacy/gpt-neox-DERIVED-tp1": ("gpt_neox", "GPT-NeoX (2021 to 2024)", "rope, 2048"),
}


@pytest.mark.parametrize("name", INSPECTED)
def test_inspect_says_what_it_is_and_why(name: str, golden: Golden) -> None:
    code, out, _ = run("inspect", golden(name))
    assert code == 0
    for words in INSPECTED[name]:
        assert words in out


@pytest.mark.parametrize(
    ("name", "to", "layout"),
    [
        (GPT2_TP2, "torch", {"tp": 2, "pp": 4}),
        (LLAMA, "torch_dist", {"tp": 2}),
        ("legacy/v1.0-ckptver0-gpt2-tp2pp1", "torch", {"tp": 4}),
        ("legacy/git-d763f54a21-ckptver1-gpt2-tp2pp1", "torch_dist", {"pp": 2}),
    ],
)
def test_written_back_as_megatron_core(
    name: str, to: str, layout: dict[str, int], golden: Golden, digest_of: Digest, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"overrides": {"vocab_size": 497}, "tokenizer": "none"}
    mtt_convert.convert(golden(name), tmp_path / "megatron", to=to, **layout, **options)
    assert digest(tmp_path / "megatron", tmp_path / "hf", overrides={}) == digest_of(name)


@pytest.mark.parametrize("name", [BLOOM, "legacy/gpt-neox-DERIVED-tp1"])
def test_what_megatron_core_does_not_compute(name: str, golden: Golden, tmp_path: Path) -> None:
    with pytest.raises(MTTError) as caught:
        mtt_convert.convert(golden(name), tmp_path / "megatron", to="torch", tokenizer="none")
    words = "position_embedding_type = alibi" if name == BLOOM else "parallel_residual = True"
    assert words in str(caught.value)
