"""The order of the rows of a tensor-parallel rank's `query_key_value`, `key_value` and gated MLP.

    head      [g, (r queries, 1 key, 1 value), d]      checkpoint_version 2.0 and 3.0; canonical
    block     [g * r, d] [g, d] [g, d]                 version 0: all queries, all keys, all values
    element   [h, d, (query, key, value)]              version 1.0, which knew no groups
    paired    [g * r, d] [g, (key, value), d]          two tensors of Megatron-DeepSpeed, joined

for g query groups of r heads, h heads in all, d channels; `key_value`, of a T5's attention to its
encoder, alike but without the queries. A gated `linear_fc1` is [gate | up];
GPT-NeoX and EPFL's Megatron-LLM have [up | gate]. Weights and biases alike. The order is each
rank's own: rows are put right before ranks are joined. A tensor that holds several ranks' rows
already is taken apart first. All of it is strides: nothing is read.
(Source: fix_query_key_value_ordering, megatron/checkpointing.py at v2.6.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from .architecture import Architecture
from .checkpoint import Shard
from .dialects.dialect import BLOCK, ELEMENT, HEAD, PAIRED
from .errors import UnsupportedError, UsageError
from .tensors import LazyTensor, concat

ORDERS = (HEAD, BLOCK, ELEMENT)
AUTO = "auto"
_MARK, _GATED = ".self_attention.linear_qkv.", ".mlp.linear_fc1."
_PAIR = ".cross_attention.linear_kv."
_NAMES = ("weight", "bias")


def check_choice(order: str) -> None:
    """Raise UsageError for an order that is none."""
    if order not in (AUTO, *ORDERS):
        raise UsageError(f"unknown order of rows {order!r}", expected=" or ".join((AUTO, *ORDERS)))


def in_head_order(
    held: dict[str, list[Shard]], order: str, architecture: Architecture, layout_tp: int, tp: int
) -> dict[str, list[Shard]]:
    """All QKV rows in canonical order.

    Args:
        held: canonical name -> shards.
        order: the order they are in.
        architecture: how many heads, and how large.
        layout_tp: tensor-parallel ranks of the run that saved.
        tp: parts that tensors stand in now, `layout_tp` or 1.

    Raises:
        UnsupportedError: the heads cannot be dealt to so many ranks.
        UsageError: an order that a model with groups cannot have.
    """
    if order == HEAD:
        return held
    groups, rest = divmod(architecture.num_query_groups, layout_tp)
    if rest:
        raise UnsupportedError(
            "the heads cannot be divided among the ranks",
            found=f"num_query_groups = {architecture.num_query_groups}, TP{layout_tp}",
            expected=f"a multiple of {layout_tp}",
            fix="correct the arguments with --set NAME=VALUE if they are wrong",
        )
    if order == ELEMENT and architecture.heads_per_group > 1:
        raise UsageError(
            "rows in element order are of models without query groups",
            found=f"{architecture.num_attention_heads} heads in "
            f"{architecture.num_query_groups} groups",
            expected="--qkv-order head or block",
            fix="leave out --qkv-order",
        )
    parts = layout_tp // tp
    result = {}
    for name, shards in held.items():
        if (_MARK in name or _PAIR in name) and name.rpartition(".")[2] in _NAMES:
            change = partial(
                _reordered if _MARK in name else _pairs_reordered,
                order=order,
                architecture=architecture,
                parts=parts,
                groups=groups,
            )
            shards = [_mapped(shard, name, change) for shard in shards]
        result[name] = shards
    return result


def gate_first(
    held: dict[str, list[Shard]], architecture: Architecture, layout_tp: int, tp: int
) -> dict[str, list[Shard]]:
    """Gated MLPs that have [up | gate] on each rank as [gate | up]; arguments as above."""
    if not architecture.gated_linear_unit:
        return held
    parts = layout_tp // tp
    return {
        name: [_mapped(shard, name, lambda t: _swapped(t, parts)) for shard in shards]
        if _GATED in name and name.rpartition(".")[2] in _NAMES
        else shards
        for name, shards in held.items()
    }


def _mapped(shard: Shard, name: str, change: Callable[[LazyTensor], LazyTensor]) -> Shard:
    """A shard with one of its tensors, changed."""
    return replace(shard, tensors={name: change(shard.tensors[name])})


def _swapped(tensor: LazyTensor, parts: int) -> LazyTensor:
    if not tensor.shape or not tensor.shape[0] or tensor.shape[0] % (2 * parts):
        return tensor  # `check_complete` says what is wrong with its shape
    halves = [half for part in tensor.chunk(parts) for half in reversed(part.chunk(2))]
    return concat(halves)


def _reordered(
    tensor: LazyTensor, order: str, architecture: Architecture, parts: int, groups: int
) -> LazyTensor:
    per_group, channels = architecture.heads_per_group, architecture.kv_channels
    rows = groups * (per_group + 2) * channels
    change = partial(_rank, order=order, groups=groups, per_group=per_group, channels=channels)
    return _by_rank(tensor, parts, rows, change)


def _pairs_reordered(
    tensor: LazyTensor, order: str, architecture: Architecture, parts: int, groups: int
) -> LazyTensor:
    """Rows of keys and values as [g, (1 key, 1 value), d]."""
    channels = architecture.kv_channels
    change = partial(_pair, order=order, groups=groups, channels=channels)
    return _by_rank(tensor, parts, groups * 2 * channels, change)


def _by_rank(
    tensor: LazyTensor, parts: int, rows: int, change: Callable[[LazyTensor], LazyTensor]
) -> LazyTensor:
    """A tensor with each rank's rows changed."""
    if not tensor.shape or tensor.shape[0] != parts * rows:
        return tensor  # `check_complete` says what is wrong with its shape
    done = [change(part) for part in tensor.chunk(parts)]
    return concat(done) if len(done) > 1 else done[0]


def _pair(tensor: LazyTensor, order: str, groups: int, channels: int) -> LazyTensor:
    if order == ELEMENT:
        axes = range(3, len(tensor.shape) + 2)
        return tensor.unflatten(0, groups, channels, 2).permute(0, 2, 1, *axes).flatten(0, 3)
    if order == BLOCK:
        axes = range(3, len(tensor.shape) + 2)
        return tensor.unflatten(0, 2, groups, channels).permute(1, 0, 2, *axes).flatten(0, 3)
    return tensor


def _rank(tensor: LazyTensor, order: str, groups: int, per_group: int, channels: int) -> LazyTensor:
    """One rank's rows as [g, (r queries, 1 key, 1 value), d]."""
    if order == ELEMENT:
        axes = range(3, len(tensor.shape) + 2)
        return tensor.unflatten(0, groups, channels, 3).permute(0, 2, 1, *axes).flatten(0, 3)
    heads = groups * per_group
    queries = tensor.narrow(0, 0, heads * channels).unflatten(0, groups, per_group, channels)
    others = tensor.narrow(0, heads * channels, 2 * groups * channels)
    if order == BLOCK:
        pair = [part.unflatten(0, groups, 1, channels) for part in others.chunk(2)]
    else:
        assert order == PAIRED, order
        pair = [others.unflatten(0, groups, 2, channels)]
    return concat([queries, *pair], axis=1).flatten(0, 3)
