"""Hugging Face folders as a source: what older versions left there, and what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mtt_convert import convert, diff, open_checkpoint
from mtt_convert.cli import main
from mtt_convert.errors import (
    CorruptError,
    IncompleteError,
    InconsistentError,
    MappingError,
    MTTError,
    UnsupportedError,
    UsageError,
)
from mtt_convert.families import FAMILIES
from tests.convert.families.natives import case, model_class

SAMPLE = Path(__file__).parents[2] / "convert" / "sample"
WEIGHTS = "model.safetensors"
LLAMA = case("llama", num_key_value_heads=2)
TIED = case("llama", num_key_value_heads=2, tie_word_embeddings=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    LLAMA.save(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    TIED.save(tmp_path / "tied")
    return tmp_path / "tied"


@contextmanager
def weights(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """A folder's tensors, written again with what was done to them."""
    tensors = load_file(folder / WEIGHTS)
    yield tensors
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def set_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    for name, value in fields.items():
        config.pop(name, None)
        if value is not ...:
            config[name] = value
    (folder / "config.json").write_text(json.dumps(config))


def refused(folder: Path, kind: type[MTTError], **options: Any) -> MTTError:
    with pytest.raises(kind) as caught:
        open_checkpoint(folder, **options)
    assert type(caught.value) is kind
    assert caught.value.found
    return caught.value


# ---- what is opened


def test_what_a_checkpoint_says(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.format, checkpoint.dialect, checkpoint.folder) == (
        "hf",
        "llama",
        str(folder),
    )
    assert (checkpoint.layout.tp, checkpoint.layout.pp, checkpoint.iteration) == (1, 1, None)
    assert (checkpoint.replicas, checkpoint.dropped, checkpoint.warnings) == ((), {}, ())
    assert checkpoint.architecture.padded_vocab_size == checkpoint.architecture.vocab_size == 97
    assert checkpoint.architecture.params_dtype == "float32"
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.args == {}
    qkv = checkpoint.tensors["decoder.layers.3.self_attention.linear_qkv.weight"]
    assert qkv.shape == (64, 32)
    assert checkpoint.num_files == 1


def test_a_folder_saved_without_its_head(tmp_path: Path) -> None:
    """`GPT2Model.save_pretrained`: names have no prefix, and the tied head is not missed."""
    native = case("gpt2").model()
    native.transformer.save_pretrained(tmp_path / "base")
    native.save_pretrained(tmp_path / "whole")
    assert "wte.weight" in load_file(tmp_path / "base" / WEIGHTS)
    assert diff(tmp_path / "base", tmp_path / "whole").differences == ()


def test_a_head_beside_names_without_prefix(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "whole")
    with weights(folder) as tensors:
        for name in [name for name in tensors if name.startswith("model.")]:
            tensors[name.removeprefix("model.")] = tensors.pop(name)
    assert diff(folder, tmp_path / "whole").differences == ()


def test_an_untied_head_that_was_not_saved(folder: Path, tmp_path: Path) -> None:
    LLAMA.model().model.save_pretrained(tmp_path / "base")
    error = refused(tmp_path / "base", IncompleteError)
    assert error.expected == "lm_head.weight"


@pytest.mark.parametrize(
    ("one", "buffers"),
    [
        (case("gpt2"), ["transformer.h.0.attn.bias", "transformer.h.2.attn.masked_bias"]),
        (
            case("gpt_neox"),
            [
                "gpt_neox.layers.0.attention.bias",
                "gpt_neox.layers.1.attention.masked_bias",
                "gpt_neox.layers.1.attention.rotary_emb.inv_freq",
            ],
        ),
        (LLAMA, ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
    ],
    ids=["gpt2", "gpt_neox", "llama"],
)
def test_buffers_are_left_out(one: Any, buffers: list[str], tmp_path: Path) -> None:
    one.save(tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "old")
    with weights(tmp_path / "old") as tensors:
        tensors |= {name: torch.ones(1, 1, 64, 64, dtype=torch.uint8) for name in buffers}
    assert open_checkpoint(tmp_path / "old").dropped == {"buffers": tuple(sorted(buffers))}
    result = diff(tmp_path / "plain", tmp_path / "old")
    assert result.differences == ()
    assert result.notes == (f"{tmp_path / 'old'}: not compared: buffers",)


def test_a_stored_copy_of_a_tied_head(tied: Path, tmp_path: Path) -> None:
    with weights(tied) as tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    checkpoint = open_checkpoint(tied)
    assert checkpoint.dropped == {"tied copy": ("output_layer.weight",)}
    convert(tied, tmp_path / "out", tokenizer="none", model_type="llama")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / WEIGHTS)


