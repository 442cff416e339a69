"""Megatron-LM's own T5, v2.5 to core_v0.16: `language_model` with `encoder` and `decoder` in it.

    language_model.embedding...                                one embedding for both
    language_model.encoder.layers.0.self_attention...          as in a GPT
    language_model.decoder.layers.0.self_attention...          as in a GPT, and
                                   .inter_attention.{query, key_value, dense}
                                   .post_attention_norm         the norm before inter_attention
                                   .post_inter_attention_norm   the norm before the MLP
    lm_head.bias                                               always; its table is the embedding

Norms had `layernorm` in their names until 2023-09. In a pipeline the decoder's first stage has a
copy of the embeddings, the last one `word_embeddings_for_head`. Rows of `key_value` are in the
order of those of `query_key_value`.
(megatron/model/t5_model.py, language_model.py and transformer.py at v2.5; legacy/model at
core_v0.12.0.)
"""

from __future__ import annotations

from ..mapping import Rule, RuleTable
from .dialect import Dialect
from .legacy import QKV_ORDERS, layer_rules

_IN, _OUT = "language_model.decoder.layers.{i}", "decoder.layers.{i}"
_NORMS = ("norm", "layernorm")


def _of_decoder() -> list[Rule]:
    """A decoder layer: the norm after self attention is not the MLP's, as it is in a GPT."""
    rules = layer_rules(("language_model.decoder.layers",), skipped="post_attention_")
    renamed = (
        ("post_attention", f"{_OUT}.pre_cross_attn_layernorm.{{p}}"),
        ("post_inter_attention", f"{_OUT}.mlp.linear_fc1.layer_norm_{{p}}"),
    )
    for name, target in renamed:
        rules += [
            Rule(f"{_IN}.{name}_{norm}.{{p}}", target, one_way=norm != _NORMS[0]) for norm in _NORMS
        ]
    parts = (("query", "linear_q"), ("key_value", "linear_kv"), ("dense", "linear_proj"))
    for name, target in parts:
        source = f"{_IN}.inter_attention.{name}.{{p}}"
        rules.append(Rule(source, f"{_OUT}.cross_attention.{target}.{{p}}"))
    return rules


def _final(stack: str) -> list[Rule]:
    return [
        Rule(
            f"language_model.{stack}.final_{norm}.{{p}}",
            f"{stack}.final_layernorm.{{p}}",
            one_way=norm != _NORMS[0],
        )
        for norm in _NORMS
    ]


RULES = RuleTable(
    *(
        Rule(f"language_model.embedding.{name}.weight", f"embedding.{name}.weight")
        for name in ("word_embeddings", "position_embeddings")
    ),
    *layer_rules(("language_model.encoder.layers",), out="encoder.layers.{i}"),
    *_final("encoder"),
    *_of_decoder(),
    *_final("decoder"),
    Rule("lm_head.bias", "output_layer.bias"),
    Rule("word_embeddings_for_head.weight", "output_layer.weight"),
)
DIALECT = Dialect(
    name="legacy_t5",
    rules=RULES,
    generations=(
        (
            r"language_model\.decoder\.layers\..*\.post_inter_attention_norm\..*",
            "Megatron-LM from 2023-09 (core_v0.4) to core_v0.16, legacy T5",
        ),
        (r"language_model\.decoder\.layers\..*", "Megatron-LM v2.5 to 23.08, T5"),
    ),
    orders=QKV_ORDERS,
    tied_copy=r"word_embeddings_for_head\..*",
)
