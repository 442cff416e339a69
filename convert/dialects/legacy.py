"""Megatron-LM before Megatron-Core: `language_model.encoder` and its renamed norms.

    v2.1 ... 23.08           input_layernorm, post_attention_layernorm, final_layernorm
    2023-09 ... core_v0.16   input_norm, post_attention_norm, final_norm

Since both names of a norm occur, each has a line; a checkpoint uses one of them.
(megatron/legacy/model/{language_model,transformer}.py, core_v0.12.0.)
"""

from ..mapping import Rule, RuleTable

_IN = "language_model.encoder.layers.{i}"
_OUT = "decoder.layers.{i}"
RULES = RuleTable(
    Rule("language_model.embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
    Rule(
        "language_model.embedding.position_embeddings.weight",
        "embedding.position_embeddings.weight",
    ),
    Rule(f"{_IN}.input_layernorm.{{p}}", f"{_OUT}.self_attention.linear_qkv.layer_norm_{{p}}"),
    Rule(f"{_IN}.input_norm.{{p}}", f"{_OUT}.self_attention.linear_qkv.layer_norm_{{p}}"),
    Rule(f"{_IN}.self_attention.query_key_value.{{p}}", f"{_OUT}.self_attention.linear_qkv.{{p}}"),
    Rule(f"{_IN}.self_attention.dense.{{p}}", f"{_OUT}.self_attention.linear_proj.{{p}}"),
    Rule(f"{_IN}.post_attention_layernorm.{{p}}", f"{_OUT}.mlp.linear_fc1.layer_norm_{{p}}"),
    Rule(f"{_IN}.post_attention_norm.{{p}}", f"{_OUT}.mlp.linear_fc1.layer_norm_{{p}}"),
    Rule(f"{_IN}.mlp.dense_h_to_4h.{{p}}", f"{_OUT}.mlp.linear_fc1.{{p}}"),
    Rule(f"{_IN}.mlp.dense_4h_to_h.{{p}}", f"{_OUT}.mlp.linear_fc2.{{p}}"),
    Rule("language_model.encoder.final_layernorm.{p}", "decoder.final_layernorm.{p}"),
    Rule("language_model.encoder.final_norm.{p}", "decoder.final_layernorm.{p}"),
    Rule("language_model.output_layer.weight", "output_layer.weight"),
    Rule("word_embeddings_for_head.weight", "output_layer.weight"),
)
