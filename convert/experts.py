"""Experts under their global numbers, whichever way a rank's file has them; and back.

A layer has E experts; expert-parallel rank r of EP has n = E / EP of them, those from r * n on.
The router, which every rank has, says E. Within `decoder.layers.I.mlp.` files have

    experts.local_experts.K.linear_fc1.weight    SequentialMLP; expert r * n + K
    experts.linear_fc1.weightK                   TEGroupedMLP; the same
    experts.weight1, experts.weight2             GroupedMLP; all n at once
    experts.experts.linear_fc1.weight            distributed checkpoints: [E, ...]
    experts.experts.E.linear_fc1.weight          the same with singleton shards

and all of them become `experts.E.linear_fc1.weight`. The shape of a GroupedMLP's matrices lies:

    weight1 [h, n * rows]   is in truth [n, h, rows], each expert [h, rows] and transposed
    weight2 [n * f, h]      is [n, f, h], each expert [f, h] and transposed

with `rows` those of linear_fc1 on this rank, f the columns of linear_fc2.
(Source: megatron/core/transformer/moe/experts.py, 0.16.1.)
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from .checkpoint import Shard
from .errors import CorruptError, IncompleteError, InconsistentError
from .tensors import LazyTensor, stack

_MARK = ".mlp.experts."
_SEQUENTIAL = re.compile(r"local_experts\.(?P<e>\d+)\.(?P<name>linear_fc[12]\.(weight|bias))")
_GROUPED = re.compile(r"(?P<name>linear_fc[12]\.(weight|bias))(?P<e>\d+)")
_SINGLE = re.compile(r"experts\.(?P<e>\d+)\.(?P<name>.+)")
_STACKED = re.compile(r"experts\.(?P<name>linear_fc[12]\.(weight|bias))")
_JOINED = {"weight1": "linear_fc1.weight", "weight2": "linear_fc2.weight"}
_CANONICAL = re.compile(r"(?P<layer>.+)\.mlp\.experts\.(?P<e>\d+)\.(?P<name>.+)")
SEQUENTIAL, TE_GROUPED, GROUPED = "SequentialMLP", "TEGroupedMLP", "GroupedMLP"


def numbered(shards: Sequence[Shard]) -> tuple[Shard, ...]:
    """Shards with a name of its own for every expert, by its global number.

    Raises:
        IncompleteError: experts are missing, or a router.
        InconsistentError: the experts cannot be divided among the ranks.
        CorruptError: a tensor that holds several experts has another shape than that.
    """
    if not any(_MARK in name for shard in shards for name in shard.tensors):
        return tuple(shards)
    ep = 1 + max(shard.ep for shard in shards)
    return tuple(replace(shard, tensors=dict(_renamed(shard, ep))) for shard in shards)


def _renamed(shard: Shard, ep: int) -> Iterator[tuple[str, LazyTensor]]:
    layers: dict[str, dict[str, LazyTensor]] = defaultdict(dict)
    for name, tensor in shard.tensors.items():
        layer, mark, rest = name.partition(_MARK)
        if mark:
            layers[layer][rest] = tensor
    for name, tensor in shard.tensors.items():
        layer, mark, _ = name.partition(_MARK)
        if not mark:
            yield name, tensor
        elif layer in layers:
            count = _local_count(shard, layer, ep)
            found = _experts(layers.pop(layer), f"{layer}{_MARK}", count, shard.ep)
            _check_count(found, count, f"{layer}{_MARK[:-1]} in {shard.where}")
            for (number, rest), part in found.items():
                yield f"{layer}{_MARK}{number}.{rest}", part


def _local_count(shard: Shard, layer: str, ep: int) -> int:
    """Experts that a rank has of a layer."""
    router = shard.tensors.get(f"{layer}.mlp.router.weight")
    if router is None or not router.shape:
        raise IncompleteError(
            f"{layer}.mlp.router.weight is missing; nothing was written",
            found=f"experts without a router in {shard.where}",
            expected="a router in each layer that has experts",
            fix="check that all files of the iteration were copied",
        )
    count, rest = divmod(router.shape[0], ep)
    if rest or not count:
        raise InconsistentError(
            "the experts cannot be divided among the expert-parallel ranks",
            found=f"{router.shape[0]} rows in {layer}.mlp.router.weight, {ep} ranks",
            expected=f"a multiple of {ep}",
            fix="use files of one and the same run",
        )
    return count


def _experts(
    tensors: Mapping[str, LazyTensor], prefix: str, count: int, rank: int
) -> dict[tuple[int, str], LazyTensor]:
    """Number and name within the expert -> tensor; other names are left as they are found."""
    found: dict[tuple[int, str], LazyTensor] = {}
    first = rank * count
    for name, tensor in tensors.items():
        if hit := _SEQUENTIAL.fullmatch(name) or _GROUPED.fullmatch(name):
            found[first + int(hit["e"]), hit["name"]] = tensor
        elif hit := _SINGLE.fullmatch(name):
            found[int(hit["e"]), hit["name"]] = tensor
        elif name in _JOINED:
            for number, part in enumerate(_apart(prefix + name, tensor, name, count)):
                found[first + number, _JOINED[name]] = part
        elif (hit := _STACKED.fullmatch(name)) and tensor.shape:
            for number, part in enumerate(tensor.unstack()):
                found[number, hit["name"]] = part
        else:
            raise CorruptError(
                f"{prefix}{name} is no part of an expert that mtt knows; nothing was written",
                expected="linear_fc1 and linear_fc2 of numbered experts, or weight1 and weight2",
                fix="report the name above if a released Megatron wrote it",
            )
    return found


def _apart(name: str, tensor: LazyTensor, kind: str, count: int) -> Iterable[LazyTensor]:
    """The experts of a GroupedMLP's `weight1` or `weight2`."""
    if len(tensor.shape) == 2:
        axis = 1 if kind == "weight1" else 0
        size, rest = divmod(tensor.shape[axis], count)
        if not rest and size:
            inner = (tensor.shape[0], size) if axis else (size, tensor.shape[1])
            whole = tensor.flatten(0, 2).unflatten(0, count, *inner)
            return [part.permute(1, 0) for part in whole.unstack()]
    raise CorruptError(
        f"{name} cannot be divided into experts",
        found=f"shape {list(tensor.shape)}",
        expected=f"a matrix of {count} experts side by side",
        fix="use files of one and the same run",
    )


