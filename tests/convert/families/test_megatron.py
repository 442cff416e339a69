"""Native classes of transformers through Megatron and back: the same files, the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import modeling_mtt
import mtt_convert
from mtt_convert import UnsupportedError

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


def test_the_options_of_an_mtt_model_that_megatron_lacks(tmp_path: Path):
    config = modeling_mtt.MTTConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=20,
        intermediate_size=8, position_embedding_type="alibi", embedding_norm=True,
    )  # fmt: skip
    modeling_mtt.MTTForCausalLM(config).save_pretrained(tmp_path / "source")
    with pytest.raises(UnsupportedError) as caught:
        mtt_convert.convert(tmp_path / "source", tmp_path / "out", to="torch")
    assert "embedding_norm" in str(caught.value.found)


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
