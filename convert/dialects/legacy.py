"""Megatron-LM before Megatron-Core: `language_model` with a `transformer` or an `encoder` in it.

    2019                     transformer.layers.0.attention...           no language_model
    v1.0 ... v2.0            language_model.transformer.layers.0.attention...
    v2.1 ... 23.08           language_model.encoder.layers.0.self_attention...
                             input_layernorm, post_attention_layernorm, final_layernorm
    2023-09 ... core_v0.16   input_norm, post_attention_norm, final_norm
    --transformer-impl transformer_engine      self_attention.layernorm_qkv, layernorm_mlp

All spellings are read, the newest one is the table's other direction. With a tied head and a
pipeline, the last stage holds a copy of the embedding as `word_embeddings_for_head`.
Names and `checkpoint_version` are independent: v2.0 stamps 3.0 on the names of v1.0.
(megatron/model/{language_model,transformer}.py of each release; legacy/model at core_v0.12.0.)
"""

from __future__ import annotations

from ..mapping import Rule, RuleTable
from .dialect import BLOCK, ELEMENT, HEAD, Dialect

# The rows of query_key_value, and since when checkpoint_version says so. (Source:
# fix_query_key_value_ordering in megatron/checkpointing.py at v2.6; commits 51a2e6b0ff,
# a8d4781283 and 9b0083ea03 of 2020.)
QKV_ORDERS = ((2.0, HEAD), (1.0, ELEMENT), (0.0, BLOCK))
_QKV, _FC1 = "self_attention.linear_qkv", "mlp.linear_fc1"
_OUT = "decoder.layers.{i}"
# Within a layer, the newest spelling first; all of one line mean the same.
_LAYER: tuple[tuple[tuple[str, ...], str], ...] = (
    (("input_norm.{p}", "input_layernorm.{p}"), f"{_QKV}.layer_norm_{{p}}"),
    (
        (
            "self_attention.query_key_value.{p}",
            "attention.query_key_value.{p}",
            "self_attention.layernorm_qkv.{p}",
        ),
        f"{_QKV}.{{p}}",
    ),
    (
        ("self_attention.dense.{p}", "attention.dense.{p}", "self_attention.proj.{p}"),
        "self_attention.linear_proj.{p}",
    ),
    (("post_attention_norm.{p}", "post_attention_layernorm.{p}"), f"{_FC1}.layer_norm_{{p}}"),
    (("mlp.dense_h_to_4h.{p}", "layernorm_mlp.fc1_{p}"), f"{_FC1}.{{p}}"),
    (("mlp.dense_4h_to_h.{p}", "layernorm_mlp.fc2_{p}"), "mlp.linear_fc2.{p}"),
)
_FUSED_NORMS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("self_attention.layernorm_qkv.layer_norm_{p}",), f"{_QKV}.layer_norm_{{p}}"),
    (("layernorm_mlp.layer_norm_{p}",), f"{_FC1}.layer_norm_{{p}}"),
)
_WRITTEN = {target: names[0] for names, target in _LAYER}
_STACKS = ("language_model.encoder", "language_model.transformer", "transformer")
_EMBEDDINGS = ("word_embeddings.weight", "position_embeddings.weight")


def layer_rules(stacks: tuple[str, ...], skipped: str = " ", out: str = _OUT) -> list[Rule]:
    """A layer's names in all spellings, below each of these; only the very first is written.

    Names within a layer that begin with `skipped` are left out; `out` is what the layer is called
    on the other side.
    """
    rules = []
    for names, target in (*_LAYER, *_FUSED_NORMS):
        for stack in stacks:
            for name in names:
                if name.startswith(skipped):
                    continue
                written = stack == stacks[0] and name == _WRITTEN.get(target)
                source = f"{stack}.{{i}}.{name}"
                rules.append(Rule(source, f"{out}.{target}", one_way=not written))
    return rules


def _rules() -> RuleTable:
    embeddings = [Rule(f"language_model.embedding.{n}", f"embedding.{n}") for n in _EMBEDDINGS]
    layers = layer_rules(tuple(f"{stack}.layers" for stack in _STACKS))
    final = [
        Rule(f"{stack}.{norm}.{{p}}", "decoder.final_layernorm.{p}", one_way=number > 0)
        for number, (stack, norm) in enumerate(
            (stack, norm) for stack in _STACKS for norm in ("final_norm", "final_layernorm")
        )
    ]
    return RuleTable(
        *embeddings,
        *layers,
        *final,
        Rule("language_model.output_layer.weight", "output_layer.weight"),
        Rule("word_embeddings_for_head.weight", "output_layer.weight", one_way=True),
        *(Rule(name, f"embedding.{name}", one_way=True) for name in _EMBEDDINGS),
    )


RULES = _rules()
DIALECT = Dialect(
    name="legacy",
    rules=RULES,
    generations=(
        (r"transformer\.layers\..*", "Megatron-LM of 2019, before v1.0"),
        (r"language_model\.transformer\.layers\..*", "Megatron-LM v1.0 to v2.0 (2020)"),
        (r".*\.layernorm_qkv\..*", "Megatron-LM 23.04 on, Transformer Engine layers"),
        (
            r"language_model\.encoder\.layers\..*\.(input|post_attention)_norm\..*",
            "Megatron-LM from 2023-09 (core_v0.4) to core_v0.16, legacy model",
        ),
        (r"language_model\.encoder\.layers\..*", "Megatron-LM v2.1 to 23.08 (2021 to 2023)"),
    ),
    orders=QKV_ORDERS,
    # Transformer Engine's own layers, whatever the stamp; and Megatron-DeepSpeed without its
    # pipeline, for which see its dialect.
    ordered_by_names=((r".*\.layernorm_qkv\..*", HEAD),),
    ordered_by_arguments={"ds_sequence_parallel_fpdt": BLOCK},
    tied_copy=r"word_embeddings_for_head\..*",
)
