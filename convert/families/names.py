"""The names of a decoder's tensors as most classes of transformers have them."""

from __future__ import annotations

from ..architecture import Architecture
from ..mapping import Rule, RuleTable
from ..ops import SplitGated, SplitQKV, TrimVocab

_IN, _OUT = "decoder.layers.{i}", "model.layers.{i}"
_FC1 = f"{_IN}.mlp.linear_fc1.{{p}}"
_GATED = Rule(_FC1, f"{_OUT}.mlp.{{gate_proj,up_proj}}.{{p}}", SplitGated())
_PLAIN = Rule(_FC1, f"{_OUT}.mlp.up_proj.{{p}}")


def _table(fc1: Rule) -> RuleTable:
    return RuleTable(
        Rule("embedding.word_embeddings.weight", "model.embed_tokens.weight", TrimVocab()),
        Rule("embedding.position_embeddings.weight", "model.embed_positions.weight"),
        Rule("embedding.norm.{p}", "model.embed_norm.{p}"),
        Rule(
            f"{_IN}.self_attention.linear_qkv.{{p}}",
            f"{_OUT}.self_attn.{{q_proj,k_proj,v_proj}}.{{p}}",
            SplitQKV(),
        ),
        Rule(f"{_IN}.self_attention.linear_proj.{{p}}", f"{_OUT}.self_attn.o_proj.{{p}}"),
        Rule(f"{_IN}.self_attention.q_layernorm.{{p}}", f"{_OUT}.self_attn.q_norm.{{p}}"),
        Rule(f"{_IN}.self_attention.k_layernorm.{{p}}", f"{_OUT}.self_attn.k_norm.{{p}}"),
        fc1,
        Rule(f"{_IN}.mlp.linear_fc2.{{p}}", f"{_OUT}.mlp.down_proj.{{p}}"),
        Rule(f"{_IN}.self_attention.linear_qkv.layer_norm_{{p}}", f"{_OUT}.input_layernorm.{{p}}"),
        Rule(f"{_IN}.mlp.linear_fc1.layer_norm_{{p}}", f"{_OUT}.post_attention_layernorm.{{p}}"),
        Rule("decoder.final_layernorm.{p}", "model.norm.{p}"),
        Rule("output_layer.weight", "lm_head.weight", TrimVocab()),
    )


_TABLES = {True: _table(_GATED), False: _table(_PLAIN)}


def decoder_rules(architecture: Architecture) -> RuleTable:
    """The table for an architecture, canonical names on the left."""
    return _TABLES[architecture.gated_linear_unit]
