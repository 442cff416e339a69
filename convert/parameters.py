"""The parameters a model must have, and how tensor parallelism cuts each of them.

One line per canonical name: shape, the axis that ranks split, and when it exists. Readers join
shards by it, completeness is judged by it, writers cut by it.
(Source: the `ColumnParallelLinear` / `RowParallelLinear` / `VocabParallelEmbedding` choices of
megatron/core/models/gpt and megatron/core/transformer, 0.16.1.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

from .architecture import Architecture
from .boxes import Ints
from .errors import CorruptError, IncompleteError, MappingError
from .mapping import shorten

Condition = Callable[[Architecture], bool]
LayerCondition = Callable[[Architecture, int], bool]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A canonical parameter.

    Attributes:
        name: canonical name; `{i}` stands for the layer, `{e}` for the expert.
        shape: sizes, given the architecture.
        split: the axis ranks divide; None if every rank holds all of it. Ranks of expert tensor
            parallelism divide those with `{e}`.
        when: whether this model has it.
        layers: which layers have it, if its name has one.
        blocks: how many parts of the split axis are divided on their own: 2 for `linear_fc1` of
            a gated MLP, whose rank shard is [gate_r | up_r].
        may_be_whole: whether ranks hold all of it in some specs and a part in others; the shape
            shows which.
    """

    name: str
    shape: Callable[[Architecture], Ints]
    split: int | None = None
    when: Condition = lambda a: True
    layers: LayerCondition = lambda a, i: True
    blocks: Callable[[Architecture], int] = lambda a: 1
    may_be_whole: bool = False

    @property
    def of_expert(self) -> bool:
        """Whether there is one for each expert."""
        return "{e}" in self.name


def _gated(a: Architecture) -> int:
    return 2 if a.gated_linear_unit else 1


def _norm(name: str, size: Callable[[Architecture], int], when: Condition) -> Iterator[Parameter]:
    """A norm's weight and bias; `name` ends where theirs differ."""
    yield Parameter(f"{name}weight", lambda a: (size(a),), when=when)
    yield Parameter(f"{name}bias", lambda a: (size(a),), when=lambda a: when(a) and a.has_norm_bias)


def _linear(
    name: str, shape: Callable[[Architecture], tuple[int, int]], when: Condition
) -> Iterator[Parameter]:
    """A linear layer with a bias that every rank holds all of."""
    yield Parameter(f"{name}.weight", shape, when=when)
    yield Parameter(f"{name}.bias", lambda a: shape(a)[:1], when=when)


def _mlp(
    name: str,
    width: Callable[[Architecture], int],
    when: Condition = lambda a: True,
    layers: LayerCondition = lambda a, i: True,
) -> Iterator[Parameter]:
    """The two linear layers of an MLP, an expert or a shared expert."""

    def biased(a: Architecture) -> bool:
        return when(a) and a.add_bias_linear

    def rows(a: Architecture) -> int:
        return a.fc1_size(width(a))

    yield Parameter(
        f"{name}.linear_fc1.weight", lambda a: (rows(a), a.hidden_size), 0, when, layers, _gated
    )
    yield Parameter(f"{name}.linear_fc1.bias", lambda a: (rows(a),), 0, biased, layers, _gated)
    yield Parameter(
        f"{name}.linear_fc2.weight", lambda a: (a.hidden_size, width(a)), 1, when, layers
    )
    yield Parameter(f"{name}.linear_fc2.bias", lambda a: (a.hidden_size,), None, biased, layers)


def _always(a: Architecture) -> bool:
    return True


def _is_latent(a: Architecture) -> bool:
    return a.multi_latent_attention


def _is_plain(a: Architecture) -> bool:
    return not a.multi_latent_attention


def _is_bert(a: Architecture) -> bool:
    return a.kind == "bert"


def _has_binary_head(a: Architecture) -> bool:
    return _is_bert(a) and a.bert_binary_head


def _is_dense(a: Architecture, layer: int) -> bool:
    return not a.moe_layers[layer]


def _is_sparse(a: Architecture, layer: int) -> bool:
    return a.moe_layers[layer]


