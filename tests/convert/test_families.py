"""Native classes of transformers: the same function under MTT, the same files after Megatron."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

import modeling_mtt
import mtt_convert
from mtt_convert import IncompleteError, MappingError, UnsupportedError, UsageError
from mtt_convert.cli import main
from mtt_convert.families import FAMILIES
from tests.convert.surgery import Golden

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
GROUPS = {"num_key_value_heads": 2}
GPT2 = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_inner": 48,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NEOX = {**SIZES, "use_parallel_residual": False}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**SIZES, **GROUPS}),
    "llama-tied": ("llama", {**SIZES, "tie_word_embeddings": True}),
    "llama-biases": ("llama", {**SIZES, **GROUPS, "attention_bias": True, "mlp_bias": True}),
    "llama-head-size": ("llama", {**SIZES, **GROUPS, "head_dim": 12}),
    "llama-3": ("llama", {**SIZES, **GROUPS, "rope_parameters": LLAMA3}),
    "llama-linear": ("llama", {**SIZES, "rope_parameters": LINEAR}),
    "llama-gelu": ("llama", {**SIZES, "hidden_act": "gelu"}),
    "mistral": ("mistral", {**SIZES, **GROUPS, "sliding_window": None}),
    "mistral-window": ("mistral", {**SIZES, **GROUPS, "sliding_window": 5}),
    "qwen2": ("qwen2", {**SIZES, **GROUPS}),
    "qwen2-tied": ("qwen2", {**SIZES, **GROUPS, "tie_word_embeddings": True}),
    "qwen2-window": (
        "qwen2",
        {
            **SIZES,
            **GROUPS,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 2,
        },
    ),
    "qwen3": ("qwen3", {**SIZES, **GROUPS, "head_dim": 12}),
    "gpt2": ("gpt2", GPT2),
    "gpt2-gelu": ("gpt2", {**GPT2, "activation_function": "gelu"}),
    "gpt2-untied": ("gpt2", {**GPT2, "tie_word_embeddings": False}),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox-tanh": ("gpt_neox", {**NEOX, "hidden_act": "gelu_new"}),
    "gpt_neox-parallel": ("gpt_neox", {**NEOX, "use_parallel_residual": True}),
    "nemotron": ("nemotron", {**SIZES, **GROUPS}),
    "nemotron-whole": ("nemotron", {**SIZES, **GROUPS, "partial_rotary_factor": 1.0}),
}
# What Megatron-Core's GPT does not compute, or no argument of its says.
NOT_MEGATRON = {"llama-gelu": "gated_linear_unit", "gpt_neox-parallel": "parallel_residual"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models, saved by transformers."""
    root = tmp_path_factory.mktemp("families")
    for name, (model_type, options) in MODELS.items():
        torch.manual_seed(len(name))
        config = AutoConfig.for_model(model_type, **options)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
                else:
                    parameter.normal_(std=0.25)
        model.save_pretrained(root / name)
        model.save_pretrained(root / "sharded" / name, max_shard_size="20KB")
    return root


def logits(folder: Path, length: int = 20) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    input_ids = torch.arange(length).unsqueeze(0) * 5 % 97
    with torch.no_grad():
        return model(input_ids).logits


@pytest.mark.parametrize("name", MODELS)
def test_mtt_computes_the_same(folders: Path, tmp_path: Path, name: str):
    mtt_convert.convert(folders / name, tmp_path / "mtt", tokenizer="none")
    expected, found = logits(folders / name), logits(tmp_path / "mtt")
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in NOT_MEGATRON])
@pytest.mark.parametrize("to", ["torch", "torch_dist"])
def test_megatron_and_back_gives_the_same_file(folders: Path, tmp_path: Path, name: str, to: str):
    """TP2 PP2 in between; the file is the one transformers wrote, to the byte."""
    model_type, _ = MODELS[name]
    mtt_convert.convert(folders / name, tmp_path / "megatron", to=to, tp=2, pp=2)
    mtt_convert.convert(tmp_path / "megatron", tmp_path / "back", model_type=model_type)
    ours, theirs = tmp_path / "back", folders / name
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    # GELU by tanh has two names, whose code differs by a rounding.
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    before, after = (AutoConfig.from_pretrained(folder) for folder in (theirs, ours))
    assert (after.eos_token_id, after.bos_token_id) == (2, 1)
    assert type(after) is type(before)


