"""DeepSpeed's checkpoints without its pipeline: a file for each tensor-parallel rank.

    global_step1000/mp_rank_00_model_states.pt = {module, args, iteration, mp_world_size, ...}

    module = {"language_model": {...}}                  Megatron-DeepSpeed --no-pipeline-parallel:
                                                        Megatron-LM's nested names
    module = {"sequential.2.attention...": ...}         GPT-NeoX: modules numbered as in a pipeline

(save_checkpoint in megatron/checkpointing.py at 6acc370a; GPT-NeoX's tools/ckpts/
convert_neox_to_hf.py.)
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from .. import sources
from ..checkpoint import Layout, RawCheckpoint, Shard
from ..errors import CorruptError, IncompleteError, InconsistentError
from ..tensors import LazyTensor
from .deepspeed import (
    RankStates,
    rank_files,
    raw_checkpoint,
    read_rank,
    refuse_unreadable,
    renamed,
    tensor_parallel_size,
)
from .folders import Place
from .state_dicts import Dropped, tensors_of
from .values import check_ranks_agree, check_ranks_rise, scalar

NAME = "deepspeed_module"
_SEQUENTIAL = re.compile(r"sequential\.(0|[1-9]\d{0,6})\.(.+)")


def holds_model(folder: str) -> bool:
    """Whether the folder has rank files; a folder of layer files has them too."""
    return bool(rank_files(folder))


def open_folder(place: Place, skip_keys: frozenset[str] = frozenset()) -> RawCheckpoint:
    """Read the metadata of all ranks.

    Args:
        place: the folder of one tag.
        skip_keys: of no use here: beside the model, tensors are known state.

    Raises:
        IncompleteError: a rank's file is missing, or the files hold no model.
        InconsistentError: files of different runs, or in each other's place.
        CorruptError, UnsafePickleError: a file cannot be read as data.
    """
    folder = place.folder
    refuse_unreadable(folder)
    paths = dict(sorted(rank_files(folder).items()))
    ranks = dict(zip(paths, sources.each(read_rank, paths.values()), strict=True))
    first = next(iter(ranks.values()))
    check_ranks_agree([(states.where, states.path, states.content) for states in ranks.values()])
    tp = _check_ranks(ranks, first, folder)
    check_ranks_rise([(states.where, states.args) for states in ranks.values()])
    dropped: Dropped = defaultdict(list)
    shards, notes = [], []
    for number, states in ranks.items():
        tensors, note = _tensors(states, dropped)
        shards.append(Shard(states.where, tensors, states.args, tp=number))
        notes.append(note)
    return raw_checkpoint(
        NAME,
        place,
        first,
        layout=Layout(tp),
        shards=shards,
        dropped=dropped,
        evidence=f"{len(ranks)} mp_rank_*_model_states.pt files with a module, {notes[0]}",
        num_files=len(ranks),
    )


def _check_ranks(ranks: Mapping[int, RankStates], first: RankStates, folder: str) -> int:
    """The tensor-parallel size, of which all ranks must be there."""
    world = scalar(first.content, "mp_world_size", first.where)
    said = world if isinstance(world, int) and world > 0 else tensor_parallel_size(first.args)
    wanted = said or 1 + max(ranks)
    if missing := [n for n in range(min(wanted, len(ranks) + 1)) if n not in ranks]:
        raise IncompleteError(
            f"{folder} is incomplete; nothing was written",
            found=f"{len(ranks)} of {wanted} ranks",
            expected=f"mp_rank_{missing[0]:02d}_model_states.pt",
            fix="copy that file again",
        )
    if max(ranks) >= wanted:
        raise InconsistentError(
            f"{folder} has files of more ranks than the run had",
            found=f"mp_rank_{max(ranks):02d}_model_states.pt",
            expected=f"{wanted} ranks, as the files say",
            fix="separate the files of the two runs",
        )
    return wanted


def _tensors(states: RankStates, dropped: Dropped) -> tuple[dict[str, LazyTensor], str]:
    """One rank's tensors, and what its module looks like."""
    module = states.content.get("module")
    if module is None:
        raise IncompleteError(
            f"{states.path} holds no model; nothing was written",
            found="module = None, as in a checkpoint of layer files",
            expected="layer_*-model_states.pt files beside it",
            fix="copy all files of the tag again",
        )
    if not isinstance(module, dict):
        raise CorruptError(
            f"{states.path} is no DeepSpeed checkpoint",
            found=f"a module that is a {type(module).__name__}",
            expected="a dict of tensors",
        )
    named = tensors_of(module, states.where, states.path, dropped)
    hits = {name: hit for name in named if (hit := _SEQUENTIAL.fullmatch(name))}
    if not hits:
        return named, "nested names"
    if odd := [name for name in named if name not in hits]:
        raise CorruptError(
            f"{states.path} has modules with and without numbers",
            found=odd[0],
            expected="names like sequential.2.attention.dense.weight",
        )
    names, note = renamed(hits, states.where, has_args=states.args is not None)
    tensors = {new: named[name] for name, new in names.items()}
    if len(tensors) < len(named):
        raise InconsistentError(
            "two modules have one parameter; nothing was written",
            found=f"{len(named)} parameters with {len(tensors)} names in {states.where}",
            expected="every parameter once",
        )
    return tensors, note