def _is_t5(a: Architecture) -> bool:
    return a.kind == "t5"


def _is_tied(a: Architecture) -> bool:
    return not a.untie_embeddings_and_output_weights


def _of_encoder(parameters: Iterable[Parameter]) -> Iterator[Parameter]:
    """The parameters that a T5's encoder has as its decoder does: those of plain layers."""
    for p in parameters:
        if not p.of_expert and p.layers is not _is_sparse:
            name = p.name.replace("decoder.", "encoder.")
            yield replace(p, name=name, when=_both(_is_t5, p.when), layers=lambda a, i: True)


def _both(one: Condition, other: Condition) -> Condition:
    return lambda a: one(a) and other(a)


_ATTENTION = "decoder.layers.{i}.self_attention"
_CROSS = "decoder.layers.{i}.cross_attention"
_MLP = "decoder.layers.{i}.mlp"
_MTP = "mtp.layers.{i}"
_EMBEDDINGS = (
    Parameter(
        "embedding.word_embeddings.weight", lambda a: (a.padded_vocab_size, a.hidden_size), 0
    ),
    Parameter(
        "embedding.position_embeddings.weight",
        lambda a: (a.max_position_embeddings, a.hidden_size),
        when=lambda a: a.has_position_table,
    ),
    Parameter(
        "embedding.tokentype_embeddings.weight",
        lambda a: (a.num_tokentypes, a.hidden_size),
        when=lambda a: _is_bert(a) and a.num_tokentypes > 0,
    ),
    *_norm("embedding.norm.", lambda a: a.hidden_size, lambda a: a.embedding_norm),
    *(
        Parameter(
            f"{side}_relative_pos_emb.relative_attention_bias.weight",
            lambda a: (a.relative_attention_num_buckets, a.num_attention_heads),
            when=lambda a: a.position_embedding_type == "relative",
        )
        for side in ("encoder", "decoder")
    ),
)
_SELF_ATTENTION = (
    *_norm(f"{_ATTENTION}.linear_qkv.layer_norm_", lambda a: a.hidden_size, _always),
    Parameter(
        f"{_ATTENTION}.linear_qkv.weight", lambda a: (a.qkv_size, a.hidden_size), 0, _is_plain
    ),
    Parameter(
        f"{_ATTENTION}.linear_qkv.bias",
        lambda a: (a.qkv_size,),
        0,
        when=lambda a: _is_plain(a) and a.has_qkv_bias,
    ),
    *_norm(
        f"{_ATTENTION}.q_layernorm.",
        lambda a: a.kv_channels,
        lambda a: _is_plain(a) and a.qk_layernorm,
    ),
    *_norm(
        f"{_ATTENTION}.k_layernorm.",
        lambda a: a.kv_channels,
        lambda a: _is_plain(a) and a.qk_layernorm,
    ),
    Parameter(
        f"{_ATTENTION}.linear_q_proj.weight",
        lambda a: (a.num_attention_heads * a.kv_channels, a.hidden_size),
        0,
        when=lambda a: _is_latent(a) and a.q_lora_rank is None,
    ),
    Parameter(
        f"{_ATTENTION}.linear_q_down_proj.weight",
        lambda a: (a.q_lora_rank or 0, a.hidden_size),
        0,
        when=lambda a: _is_latent(a) and a.q_lora_rank is not None,
        may_be_whole=True,
    ),
    *_norm(
        f"{_ATTENTION}.linear_q_up_proj.layer_norm_",
        lambda a: a.q_lora_rank or 0,
        lambda a: _is_latent(a) and a.q_lora_rank is not None and a.qk_layernorm,
    ),
    Parameter(
        f"{_ATTENTION}.linear_q_up_proj.weight",
        lambda a: (a.num_attention_heads * a.kv_channels, a.q_lora_rank or 0),
        0,
        when=lambda a: _is_latent(a) and a.q_lora_rank is not None,
    ),
    Parameter(
        f"{_ATTENTION}.linear_kv_down_proj.weight",
        lambda a: (a.kv_lora_rank + a.qk_pos_emb_head_dim, a.hidden_size),
        0,
        when=_is_latent,
        may_be_whole=True,
    ),
    *_norm(
        f"{_ATTENTION}.linear_kv_up_proj.layer_norm_",
        lambda a: a.kv_lora_rank,
        lambda a: _is_latent(a) and a.qk_layernorm,
    ),
    Parameter(
        f"{_ATTENTION}.linear_kv_up_proj.weight",
        lambda a: (a.num_attention_heads * (a.qk_head_dim + a.v_head_dim), a.kv_lora_rank),
        0,
        when=_is_latent,
    ),
    Parameter(
        f"{_ATTENTION}.linear_proj.weight",
        lambda a: (a.hidden_size, a.attention_size),
        1,
    ),
    Parameter(
        f"{_ATTENTION}.linear_proj.bias",
        lambda a: (a.hidden_size,),
        when=lambda a: a.add_bias_linear,
    ),
)
_CROSS_ATTENTION = (
    *_norm("decoder.layers.{i}.pre_cross_attn_layernorm.", lambda a: a.hidden_size, _is_t5),
    Parameter(f"{_CROSS}.linear_q.weight", lambda a: (a.attention_size, a.hidden_size), 0, _is_t5),
    Parameter(
        f"{_CROSS}.linear_q.bias",
        lambda a: (a.attention_size,),
        0,
        when=lambda a: _is_t5(a) and a.add_bias_linear,
    ),
    Parameter(f"{_CROSS}.linear_kv.weight", lambda a: (a.kv_size, a.hidden_size), 0, _is_t5),
    Parameter(
        f"{_CROSS}.linear_kv.bias",
        lambda a: (a.kv_size,),
        0,
        when=lambda a: _is_t5(a) and a.add_bias_linear,
    ),
    Parameter(
        f"{_CROSS}.linear_proj.weight", lambda a: (a.hidden_size, a.attention_size), 1, _is_t5
    ),
    Parameter(
        f"{_CROSS}.linear_proj.bias",
        lambda a: (a.hidden_size,),
        when=lambda a: _is_t5(a) and a.add_bias_linear,
    ),
)
_MLPS = (
    *_norm(
        f"{_MLP}.linear_fc1.layer_norm_", lambda a: a.hidden_size, lambda a: not a.shared_layernorm
    ),
    *_mlp(_MLP, lambda a: a.ffn_hidden_size, layers=_is_dense),
    Parameter(
        f"{_MLP}.router.weight", lambda a: (a.num_experts or 0, a.hidden_size), layers=_is_sparse
    ),
    Parameter(
        f"{_MLP}.router.expert_bias",
        lambda a: (a.num_experts or 0,),
        when=lambda a: a.moe_router_enable_expert_bias,
        layers=_is_sparse,
    ),
    *_mlp(f"{_MLP}.experts.{{e}}", lambda a: a.moe_ffn_hidden_size, layers=_is_sparse),
    *_mlp(
        f"{_MLP}.shared_experts",
        lambda a: a.moe_shared_expert_intermediate_size or 0,
        lambda a: a.moe_shared_expert_intermediate_size is not None,
        _is_sparse,
    ),
    Parameter(
        f"{_MLP}.shared_experts.gate_weight",
        lambda a: (1, a.hidden_size),
        when=lambda a: a.moe_shared_expert_gate,
        layers=_is_sparse,
    ),
)
_FINAL = tuple(
    _norm("decoder.final_layernorm.", lambda a: a.hidden_size, lambda a: a.final_layernorm)
)
PARAMETERS = (
    *_EMBEDDINGS,
    *_of_encoder((*_SELF_ATTENTION, *_MLPS, *_FINAL)),
    *_SELF_ATTENTION,
    *_CROSS_ATTENTION,
    *_MLPS,
    *_FINAL,
    *_norm(f"{_MTP}.enorm.", lambda a: a.hidden_size, _always),
    *_norm(f"{_MTP}.hnorm.", lambda a: a.hidden_size, _always),
    Parameter(f"{_MTP}.eh_proj.weight", lambda a: (a.hidden_size, 2 * a.hidden_size), 0),
    *_norm(f"{_MTP}.final_layernorm.", lambda a: a.hidden_size, _always),
    *_linear("pooler.dense", lambda a: (a.hidden_size, a.hidden_size), _has_binary_head),
    *_linear("lm_head.dense", lambda a: (a.hidden_size, a.hidden_size), _is_bert),
    *_norm("lm_head.layer_norm.", lambda a: a.hidden_size, _is_bert),
    Parameter(
        "output_layer.weight",
        lambda a: (a.padded_vocab_size, a.hidden_size),
        0,
        when=lambda a: a.untie_embeddings_and_output_weights,
    ),
    # Only a table of its own is without (T5LMHead, models/T5/t5_model.py).
    Parameter(
        "output_layer.bias",
        lambda a: (a.padded_vocab_size,),
        0,
        when=lambda a: _is_bert(a) or (_is_t5(a) and _is_tied(a)),
    ),
    *_linear("binary_head", lambda a: (2, a.hidden_size), _has_binary_head),
)
# Those with a row or an element per token.
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias")
# Kept in float32 whatever the others are in: what is learnt of it is too small for fewer bits
# (TopKRouter._maintain_float32_expert_bias, core/transformer/moe/router.py).
FLOAT32 = ".router.expert_bias"
# Modules that a T5 has under two names, and so stores twice -> the canonical one (T5Model.__init__,
# models/T5/t5_model.py).
COPIES = {
    "position_embeddings.weight": "embedding.position_embeddings.weight",
    "lm_head.output_layer.weight": "output_layer.weight",
    "lm_head.output_layer.bias": "output_layer.bias",
}
_BY_NAME = {parameter.name: parameter for parameter in PARAMETERS}
_LAYERS, _MTP_LAYER = "decoder.layers.{i}.", "mtp.layers.{i}.transformer_layer."
_ENCODER_LAYERS = "encoder.layers.{i}."
_NUMBERS = (
    (re.compile(r"^mtp\.layers\.\d+\.transformer_layer\."), _LAYERS),
    (re.compile(r"(?<=^(?:en|de)coder\.layers\.)\d+(?=\.)"), "{i}"),
    (re.compile(r"(?<=^mtp\.layers\.)\d+(?=\.)"), "{i}"),
    (re.compile(r"(?<=\.mlp\.experts\.)\d+(?=\.)"), "{e}"),
)


