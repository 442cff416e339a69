"""Megatron-LM before Megatron-Core: `language_model.encoder` and its renamed norms.

    v2.1 ... 23.08           input_layernorm, post_attention_layernorm, final_layernorm
    2023-09 ... core_v0.16   input_norm, post_attention_norm, final_norm

Both spellings are read, the newer one is written. With a tied head and a pipeline, the last stage
holds a copy of the embedding as `word_embeddings_for_head`.
(megatron/legacy/model/{language_model,transformer}.py, core_v0.12.0.)
"""

from ..mapping import Rule, RuleTable

_EMBEDDINGS = ("embedding.word_embeddings.weight", "embedding.position_embeddings.weight")
_IN, _OUT = "language_model.encoder.layers.{i}", "decoder.layers.{i}"
RULES = RuleTable(
    *(Rule(f"language_model.{name}", name) for name in _EMBEDDINGS),
    Rule(f"{_IN}.input_norm.{{p}}", f"{_OUT}.self_attention.linear_qkv.layer_norm_{{p}}"),
    Rule(f"{_IN}.self_attention.query_key_value.{{p}}", f"{_OUT}.self_attention.linear_qkv.{{p}}"),
    Rule(f"{_IN}.self_attention.dense.{{p}}", f"{_OUT}.self_attention.linear_proj.{{p}}"),
    Rule(f"{_IN}.post_attention_norm.{{p}}", f"{_OUT}.mlp.linear_fc1.layer_norm_{{p}}"),
    Rule(f"{_IN}.mlp.dense_h_to_4h.{{p}}", f"{_OUT}.mlp.linear_fc1.{{p}}"),
    Rule(f"{_IN}.mlp.dense_4h_to_h.{{p}}", f"{_OUT}.mlp.linear_fc2.{{p}}"),
    Rule("language_model.encoder.final_norm.{p}", "decoder.final_layernorm.{p}"),
    Rule("language_model.output_layer.weight", "output_layer.weight"),
    Rule("word_embeddings_for_head.weight", "output_layer.weight", one_way=True),
    Rule(
        f"{_IN}.input_layernorm.{{p}}",
        f"{_OUT}.self_attention.linear_qkv.layer_norm_{{p}}",
        one_way=True,
    ),
    Rule(
        f"{_IN}.post_attention_layernorm.{{p}}",
        f"{_OUT}.mlp.linear_fc1.layer_norm_{{p}}",
        one_way=True,
    ),
    Rule("language_model.encoder.final_layernorm.{p}", "decoder.final_layernorm.{p}", one_way=True),
)
