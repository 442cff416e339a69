"""Models of transformers that compute what an option of MTT computes, with weights to share.

`python -m tests.modeling_mtt.oracles` measures them all and writes the table in `docs/oracles.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.modeling_mtt.oracle import (
    LARGEST_DIFFERENCE,
    LLAMA,
    NO_BIAS,
    SIZES,
    Oracle,
    Tensors,
    difference,
    prompt,
    randomise,
    rename,
    split_gated,
    split_groups,
)
from tests.modeling_mtt.oracles_sparse import SPARSE_ORACLES

__all__ = [
    "HEADER",
    "LARGEST_DIFFERENCE",
    "ORACLES",
    "ROPE_PARAMETERS",
    "SIZES",
    "TABLE",
    "Oracle",
    "difference",
    "prompt",
    "randomise",
]

TABLE = Path(__file__).parents[2] / "docs" / "oracles.md"

MEGATRON_NAMES = {
    "dense_h_to_4h": "up_proj",
    "dense_4h_to_h": "down_proj",
    "self_attention.": "self_attn.",
    "attention.dense": "self_attn.o_proj",
    "self_attn.dense": "self_attn.o_proj",
    "attention.query_key_value": "self_attn.query_key_value",
    "transformer.h.": "model.layers.",
    "transformer.ln_f": "model.norm",
    "transformer.word_embeddings_layernorm": "model.embed_norm",
    "transformer.word_embeddings": "model.embed_tokens",
    "ln_attn": "input_layernorm",
    "ln_mlp": "post_attention_layernorm",
    "gpt_neox.embed_in": "model.embed_tokens",
    "gpt_neox.final_layer_norm": "model.norm",
    "gpt_neox.": "model.",
    "embed_out": "lm_head",
    "final_layernorm": "norm",
    "q_layernorm": "q_norm",
    "k_layernorm": "k_norm",
}


def from_groups(num_groups: int) -> Callable[[Tensors], Tensors]:
    """The renaming of a class with Megatron's names and fused matrix, of so many groups."""
    split = {"query_key_value": partial(split_groups, num_groups=num_groups)}
    return partial(rename, names=MEGATRON_NAMES, split=split)


def from_gpt2(tensors: Tensors) -> Tensors:
    names = {
        "transformer.h.": "model.layers.",
        "transformer.wte": "model.embed_tokens",
        "transformer.wpe": "model.embed_positions",
        "transformer.ln_f": "model.norm",
        "attn.c_proj": "self_attn.o_proj",
        "attn.c_attn": "self_attn.c_attn",
        "mlp.c_fc": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
    }
    # GPT-2 keeps the matrices of its layers as [in, out].
    turned = {
        name: tensor.T if ".h." in name and tensor.dim() == 2 else tensor
        for name, tensor in tensors.items()
    }

    def split(tensor: torch.Tensor) -> Tensors:
        return dict(zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True))

    return rename(turned, names, {"c_attn": split})


def from_cohere(tensors: Tensors) -> Tensors:
    """Its norms have no bias, MTT's have one."""
    biases = {
        name.replace(".weight", ".bias"): torch.zeros_like(tensor)
        for name, tensor in tensors.items()
        if "norm" in name
    }
    return {**tensors, **biases}


def _gpt2(activation: str, hidden_act: str) -> Oracle:
    config = {
        "n_embd": 32,
        "n_inner": 48,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "activation_function": activation,
    }
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return Oracle(
        f"learned positions, {hidden_act}",
        "GPT2LMHeadModel",
        {**config, **{name: SIZES[name] for name in names}},
        {"hidden_act": hidden_act},
        from_gpt2,
    )


def _llama(option: str, config: Mapping[str, Any], native: str = "LlamaForCausalLM") -> Oracle:
    """An option that both configurations spell alike."""
    return Oracle(
        option, native, {"rms_norm_eps": 1e-6, **config}, {**LLAMA, "norm_eps": 1e-6} | config
    )


ROPE_PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 500.0},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "proportional": {},
}


