"""Between rank shards and whole tensors: layer numbers, joins and cuts.

pipeline   every stage and virtual chunk numbers its layers from 0; going through chunks
           first and stages within them gives the global order, for even, uneven and custom
           splits alike, because the counts are read from the shards
tensor     shards of one parameter are joined along the axis the parameter table names;
           a gated `linear_fc1` in two blocks, since rank r holds [gate_r | up_r]
expert     those of an expert are joined along their own tensor-parallel ranks
copies     parameters every rank holds must agree: they become `Replicas` to be compared
cuts       what a rank gets of a parameter is one or two boxes of the whole tensor
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from .architecture import Architecture
from .boxes import Box, Ints
from .checkpoint import Replicas, Shard
from .errors import CorruptError, IncompleteError, InconsistentError, MappingError
from .layouts import Stage
from .mapping import shorten
from .parameters import COPIES, Parameter, find
from .tensors import SUM, SUM_OF_PARTS, LazyTensor, combined, concat

_LAYER = re.compile(r"(?<=^(?:en|de)coder\.layers\.)(\d+)(?=\.)")
_STACKS = ("encoder", "decoder")
_HEAD = re.compile(r"(lm_head\.)?output_layer\.")
_EXPERT = re.compile(r"(?<=\.mlp\.experts\.)(\d+)(?=\.)")
EMBEDDING, TIED_HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
Held = Mapping[str, Sequence[Shard]]


def number_layers(shards: Iterable[Shard]) -> tuple[Shard, ...]:
    """Replace local layer numbers in canonical names by global ones.

    Raises:
        IncompleteError: a shard skips a layer number.
        InconsistentError: tensor-parallel ranks of one stage hold different layers.
    """
    shards = list(shards)
    counts: dict[tuple[str, int, int], int] = {}
    for shard in shards:
        for stack in _STACKS:
            _count_layers(shard, stack, counts)
    offsets: dict[tuple[str, int, int], int] = {}
    position = dict.fromkeys(_STACKS, 0)
    for stack, vpp, pp in sorted(counts):
        offsets[stack, vpp, pp] = position[stack]
        position[stack] += counts[stack, vpp, pp]
    return tuple(
        _shifted(shard, {stack: offsets[stack, shard.vpp, shard.pp] for stack in _STACKS})
        for shard in shards
    )


def _count_layers(shard: Shard, stack: str, counts: dict[tuple[str, int, int], int]) -> None:
    """Note how many layers of an encoder or decoder a shard has."""
    names = [name for name in shard.tensors if name.startswith(stack)]
    found = {int(hit[1]) for name in names if (hit := _LAYER.search(name))}
    if found != set(range(len(found))):
        raise IncompleteError(
            f"{shard.where} skips layers; nothing was written",
            found=f"layers {sorted(found)}",
            expected=f"layers 0 to {len(found) - 1}",
            fix="check that all files of the iteration were copied",
        )
    previous = counts.setdefault((stack, shard.vpp, shard.pp), len(found))
    if previous != len(found):
        raise InconsistentError(
            "ranks of one pipeline stage hold different numbers of layers",
            found=f"{len(found)} in {shard.where}",
            expected=str(previous),
            fix="use files of one and the same run",
        )


def _shifted(shard: Shard, offsets: Mapping[str, int]) -> Shard:
    def renumbered(name: str) -> str:
        offset = offsets.get(name[: len(_STACKS[0])], 0)
        return _LAYER.sub(lambda hit: str(int(hit[1]) + offset), name)

    return replace(shard, tensors={renumbered(n): tensor for n, tensor in shard.tensors.items()})


def without_idle_heads(shards: Iterable[Shard]) -> tuple[tuple[Shard, ...], tuple[str, ...]]:
    """Leave out the heads that stages of an encoder have, and the names of what was left out.

    Megatron-Core v0.9 to v0.13 built one at the end of a T5's encoder too, where no loss reaches it
    (get_model in training/training.py and T5Model.__init__ in core/models/T5/t5_model.py).
    """
    kept, dropped = [], set()
    for shard in shards:
        names = list(shard.tensors)
        stacks = {name[: len(_STACKS[0])] for name in names if _LAYER.search(name)}
        idle = {name for name in names if stacks == {"encoder"} and _HEAD.match(name)}
        dropped |= idle
        tensors = {n: tensor for n, tensor in shard.tensors.items() if n not in idle}
        kept.append(replace(shard, tensors=tensors))
    return tuple(kept), tuple(sorted(dropped))


def holders(shards: Iterable[Shard]) -> dict[str, list[Shard]]:
    """Canonical name -> the shards that hold a part of it, by tensor-parallel rank.

    Raises:
        MappingError: a name the parameter table does not know.
    """
    held: dict[str, list[Shard]] = defaultdict(list)
    for shard in sorted(shards, key=lambda s: (s.vpp, s.pp, s.tp, s.ep)):
        for name in shard.tensors:
            held[name].append(shard)
    if unknown := [name for name in held if find(name) is None]:
        raise MappingError(
            f"{len(unknown)} tensors are not part of any model mtt knows; nothing was written",
            found=shorten(unknown),
            expected="the parameters of a GPT, a T5 or a BERT",
            fix="report the names above if a released Megatron wrote them; --skip-key NAME leaves "
            "out what the model works without",
        )
    return dict(held)


def joined_shapes(held: Held, tp: int, etp: int) -> dict[str, Ints]:
    """Shapes the parameters will have once joined."""
    shapes = {}
    for name, shards in held.items():
        parameter = _parameter(name)
        shape, split = list(shards[0].tensors[name].shape), parameter.split
        if split is not None and split < len(shape):
            shape[split] *= etp if parameter.of_expert else tp
        shapes[name] = tuple(shape)
    return shapes


def join(
    held: Held, tp: int, etp: int, architecture: Architecture, summed: Collection[str] = ()
) -> tuple[dict[str, LazyTensor], tuple[Replicas, ...]]:
    """Whole tensors, and the copies that must be equal.

    A tied output layer is a copy of the embedding on the last stage: it is compared, not kept.
    Of parameters in `summed` (canonical names with `{i}`) ranks hold parts that are added; where
    attention and MLP do not run beside each other, only if they are not all equal (see the
    dialect of GPT-NeoX).

    Raises:
        IncompleteError: a rank's part is missing.
        InconsistentError: parts of one parameter differ in dtype or size.
    """
    tensors, replicas = {}, []
    for name, shards in held.items():
        parameter = _parameter(name)
        first, copies = _parts(name, shards, etp if parameter.of_expert else tp)
        blocks, split = parameter.blocks(architecture), parameter.split
        if parameter.may_be_whole:
            whole = parameter.shape(architecture)
            split = None if first[0].tensors[name].shape == whole else split
        tensors[name] = _join(name, first, split, blocks)
        if parameter.name in summed and len(first) > 1:
            how = SUM if architecture.parallel_residual else SUM_OF_PARTS
            tensors[name] = combined([shard.tensors[name] for shard in first], how)
        elif split is None:
            copies = [first, *copies]
            same = [shard.tensors[name] for group in copies for shard in group]
            where = [shard.where for group in copies for shard in group]
            if len(same) > 1:
                replicas.append(Replicas(name, tuple(same), tuple(where)))
        elif copies:
            others = [_join(name, group, split, blocks) for group in copies]
            where = [group[0].where for group in (first, *copies)]
            replicas.append(Replicas(name, (tensors[name], *others), tuple(where)))
    for name, original in COPIES.items():
        if name in tensors:
            replicas += _copy(tensors, held, name, original)
    if not architecture.untie_embeddings_and_output_weights and TIED_HEAD in tensors:
        head = tensors.pop(TIED_HEAD)
        if EMBEDDING in tensors:
            places = (held[EMBEDDING][0].where, held[TIED_HEAD][0].where)
            replicas.append(Replicas(TIED_HEAD, (tensors[EMBEDDING], head), places, tied=True))
    return tensors, tuple(replicas)


def _copy(
    tensors: dict[str, LazyTensor], held: Held, name: str, original: str
) -> Iterable[Replicas]:
    """Take out what is stored under a second name: it must be equal, or stands for the first."""
    copy = tensors.pop(name)
    if tensors.setdefault(original, copy) is copy:
        return ()
    places = tuple(f"{n} in {held[n][0].where}" for n in (original, name))
    return (Replicas(original, (tensors[original], copy), places),)


def _parameter(name: str) -> Parameter:
    parameter = find(name)
    assert parameter is not None, name
    return parameter


def _parts(name: str, shards: Sequence[Shard], count: int) -> tuple[list[Shard], list[list[Shard]]]:
    """One shard for each of `count` ranks, and further complete sets of copies.

    Expert-parallel ranks need not be there for every tensor-parallel rank: a set whose rank has no
    further copy has its last one.
    """
    of_expert = _parameter(name).of_expert
    ranks: list[list[Shard]] = [[] for _ in range(count)]
    for shard in shards:
        ranks[shard.expert_tp if of_expert else shard.tp].append(shard)
    if missing := [rank for rank, found in enumerate(ranks) if not found]:
        raise IncompleteError(
            f"{name} is incomplete; nothing was written",
            found=f"tensor-parallel ranks {[r for r, found in enumerate(ranks) if found]}",
            expected=f"also rank {missing[0]} of {count}",
            fix="check that all files of the iteration were copied",
        )
    kinds = {(s.tensors[name].dtype, s.tensors[name].shape) for s in shards}
    if len(kinds) > 1:
        raise InconsistentError(
            f"ranks disagree about {name}; nothing was written",
            found=" and ".join(sorted(f"{dtype} {list(shape)}" for dtype, shape in kinds)),
            expected="one dtype and one shape on all ranks",
            fix="use files of one and the same run",
        )
    sets = [
        [found[min(number, len(found) - 1)] for found in ranks]
        for number in range(max(map(len, ranks)))
    ]
    return sets[0], sets[1:]


def _join(name: str, shards: Sequence[Shard], split: int | None, blocks: int) -> LazyTensor:
    parts = [shard.tensors[name] for shard in shards]
    if split is None or len(parts) == 1:
        return parts[0]
    if split >= len(parts[0].shape) or parts[0].shape[split] % blocks or not parts[0].num_elements:
        raise CorruptError(
            f"{name} cannot be joined",
            found=f"shape {list(parts[0].shape)}",
            expected=f"{blocks} equal blocks along axis {split}",
        )
    size = parts[0].shape[split] // blocks
    cut = [part.unflatten(split, blocks, size) for part in parts]
    return concat(cut, axis=split + 1).flatten(split)


def boxes(name: str, shape: Ints, architecture: Architecture, tp: int, rank: int) -> list[Box]:
    """The boxes of a whole tensor that one of `tp` ranks holds, in their order there."""
    parameter = _parameter(name)
    split, start = parameter.split, [0] * len(shape)
    if split is None:
        return [(tuple(start), shape)]
    blocks = parameter.blocks(architecture)
    size, rest = divmod(shape[split], blocks * tp)
    assert rest == 0, (name, shape, tp)
    extent = (*shape[:split], size, *shape[split + 1 :])
    return [
        ((*start[:split], (block * tp + rank) * size, *start[split + 1 :]), extent)
        for block in range(blocks)
    ]


def cut(
    name: str, tensor: LazyTensor, architecture: Architecture, tp: int, rank: int
) -> LazyTensor:
    """What a tensor-parallel rank holds of a whole tensor: `join` undone."""
    held = [tensor.part(box) for box in boxes(name, tensor.shape, architecture, tp, rank)]
    return held[0] if len(held) == 1 else concat(held, axis=_parameter(name).split or 0)


def is_of_expert(name: str) -> bool:
    """Whether a parameter is a part of one of the experts, and divided as those are."""
    return _parameter(name).of_expert


def may_be_whole(name: str) -> bool:
    """Whether ranks hold all of it in some specs and a part in others."""
    return _parameter(name).may_be_whole


def expert_number(name: str) -> int:
    """The expert that a parameter belongs to."""
    hit = _EXPERT.search(name)
    assert hit is not None, name
    return int(hit[1])


def is_split(name: str) -> bool:
    """Whether tensor-parallel ranks hold different parts of a parameter."""
    return _parameter(name).split is not None


def stage_names(names: Iterable[str], stage: Stage) -> list[str]:
    """The canonical names of the parameters that a pipeline stage holds, copies left out."""
    held = []
    for name in names:
        layer = _LAYER.search(name)
        if name.startswith(("embedding.", "encoder")):
            wanted = stage.first  # an encoder is never divided: see `plan_stages`
        else:
            wanted = int(layer[1]) in stage.layers if layer else stage.last
        if wanted:
            held.append(name)
    return held


def copied_names(names: Iterable[str], stage: Stage) -> list[str]:
    """What a stage holds copies of: layers that predict further tokens look tokens up again.

    (Source: GPTModel, core/models/gpt/gpt_model.py.)
    """
    names = list(names)
    if not stage.last or stage.first or not any(name.startswith("mtp.") for name in names):
        return []
    return [name for name in names if name.startswith("embedding.")]


def local_name(name: str, stage: Stage) -> str:
    """A canonical name with the layer numbered from the beginning of the stage."""
    return _LAYER.sub(lambda hit: str(int(hit[1]) - stage.layers.start), name)
