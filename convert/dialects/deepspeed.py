"""Megatron-DeepSpeed and BigScience: modules of a pipeline, with the names of Megatron-LM v2.

    word_embeddings.weight, position_embeddings.weight, word_embeddings.norm.weight     embedding
    layers.0.self_attention.query_key_value.weight ...                                  layers
    weight, bias                                                                        final norm
    lm_head.weight                                                                      own head

`word_embeddings.norm` is BigScience's norm after the embedding. Models with fewer key than query
heads had `self_attention.query` and `key_value` apart until 2023-11 (commit 8415d03e), and one
`query_key_value` since. Rows are in Megatron-LM's order of the version; but main since 2024-12
(commit 676a482c) computes with all queries, keys and values of a rank one after another and still
stamps 3.0; the arguments that came with the same commit show it.
(GPTModelPipe, megatron/model/gpt_model.py at 346b89a6, 6acc370a, 4efb479d; BigScience 8387ae17.)
"""

from __future__ import annotations

from ..mapping import Rule, RuleTable
from ..ops import JoinKeyValue
from .dialect import BLOCK, PAIRED, Dialect
from .legacy import QKV_ORDERS, layer_rules

_IN, _OUT = "layers.{i}.self_attention", "decoder.layers.{i}.self_attention"
RULES = RuleTable(
    Rule("word_embeddings.weight", "embedding.word_embeddings.weight"),
    Rule("position_embeddings.weight", "embedding.position_embeddings.weight"),
    Rule("word_embeddings.norm.{p}", "embedding.norm.{p}"),
    *layer_rules(("layers",), skipped="attention."),
    Rule(
        f"{_IN}.{{query,key_value}}.{{p}}", f"{_OUT}.linear_qkv.{{p}}", JoinKeyValue(), one_way=True
    ),
    Rule("{p}", "decoder.final_layernorm.{p}"),
    Rule("lm_head.weight", "output_layer.weight"),
)
DIALECT = Dialect(
    name="megatron_deepspeed",
    rules=RULES,
    generations=(
        (r"word_embeddings\.norm\..*", "BigScience's Megatron-DeepSpeed (2021 to 2022)"),
        (r".*\.self_attention\.key_value\..*", "Megatron-DeepSpeed before 2023-11"),
        (r"layers\..*", "Megatron-DeepSpeed (2021 on)"),
    ),
    orders=QKV_ORDERS,
    ordered_by_names=((r".*\.self_attention\.key_value\..*", PAIRED),),
    ordered_by_arguments={"ds_sequence_parallel_fpdt": BLOCK},
)
