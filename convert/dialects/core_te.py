"""Megatron-Core with the TransformerEngine spec: norms are fused into the linear that follows.

Distributed checkpoints spell dense layers like this whatever the spec; so do canonical names.
"""

from ..mapping import Rule, RuleTable

_NAMES = (
    "embedding.word_embeddings.weight",
    "embedding.position_embeddings.weight",
    "decoder.layers.{i}.self_attention.linear_qkv.layer_norm_{p}",
    "decoder.layers.{i}.self_attention.linear_qkv.{p}",
    "decoder.layers.{i}.self_attention.q_layernorm.{p}",
    "decoder.layers.{i}.self_attention.k_layernorm.{p}",
    "decoder.layers.{i}.self_attention.linear_proj.{p}",
    "decoder.layers.{i}.mlp.linear_fc1.layer_norm_{p}",
    "decoder.layers.{i}.mlp.linear_fc1.{p}",
    "decoder.layers.{i}.mlp.linear_fc2.{p}",
    "decoder.final_layernorm.{p}",
    "output_layer.weight",
)
RULES = RuleTable(*(Rule(name, name) for name in _NAMES))