@lru_cache(maxsize=1 << 17)
def find(name: str) -> Parameter | None:
    """The table line of a concrete canonical name, or of a name in `COPIES`.

    A layer that predicts further tokens has a layer of the decoder within it.
    """
    name = COPIES.get(name, name)
    for pattern, template in _NUMBERS:
        name = pattern.sub(template, name)
    return _BY_NAME.get(name)


def expected(architecture: Architecture) -> dict[str, Ints]:
    """Canonical name -> shape of every parameter this architecture has, in model order."""
    a = architecture
    found: dict[str, Ints] = {}
    ours = [parameter for parameter in PARAMETERS if parameter.when(a)]
    encoder = [p for p in ours if p.name.startswith(_ENCODER_LAYERS)]
    layer = [p for p in ours if p.name.startswith(_LAYERS)]
    mtp = [p for p in ours if p.name.startswith(_MTP)]
    first = next(number for number, p in enumerate(ours) if p is layer[0])
    start = next(number for number, p in enumerate(ours) if "{i}" in p.name)
    found |= {p.name: p.shape(a) for p in ours[:start]}
    for number in range(a.encoder_num_layers):
        found |= _of_layer(a, encoder, number, _ENCODER_LAYERS.replace("{i}", str(number)))
    found |= {p.name: p.shape(a) for p in ours[start:first] if "{i}" not in p.name}
    for number in range(a.num_layers):
        found |= _of_layer(a, layer, number, _LAYERS.replace("{i}", str(number)))
    found |= {p.name: p.shape(a) for p in ours[first:] if "{i}" not in p.name}
    for number in range(a.mtp_num_layers):
        found |= {p.name.replace("{i}", str(number)): p.shape(a) for p in mtp}
        # It is built like the last layer of the decoder (get_gpt_mtp_block_spec,
        # models/gpt/gpt_layer_specs.py).
        prefix = _MTP_LAYER.replace("{i}", str(number))
        found |= _of_layer(a, layer, a.num_layers - 1, prefix)
    return found


