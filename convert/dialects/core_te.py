"""Megatron-Core with the TransformerEngine spec: norms are fused into the linear that follows.

Distributed checkpoints spell dense layers like this whatever the spec; so do canonical names. The
norm before experts and that before latent attention stay modules of their own, and canonical names
call them as in dense layers; distributed checkpoints of the local spec do so with the first.
(megatron/core/models/gpt/gpt_layer_specs.py; the layers that predict further tokens,
megatron/core/transformer/multi_token_prediction.py; T5, megatron/core/models/T5/t5_model.py and
t5_spec.py, which give two names to a few modules: `COPIES` in parameters.py.)
"""

from collections.abc import Iterator
from dataclasses import replace

from ..mapping import Rule, RuleTable
from .dialect import Dialect
from .modules import Modules

LAYER, MTP_LAYER = "decoder.layers.{i}.", "mtp.layers.{i}.transformer_layer."
ENCODER_LAYER = "encoder.layers.{i}."
_NEWER_MTP_LAYER = "mtp.layers.{i}.mtp_model_layer."
ROUTER = f"{LAYER}mlp.router.weight"
LATENT = f"{LAYER}self_attention.linear_kv_down_proj.weight"
NORM_1 = f"{LAYER}self_attention.linear_qkv.layer_norm_{{p}}"
NORM_2 = f"{LAYER}mlp.linear_fc1.layer_norm_{{p}}"


def same(*names: str) -> tuple[Rule, ...]:
    """Names that are spelled alike on either side."""
    return tuple(Rule(name, name) for name in names)


def with_mtp(*rules: Rule) -> Iterator[Rule]:
    """The rules of a decoder layer, and those of the layers that predict further tokens."""
    yield from rules
    yield from same(
        "mtp.layers.{i}.enorm.{p}",
        "mtp.layers.{i}.hnorm.{p}",
        "mtp.layers.{i}.eh_proj.weight",
    )
    for rule in rules:
        texts = {
            name: text.replace(LAYER, MTP_LAYER)
            for name in ("source", "target", "beside", "unless")
            if (text := getattr(rule, name)) is not None
        }
        yield replace(rule, **texts)
        # What core_v0.18 and later call that layer in `torch` checkpoints; distributed ones keep
        # the old name.
        newer = {
            name: text.replace(MTP_LAYER, _NEWER_MTP_LAYER)
            for name, text in texts.items()
            if name != "target"
        }
        yield replace(rule, **{**texts, **newer}, one_way=True)
    yield from same("mtp.layers.{i}.final_layernorm.{p}")


def of_encoder(*rules: Rule) -> Iterator[Rule]:
    """The rules of an encoder layer, made from those of a plain decoder layer."""
    for rule in rules:
        yield Rule(
            rule.source.replace(LAYER, ENCODER_LAYER), rule.target.replace(LAYER, ENCODER_LAYER)
        )


