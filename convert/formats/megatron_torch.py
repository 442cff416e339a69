"""Megatron's `torch` format: one pickle per model-parallel rank.

    iter_0001000/mp_rank_TT/model_optim_rng.pt             tensor-parallel rank TT
                 mp_rank_TT_PPP/model_optim_rng.pt         ... and pipeline rank PPP
                 mp_rank_TT_EEE/model_optim_rng.pt         ... or expert rank EEE: args decide
                 mp_rank_TT_PPP_EEE/model_optim_rng.pt     ... and expert rank EEE
                 mp_rank_TT[_PPP]/model_rng.pt             2022-03 to 2023-05 with the distributed
                 mp_rank_TT[_PPP]_DDD/optim.pt             optimizer, which has folders of its own
                 mp_rank_TT[_PPP]_DDD/model_rng.pt         days in 2022-05: data rank DDD's copy

    model_optim_rng.pt = {args, checkpoint_version, iteration,
                          model | model0, model1, ... (virtual pipeline chunks),
                          optimizer?, opt_param_scheduler?, rng_state?, ...}

`model` is flat since Megatron-Core ("decoder.layers.0...") and nested dicts before; both are
read as dotted names, the flat one is written. (megatron/training/checkpointing.py, core 0.16.1.)
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from math import lcm

from .. import sources
from ..checkpoint import Layout, RawCheckpoint, Shard
from ..errors import (
    CorruptError,
    IncompleteError,
    InconsistentError,
    MappingError,
    UnsupportedError,
)
from ..plan import PlannedFile
from ..sources import listing
from .folders import Place, iteration_folder
from .pickle_writer import Call, Global, Instance
from .state_dicts import STATE, Dropped, tensors_of
from .torch_zip import ORDERED_DICT, Weight, load, plan, tensor_value
from .values import (
    check_ranks_agree,
    check_ranks_rise,
    holds_tensors,
    iteration,
    plain_arguments,
    size_in,
    version,
)

NAME = "torch"
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_FILE, _FILE_OF_2022 = "model_optim_rng.pt", "model_rng.pt"
_MAX_NAMED = 4


@dataclass(frozen=True, slots=True)
class _RankFile:
    """One rank's file and the numbers in its folder name."""

    folder: str
    path: str
    numbers: tuple[int, ...]


def holds_model(folder: str) -> bool:
    """Whether the folder has rank folders with model files in them."""
    return bool(_rank_files(folder))


def open_folder(place: Place, skip_keys: frozenset[str] = frozenset()) -> RawCheckpoint:
    """Read the metadata of all ranks of one iteration.

    Args:
        place: the iteration's folder.
        skip_keys: further top-level entries to leave out.

    Raises:
        IncompleteError: a rank's file is missing.
        InconsistentError: ranks stem from different iterations or layouts.
        MappingError: an entry holds tensors and is neither the model nor a known kind of state.
        UnsupportedError: a T5 whose encoder is divided otherwise than its decoder.
        CorruptError, UnsafePickleError: a file cannot be read as data.
    """
    files = _rank_files(place.folder)
    dropped: Dropped = defaultdict(list)
    contents = dict(
        zip(
            [file.folder for file in files],
            sources.each(_content, [file.path for file in files]),
            strict=True,
        )
    )
    first = contents[files[0].folder]
    arguments = {name: plain_arguments(content.get("args")) for name, content in contents.items()}
    args = arguments[files[0].folder]
    files = _without_copies(files, args)
    sizes = _sizes(args, files)
    ranks = {file.folder: _coordinates(file, sizes) for file in files}
    _check_grid(place, ranks, sizes)
    order = {rank: number for number, rank in enumerate(needed_ranks(sizes))}
    places = sorted((order[rank], folder) for folder, rank in ranks.items() if rank in order)
    check_ranks_rise([(folder, arguments[folder]) for _, folder in places])
    stamp = version(first, files[0].path, missing=0.0)
    shards = []
    for file in files:
        content = contents[file.folder]
        check_ranks_agree([(f.folder, f.path, contents[f.folder]) for f in (files[0], file)])
        tp, pp, ep = ranks[file.folder]
        for chunk, model in enumerate(_chunks(file, content, dropped, skip_keys)):
            tensors = tensors_of(model, file.folder, file.path, dropped)
            where = f"{file.folder}/{os.path.basename(file.path)}"
            etp = tp % sizes.expert_tp
            shards.append(Shard(where, tensors, arguments[file.folder], tp, pp, chunk, ep, etp))
    num_chunks = 1 + max(shard.vpp for shard in shards)
    return RawCheckpoint(
        format=NAME,
        folder=place.folder,
        layout=replace(sizes, vpp=num_chunks),
        shards=tuple(shards),
        iteration=iteration(first, place, files[0].path),
        args=args,
        checkpoint_version=stamp,
        is_stamped=first.get("checkpoint_version") is not None,
        dropped={kind: tuple(sorted(set(names))) for kind, names in dropped.items()},
        evidence=(f"{len(files)} mp_rank_* folders with {os.path.basename(files[0].path)}",),
        num_files=len(files),
        iterations=place.iterations,
    )


