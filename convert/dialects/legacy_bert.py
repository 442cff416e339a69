"""Megatron-LM's BERT before Megatron-Core: the names of its GPT, and those of two heads.

    language_model.embedding.tokentype_embeddings.weight    a row for each type of token
    language_model.pooler.dense.{weight,bias}                only with the binary head
    lm_head.{bias,dense.weight,dense.bias}                   the head of masked tokens
    lm_head.{layernorm,norm}.{weight,bias}                   `norm` from 2023-09 on
    binary_head.{weight,bias}                                does the second text follow?

(megatron/model/bert_model.py of v1.0 to 23.08; legacy/model/bert_model.py at core_v0.12.0.)
"""

from __future__ import annotations

from dataclasses import replace

from ..mapping import Rule, RuleTable
from . import legacy

_TYPES = "embedding.tokentype_embeddings.weight"
RULES = RuleTable(
    *legacy.RULES.rules,
    Rule(f"language_model.{_TYPES}", _TYPES),
    Rule("tokentype_embeddings.weight", _TYPES, one_way=True),
    Rule("language_model.pooler.dense.{p}", "pooler.dense.{p}"),
    Rule("lm_head.dense.{p}", "lm_head.dense.{p}"),
    Rule("lm_head.norm.{p}", "lm_head.layer_norm.{p}"),
    Rule("lm_head.layernorm.{p}", "lm_head.layer_norm.{p}", one_way=True),
    Rule("lm_head.bias", "output_layer.bias"),
    Rule("binary_head.{p}", "binary_head.{p}"),
)
DIALECT = replace(legacy.DIALECT, name="legacy_bert", kind="bert", rules=RULES)
