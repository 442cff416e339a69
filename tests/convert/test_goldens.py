"""Real Megatron checkpoints become models that compute what Megatron computed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modeling_mtt import MTTConfig, MTTForCausalLM
from mtt_convert import convert, diff, from_megatron, open_checkpoint, verify
from mtt_convert.logits import compare_logits

Golden = Callable[[str], Path]


@dataclass(frozen=True)
class Case:
    """A checkpoint, Megatron's logits for it, and its true vocabulary size where args lack it."""

    path: str
    logits: str
    model: str
    vocab_size: int | None = None
    qkv_order: str = "auto"

    @property
    def options(self) -> dict[str, Any]:
        """How to open it."""
        overrides = {"vocab_size": self.vocab_size} if self.vocab_size else {}
        return {"overrides": overrides, "qkv_order": self.qkv_order}

    def __str__(self) -> str:
        return self.path


def core(path: str) -> Case:
    model = path.split("/")[1]
    return Case(path, f"mcore/{model}/logits.npz", model)


def legacy(name: str, kind: str, **options: Any) -> Case:
    logits = f"legacy/reference/{kind}.npz"
    return Case(f"legacy/{name}", logits, f"legacy-{kind}", 497, **options)


CASES = [
    core("mcore/gpt/ref/torch"),
    core("mcore/gpt/tp2pp2/torch"),
    core("mcore/gpt/tp2pp2/torch_dist"),
    core("mcore/gpt/tp2pp2vpp2/torch"),
    core("mcore/gpt/distopt_tp2pp1/torch"),
    core("mcore-te/gpt/tp2pp2/torch"),
    core("mcore/gpt_bf16/tp2pp2/torch"),
    core("mcore/gpt_bf16/tp2pp2/torch_dist"),
    core("mcore/llama/tp1pp2/torch"),
    core("mcore/llama/tp2pp1/torch_dist"),
    core("mcore/llama/tp2pp2vpp2/torch"),
    core("mcore/llama/tp2pp2vpp2/torch_dist"),
    core("mcore-te/llama/tp2pp2/torch"),
    core("mcore-te/llama/tp2pp2/torch_dist"),
    core("mcore/llama_bf16/tp2pp2/torch_dist"),
    core("mcore/llama_6l/pp2_layout/torch"),
    core("mcore/llama_6l/pp2_uneven/torch"),
    core("mcore/llama_6l/pp2_uneven/torch_dist"),
    core("mcore/qwen/tp2pp2/torch"),
    core("mcore/qwen/tp2pp2/torch_dist"),
    core("mcore/nemotron/tp2pp1/torch"),
    core("mcore/nemotron/tp2pp1/torch_dist"),
    legacy("core_v0.12.0-gpt2-tp1pp2", "gpt2"),
    legacy("core_v0.12.0-llama-tp2pp1", "llama"),
    legacy("core_v0.12.0-llama-tp2pp2", "llama"),
    legacy("v2.6-ckptver3-gpt2-tp1pp1", "gpt2"),
    legacy("v2.6-ckptver3-gpt2-tp2pp2", "gpt2"),
    legacy("v1.0-ckptver0-RELEASE-oldserial-fp16-gpt2-tp1pp1", "gpt2_fp16rounded_weights"),
    legacy("v1.0-ckptver0-gpt2-tp2pp1", "gpt2"),
    legacy("git-d763f54a21-ckptver1-gpt2-tp2pp1", "gpt2"),
    legacy("git-9b0083ea03-ckptver2-gpt2-tp1pp1", "gpt2"),
    legacy("v2.0-ckptver3-gpt2-tp2pp2", "gpt2"),
    legacy("v2.0-RELABEL-v0-order-stamped-3.0-gpt2-tp1pp1", "gpt2", qkv_order="block"),
]
MODELS = sorted({case.model for case in CASES})


@pytest.fixture(scope="module")
def converted(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """Each case converted once."""

    @cache
    def run(case: Case) -> Path:
        target = tmp_path_factory.mktemp("out") / "hf"
        convert(golden(case.path), target, tokenizer="none", **case.options)
        return target

    return run


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_are_those_of_megatron(case: Case, golden: Golden, converted: Callable) -> None:
    assert compare_logits(converted(case), golden(case.logits)) < 1e-4


@pytest.mark.parametrize("case", CASES, ids=str)
def test_generation_with_cache_equals_without(
    case: Case, golden: Golden, converted: Callable
) -> None:
    model = MTTForCausalLM.from_pretrained(converted(case), dtype=torch.float32)
    prompt = torch.from_numpy(np.load(golden(case.logits))["input_ids"][:, :8]).long()
    options = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    cached = model.generate(prompt, use_cache=True, **options)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))
    assert cached.shape == (prompt.shape[0], 20)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_from_megatron_is_the_same_model(case: Case, golden: Golden, converted: Callable) -> None:
    direct = from_megatron(golden(case.path), tokenizer="none", **case.options)
    saved = MTTForCausalLM.from_pretrained(converted(case), dtype="auto")
    fields = [model.config.to_dict() for model in (direct, saved)]
    for config in fields:
        for only_in_files in ("architectures", "auto_map", "_name_or_path"):
            config.pop(only_in_files, None)
    assert fields[0] == fields[1]
    assert direct.generation_config.to_dict() == saved.generation_config.to_dict()
    left, right = direct.state_dict(), saved.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(direct(ids).logits, saved(ids).logits)


@pytest.mark.parametrize("model", MODELS)
def test_all_layouts_and_formats_give_the_same_bytes(model: str, converted: Callable) -> None:
    hashes = {
        hashlib.sha256((converted(case) / "model.safetensors").read_bytes()).hexdigest()
        for case in CASES
        if case.model == model
    }
    assert len(hashes) == 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_source_and_result_hold_the_same_bits(
    case: Case, golden: Golden, converted: Callable
) -> None:
    result = diff(golden(case.path), converted(case))
    assert result.differences == ()
    assert result.num_equal == len(MTTForCausalLM.from_pretrained(converted(case)).state_dict()) - (
        MTTConfig.from_pretrained(converted(case)).tie_word_embeddings
    )
    assert verify(converted(case)).problems == ()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_config_says_the_same_to_transformers(case: Case, converted: Callable) -> None:
    written = json.loads((converted(case) / "config.json").read_text())
    loaded = MTTConfig.from_pretrained(converted(case))
    for name, value in written.items():
        if name not in ("auto_map", "rope_parameters", "dtype", "architectures"):
            assert getattr(loaded, name) == value, name


@pytest.mark.parametrize("case", [case for case in CASES if case.vocab_size is None], ids=str)
def test_the_reference_tensors_are_reached(case: Case, golden: Golden) -> None:
    """Canonical tensors equal Megatron's own unsharded ones, bit for bit."""
    from safetensors.torch import load_file

    from mtt_convert.reading import FileReader, stream

    reference = load_file(golden(f"mcore/{case.model}/reference_megatron.safetensors"))
    names = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
    checkpoint = open_checkpoint(golden(case.path))
    with FileReader() as reader:
        for name, tensor in reference.items():
            for separate, fused in names.items():
                name = name.replace(separate, fused)
            if name == "output_layer.weight" and name not in checkpoint.tensors:
                continue
            ours = b"".join(bytes(window) for window in stream(checkpoint.tensors[name], reader))
            assert ours == tensor.contiguous().view(torch.uint8).numpy().tobytes(), name
