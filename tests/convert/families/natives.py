"""Tiny random models of transformers' own classes, and what is asked of each family."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2: dict[str, Any] = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BLOOM: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "n_layer": 4,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FALCON = {**SIZES, "ffn_hidden_size": 48}
del FALCON["intermediate_size"]
OWN_SIZES = {"gpt2": GPT2, "bloom": BLOOM, "falcon": FALCON}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "nemotron": "NemotronForCausalLM",
    "bloom": "BloomForCausalLM",
    "falcon": "FalconForCausalLM",
}
# Without a counterpart in MTT.
NO_DECODERS = {"megatron-bert": "MegatronBertForPreTraining"}


@dataclass(frozen=True)
class Case:
    """A configuration of a family.

    Attributes:
        family: its `model_type`.
        options: fields of the class's configuration.
    """

    family: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = [
            f"{k}={v['rope_type'] if isinstance(v, dict) else v}" for k, v in self.options.items()
        ]
        return "-".join([self.family, *shown])

    def config(self) -> Any:
        sizes = OWN_SIZES.get(self.family, SIZES)
        return model_class(self.family).config_class(**{**sizes, **self.options})

    @property
    def beyond_megatron(self) -> str | None:
        """What no argument of Megatron-Core describes: a gate with GELU, parallel residuals."""
        if self.family == "llama" and "hidden_act" in self.options:
            return "gated_linear_unit"
        if self.family == "gpt_neox" and self.config().use_parallel_residual:
            return "parallel_residual"
        if self.family == "falcon" and self.config().parallel_attn:
            return "parallel_residual"
        if self.family == "bloom":
            return "position_embedding_type = alibi"
        return None

    def model(self) -> Any:
        """A model with random weights that all matter, norms and biases included."""
        torch.manual_seed(0)
        model = model_class(self.family)(self.config()).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
        return model

    def save(self, folder: Path, **options: Any) -> Any:
        model = self.model()
        model.save_pretrained(folder, **options)
        return model


def model_class(family: str) -> Any:
    return getattr(transformers, {**CLASSES, **NO_DECODERS}[family])


def case(family: str, **options: Any) -> Case:
    return Case(family, options)


def windows(**options: Any) -> dict[str, Any]:
    return {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 5, **options}


TYPES = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
CASES = [
    case("llama", num_key_value_heads=2),
    case("llama", num_key_value_heads=1, head_dim=12, tie_word_embeddings=True),
    case("llama", attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3),
    case("llama", rope_parameters=LINEAR, hidden_act="gelu"),
    case("llama", hidden_act="gelu_new", rms_norm_eps=1e-4),
    case("mistral", num_key_value_heads=2, sliding_window=None),
    case("mistral", num_key_value_heads=2, sliding_window=5, head_dim=16),
    case("mistral", num_key_value_heads=4, sliding_window=1, tie_word_embeddings=True),
    case("qwen2", num_key_value_heads=2),
    case("qwen2", num_key_value_heads=4, tie_word_embeddings=True, head_dim=12),
    case("qwen2", max_window_layers=2, **windows()),
    case("qwen2", layer_types=TYPES, **windows()),
    case("qwen2", max_window_layers=0, **windows(rope_parameters=LLAMA3)),
    case("qwen3", num_key_value_heads=2, head_dim=12),
    case("qwen3", tie_word_embeddings=True, num_key_value_heads=1, head_dim=8),
    case("qwen3", max_window_layers=1, head_dim=8, **windows()),
    case("gpt2"),
    case("gpt2", n_inner=48, activation_function="gelu", tie_word_embeddings=False),
    case("gpt2", activation_function="gelu_fast", reorder_and_upcast_attn=True),
    case("gpt_neox"),
    case("gpt_neox", use_parallel_residual=False, tie_word_embeddings=True),
    case(
        "gpt_neox",
        hidden_act="gelu_fast",
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.8},
    ),
    case("nemotron", num_key_value_heads=2),
    case("nemotron", num_key_value_heads=4, attention_bias=True, mlp_bias=True, norm_eps=1e-4),
    case(
        "nemotron",
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.25},
    ),
    case("nemotron", num_key_value_heads=2, partial_rotary_factor=1.0),
    case("gpt_neox", use_parallel_residual=False, hidden_act="gelu_new"),
    case("bloom"),
    case("bloom", n_head=6, hidden_size=36, tie_word_embeddings=False, pretraining_tp=2),
    case("bloom", layer_norm_epsilon=1e-3, slow_but_exact=True),
    # Falcon 7B, 40B, 11B, and the oldest without ALiBi.
    case("falcon"),
    case("falcon", new_decoder_architecture=True, num_kv_heads=2),
    case("falcon", new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1),
    case("falcon", new_decoder_architecture=True, num_kv_heads=4, tie_word_embeddings=False),
    case("falcon", multi_query=False, parallel_attn=False, bias=True),
    case("falcon", parallel_attn=False, activation="gelu_new", rope_parameters=LINEAR),
    case("falcon", multi_query=False, bias=True, tie_word_embeddings=False),
]