@pytest.mark.parametrize("name", MODELS)
def test_mtt_and_back_gives_the_same_file(folders: Path, tmp_path: Path, name: str):
    model_type, _ = MODELS[name]
    mtt_convert.convert(folders / name, tmp_path / "mtt")
    mtt_convert.convert(tmp_path / "mtt", tmp_path / "back", model_type=model_type)
    expected = (folders / name / "model.safetensors").read_bytes()
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == expected


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "nemotron"])
def test_shards_are_those_of_save_pretrained(folders: Path, tmp_path: Path, name: str):
    mtt_convert.convert(
        folders / name, tmp_path / "ours", model_type=MODELS[name][0], max_shard_size="20KB"
    )
    ours, theirs = (
        {path.name: path.read_bytes() for path in folder.glob("model*.safetensors*")}
        for folder in (tmp_path / "ours", folders / "sharded" / name)
    )
    assert len(ours) > 3
    index = "model.safetensors.index.json"
    assert json.loads(ours.pop(index)) == json.loads(theirs.pop(index))
    assert ours == theirs


@pytest.mark.parametrize("name", NOT_MEGATRON)
def test_what_megatron_does_not_compute_is_refused(folders: Path, tmp_path: Path, name: str):
    with pytest.raises(UnsupportedError) as caught:
        mtt_convert.convert(folders / name, tmp_path / "out", to="torch")
    assert NOT_MEGATRON[name] in str(caught.value.found)
    assert not (tmp_path / "out").exists()


# Choosing a class


def test_a_native_folder_needs_no_mtt_code(golden: Golden, tmp_path: Path):
    """Megatron's own logits, from a process that could not import mtt if it wanted to."""
    out = tmp_path / "out"
    mtt_convert.convert(golden("mcore/llama/tp2pp2vpp2/torch"), out, model_type="llama")
    assert not list(out.glob("*.py"))
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    script = """
import sys
import numpy, torch
sys.modules["modeling_mtt"] = sys.modules["mtt_convert"] = None
from transformers import AutoModelForCausalLM
reference = numpy.load(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
assert type(model).__name__ == "LlamaForCausalLM"
with torch.no_grad():
    logits = model(torch.from_numpy(reference["input_ids"])).logits.numpy()
print(abs(logits - reference["logits"][..., : logits.shape[-1]]).max())
"""
    reference = golden("mcore/llama/logits.npz")
    command = [sys.executable, "-c", script, str(out), str(reference)]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 1e-4


@pytest.mark.parametrize(
    ("checkpoint", "family"),
    [
        ("mcore/llama/tp2pp2vpp2/torch", "llama"),
        ("mcore/nemotron/tp2pp1/torch", "nemotron"),
        ("mcore/gpt/tp2pp2/torch", "mtt"),
        ("mcore/qwen/tp2pp2/torch", "mtt"),
    ],
)
def test_auto_takes_a_native_class_where_it_is_exact_and_able(golden: Golden, checkpoint, family):
    """GPT-2's class is exact for the gpt, but has no tensor-parallel plan."""
    opened = mtt_convert.open_checkpoint(golden(checkpoint))
    assert mtt_convert.plan_conversion(opened, model_type="auto").model_type == family