def test_a_head_that_is_no_copy(tied: Path, tmp_path: Path) -> None:
    with weights(tied) as tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    with pytest.raises(InconsistentError, match="no copy of the embedding") as caught:
        convert(tied, tmp_path / "out", tokenizer="none")
    assert "lm_head.weight in model.safetensors" in str(caught.value.found)
    assert not (tmp_path / "out").exists()


def test_a_sharded_snapshot_of_the_hub_cache(tmp_path: Path) -> None:
    """Files that are links to blobs, as `huggingface_hub` keeps them."""
    native = LLAMA.save(tmp_path / "real", max_shard_size="20KB")
    blobs, snapshot = (
        tmp_path / "models--x--y" / "blobs",
        tmp_path / "models--x--y" / "snapshots" / "a1",
    )
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted((tmp_path / "real").iterdir())):
        shutil.move(path, blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / f"{number:040x}", snapshot))
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.num_files > 5
    convert(snapshot, tmp_path / "out", tokenizer="none", model_type="llama")
    saved = load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(saved[name], t) for name, t in native.state_dict().items())


def test_tokenizer_and_generation_config_are_carried_over(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        for root, _, names in os.walk(SAMPLE):
            if name in names:
                shutil.copy(os.path.join(root, name), folder / name)
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [2, 5]}\n')
    set_config(folder, eos_token_id=[2, 5], vocab_size=600)
    with weights(folder) as tensors:
        for table in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[table] = torch.zeros(600, 32)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.args["tokenizer_type"] == "HuggingFaceTokenizer"
    result = convert(folder, tmp_path / "out")
    assert result.conversion.warnings == ()
    assert "vocab.json" in os.listdir(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["eos_token_id"], written["vocab_size"]) == ([2, 5], 600)
    copied = (tmp_path / "out" / "generation_config.json").read_bytes()
    assert copied == (folder / "generation_config.json").read_bytes()


def test_a_tokenizer_with_more_tokens_than_rows(folder: Path, tmp_path: Path) -> None:
    """A token that was added and never trained."""
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(next(SAMPLE.rglob(f"*{name}")), folder / name)
    result = convert(folder, tmp_path / "out", model_type="auto")
    assert result.conversion.model_type == "llama"
    assert result.conversion.warnings == ("the tokenizer has 505 tokens, the tables 97 rows",)


def test_a_skipped_tensor(folder: Path) -> None:
    with weights(folder) as tensors:
        tensors["reward.weight"] = torch.ones(3)
    error = refused(folder, MappingError)
    assert error.found == "reward.weight" and "--skip-key" in str(error.fix)
    assert open_checkpoint(folder, skip_keys=["reward.weight"]).dropped == {
        "skipped": ("reward.weight",)
    }
    refused(folder, IncompleteError, skip_keys=["reward.weight", "model.norm.weight"])


# ---- what is wrong


def test_a_missing_tensor(folder: Path) -> None:
    with weights(folder) as tensors:
        del tensors["model.layers.2.self_attn.k_proj.weight"]
    error = refused(folder, IncompleteError)
    assert error.expected == "model.layers.2.self_attn.k_proj.weight"


def test_a_missing_shard(tmp_path: Path) -> None:
    LLAMA.save(tmp_path / "x", max_shard_size="20KB")
    next((tmp_path / "x").glob("model-00003*")).unlink()
    with pytest.raises(IncompleteError):
        open_checkpoint(tmp_path / "x")