def _check_count(found: Mapping[tuple[int, str], LazyTensor], count: int, where: str) -> None:
    """Raise IncompleteError unless every name is there for `count` neighbouring experts."""
    numbers: dict[str, set[int]] = defaultdict(set)
    for number, name in found:
        numbers[name].add(number)
    for name, have in numbers.items():
        first = min(have) // count * count
        if have != set(range(first, first + count)):
            raise IncompleteError(
                f"experts are missing from {where}; nothing was written",
                found=f"{name} of {len(have)} experts, numbers {min(have)} to {max(have)}",
                expected=f"{count} experts, as the router has",
                fix="use files of one and the same run",
            )


def spelled(tensors: Mapping[str, LazyTensor], module: str, first: int) -> dict[str, LazyTensor]:
    """The tensors of a rank as one of Megatron's modules has its experts.

    Args:
        tensors: names with global numbers of experts; the others are left alone.
        module: `SequentialMLP`, `TEGroupedMLP` or `GroupedMLP`.
        first: number of the rank's first expert.
    """
    found: dict[str, LazyTensor] = {}
    joined: dict[str, list[LazyTensor]] = defaultdict(list)
    for name, tensor in tensors.items():
        hit = _CANONICAL.fullmatch(name)
        if not hit:
            found[name] = tensor
            continue
        prefix, number, rest = f"{hit['layer']}{_MARK}", int(hit["e"]) - first, hit["name"]
        if module == SEQUENTIAL:
            found[f"{prefix}local_experts.{number}.{rest}"] = tensor
        elif module == TE_GROUPED:
            found[f"{prefix}{rest}{number}"] = tensor
        else:
            (weight,) = (weight for weight, within in _JOINED.items() if within == rest)
            joined[prefix + weight].append(tensor.permute(1, 0))
    return found | {name: _together(name, parts) for name, parts in joined.items()}


def _together(name: str, parts: Sequence[LazyTensor]) -> LazyTensor:
    """A GroupedMLP's matrix of transposed experts in the order of their numbers."""
    rows, columns = parts[0].shape
    shape = (rows, len(parts) * columns) if name.endswith("1") else (len(parts) * rows, columns)
    return stack(parts).flatten(0, 3).unflatten(0, *shape)


def in_distributed_checkpoints(name: str) -> str:
    """A name with a numbered expert as singleton shards have it; others as they are."""
    return name.replace(_MARK, f"{_MARK}experts.")