def _rope(rope_type: str, part: float) -> Oracle:
    """Scaled rotations of the whole head (Llama) or of its first part (StableLM).

    Proportional rotations reach over the whole head, with frequencies of 0, and Llama has them.
    """
    parameters = {"rope_type": rope_type, "rope_theta": 10000.0, **ROPE_PARAMETERS[rope_type]}
    option = f"rope_type {rope_type}"
    if part != 1.0:
        option += f", partial_rotary_factor {part}"
        parameters["partial_rotary_factor"] = part
        for name in {"short_factor", "long_factor"} & parameters.keys():
            parameters[name] = parameters[name][: int(8 * part / 2)]
    # Beyond what was trained, where dynamic and longrope change their frequencies.
    length = 70 if rope_type == "dynamic" else 18
    # transformers completes the dictionary it is given.
    config, options = {"rope_parameters": dict(parameters)}, {"rope_parameters": dict(parameters)}
    if part == 1.0 or rope_type == "proportional":
        options |= {**LLAMA, "norm_eps": 1e-6}
        return Oracle(option, "LlamaForCausalLM", config, options, prompt_length=length)
    config |= {"num_key_value_heads": 4}
    options |= {**LLAMA, "norm_type": "layernorm"}
    return Oracle(option, "StableLmForCausalLM", config, options, prompt_length=length)


def _bloom(option: str, num_heads: int = 4, **same: Any) -> Oracle:
    hidden_size = 8 * num_heads
    return Oracle(
        option,
        "BloomForCausalLM",
        {"num_attention_heads": num_heads, "hidden_size": hidden_size, **same},
        {
            "num_attention_heads": num_heads,
            "hidden_size": hidden_size,
            "intermediate_size": 4 * hidden_size,
            "position_embedding_type": "alibi",
            "embedding_norm": True,
            **same,
        },
        from_groups(num_heads),
    )


def _falcon(option: str, num_groups: int, config: Mapping[str, Any], **options: Any) -> Oracle:
    defaults = {
        **NO_BIAS,
        "tie_word_embeddings": True,
        "hidden_act": "gelu",
        "position_embedding_type": "rope",
        "use_parallel_residual": True,
        "num_key_value_heads": num_groups,
    }
    return Oracle(
        option,
        "FalconForCausalLM",
        {"ffn_hidden_size": 48, **config},
        {**defaults, **options},
        from_groups(num_groups),
    )


_NEOX_OPTIONS: dict[str, Any] = {
    "hidden_act": "gelu",
    "position_embedding_type": "rope",
    "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    "tie_word_embeddings": False,
}
_QWEN2_LAYERS = ["full_attention", "sliding_attention", "sliding_attention"]

