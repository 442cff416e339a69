"""The golden checkpoints of GPTs: how to open each, and which logits are its own.

`CASES` go through every test of test_goldens.py; `OTHER_FORMATS` through those of
test_same_hashes.py, as `CASES` do. A checkpoint of another format is a line in one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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


def legacy(name: str, kind: str, model: str | None = None, **options: Any) -> Case:
    logits = f"legacy/reference/{kind}.npz"
    return Case(f"legacy/{name}", logits, model or f"legacy-{kind}", 497, **options)


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
    core("mcore/mixtral/tp2ep2/torch"),
    core("mcore/mixtral_bf16/grouped_ep2/torch"),
    core("mcore-te/moe_mixed/ep2/torch_dist"),
    core("mcore/mla/tp2pp1/torch"),
    core("mcore/mtp/tp2pp2/torch"),
    legacy("core_v0.12.0-gpt2-tp1pp2", "gpt2"),
    legacy("core_v0.12.0-llama-tp2pp1", "llama"),
    legacy("core_v0.12.0-llama-tp2pp2", "llama"),
    legacy("v2.6-ckptver3-gpt2-tp1pp1", "gpt2"),
    legacy("v2.6-ckptver3-gpt2-tp2pp2", "gpt2"),
]
OTHER_FORMATS = [
    core("mcore/mixtral/ep2/torch"),
    core("mcore/mixtral/tp2ep2/torch_dist"),
    core("mcore-te/mixtral/grouped_ep2/torch"),
    core("mcore-te/mixtral/grouped_ep2/torch_dist"),
    core("mcore/moe_mixed/ep2/torch"),
    core("mcore/moe_mixed/ep2/torch_dist"),
    core("mcore/moe_mixed/singleton_ep2/torch_dist"),
    core("mcore/mla/tp2pp1/torch_dist"),
    core("mcore-te/mla/ep2/torch"),
    legacy("v1.0-ckptver0-RELEASE-oldserial-fp16-gpt2-tp1pp1", "gpt2_fp16rounded_weights"),
    legacy("v1.0-ckptver0-gpt2-tp2pp1", "gpt2"),
    legacy("git-d763f54a21-ckptver1-gpt2-tp2pp1", "gpt2"),
    legacy("git-9b0083ea03-ckptver2-gpt2-tp1pp1", "gpt2"),
    legacy("v2.0-ckptver3-gpt2-tp2pp2", "gpt2"),
    legacy("v2.0-RELABEL-v0-order-stamped-3.0-gpt2-tp1pp1", "gpt2", qkv_order="block"),
    legacy("megatron-deepspeed-346b89a6-2021-gpt2-tp1pp1", "gpt2"),
    legacy("megatron-deepspeed-6acc370a-gpt2-tp2pp2", "gpt2"),
    legacy("megatron-deepspeed-6acc370a-NOPIPE-gpt2-tp2pp1", "gpt2"),
    legacy("megatron-deepspeed-main4efb479d-CATQKV-gpt2-tp1pp1", "gpt2"),
    legacy("megatron-deepspeed-6acc370a-llama-tp2pp1", "llama"),
    legacy(
        "megatron-deepspeed-6acc370a-ZERO1bf16-gpt2-tp1pp1dp2",
        "gpt2_bf16rounded_weights",
        model="legacy-gpt2-bf16",
    ),
    # The optimizer's float32 weights of the same run.
    legacy(
        "universal-6acc370a-gpt2-from-ZERO1bf16-tp2dp2",
        "gpt2_bf16rounded_weights",
        model="legacy-gpt2-float32-of-bf16",
    ),
    legacy("bigscience-8387ae17-bloom-tp2pp1", "bloom"),
    legacy("gpt-neox-DERIVED-tp1", "neox_derived"),
]
