"""The parameters a model must have, and how tensor parallelism cuts each of them.

One line per canonical name: shape, the axis that ranks split, and when it exists. Readers join
shards by it, completeness is judged by it, writers cut by it.
(Source: the `ColumnParallelLinear` / `RowParallelLinear` / `VocabParallelEmbedding` choices of
megatron/core/models/gpt and megatron/core/transformer, 0.16.1.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .architecture import Architecture
from .boxes import Ints
from .errors import CorruptError, IncompleteError, MappingError
from .mapping import shorten

Condition = Callable[[Architecture], bool]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A canonical parameter.

    Attributes:
        name: canonical name; `{i}` stands for the layer.
        shape: sizes, given the architecture.
        split: the axis ranks divide; None if every rank holds all of it.
        when: whether this model has it.
        blocks: how many parts of the split axis are divided on their own: 2 for `linear_fc1` of
            a gated MLP, whose rank shard is [gate_r | up_r].
    """

    name: str
    shape: Callable[[Architecture], Ints]
    split: int | None = None
    when: Condition = lambda a: True
    blocks: Callable[[Architecture], int] = lambda a: 1


def _gated(a: Architecture) -> int:
    return 2 if a.gated_linear_unit else 1


def _norm_bias(a: Architecture) -> bool:
    return a.has_norm_bias


def _qk_layernorm_bias(a: Architecture) -> bool:
    return a.qk_layernorm and a.has_norm_bias


_ATTENTION = "decoder.layers.{i}.self_attention"
_MLP = "decoder.layers.{i}.mlp"
PARAMETERS = (
    Parameter(
        "embedding.word_embeddings.weight", lambda a: (a.padded_vocab_size, a.hidden_size), 0
    ),
    Parameter(
        "embedding.position_embeddings.weight",
        lambda a: (a.max_position_embeddings, a.hidden_size),
        when=lambda a: a.has_position_table,
    ),
    Parameter("embedding.norm.weight", lambda a: (a.hidden_size,), when=lambda a: a.embedding_norm),
    Parameter(
        "embedding.norm.bias",
        lambda a: (a.hidden_size,),
        when=lambda a: a.embedding_norm and a.has_norm_bias,
    ),
    Parameter(f"{_ATTENTION}.linear_qkv.layer_norm_weight", lambda a: (a.hidden_size,)),
    Parameter(
        f"{_ATTENTION}.linear_qkv.layer_norm_bias", lambda a: (a.hidden_size,), when=_norm_bias
    ),
    Parameter(f"{_ATTENTION}.linear_qkv.weight", lambda a: (a.qkv_size, a.hidden_size), 0),
    Parameter(
        f"{_ATTENTION}.linear_qkv.bias",
        lambda a: (a.qkv_size,),
        0,
        when=lambda a: a.has_qkv_bias,
    ),
    Parameter(
        f"{_ATTENTION}.q_layernorm.weight",
        lambda a: (a.kv_channels,),
        when=lambda a: a.qk_layernorm,
    ),
    Parameter(
        f"{_ATTENTION}.q_layernorm.bias", lambda a: (a.kv_channels,), when=_qk_layernorm_bias
    ),
    Parameter(
        f"{_ATTENTION}.k_layernorm.weight",
        lambda a: (a.kv_channels,),
        when=lambda a: a.qk_layernorm,
    ),
    Parameter(
        f"{_ATTENTION}.k_layernorm.bias", lambda a: (a.kv_channels,), when=_qk_layernorm_bias
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
    Parameter(f"{_MLP}.linear_fc1.layer_norm_weight", lambda a: (a.hidden_size,)),
    Parameter(f"{_MLP}.linear_fc1.layer_norm_bias", lambda a: (a.hidden_size,), when=_norm_bias),
    Parameter(f"{_MLP}.linear_fc1.weight", lambda a: (a.fc1_size, a.hidden_size), 0, blocks=_gated),
    Parameter(
        f"{_MLP}.linear_fc1.bias",
        lambda a: (a.fc1_size,),
        0,
        when=lambda a: a.add_bias_linear,
        blocks=_gated,
    ),
    Parameter(f"{_MLP}.linear_fc2.weight", lambda a: (a.hidden_size, a.ffn_hidden_size), 1),
    Parameter(
        f"{_MLP}.linear_fc2.bias", lambda a: (a.hidden_size,), when=lambda a: a.add_bias_linear
    ),
    Parameter("decoder.final_layernorm.weight", lambda a: (a.hidden_size,)),
    Parameter("decoder.final_layernorm.bias", lambda a: (a.hidden_size,), when=_norm_bias),
    Parameter(
        "output_layer.weight",
        lambda a: (a.padded_vocab_size, a.hidden_size),
        0,
        when=lambda a: a.untie_embeddings_and_output_weights,
    ),
)
# Those with a row per token.
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_BY_NAME = {parameter.name: parameter for parameter in PARAMETERS}
_LAYER = re.compile(r"(?<=^decoder\.layers\.)\d+(?=\.)")


def find(name: str) -> Parameter | None:
    """The table line of a concrete canonical name."""
    return _BY_NAME.get(_LAYER.sub("{i}", name))


def expected(architecture: Architecture) -> dict[str, Ints]:
    """Canonical name -> shape of every parameter this architecture has, in model order."""
    before: list[Parameter] = []
    layers: list[Parameter] = []
    after: list[Parameter] = []
    for parameter in PARAMETERS:
        if parameter.when(architecture):
            group = layers if "{i}" in parameter.name else after if layers else before
            group.append(parameter)
    names = [(p.name, p) for p in before]
    for layer in range(architecture.num_layers):
        names += [(p.name.replace("{i}", str(layer)), p) for p in layers]
    names += [(p.name, p) for p in after]
    return {name: parameter.shape(architecture) for name, parameter in names}


def check_complete(shapes: Mapping[str, Ints], architecture: Architecture) -> None:
    """Hold what was found against what the architecture has.

    Raises:
        IncompleteError: parameters are missing.
        MappingError: there are parameters this architecture does not have.
        CorruptError: a shape contradicts the architecture.
    """
    if architecture.num_layers > len(shapes):
        raise IncompleteError(
            "layers are missing; nothing was written",
            found=f"{len(shapes)} parameters",
            expected=f"those of {architecture.num_layers} layers",
            fix="check that all files of the iteration were copied",
        )
    wanted = expected(architecture)
    if missing := [name for name in wanted if name not in shapes]:
        raise IncompleteError(
            f"{len(missing)} of {len(wanted)} parameters are missing; nothing was written",
            found=f"{len(shapes)} parameters",
            expected=shorten(missing),
            fix="check that all files of the iteration were copied",
        )
    if extra := [name for name in shapes if name not in wanted]:
        raise MappingError(
            f"{len(extra)} parameters do not belong to the model its arguments describe",
            found=shorten(extra),
            expected=f"the {len(wanted)} parameters of {architecture.num_layers} layers",
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
