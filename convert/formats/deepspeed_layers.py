"""DeepSpeed's pipeline checkpoints: a file for each module and tensor-parallel rank.

    global_step1000/layer_03-model_00-model_states.pt     module 3, tensor-parallel rank 0
                    layer_03-model_01-model_states.pt     ... rank 1
                    mp_rank_00_model_states.pt            args; its `module` is None

    layer_NN-model_TT-model_states.pt = {"input_layernorm.weight": ..., ...}

The layout's pipeline stages leave no trace in the files: a module has a number in the whole model.
A tied head writes no file. Megatron-DeepSpeed from 2021 on, BigScience and GPT-NeoX alike; see
`deepspeed.py` for what the numbers mean.
(deepspeed/runtime/pipe/module.py, `ckpt_layer_path` and `save_state_dict`, 0.16.9.)
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Mapping

from .. import sources
from ..checkpoint import Layout, RawCheckpoint, Shard
from ..errors import CorruptError, IncompleteError, InconsistentError
from ..sources import listing
from ..tensors import LazyTensor
from .deepspeed import (
    RankStates,
    numbered,
    pipeline_size,
    rank_files,
    raw_checkpoint,
    read_rank,
    refuse_unreadable,
    tensor_parallel_size,
)
from .folders import Place
from .state_dicts import Dropped, tensors_of
from .torch_zip import load
from .values import check_ranks_agree

NAME = "deepspeed_layers"
_LAYER_FILE = re.compile(r"layer_(\d{2,7})(?:-model_(\d{2,5}))?-model_states\.pt")
_MOST_NAMED = 4


def holds_model(folder: str) -> bool:
    """Whether the folder has files of layers."""
    return any(map(_LAYER_FILE.fullmatch, listing(folder)))


def open_folder(place: Place, skip_keys: frozenset[str] = frozenset()) -> RawCheckpoint:
    """Read the metadata of all modules, and of the ranks of the first pipeline stage.

    Args:
        place: the folder of one tag.
        skip_keys: of no use here: beside the model, tensors are known state.

    Raises:
        IncompleteError: a module's file is missing.
        InconsistentError: files of different runs.
        CorruptError, UnsafePickleError: a file cannot be read as data.
    """
    folder = place.folder
    refuse_unreadable(folder)
    files = _files(folder)
    tp = 1 + max(rank for _, rank in files)
    paths = [path for number, path in sorted(rank_files(folder).items()) if number < tp]
    ranks = list(sources.each(read_rank, paths))
    check_ranks_agree([(states.where, states.path, states.content) for states in ranks])
    first = ranks[0] if ranks else None
    _check_grid(files, tp, tensor_parallel_size(first.args if first else None), folder)
    dropped: Dropped = defaultdict(list)
    contents = zip(files.items(), sources.each(load, files.values()), strict=True)
    modules = {key: _module(path, content, dropped) for (key, path), content in contents}
    prefixes, begin = numbered(
        {number: tensors for (number, rank), tensors in modules.items() if rank == 0},
        folder,
        has_args=first is not None and first.args is not None,
    )
    shards = [_shard(rank, modules, prefixes, ranks) for rank in range(tp)]
    return raw_checkpoint(
        NAME,
        place,
        first,
        layout=Layout(tp, pipeline_size(first, tp)),
        shards=shards,
        dropped=dropped,
        evidence=f"{len(files)} layer_*-model_states.pt files, {begin}",
        num_files=len(files),
        may_lack_head=True,
    )


def _files(folder: str) -> dict[tuple[int, int], str]:
    """(module, tensor-parallel rank) -> path."""
    files: dict[tuple[int, int], str] = {}
    for name in listing(folder):
        if hit := _LAYER_FILE.fullmatch(name):
            key = (int(hit[1]), int(hit[2] or 0))
            if key in files:
                raise InconsistentError(
                    f"{folder} has two files for one module",
                    found=f"{os.path.basename(files[key])} and {name}",
                    expected="one file for each module and rank",
                    fix="separate the files of the two runs",
                )
            files[key] = os.path.join(folder, name)
    return files


def _check_grid(
    files: Mapping[tuple[int, int], str], tp: int, said: int | None, folder: str
) -> None:
    """Every module needs a file of every tensor-parallel rank."""
    wanted = max(tp, said or 0)
    numbers = sorted({number for number, _ in files})
    if missing := [(n, r) for n in numbers for r in range(wanted) if (n, r) not in files]:
        names = [f"layer_{n:02d}-model_{r:02d}-model_states.pt" for n, r in missing[:_MOST_NAMED]]
        more = f", ... ({len(missing)})" if len(missing) > _MOST_NAMED else ""
        raise IncompleteError(
            f"{os.path.basename(folder)} is incomplete; nothing was written",
            found=f"{len(files)} files of {len(numbers)} modules, TP{wanted}",
            expected=", ".join(names) + more,
            fix="copy these files again",
        )
    if said is not None and tp > said:
        raise InconsistentError(
            f"{folder} does not belong to a TP{said} checkpoint",
            found=f"files of {tp} tensor-parallel ranks",
            expected=f"{said}, as the arguments say",
            fix="separate the files of the two runs",
        )


def _module(path: str, content: object, dropped: Dropped) -> dict[str, LazyTensor]:
    if not isinstance(content, dict):
        raise CorruptError(
            f"{path} is no module of a model",
            found=type(content).__name__,
            expected="a dict of tensors",
        )
    return tensors_of(content, os.path.basename(path), path, dropped)


def _shard(
    rank: int,
    modules: Mapping[tuple[int, int], Mapping[str, LazyTensor]],
    prefixes: Mapping[int, str],
    ranks: list[RankStates],
) -> Shard:
    """What one tensor-parallel rank holds of the whole pipeline."""
    tensors: dict[str, LazyTensor] = {}
    for number, prefix in sorted(prefixes.items()):
        for name, tensor in modules[number, rank].items():
            if prefix + name in tensors:
                raise InconsistentError(
                    "two modules of the pipeline have one parameter; nothing was written",
                    found=f"{name} in module {number} and before",
                    expected="every parameter once",
                )
            tensors[prefix + name] = tensor
    args = ranks[rank].args if rank < len(ranks) else None
    return Shard(f"layer_*-model_{rank:02d}-model_states.pt", tensors, args, tp=rank)