def _rank_files(folder: str) -> list[_RankFile]:
    folders = [os.path.join(folder, name) for name in listing(folder) if _RANK.fullmatch(name)]
    return [file for file in sources.each(_rank_file_in, folders) if file]


def _rank_file_in(folder: str) -> _RankFile | None:
    name = os.path.basename(folder)
    hit = _RANK.fullmatch(name)
    for model in (_FILE, _FILE_OF_2022) if hit else ():
        path = os.path.join(folder, model)
        if hit and sources.is_file(path):
            return _RankFile(name, path, tuple(int(n) for n in hit.groups() if n))
    return None


def _without_copies(files: list[_RankFile], args: Mapping[str, object] | None) -> list[_RankFile]:
    """Without the files that further data-parallel ranks wrote for some days in 2022-05.

    (Megatron-LM 3c93098118: `mp_rank_TT[_PPP]_DDD/model_rng.pt`.)
    """
    if args is None:
        return files
    stages = args.get("pipeline_model_parallel_size")
    count = 2 if isinstance(stages, int) and stages > 1 else 1
    kept = []
    for file in files:
        is_copied = os.path.basename(file.path) == _FILE_OF_2022 and len(file.numbers) > count
        if not is_copied:
            kept.append(file)
        elif file.numbers[count:] == (0,):
            kept.append(replace(file, numbers=file.numbers[:count]))
    return kept or files


def _content(path: str) -> Mapping[str, object]:
    content = load(path)
    if not isinstance(content, dict):
        raise CorruptError(
            f"{path} is no Megatron checkpoint",
            found=type(content).__name__,
            expected="a dict with args and model",
        )
    return content


def _sizes(args: Mapping[str, object] | None, files: list[_RankFile]) -> Layout:
    """The layout the arguments name, or the one the folder names imply."""
    widest = [max(f.numbers[k] + 1 if k < len(f.numbers) else 1 for f in files) for k in range(3)]
    names = (
        ("tensor_model_parallel_size", "model_parallel_size"),
        ("pipeline_model_parallel_size",),
        ("expert_model_parallel_size",),
    )
    tp, pp, ep = (size_in(args, *n) or most for n, most in zip(names, widest, strict=True))
    pp += _encoder_stages(args, tp)
    return Layout(tp=tp, pp=pp, ep=ep, etp=_expert_tp(args, tp))


def _encoder_stages(args: Mapping[str, object] | None, tp: int) -> int:
    """Stages of a T5's encoder before those that the size of the pipeline counts.

    (Megatron-LM core_v0.9 to v0.13, whose decoder had a pipeline of its own.)

    Raises:
        UnsupportedError: they are divided over other tensor-parallel ranks than the decoder's.
    """
    stages = size_in(args, "encoder_pipeline_model_parallel_size") or 0
    ranks = size_in(args, "encoder_tensor_model_parallel_size") or tp
    if stages and ranks != tp:
        raise UnsupportedError(
            "encoder and decoder are divided over different numbers of ranks",
            found=f"encoder_tensor_model_parallel_size = {ranks}",
            expected=f"tensor_model_parallel_size = {tp} for both",
            fix="save it again with one size for both",
        )
    return stages