def _of_layer(
    a: Architecture, parameters: Iterable[Parameter], number: int, prefix: str
) -> dict[str, Ints]:
    """The parameters that a layer like this one has, under a prefix."""
    found: dict[str, Ints] = {}
    experts: list[Parameter] = []
    for parameter in parameters:
        if not parameter.layers(a, number):
            continue
        if parameter.of_expert:
            experts.append(parameter)
            continue
        found |= _of_experts(a, experts, prefix)
        experts = []
        found[prefix + _within_layer(parameter)] = parameter.shape(a)
    return found | _of_experts(a, experts, prefix)


def _within_layer(parameter: Parameter) -> str:
    return parameter.name.partition(".layers.{i}.")[2]


def _of_experts(a: Architecture, parameters: list[Parameter], prefix: str) -> dict[str, Ints]:
    """Those of all experts, expert by expert."""
    shapes = [(prefix + _within_layer(p), p.shape(a)) for p in parameters]
    return {
        name.replace("{e}", str(expert)): shape
        for expert in range(a.num_experts or 0 if shapes else 0)
        for name, shape in shapes
    }


def layers_text(a: Architecture) -> str:
    """How many layers there are, for a message."""
    if a.encoder_num_layers:
        return f"{a.encoder_num_layers} + {a.num_layers} layers"
    return f"{a.num_layers} layers"


