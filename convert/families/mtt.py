"""Canonical names <-> `modeling_mtt`: the class that computes every dense Megatron GPT.

Left, Megatron's words; right, Hugging Face's. They meet only in the tables of this file.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..architecture import (
    ROPE_SCALING_HIGH_FREQ_FACTOR,
    ROPE_SCALING_LOW_FREQ_FACTOR,
    ROPE_SCALING_ORIGINAL_MAX_POSITION_EMBEDDINGS,
    Architecture,
)
from ..errors import UnsupportedError
from ..mapping import Rule, RuleTable
from ..ops import SplitGated, SplitQKV, TrimVocab

NAME = "mtt"
CAUSAL_LM = "MTTForCausalLM"
AUTO_MAP: Mapping[str, str] = {
    "AutoConfig": "configuration_mtt.MTTConfig",
    "AutoModel": "modeling_mtt.MTTModel",
    "AutoModelForCausalLM": f"modeling_mtt.{CAUSAL_LM}",
}
CODE: str | None = "modeling_mtt"
_IN, _OUT = "decoder.layers.{i}", "model.layers.{i}"
_COMMON = (
    Rule("embedding.word_embeddings.weight", "model.embed_tokens.weight", TrimVocab()),
    Rule("embedding.position_embeddings.weight", "model.embed_positions.weight"),
    Rule(f"{_IN}.self_attention.linear_qkv.layer_norm_{{p}}", f"{_OUT}.input_layernorm.{{p}}"),
    Rule(
        f"{_IN}.self_attention.linear_qkv.{{p}}",
        f"{_OUT}.self_attn.{{q_proj,k_proj,v_proj}}.{{p}}",
        SplitQKV(),
    ),
    Rule(f"{_IN}.self_attention.q_layernorm.{{p}}", f"{_OUT}.self_attn.q_norm.{{p}}"),
    Rule(f"{_IN}.self_attention.k_layernorm.{{p}}", f"{_OUT}.self_attn.k_norm.{{p}}"),
    Rule(f"{_IN}.self_attention.linear_proj.{{p}}", f"{_OUT}.self_attn.o_proj.{{p}}"),
    Rule(f"{_IN}.mlp.linear_fc1.layer_norm_{{p}}", f"{_OUT}.post_attention_layernorm.{{p}}"),
    Rule(f"{_IN}.mlp.linear_fc2.{{p}}", f"{_OUT}.mlp.down_proj.{{p}}"),
    Rule("decoder.final_layernorm.{p}", "model.norm.{p}"),
    Rule("output_layer.weight", "lm_head.weight", TrimVocab()),
)
_FC1 = f"{_IN}.mlp.linear_fc1.{{p}}"
_GATED = RuleTable(*_COMMON, Rule(_FC1, f"{_OUT}.mlp.{{gate_proj,up_proj}}.{{p}}", SplitGated()))
_PLAIN = RuleTable(*_COMMON, Rule(_FC1, f"{_OUT}.mlp.up_proj.{{p}}"))

# config.json's field -> the architecture's: equal values, opposite values, and renamed choices.
SAME = {
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "gated_mlp": "gated_linear_unit",
    "norm_eps": "layernorm_epsilon",
    "zero_centered_norm": "layernorm_zero_centered_gamma",
    "max_position_embeddings": "max_position_embeddings",
    "attention_bias": "has_qkv_bias",
    "attention_out_bias": "add_bias_linear",
    "mlp_bias": "add_bias_linear",
    "use_qk_norm": "qk_layernorm",
    "attention_dropout": "attention_dropout",
    "hidden_dropout": "hidden_dropout",
    "initializer_range": "init_method_std",
}
OPPOSITE = {"tie_word_embeddings": "untie_embeddings_and_output_weights"}
CHOICES = {
    "hidden_act": (
        "activation",
        {
            "gelu": "gelu",
            "gelu_tanh": "gelu_pytorch_tanh",
            "silu": "silu",
            "squared_relu": "relu2",
        },
    ),
    "norm_type": ("normalization", {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm"}),
    "position_embedding_type": (
        "position_embedding_type",
        {"learned_absolute": "learned", "rope": "rope", "none": "none"},
    ),
}


def rules(architecture: Architecture) -> RuleTable:
    """The table for this architecture, canonical names on the left."""
    return _GATED if architecture.gated_linear_unit else _PLAIN


def config(architecture: Architecture) -> dict[str, object]:
    """The fields of `MTTConfig` that describe this architecture.

    Raises:
        UnsupportedError: see `_rope`.
    """
    a = architecture
    return {
        "vocab_size": a.vocab_size or a.padded_vocab_size,
        **{ours: getattr(a, theirs) for ours, theirs in SAME.items()},
        **{ours: not getattr(a, theirs) for ours, theirs in OPPOSITE.items()},
        **{ours: names[getattr(a, theirs)] for ours, (theirs, names) in CHOICES.items()},
        "rope_parameters": _rope(a) if a.position_embedding_type == "rope" else None,
    }


def _rope(a: Architecture) -> dict[str, object]:
    """`rope_parameters` as transformers 5 spells them.

    Raises:
        UnsupportedError: two kinds of scaling at once.
    """
    parameters: dict[str, object] = {"rope_theta": a.rotary_base, "rope_type": "default"}
    if a.rotary_percent != 1.0:
        parameters["partial_rotary_factor"] = a.rotary_percent
    if a.rope_scaling_factor is not None and a.rotary_seq_len_interpolation_factor is not None:
        raise UnsupportedError(
            "rope scaling and interpolation at once cannot be represented",
            found=f"rope_scaling_factor = {a.rope_scaling_factor:g}, "
            f"rotary_seq_len_interpolation_factor = {a.rotary_seq_len_interpolation_factor:g}",
            expected="one of them",
        )
    if a.rope_scaling_factor is not None:
        parameters |= {
            "rope_type": "llama3",
            "factor": a.rope_scaling_factor,
            "low_freq_factor": ROPE_SCALING_LOW_FREQ_FACTOR,
            "high_freq_factor": ROPE_SCALING_HIGH_FREQ_FACTOR,
            "original_max_position_embeddings": ROPE_SCALING_ORIGINAL_MAX_POSITION_EMBEDDINGS,
        }
    if a.rotary_seq_len_interpolation_factor is not None:
        factor = a.rotary_seq_len_interpolation_factor
        parameters |= {"rope_type": "linear", "factor": factor}
    return parameters
