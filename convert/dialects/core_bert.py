"""Megatron-Core's BERT: an `encoder` in the names of either spec, and two heads.

    encoder.layers.0.self_attention.linear_qkv.weight ...    as in core_te.py or core_local.py
    embedding.tokentype_embeddings.weight, pooler.dense.*    see legacy_bert.py
    lm_head.{dense,layer_norm}.*, binary_head.*
    output_layer.bias                                        of masked tokens, beside a tied weight

(megatron/core/models/bert/, core_v0.12.0 and 0.16.1.)
"""

from __future__ import annotations

from ..mapping import Rule, RuleTable
from .core_te import same
from .dialect import Dialect

_IN, _OUT = "encoder.layers.{i}", "decoder.layers.{i}"
_NORM_1, _NORM_2 = "self_attention.linear_qkv.layer_norm_{p}", "mlp.linear_fc1.layer_norm_{p}"


RULES = RuleTable(
    *same(
        "embedding.word_embeddings.weight",
        "embedding.position_embeddings.weight",
        "embedding.tokentype_embeddings.weight",
    ),
    *(
        Rule(f"{_IN}.{name}", f"{_OUT}.{name}")
        for name in (
            _NORM_1,
            "self_attention.linear_qkv.{p}",
            "self_attention.linear_proj.{p}",
            _NORM_2,
            "mlp.linear_fc1.{p}",
            "mlp.linear_fc2.{p}",
        )
    ),
    Rule(f"{_IN}.input_layernorm.{{p}}", f"{_OUT}.{_NORM_1}", one_way=True),
    Rule(f"{_IN}.pre_mlp_layernorm.{{p}}", f"{_OUT}.{_NORM_2}", one_way=True),
    Rule("encoder.final_layernorm.{p}", "decoder.final_layernorm.{p}"),
    *same(
        "pooler.dense.{p}",
        "lm_head.dense.{p}",
        "lm_head.layer_norm.{p}",
        "output_layer.{p}",
        "binary_head.{p}",
    ),
)
DIALECT = Dialect(
    name="core_bert",
    kind="bert",
    rules=RULES,
    generations=(
        (r"encoder\.layers\.\d+\.input_layernorm\..*", "Megatron-Core's BERT, its own layers"),
        (r".*", "Megatron-Core's BERT, Transformer Engine layers or a distributed checkpoint"),
    ),
    is_core=True,
)