def _expert_tp(args: Mapping[str, object] | None, tp: int) -> int | None:
    """Ranks that an expert is divided among, where it is not divided like everything else.

    Rank r of a stage is tensor-parallel rank r % TP, within an expert rank r % ETP, and
    expert-parallel rank r // ETP % EP. A folder says the first and the last, which determine the
    second if ETP divides TP. (Source: initialize_model_parallel, core/parallel_state.py.)
    """
    if args is None or not args.get("num_experts"):
        return None
    etp = size_in(args, "expert_tensor_parallel_size")
    if etp is None or etp == tp:
        return None
    if tp % etp:
        raise UnsupportedError(
            "experts are divided among ranks that have no files of their own",
            found=f"expert_tensor_parallel_size = {etp}, tensor_model_parallel_size = {tp}",
            expected=f"a size that divides {tp}",
            fix="save the checkpoint as torch_dist, which does not depend on ranks",
        )
    return etp


def _coordinates(file: _RankFile, sizes: Layout) -> tuple[int, int, int]:
    match file.numbers:
        case (tp,):
            return tp, 0, 0
        case (tp, ep) if sizes.pp == 1 and sizes.ep > 1:
            return tp, 0, ep
        case (tp, pp):
            return tp, pp, 0
        case (tp, pp, ep):
            return tp, pp, ep
    raise AssertionError(file.numbers)


def _check_grid(place: Place, ranks: Mapping[str, tuple[int, int, int]], sizes: Layout) -> None:
    """Every tensor-parallel rank needs a file, and every expert rank, at each pipeline stage."""
    for folder, (tp, pp, ep) in ranks.items():
        if tp >= sizes.tp or pp >= sizes.pp or ep >= sizes.ep:
            raise InconsistentError(
                f"{folder} does not belong to a {sizes} checkpoint",
                found=f"{len(ranks)} rank folders in {place.folder}",
                expected=f"the ranks of {sizes}, as the arguments in the files say",
                fix="separate the files of the two runs",
            )
    if len(set(ranks.values())) < len(ranks):
        raise InconsistentError(
            f"{place.folder} has two folders for one rank",
            found=", ".join(ranks),
            expected=f"one folder per rank of {sizes}",
            fix="separate the files of the two runs",
        )
    dense = {(tp, pp) for tp, pp, _ in ranks.values()}
    experts = {(tp % sizes.expert_tp, pp, ep) for tp, pp, ep in ranks.values()}
    grid = ((tp, pp) for tp in range(sizes.tp) for pp in range(sizes.pp))
    num_missing = sizes.tp * sizes.pp - len(dense)
    missing = [
        f"{_rank_folder(tp, pp, 0, sizes)}/{_FILE}"
        for tp, pp in islice((rank for rank in grid if rank not in dense), _MAX_NAMED)
    ]
    num_absent = sizes.expert_tp * sizes.pp * sizes.ep - len(experts)
    if not missing and num_absent:
        num_missing = num_absent
        whole = (
            (tp, pp, ep)
            for tp in range(sizes.expert_tp)
            for pp in range(sizes.pp)
            for ep in range(sizes.ep)
        )
        absent = (rank for rank in whole if rank not in experts)
        missing = [
            f"{_rank_folder(tp, pp, ep, sizes)}/{_FILE}"
            if sizes.expert_tp == sizes.tp
            else f"a file of expert rank {ep} at pipeline rank {pp}, of a rank TT of which the "
            f"remainder by {sizes.expert_tp} is {tp}"
            for tp, pp, ep in islice(absent, _MAX_NAMED)
        ]
    if missing:
        others = [n for n in place.iterations if _has_all(place, n, sizes)]
        fix = "copy that file again" if num_missing == 1 else "copy those files again"
        more = f", ... ({num_missing})" if num_missing > len(missing) else ""
        raise IncompleteError(
            f"{os.path.basename(place.folder)} is incomplete; nothing was written",
            found=f"{len(ranks)} of {num_needed_ranks(sizes)} ranks ({sizes})",
            expected=", ".join(missing) + more,
            fix=fix + (f", or use --iteration {others[-1]}, which is complete" if others else ""),
        )


def _has_all(place: Place, iteration: int, sizes: Layout) -> bool:
    """Whether another iteration of the same root has a file for each tensor and pipeline rank."""
    root = iteration_folder(os.path.dirname(place.folder), iteration)
    folders = (_rank_folder(tp, pp, ep, sizes) for tp, pp, ep in needed_ranks(sizes))
    return all(sources.is_file(os.path.join(root, folder, _FILE)) for folder in folders)


def num_needed_ranks(sizes: Layout) -> int:
    """How many ranks write a file."""
    return sizes.pp * _stage_size(sizes)