def test_more_layers_than_tensors(folder: Path) -> None:
    set_config(folder, num_hidden_layers=10**9)
    refused(folder, IncompleteError)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens.weight", (96, 32)),
        ("model.layers.0.self_attn.q_proj.weight", (33, 32)),
        ("model.layers.1.self_attn.k_proj.weight", (16, 31)),
        ("model.layers.1.mlp.gate_proj.weight", (47, 32)),
        ("model.layers.1.mlp.down_proj.weight", (48, 32)),
        ("model.norm.weight", (1, 32)),
        ("lm_head.weight", ()),
    ],
)
def test_another_shape(name: str, shape: tuple[int, ...], folder: Path) -> None:
    with weights(folder) as tensors:
        tensors[name] = torch.zeros(shape)
    error = refused(folder, CorruptError)
    assert error.message == f"{name} has another shape than config.json says"
    assert error.found == str(list(shape))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.layers.0.self_attn.k_proj.weight", torch.bfloat16),
        ("model.layers.0.mlp.up_proj.weight", torch.float16),
        ("model.layers.0.mlp.down_proj.weight", torch.int8),
        ("model.layers.0.mlp.down_proj.weight", torch.float8_e4m3fn),
    ],
)
def test_types_that_cannot_be(name: str, dtype: torch.dtype, folder: Path) -> None:
    with weights(folder) as tensors:
        tensors[name] = tensors[name].to(dtype)
    error = refused(folder, UnsupportedError)
    assert name in str(error.found)
    assert error.fix in (
        "give the folder this one was quantised from",
        "save the model in one type",
    )


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000, "\x00"])
def test_a_damaged_configuration(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CorruptError, match=r"config\.json is damaged") as caught:
        open_checkpoint(folder)
    assert caught.value.found is not None
    assert (caught.value.expected, caught.value.fix) == ("a JSON object", "copy it again")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": [1]}', "[" * 100_000])
def test_a_damaged_index(text: str, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CorruptError, match=r"index\.json is damaged") as caught:
        open_checkpoint(folder)
    assert caught.value.found is not None
    assert caught.value.expected == "a JSON object with a weight_map"
    assert caught.value.fix == "copy it again"


def test_a_file_that_the_index_names_is_missing(folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(IncompleteError, match="is incomplete") as caught:
        open_checkpoint(folder)
    assert caught.value.found == (
        "model.safetensors.index.json, which names model-00001-of-00001.safetensors"
    )
    assert caught.value.expected == "model-00001-of-00001.safetensors"
    assert caught.value.fix == "copy that file again"


def test_a_tensor_that_the_index_names_is_missing(folder: Path) -> None:
    weight_map = dict.fromkeys(("model.norm.weight", "model.bias"), "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(IncompleteError, match="is incomplete") as caught:
        open_checkpoint(folder)
    assert caught.value.found == (
        "files without 1 of the tensors that model.safetensors.index.json names"
    )
    assert (caught.value.expected, caught.value.fix) == ("model.bias", "copy or convert it again")


@pytest.mark.parametrize("name", ["opt", ..., None, 3, ["llama"]])
def test_a_model_mtt_does_not_know(name: object, folder: Path) -> None:
    set_config(folder, model_type=name)
    error = refused(folder, UnsupportedError)
    assert error.expected == ", ".join(sorted(FAMILIES))


def test_another_head(folder: Path) -> None:
    set_config(folder, architectures=["LlamaForSequenceClassification"])
    assert "LlamaForSequenceClassification" in str(refused(folder, UnsupportedError).found)


def test_quantised_weights(folder: Path) -> None:
    set_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "gptq" in str(refused(folder, UnsupportedError).found)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "consolidated.safetensors"])
def test_weights_in_other_files(name: str, folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(b"")
    error = refused(folder, UnsupportedError)
    assert error.found == name and "save_pretrained" in str(error.fix)


def test_no_weights_at_all(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(MTTError, match="no Megatron checkpoint"):
        open_checkpoint(folder)


@pytest.mark.parametrize("options", [{"iteration": 3}, {"overrides": {"num_layers": 3}}])
def test_options_for_megatron(options: dict, folder: Path) -> None:
    refused(folder, UsageError, **options)


def test_what_may_be_wrong_is_warned_about(folder: Path) -> None:
    set_config(folder, auto_map={"AutoModel": "x.Y"}, attn_logit_cap=30.0)
    first, second = open_checkpoint(folder).warnings
    assert "attn_logit_cap" in first and "auto_map" in second


# ---- the command line


def run_json(capsys: pytest.CaptureFixture, *words: object) -> tuple[int, dict]:
    code = main([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_convert_asks_for_the_target(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    code, body = run_json(capsys, "convert", folder, tmp_path / "out")
    assert (code, body["code"]) == (2, "usage")
    assert "--to hf" in body["fix"]
    code, body = run_json(capsys, "convert", folder, tmp_path / "out", "--to", "hf")
    assert (code, body["model_type"], body["exact_model_types"]) == (0, "mtt", ["llama", "mistral"])
    code, body = run_json(capsys, "diff", folder, tmp_path / "out")
    assert (code, body["status"]) == (0, "equal")


def test_inspect(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "evidence     config.json with model_type llama" in text
    assert "exactly a    llama, mistral" in text
    assert "iteration" not in text and "layout" not in text


def test_generate_with_a_native_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    case("gpt2", vocab_size=505).save(tmp_path / "gpt2")
    tokenizer = convert(SAMPLE, tmp_path / "sample").output
    words = ["--prompt", "Once", "--tokenizer", tokenizer, "--max-new-tokens", "200"]
    assert main(["generate", str(tmp_path / "gpt2"), *words]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("Once") and "positions for" in output.err


@pytest.mark.parametrize(
    ("model", "exact"),
    [
        ("mcore/llama/tp2pp2vpp2/torch", ["llama", "mistral"]),
        ("mcore/gpt/tp2pp2/torch", ["gpt2"]),
        ("mcore/qwen/tp2pp2/torch", None),
        ("mcore/nemotron/tp2pp1/torch", ["nemotron"]),
    ],
)
def test_the_summary_says_what_is_exact(
    model: str, exact: list | None, golden: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = golden(model)
    found = run_json(capsys, "convert", source, tmp_path / "a")[1]["exact_model_types"]
    assert found == exact or (exact is None and set(found) <= {"qwen2", "qwen3"})
    assert main(["convert", str(source), str(tmp_path / "b")]) == 0
    text = capsys.readouterr().out
    assert (f"also exactly a {found[0]}: add --model-type {found[0]} " in text) if found else True
    code, body = run_json(capsys, "convert", source, tmp_path / "c", "--model-type", "auto")
    able = [name for name in found if FAMILIES[name].has_tp_plan]
    assert (code, body["model_type"]) == (0, able[0] if able else "mtt")


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "mistral2"])
def test_a_class_that_computes_something_else(
    name: str, golden: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = golden("mcore/llama/tp2pp2vpp2/torch")
    code, body = run_json(capsys, "convert", source, tmp_path / "out", "--model-type", name)
    assert (code, body["code"]) == (2, "usage")
    if name == "qwen3":
        assert body["message"] == "this model is not exactly a qwen3; nothing was written"
        assert body["found"] == "qk_layernorm = False"
        assert body["fix"].startswith("--model-type llama")
    assert not (tmp_path / "out").exists()


def test_a_megatron_llama_needs_no_code_of_ours(golden: Callable, tmp_path: Path) -> None:
    """Loaded and run where neither modeling_mtt nor mtt_convert can be imported."""
    convert(golden("mcore/llama/tp2pp2vpp2/torch"), tmp_path / "out", model_type="llama")
    assert not list((tmp_path / "out").glob("*.py"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in config and config["architectures"] == ["LlamaForCausalLM"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'from_pretrained(path, device_map="auto")\n' in card
    assert "trust_remote_code" not in card and "modeling-mtt" not in card and "- mtt" not in card
    reference = golden("mcore/llama/logits.npz")
    code = f"""
        import sys

        class Blocker:
            def find_spec(self, name, *rest):
                if name.split(".")[0] in ("modeling_mtt", "mtt_convert"):
                    raise ImportError(name)

        sys.meta_path.insert(0, Blocker())
        import numpy as np, torch
        from transformers import AutoModelForCausalLM, LlamaForCausalLM

        model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r}, dtype="float32")
        assert type(model) is LlamaForCausalLM
        reference = np.load({str(reference)!r})
        with torch.no_grad():
            logits = model(torch.from_numpy(reference["input_ids"]).long()).logits.numpy()
        np.save({str(tmp_path / "logits.npy")!r}, logits)
        assert not any(name.startswith(("modeling_mtt", "mtt_convert")) for name in sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=tmp_path)
    logits = np.load(tmp_path / "logits.npy")
    arrays = np.load(reference)
    wanted = arrays["logits_fp32" if "logits_fp32" in arrays else "logits"]
    size = min(logits.shape[-1], wanted.shape[-1])
    assert np.abs(logits[..., :size] - wanted[..., :size]).max() < 1e-4


def test_megatron_and_a_native_folder_have_the_same_bits(golden: Callable, tmp_path: Path) -> None:
    """Under the class's names, padding left out."""
    source = golden("mcore/gpt/tp2pp2/torch")
    convert(source, tmp_path / "out", model_type="gpt2", tokenizer="none")
    result = diff(source, tmp_path / "out")
    assert result.differences == () and result.num_equal
    assert model_class("gpt2").from_pretrained(tmp_path / "out").num_parameters()
    other = diff(golden("mcore/llama/tp2pp2vpp2/torch"), tmp_path / "out")
    assert any(d.name.startswith("decoder.") for d in other.differences)


def test_folders_of_other_models_are_still_compared(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "bert"}')
        save_file({"x": torch.ones(3), "y": torch.zeros(2)}, tmp_path / name / WEIGHTS)
    assert diff(tmp_path / "a", tmp_path / "b").num_equal == 2
    with pytest.raises(UnsupportedError, match="cannot read this kind of model"):
        diff(tmp_path / "a", SAMPLE)
