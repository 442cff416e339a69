"""The names of a decoder's tensors as most classes of transformers have them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from ..architecture import Architecture
from ..mapping import Rule, RuleTable
from ..ops import SplitGated, SplitQKV, TrimVocab

_IN, _OUT = "decoder.layers.{i}", "model.layers.{i}"
_MTP_IN, _MTP_OUT = "mtp.layers.{i}", "model.mtp.layers.{i}"
_ATTENTION = f"{_IN}.self_attention"


@dataclass(frozen=True)
class ExpertNames:
    """What a class calls the parts of a layer with experts, within the layer.

    Attributes:
        router: the matrix that scores experts.
        bias: what is added to scores when experts are chosen.
        expert: one expert; its matrices are called as `matrices` says.
        shared: the MLP beside them.
        shared_gate: its gate.
        matrices: gate, up and down.
    """

    router: str = "mlp.gate.weight"
    bias: str = "mlp.gate.e_score_correction_bias"
    expert: str = "mlp.experts.{e}"
    shared: str = "mlp.shared_experts"
    shared_gate: str = "mlp.shared_expert_gate.weight"
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


EXPERTS = ExpertNames()


def decoder_rules(
    architecture: Architecture, experts: ExpertNames = EXPERTS, *, mtp: bool = False
) -> RuleTable:
    """The table for an architecture, canonical names on the left.

    Args:
        architecture: the model.
        experts: what the class calls what belongs to experts.
        mtp: whether the class has layers that predict further tokens, called as Megatron does
            within `model.`.
    """
    a = architecture
    return _table(a.gated_linear_unit, a.multi_latent_attention, experts, mtp)


@cache
def _table(gated: bool, latent: bool, experts: ExpertNames, mtp: bool) -> RuleTable:
    layer = (*(_latent() if latent else _plain()), *_mlps(gated, experts), *_norms())
    return RuleTable(
        Rule("embedding.word_embeddings.weight", "model.embed_tokens.weight", TrimVocab()),
        Rule("embedding.position_embeddings.weight", "model.embed_positions.weight"),
        Rule("embedding.norm.{p}", "model.embed_norm.{p}"),
        *layer,
        Rule("decoder.final_layernorm.{p}", "model.norm.{p}"),
        *(_mtp(layer) if mtp else ()),
        Rule("output_layer.weight", "lm_head.weight", TrimVocab()),
    )


def _plain() -> Iterator[Rule]:
    """Attention with a key and a value for each group of heads."""
    yield Rule(
        f"{_ATTENTION}.linear_qkv.{{p}}",
        f"{_OUT}.self_attn.{{q_proj,k_proj,v_proj}}.{{p}}",
        SplitQKV(),
    )
    yield Rule(f"{_ATTENTION}.linear_proj.{{p}}", f"{_OUT}.self_attn.o_proj.{{p}}")
    yield Rule(f"{_ATTENTION}.q_layernorm.{{p}}", f"{_OUT}.self_attn.q_norm.{{p}}")
    yield Rule(f"{_ATTENTION}.k_layernorm.{{p}}", f"{_OUT}.self_attn.k_norm.{{p}}")


def _latent() -> Iterator[Rule]:
    """Latent attention: rows are in one order on both sides, per head [not rotated, rotated].

    (Source: get_query_key_value_tensors, transformer/multi_latent_attention.py; DeepseekV3Attention
    of transformers.)
    """
    for ours, theirs in (
        ("linear_q_proj.weight", "q_proj.weight"),
        ("linear_q_down_proj.weight", "q_a_proj.weight"),
        ("linear_q_up_proj.layer_norm_{p}", "q_a_layernorm.{p}"),
        ("linear_q_up_proj.weight", "q_b_proj.weight"),
        ("linear_kv_down_proj.weight", "kv_a_proj_with_mqa.weight"),
        ("linear_kv_up_proj.layer_norm_{p}", "kv_a_layernorm.{p}"),
        ("linear_kv_up_proj.weight", "kv_b_proj.weight"),
        ("linear_proj.{p}", "o_proj.{p}"),
    ):
        yield Rule(f"{_ATTENTION}.{ours}", f"{_OUT}.self_attn.{theirs}")


def _mlps(gated: bool, names: ExpertNames) -> Iterator[Rule]:
    """The MLP of a dense layer; router, experts and shared MLP of another."""
    yield from _mlp(f"{_IN}.mlp", f"{_OUT}.mlp", gated, EXPERTS.matrices)
    yield Rule(f"{_IN}.mlp.router.weight", f"{_OUT}.{names.router}")
    yield Rule(f"{_IN}.mlp.router.expert_bias", f"{_OUT}.{names.bias}")
    yield from _mlp(f"{_IN}.mlp.experts.{{e}}", f"{_OUT}.{names.expert}", gated, names.matrices)
    yield from _mlp(f"{_IN}.mlp.shared_experts", f"{_OUT}.{names.shared}", gated, EXPERTS.matrices)
    yield Rule(f"{_IN}.mlp.shared_experts.gate_weight", f"{_OUT}.{names.shared_gate}")


def _mlp(ours: str, theirs: str, gated: bool, names: tuple[str, str, str]) -> Iterator[Rule]:
    gate, up, down = names
    if gated:
        yield Rule(f"{ours}.linear_fc1.{{p}}", f"{theirs}.{{{gate},{up}}}.{{p}}", SplitGated())
    else:
        yield Rule(f"{ours}.linear_fc1.{{p}}", f"{theirs}.{up}.{{p}}")
    yield Rule(f"{ours}.linear_fc2.{{p}}", f"{theirs}.{down}.{{p}}")


def _norms() -> Iterator[Rule]:
    yield Rule(f"{_ATTENTION}.linear_qkv.layer_norm_{{p}}", f"{_OUT}.input_layernorm.{{p}}")
    yield Rule(f"{_IN}.mlp.linear_fc1.layer_norm_{{p}}", f"{_OUT}.post_attention_layernorm.{{p}}")


def _mtp(layer: tuple[Rule, ...]) -> Iterator[Rule]:
    """Layers that predict further tokens, each with a layer of the decoder within it."""
    for norm in ("enorm", "hnorm"):
        yield Rule(f"{_MTP_IN}.{norm}.{{p}}", f"{_MTP_OUT}.{norm}.{{p}}")
    yield Rule(f"{_MTP_IN}.eh_proj.weight", f"{_MTP_OUT}.eh_proj.weight")
    for rule in layer:
        yield replace(
            rule,
            source=rule.source.replace(_IN, f"{_MTP_IN}.transformer_layer"),
            target=rule.target.replace(_OUT, f"{_MTP_OUT}.transformer_layer"),
        )
    yield Rule(f"{_MTP_IN}.final_layernorm.{{p}}", f"{_MTP_OUT}.final_layernorm.{{p}}")