def _stage_size(sizes: Layout) -> int:
    return lcm(sizes.tp, sizes.expert_tp * sizes.ep)


def needed_ranks(sizes: Layout) -> Iterator[tuple[int, int, int]]:
    """The (tensor, pipeline, expert) ranks that write a file, by global rank.

    Those are the ranks of a stage without copies of experts: r with r % TP and r // ETP % EP, as
    many as either grid needs. With ETP = TP they are all combinations.
    (Source: ensure_directory_exists and get_checkpoint_name, training/checkpointing.py;
    RankGenerator, core/parallel_state.py.)
    """
    tp, etp, ep = sizes.tp, sizes.expert_tp, sizes.ep
    for pp in range(sizes.pp):
        for r in range(_stage_size(sizes)):
            yield r % tp, pp, r // etp % ep


def _rank_folder(tp: int, pp: int, ep: int, sizes: Layout) -> str:
    name = f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if sizes.pp > 1 else "")
    return name + (f"_{ep:03d}" if sizes.ep > 1 else "")


def _chunks(
    file: _RankFile,
    content: Mapping[str, object],
    dropped: Dropped,
    skip_keys: frozenset[str],
) -> list[Mapping[str, object]]:
    """The model chunks of one file, in order; everything else must be of a known kind."""
    chunks: dict[int, Mapping[str, object]] = {}
    for key, value in content.items():
        number = re.fullmatch(r"model([0-9]{0,4})", str(key))
        if number and isinstance(value, dict):
            if int(number[1] or 0) in chunks:
                raise InconsistentError(
                    f"{file.path} has two models in it",
                    found=f"{key} beside model",
                    expected="model, or model0, model1, ...",
                )
            chunks[int(number[1] or 0)] = value
        elif key in STATE or key in skip_keys:
            dropped[STATE.get(key, "skipped")].append(str(key))
        elif holds_tensors(value):
            raise MappingError(
                f"{file.path} has tensors under {key!r}; nothing was written",
                found=str(key),
                expected="tensors under model only, beside optimizer and random state",
                fix=f"leave them out with --skip-key {key}, if they are not part of the model",
            )
    if not chunks or set(chunks) != set(range(len(chunks))):
        raise IncompleteError(
            f"{file.path} holds no complete model",
            found=", ".join(map(str, content)),
            expected="model, or model0, model1, ...",
        )
    return [chunks[number] for number in sorted(chunks)]


@dataclass(frozen=True, slots=True)
class RankModel:
    """What one rank's file will hold.

    Attributes:
        tp, pp, ep: the rank's coordinates.
        args: Megatron's arguments, plain values.
        chunks: per virtual chunk, names as in the file; None for an empty `_extra_state`.
    """

    tp: int
    pp: int
    ep: int
    args: Mapping[str, object]
    chunks: tuple[Mapping[str, Weight | None], ...]


def plan_files(
    folder: str, layout: Layout, ranks: Iterable[RankModel], iteration: int
) -> tuple[PlannedFile, ...]:
    """One file per rank, below the iteration's folder."""
    files = []
    for rank in ranks:
        name = f"{folder}/{_rank_folder(rank.tp, rank.pp, rank.ep, layout)}/{_FILE}"
        files.append(_rank_file(name, rank, iteration))
    return tuple(files)


def _rank_file(name: str, rank: RankModel, iteration: int) -> PlannedFile:
    weights: dict[int, Weight] = {}
    models: dict[str, object] = {}
    for number, chunk in enumerate(rank.chunks):
        label = f"model{number}" if len(rank.chunks) > 1 else "model"
        entries: dict[str, object] = {}
        for entry, weight in chunk.items():
            if weight is None:
                entries[entry] = None
                continue
            key = len(weights)
            weights[key] = Weight(f"{label}.{entry}", weight.source, weight.dtype)
            entries[entry] = tensor_value(weight, key)
        models[label] = Call(ORDERED_DICT, (), entries)
    content = {
        "args": namespace(rank.args),
        "checkpoint_version": 3.0,
        "iteration": iteration,
        **models,
    }
    zipped = plan(content, weights, _FILE.removesuffix(".pt"))
    return PlannedFile(name, zipped.fixed, zipped.tensors)


def namespace(args: Mapping[str, object]) -> Instance:
    """Arguments as Megatron stores them."""
    return Instance(Global("argparse", "Namespace"), args)