def test_the_summary_says_when_a_native_class_is_exact(golden: Golden, tmp_path: Path, capsys):
    source = str(golden("mcore/llama/tp2pp2vpp2/torch"))
    assert main(["convert", source, str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert (
        "also exactly a llama: add --model-type llama for a folder that needs no mtt code" in text
    )


@pytest.mark.parametrize(
    ("checkpoint", "family", "feature"),
    [
        ("mcore/qwen/tp2pp2/torch", "llama", "qk_layernorm = True"),
        ("mcore/qwen/tp2pp2/torch", "qwen3", "add_qkv_bias = True"),
        ("mcore/gpt/tp2pp2/torch", "llama", "normalization = LayerNorm"),
        ("mcore/nemotron/tp2pp1/torch", "gpt2", "position_embedding_type = rope"),
        ("mcore/llama/tp2pp2vpp2/torch", "gpt_neox", "gated_linear_unit = True"),
    ],
)
def test_what_prevents_a_class_is_named(
    golden: Golden, tmp_path: Path, checkpoint, family, feature
):
    with pytest.raises(UsageError) as caught:
        mtt_convert.convert(golden(checkpoint), tmp_path / "out", model_type=family)
    assert feature in str(caught.value.found)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mtt"])
def test_what_families_say_about_their_classes_is_so(name: str):
    family = FAMILIES[name]
    model = getattr(transformers, family.causal_lm)
    config = model.config_class
    plan = getattr(config, "base_model_tp_plan", None)
    assert family.has_tp_plan == bool(plan)
    assert family.has_attention_backends == bool(model._supports_attention_backend)
    assert getattr(transformers, family.base_model)
    for field, value in family.defaults.items():
        assert getattr(config, field) == value, field


def test_the_map_of_mtt_is_that_of_its_code():
    assert FAMILIES["mtt"].auto_map == modeling_mtt.AUTO_MAP


# Refused, by name


def changed(folder: Path, target: Path, **fields: Any) -> Path:
    """A copy of a folder with other fields in its config.json."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text())
    config.update(fields)
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ("llama", {"rope_parameters": {**LLAMA3, "low_freq_factor": 2.0}}, "low_freq_factor"),
        ("llama", {"hidden_act": "relu"}, "hidden_act"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ("llama", {"model_type": "mamba"}, "mamba"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("gpt_neox", {"attention_bias": False}, "attention_bias"),
        ("mistral", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ("qwen2-window", {"layer_types": ["chunked_attention"] * 4}, "layer_types"),
    ],
)
def test_what_mtt_cannot_represent_is_refused(folders: Path, tmp_path: Path, name, fields, words):
    source = changed(folders / name, tmp_path / "source", **fields)
    with pytest.raises(UnsupportedError) as caught:
        mtt_convert.convert(source, tmp_path / "out")
    assert words in f"{caught.value.found} {caught.value.expected}"
    assert not (tmp_path / "out").exists()


def test_an_unknown_field_is_a_warning(folders: Path, tmp_path: Path):
    source = changed(folders / "llama", tmp_path / "source", attention_sinks=4)
    checkpoint = mtt_convert.open_checkpoint(source)
    assert any("attention_sinks" in warning for warning in checkpoint.warnings)


def test_the_options_of_an_mtt_model_that_megatron_lacks(tmp_path: Path):
    config = modeling_mtt.MTTConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=20,
        intermediate_size=8, position_embedding_type="alibi", embedding_norm=True,
    )  # fmt: skip
    modeling_mtt.MTTForCausalLM(config).save_pretrained(tmp_path / "source")
    with pytest.raises(UnsupportedError) as caught:
        mtt_convert.convert(tmp_path / "source", tmp_path / "out", to="torch")
    assert "embedding_norm" in str(caught.value.found)


def test_tensors_that_do_not_fit_their_configuration(folders: Path, tmp_path: Path):
    with pytest.raises(IncompleteError):
        mtt_convert.open_checkpoint(changed(folders / "llama", tmp_path / "a", num_hidden_layers=5))
    with pytest.raises(MappingError):
        mtt_convert.open_checkpoint(changed(folders / "llama", tmp_path / "b", num_hidden_layers=3))


# What older versions of transformers saved


def resaved(folder: Path, target: Path, change: Any) -> Path:
    from safetensors.numpy import load_file, save_file

    target.mkdir()
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target


def test_the_base_models_names_and_buffers_of_gpt2(folders: Path, tmp_path: Path):
    def older(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        named = {name.removeprefix("transformer."): t for name, t in tensors.items()}
        buffers = {f"h.{i}.attn.bias": np.ones((1, 1, 8, 8), np.uint8) for i in range(4)}
        return {**named, **buffers}

    source = resaved(folders / "gpt2", tmp_path / "source", older)
    checkpoint = mtt_convert.open_checkpoint(source)
    assert len(checkpoint.dropped["buffers"]) == 4
    mtt_convert.convert(source, tmp_path / "out", model_type="gpt2")
    expected = (folders / "gpt2" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected


def test_a_tied_head_that_was_stored_must_be_the_embedding(folders: Path, tmp_path: Path):
    def with_head(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].copy()}

    def with_another(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}

    same = resaved(folders / "llama-tied", tmp_path / "same", with_head)
    mtt_convert.convert(same, tmp_path / "out", model_type="llama")
    other = resaved(folders / "llama-tied", tmp_path / "other", with_another)
    with pytest.raises(mtt_convert.SourceError):
        mtt_convert.convert(other, tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


# The command line


def test_to_is_required(folders: Path, tmp_path: Path, capsys):
    assert main(["convert", str(folders / "llama"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "--to is missing" in error
    assert "--to torch" in error


def test_diff_across_formats_and_families(folders: Path, tmp_path: Path):
    mtt_convert.convert(folders / "llama", tmp_path / "mtt")
    mtt_convert.convert(folders / "llama", tmp_path / "megatron", to="torch", tp=2)
    sides = [folders / "llama", tmp_path / "mtt", tmp_path / "megatron"]
    for first in sides:
        for second in sides:
            comparison = mtt_convert.diff(first, second)
            assert comparison.num_equal > 20
            assert not comparison.differences, (first, second)
    other = mtt_convert.diff(folders / "llama-3", tmp_path / "megatron")
    assert other.differences