BEFORE = same(
    "embedding.word_embeddings.weight",
    "embedding.position_embeddings.weight",
    "position_embeddings.weight",
    "encoder_relative_pos_emb.relative_attention_bias.weight",
    "decoder_relative_pos_emb.relative_attention_bias.weight",
)
# What every spec spells alike.
ATTENTION = same(
    f"{LAYER}self_attention.linear_qkv.{{p}}",
    f"{LAYER}self_attention.linear_q_proj.weight",
    f"{LAYER}self_attention.linear_q_down_proj.weight",
    f"{LAYER}self_attention.linear_q_up_proj.weight",
    f"{LAYER}self_attention.linear_kv_down_proj.weight",
    f"{LAYER}self_attention.linear_kv_up_proj.weight",
    f"{LAYER}self_attention.linear_proj.{{p}}",
)
MLP = same(
    f"{LAYER}mlp.linear_fc1.{{p}}",
    f"{LAYER}mlp.linear_fc2.{{p}}",
    f"{LAYER}mlp.router.weight",
    f"{LAYER}mlp.router.expert_bias",
    f"{LAYER}mlp.experts.{{e}}.linear_fc1.{{p}}",
    f"{LAYER}mlp.experts.{{e}}.linear_fc2.{{p}}",
    f"{LAYER}mlp.shared_experts.linear_fc1.{{p}}",
    f"{LAYER}mlp.shared_experts.linear_fc2.{{p}}",
    f"{LAYER}mlp.shared_experts.gate_weight",
)
PLAIN_LAYER = same(
    f"{LAYER}self_attention.linear_qkv.{{p}}",
    f"{LAYER}self_attention.linear_proj.{{p}}",
    f"{LAYER}mlp.linear_fc1.{{p}}",
    f"{LAYER}mlp.linear_fc2.{{p}}",
)
AFTER_ENCODER = same("encoder.final_layernorm.{p}")
CROSS_ATTENTION = same(
    f"{LAYER}pre_cross_attn_layernorm.{{p}}",
    f"{LAYER}cross_attention.linear_q.{{p}}",
    f"{LAYER}cross_attention.linear_kv.{{p}}",
    f"{LAYER}cross_attention.linear_proj.{{p}}",
)
AFTER = same(
    "decoder.final_layernorm.{p}",
    "output_layer.{p}",
    "lm_head.output_layer.{p}",
)
RULES = RuleTable(
    *BEFORE,
    *of_encoder(Rule(NORM_1, NORM_1), Rule(NORM_2, NORM_2), *PLAIN_LAYER),
    *AFTER_ENCODER,
    *with_mtp(
        Rule(NORM_1, NORM_1, unless=LATENT),
        Rule(f"{LAYER}input_layernorm.{{p}}", NORM_1, beside=LATENT),
        *same(
            f"{LAYER}self_attention.q_layernorm.{{p}}",
            f"{LAYER}self_attention.k_layernorm.{{p}}",
            f"{LAYER}self_attention.linear_q_up_proj.layer_norm_{{p}}",
            f"{LAYER}self_attention.linear_kv_up_proj.layer_norm_{{p}}",
        ),
        *ATTENTION,
        *CROSS_ATTENTION,
        Rule(NORM_2, NORM_2, unless=ROUTER),
        Rule(f"{LAYER}pre_mlp_layernorm.{{p}}", NORM_2, beside=ROUTER),
        Rule(NORM_2, NORM_2, beside=ROUTER, one_way=True),
        *MLP,
    ),
    *AFTER,
)
DIALECT = Dialect(
    name="core_te",
    rules=RULES,
    generations=((r".*", "Megatron-Core, Transformer Engine layers or a distributed checkpoint"),),
    is_core=True,
)
# In the order in which a layer builds them (transformer/attention.py,
# transformer/multi_latent_attention.py, transformer/moe/moe_layer.py).
PROJECTIONS = (
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "self_attention.linear_q_proj",
    "self_attention.linear_q_down_proj",
    "self_attention.linear_q_up_proj",
    "self_attention.linear_kv_down_proj",
    "self_attention.linear_kv_up_proj",
)
_EXPERTS = (
    "mlp.experts.local_experts.{e}.linear_fc1",
    "mlp.experts.local_experts.{e}.linear_fc2",
    "mlp.experts.experts.{e}.linear_fc1",
    "mlp.experts.experts.{e}.linear_fc2",
    "mlp.experts.linear_fc1",
    "mlp.experts.linear_fc2",
)
_SHARED = ("mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2")
MLPS = ("mlp.linear_fc1", "mlp.linear_fc2", *_EXPERTS, *_SHARED)
LAYER_MLPS = (
    *MLPS[:2],
    "mlp.router",
    "mlp.experts",
    *_EXPERTS,
    "mlp.shared_experts",
    *_SHARED,
)
_NORMS = ("input_layernorm", "self_attention.q_layernorm", "self_attention.k_layernorm")
_LAYER = (
    "input_layernorm",
    "self_attention.core_attention",
    *PROJECTIONS,
    *_NORMS[1:],
    "pre_mlp_layernorm",
    *LAYER_MLPS,
)
_AFTER = ("decoder.final_layernorm", "output_layer")
_MTP = (("enorm", "hnorm", "eh_proj"), ("final_layernorm",))
MODULES = Modules(
    before=("embedding.word_embeddings", "embedding.position_embeddings"),
    layer=_LAYER,
    after=_AFTER,
    mtp=_MTP,
    stateful=frozenset(
        (
            "self_attention.core_attention",
            "pre_mlp_layernorm",
            *_NORMS,
            *PROJECTIONS,
            *MLPS,
            *_AFTER,
            *_MTP[0],
            *_MTP[1],
        )
    ),
    bare=frozenset(("self_attention.core_attention", "output_layer")),
)
_T5_ATTENTION = tuple(
    f"self_attention.{module}" for module in ("core_attention", "linear_proj", "linear_qkv")
)
_T5_CROSS = tuple(
    f"cross_attention.{module}"
    for module in ("core_attention", "linear_proj", "linear_q", "linear_kv")
)
_T5_MLP = ("mlp.linear_fc1", "mlp.linear_fc2")
_T5_LAYER = (*_T5_ATTENTION, "pre_cross_attn_layernorm", *_T5_CROSS, *_T5_MLP)
_T5_AFTER = ("decoder.final_layernorm", "lm_head.output_layer", "output_layer")
T5_MODULES = Modules(
    before=(
        "embedding.word_embeddings",
        "embedding.position_embeddings",
        "position_embeddings",
        "encoder_relative_pos_emb.relative_attention_bias",
        "decoder_relative_pos_emb.relative_attention_bias",
    ),
    encoder=(*_T5_ATTENTION, *_T5_MLP),
    between=("encoder.final_layernorm",),
    layer=_T5_LAYER,
    after=_T5_AFTER,
    mtp=((), ()),
    stateful=frozenset((*_T5_LAYER, "encoder.final_layernorm", *_T5_AFTER)),
    bare=frozenset((_T5_ATTENTION[0], _T5_CROSS[0])),
)