def num_active_parameters(a: Architecture) -> int:
    """Parameters that one token goes through: of experts, as many as are chosen.

    Layers that predict further tokens are left out; of the vocabulary's padding nothing is.
    """
    total = 0
    for name, shape in expected(a).items():
        parameter = find(name)
        assert parameter is not None, name
        if name.startswith("mtp."):
            continue
        if parameter.of_expert and not name.partition(".mlp.experts.")[2].startswith("0."):
            continue
        total += prod(shape) * (a.moe_router_topk if parameter.of_expert else 1)
    return total


def check_complete(shapes: Mapping[str, Ints], architecture: Architecture) -> None:
    """Hold what was found against what the architecture has.

    Raises:
        IncompleteError: parameters are missing.
        MappingError: there are parameters this architecture does not have.
        CorruptError: a shape contradicts the architecture.
    """
    if architecture.num_layers + architecture.encoder_num_layers > len(shapes):
        raise IncompleteError(
            "layers are missing; nothing was written",
            found=f"{len(shapes)} parameters",
            expected=f"those of {layers_text(architecture)}",
            fix="check that all files of the iteration were copied",
        )
    wanted = expected(architecture)
    extra = [name for name in shapes if name not in wanted]
    if missing := [name for name in wanted if name not in shapes]:
        others = f", {len(extra)} of another model: {shorten(extra, 2)}" if extra else ""
        raise IncompleteError(
            f"{len(missing)} of {len(wanted)} parameters are missing; nothing was written",
            found=f"{len(shapes)} parameters{others}",
            expected=shorten(missing),
            fix="correct the arguments with --set NAME=VALUE if they are wrong"
            if extra
            else "check that all files of the iteration were copied",
        )
    if extra:
        raise MappingError(
            f"{len(extra)} parameters do not belong to the model its arguments describe",
            found=shorten(extra),
            expected=f"the {len(wanted)} parameters of {layers_text(architecture)}",
            fix="correct the arguments with --set NAME=VALUE if they are wrong",
        )
    for name, shape in wanted.items():
        if tuple(shapes[name]) != shape:
            raise CorruptError(
                f"{name} has another shape than its arguments say",
                found=str(list(shapes[name])),
                expected=str(list(shape)),
                fix="correct the arguments with --set NAME=VALUE if they are wrong",
            )
