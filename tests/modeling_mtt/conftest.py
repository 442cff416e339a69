"""Tiny models with weights worth comparing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import mtt_convert
from modeling_mtt import MTTConfig, MTTForCausalLM
from tests.modeling_mtt.oracles import randomise

SAMPLE = Path(__file__).resolve().parents[2] / "convert" / "sample"

# The three shapes that differ most, what Megatron-Turing NLG is, what Llama is, and Nemotron; then
# what none of them has.
PRESETS: dict[str, dict[str, Any]] = {
    "gpt": {},
    "llama": {
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "gated_mlp": True,
        "norm_type": "rmsnorm",
        "position_embedding_type": "rope",
        "attention_bias": False,
        "attention_out_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    },
    "nemotron": {
        "num_key_value_heads": 1,
        "head_dim": 12,
        "hidden_act": "relu2",
        "zero_centered_norm": True,
        "use_qk_norm": True,
        "position_embedding_type": "rope",
        "rope_parameters": {"rope_theta": 5000.0, "partial_rotary_factor": 0.5},
    },
    "bloom": {
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "position_embedding_type": "alibi",
        "embedding_norm": True,
        "apply_residual_connection_post_layernorm": True,
    },
    "falcon": {
        "num_key_value_heads": 1,
        "hidden_act": "gelu",
        "position_embedding_type": "rope",
        "rope_interleave": True,
        "use_parallel_residual": True,
        "shared_layernorm": True,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
        "logits_scaling": 1.5,
    },
    "qwen2": {
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "gated_mlp": True,
        "norm_type": "rmsnorm",
        "position_embedding_type": "rope",
        "attention_out_bias": False,
        "mlp_bias": False,
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
}
# Experts with biases and without gates, with gates and a shared expert, and with latents; then
# heads that predict further tokens.
PRESETS |= {
    "switch": {"num_experts": 4, "num_experts_per_tok": 1, "norm_topk_prob": False},
    "mixtral": {
        **PRESETS["llama"],
        "num_experts": 4,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 24,
        "use_shared_expert_gate": True,
    },
    "deepseek": {
        **PRESETS["llama"],
        "num_key_value_heads": None,
        "kv_lora_rank": 12,
        "q_lora_rank": 20,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6,
        "v_head_dim": 12,
        "use_qk_norm": True,
        "rope_interleave": True,
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 32,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "scoring_func": "sigmoid",
        "use_expert_bias": True,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "shared_expert_intermediate_size": 24,
    },
    "mtp": {**PRESETS["llama"], "num_nextn_predict_layers": 2},
}


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def tiny_config() -> Callable[..., MTTConfig]:
    def build(preset: str = "gpt", **options: Any) -> MTTConfig:
        defaults: dict[str, Any] = {
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        return MTTConfig(**{**defaults, **PRESETS[preset], **options})

    return build


@pytest.fixture
def tiny_model(tiny_config: Callable[..., MTTConfig]) -> Callable[..., MTTForCausalLM]:
    def build(preset: str = "gpt", **options: Any) -> MTTForCausalLM:
        model = MTTForCausalLM(tiny_config(preset, **options))
        randomise(model)
        return model

    return build


@pytest.fixture(scope="session")
def sample_texts() -> list[dict[str, str]]:
    """The texts the sample learned by heart, with their beginnings as `prompt`."""
    texts: list[dict[str, str]] = json.loads((SAMPLE / "prompts.json").read_text())
    return texts


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample, converted, with a chat template that says only what the user says."""
    folder = tmp_path_factory.mktemp("sample") / "hf"
    mtt_convert.convert(SAMPLE, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script in fresh processes and fail with what it printed."""

    def run(script: str, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
        path = tmp_path / "script.py"
        path.write_text(script)
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(processes)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        result = subprocess.run(
            [*command, str(path), *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
        return result

    return run