ORACLES: tuple[Oracle, ...] = (
    _gpt2("gelu_new", "gelu_pytorch_tanh"),
    _gpt2("gelu", "gelu"),
    *(
        _llama(f"num_key_value_heads {heads}", {"num_key_value_heads": heads})
        for heads in (4, 2, 1)
    ),
    _llama(
        "biases, head_dim, tie_word_embeddings",
        {
            "head_dim": 10,
            "attention_bias": True,
            "attention_out_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    Oracle(
        "hidden_act relu2, zero_centered_norm",
        "NemotronForCausalLM",
        {"num_key_value_heads": 2},
        {
            **NO_BIAS,
            "num_key_value_heads": 2,
            "hidden_act": "relu2",
            "zero_centered_norm": True,
            "position_embedding_type": "rope",
            "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    Oracle(
        "use_qk_norm, rmsnorm",
        "Qwen3ForCausalLM",
        {"num_key_value_heads": 2, "head_dim": 12},
        {**LLAMA, "num_key_value_heads": 2, "head_dim": 12, "norm_eps": 1e-6, "use_qk_norm": True},
    ),
    Oracle(
        "use_qk_norm, layernorm",
        "PersimmonForCausalLM",
        {"hidden_act": "relu2"},
        {
            "hidden_act": "relu2",
            "use_qk_norm": True,
            "position_embedding_type": "rope",
            "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "tie_word_embeddings": False,
        },
        from_groups(4),
    ),
    Oracle(
        "attention_bias without the others",
        "StableLmForCausalLM",
        {"num_key_value_heads": 2, "use_qkv_bias": True},
        {
            **LLAMA,
            "num_key_value_heads": 2,
            "norm_type": "layernorm",
            "attention_bias": True,
            "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        },
    ),
    *(_rope(rope_type, part) for rope_type in ROPE_PARAMETERS for part in (1.0, 0.5)),
    Oracle(
        "rope_interleave",
        "Ernie4_5ForCausalLM",
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        {**LLAMA, "num_key_value_heads": 2, "norm_eps": 1e-6, "rope_interleave": True},
    ),
    Oracle(
        "rope_interleave, partial_rotary_factor 0.5",
        "GlmForCausalLM",
        {"num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6, "eos_token_id": 95},
        {
            **LLAMA,
            "num_key_value_heads": 2,
            "norm_eps": 1e-6,
            "attention_bias": True,
            "rope_interleave": True,
            "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "eos_token_id": 95,
        },
        partial(rename, names={}, split={"gate_up_proj": split_gated}),
    ),
    _bloom("position_embedding_type alibi, embedding_norm"),
    _bloom("alibi, 6 heads", num_heads=6),
    _bloom("alibi, 1 head", num_heads=1),
    _bloom(
        "apply_residual_connection_post_layernorm", apply_residual_connection_post_layernorm=True
    ),
    Oracle(
        "use_parallel_residual",
        "GPTNeoXForCausalLM",
        {},
        {**_NEOX_OPTIONS, "use_parallel_residual": True},
        from_groups(4),
    ),
    Oracle(
        "partial_rotary_factor 0.25, gelu",
        "GPTNeoXForCausalLM",
        {"use_parallel_residual": False},
        _NEOX_OPTIONS,
        from_groups(4),
    ),
    _falcon("shared_layernorm, num_key_value_heads 1", 1, {}, shared_layernorm=True),
    _falcon(
        "use_parallel_residual, num_key_value_heads 2",
        2,
        {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    Oracle(
        "shared_layernorm, rope_interleave, logits_scaling",
        "CohereForCausalLM",
        {
            "num_key_value_heads": 2,
            "logit_scale": 0.5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        {
            **LLAMA,
            "tie_word_embeddings": True,
            "num_key_value_heads": 2,
            "norm_type": "layernorm",
            "use_parallel_residual": True,
            "shared_layernorm": True,
            "rope_interleave": True,
            "logits_scaling": 2.0,
        },
        from_cohere,
    ),
    _llama("sliding_window", {"sliding_window": 8, "num_key_value_heads": 2}, "MistralForCausalLM"),
    Oracle(
        "sliding_window, layer_types",
        "Qwen2ForCausalLM",
        {
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
        },
        {
            **LLAMA,
            "num_key_value_heads": 2,
            "norm_eps": 1e-6,
            "attention_bias": True,
            "sliding_window": 8,
            "layer_types": _QWEN2_LAYERS,
        },
    ),
    _llama(
        "embedding_multiplier, residual_multiplier, attention_multiplier, logits_scaling",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
            "tie_word_embeddings": True,
        },
        "GraniteForCausalLM",
    ),
    Oracle(
        "position_embedding_type none",
        "SmolLM3ForCausalLM",
        {"num_key_value_heads": 2, "no_rope_layers": [0, 0, 0], "tie_word_embeddings": False},
        {
            **LLAMA,
            "norm_eps": 1e-6,
            "num_key_value_heads": 2,
            "position_embedding_type": "none",
        },
    ),
    Oracle(
        "zero_centered_norm, rmsnorm, embedding_multiplier",
        "GemmaForCausalLM",
        {"num_key_value_heads": 2, "head_dim": 12, "hidden_act": "gelu_pytorch_tanh"},
        {
            **LLAMA,
            "norm_eps": 1e-6,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "hidden_act": "gelu_pytorch_tanh",
            "zero_centered_norm": True,
            "embedding_multiplier": 32**0.5,
            "tie_word_embeddings": True,
        },
    ),
    *SPARSE_ORACLES,
)


def table() -> str:
    """Measure every oracle and return the document."""
    rows = [
        f"| {oracle.option} | `{oracle.native}` | {difference(oracle):.1e} |\n"
        for oracle in ORACLES
    ]
    return HEADER + "".join(rows)


HEADER = f"""\
# What MTT's options are compared with

Each row gives an MTT model and a model of another class in transformers the same random weights and
the same tokens, without padding, padded on the left and padded on the right, and shows the largest
absolute difference of their logits in float32. The tests require {LARGEST_DIFFERENCE} at most,
and the same greedy text with a growing and with a static cache.

`make oracles` measures again and writes this file.

| option | class | difference |
|---|---|---|
"""


if __name__ == "__main__":
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table())
    print(f"{TABLE.name} has {len(ORACLES)} rows")
