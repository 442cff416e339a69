"""Megatron-Core's `torch_dist` format: global tensors in chunks, independent of the layout.

    iter_0001000/metadata.json   {"sharded_backend": "torch_dist", ...}
                 .metadata       tensors, their chunks and places: see `dcp.py`
                 __R_W.distcp    the chunks
                 common.pt       args, iteration, checkpoint_version, optimizer settings

Homogeneous layers are stacked: `decoder.layers.self_attention.linear_qkv.weight` is [L, ...];
otherwise names carry the global layer number. With singleton shards the halves of a gated
`linear_fc1` are two tensors, `weight_w` (gate) and `weight_v` (up). Names under `optimizer.`,
whichever way the optimizer is laid out, are never opened.
Layers that are all alike are written stacked, and so are experts; each layer, expert and rank's
part is a chunk of its own, as Megatron-Core does. Layers with and without experts are numbered.
What no reader asks for is left out: the plans of the ranks that saved, and the path and the
identifier of the save.
(megatron/core/dist_checkpointing/strategies/torch.py, core 0.16.1; torch.distributed.checkpoint.)
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from .. import sources
from ..boxes import Box, Ints
from ..checkpoint import Layout, RawCheckpoint, Shard
from ..dtypes import DType
from ..errors import (
    CorruptError,
    IncompleteError,
    InconsistentError,
    UnsupportedError,
    UsageError,
)
from ..plan import PlannedFile, PlannedTensor, document
from ..tensors import LazyTensor, concat, stack
from .dcp import METADATA, open_metadata
from .folders import Place
from .nemo_config import arguments_beside
from .pickle_writer import Call, Global, Instance, Pairs, dumps
from .torch_zip import Weight, load, plan, tensor_value
from .values import iteration, plain_arguments, plain_values, size_in, version

NAME = "torch_dist"
_STATE = re.compile(
    r"(?P<optimizer>(chained_\d+\.)?optimizer\..*|opt_param_scheduler.*)"
    r"|(?P<rng>rng_state/.*|rng_state)"
    r"|(?P<rerun>rerun_state_machine_state.*)"
    r"|(?P<extra>.*\._extra_state(/.*)?)"
)
_MODEL = re.compile(
    r"(module\.)?"
    r"(embedding|encoder|decoder|output_layer|mtp|lm_head|position_embeddings|pooler|binary_head"
    r"|(encoder|decoder)_relative_pos_emb)\b"
)
# NeMo saves the model within what wraps it.
_WRAPPER = "module."
_GATE, _UP = "_w", "_v"
_KINDS = {"optimizer": "optimizer", "rng": "rng", "rerun": "rerun state", "extra": "_extra_state"}
_LAYER = re.compile(r"(encoder|decoder)\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(.+\.mlp\.experts\.experts\.)(\d+)\.(.+)")
_STACKED = re.compile(r"(encoder|decoder)\.layers\.(?!\d+\.)(.+)")


def holds_model(folder: str) -> bool:
    """Whether the folder has this format's metadata."""
    return all(sources.is_file(os.path.join(folder, n)) for n in (METADATA, "metadata.json"))


def open_folder(place: Place, skip_keys: frozenset[str] = frozenset()) -> RawCheckpoint:
    """Read the metadata of one iteration; of the `.distcp` files only their directories.

    Raises:
        IncompleteError: chunks of a tensor, or files, are missing.
        UnsupportedError: another sharded backend, or quantized weights.
        CorruptError, UnsafePickleError: metadata that cannot be read as data.
    """
    return open_global(NAME, place, open_metadata(place.folder), skip_keys)


class GlobalTensors(Protocol):
    """Global tensors and objects by name, however they are stored."""

    @property
    def entries(self) -> Mapping[str, object]:
        """All names."""

    def is_tensor(self, name: str) -> bool:
        """Whether an entry is a tensor; the others are objects."""

    def tensors(self, names: Iterable[str]) -> dict[str, LazyTensor]:
        """Some of the tensors, not read."""


def open_global(
    backend: str, place: Place, stored: GlobalTensors, skip_keys: frozenset[str]
) -> RawCheckpoint:
    """A checkpoint of Megatron-Core's: `stored` as `backend` has it, `common.pt` beside."""
    _check_backend(place.folder, backend)
    common = _common(place.folder)
    where = f"{place.folder}/common.pt"
    tensors, dropped = _model_tensors(stored, skip_keys)
    joined = join_gated(tensors)
    is_stacked = any(_STACKED.match(name.removeprefix(_WRAPPER)) for name in stored.entries)
    evidence = [f"metadata.json names the {backend} backend"]
    evidence.append("layers are stacked" if is_stacked else "layers are numbered")
    if len(joined) < len(tensors):
        evidence.append("gate and up of the MLP are apart")
    arguments: Mapping[str, object] | None = plain_arguments(common.get("args"))
    if arguments is None:
        beside, found = arguments_beside(place.folder)
        arguments = None if beside is None else plain_values(beside)
        evidence += [found] if found else []
    return raw_checkpoint(
        backend,
        place,
        (joined, dropped),
        arguments=arguments,
        iteration=iteration(common, place, where),
        checkpoint_version=version(common, where, missing=3.0),
        evidence=tuple(evidence),
    )


def _model_tensors(
    stored: GlobalTensors, skip_keys: frozenset[str]
) -> tuple[dict[str, LazyTensor], dict[str, list[str]]]:
    """The model's tensors under the names of its modules, layers numbered.

    Returns:
        The tensors, and by kind of state the names of what was left out.

    Raises:
        UnsupportedError: something that is neither a tensor nor a known kind of state.
        UsageError: `skip_keys` names a part of the model.
    """
    if wanted := sorted(name for name in skip_keys if _MODEL.match(name)):
        raise UsageError(
            "--skip-key cannot leave out a part of the model",
            found=wanted[0],
            expected="an entry that is no model parameter",
            fix="leave out that --skip-key",
        )
    dropped: dict[str, list[str]] = defaultdict(list)
    wanted = []
    for name in stored.entries:
        kind = _STATE.fullmatch(name)
        if kind or name in skip_keys:
            dropped[_KINDS[kind.lastgroup or ""] if kind else "skipped"].append(name)
        elif stored.is_tensor(name):
            wanted.append(name)
        else:
            raise UnsupportedError(
                f"{name} is not stored as a tensor; nothing was written",
                found="an object",
                expected="a tensor",
                fix=f"leave it out with --skip-key {name}, if it is not part of the model",
            )
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in stored.tensors(wanted).items():
        tensors.update(_numbered(name.removeprefix(_WRAPPER), tensor))
    return tensors, dropped


def raw_checkpoint(
    name: str,
    place: Place,
    model: tuple[Mapping[str, LazyTensor], Mapping[str, list[str]]],
    *,
    arguments: Mapping[str, object] | None,
    iteration: int | None,
    checkpoint_version: float,
    evidence: tuple[str, ...],
) -> RawCheckpoint:
    """What was found in a folder of global tensors."""
    tensors, dropped = model
    return RawCheckpoint(
        format=name,
        folder=place.folder,
        layout=layout(arguments or {}),
        shards=(Shard(METADATA, tensors, arguments),),
        iteration=iteration,
        args=arguments,
        checkpoint_version=checkpoint_version,
        dropped={kind: tuple(sorted(names)) for kind, names in dropped.items()},
        evidence=evidence,
        num_files=len({piece.path for tensor in tensors.values() for piece in tensor.pieces}),
        iterations=place.iterations,
    )


def _check_backend(folder: str, backend: str) -> None:
    """Raise UnsupportedError unless `metadata.json` names this backend."""
    path = os.path.join(folder, "metadata.json")
    try:
        found = json.loads(sources.read(path))["sharded_backend"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptError(f"{path} is not readable JSON", found=str(error)) from error
    if found == NAME != backend:
        raise IncompleteError(
            f"{os.path.basename(folder)} is incomplete; nothing was written",
            found="metadata.json of a torch_dist checkpoint",
            expected=METADATA,
            fix="copy that file again; its name begins with a dot",
        )
    if found != backend:
        raise UnsupportedError(
            f"{folder} uses another sharded backend", found=str(found), expected=backend
        )


def _common(folder: str) -> dict[Any, Any]:
    path = os.path.join(folder, "common.pt")
    if not sources.is_file(path):
        raise IncompleteError(
            f"{os.path.basename(folder)} is incomplete; nothing was written",
            found="metadata.json without common.pt",
            expected="common.pt",
            fix="copy that file again",
        )
    common = load(path)
    if not isinstance(common, dict):
        raise CorruptError(f"{path} is no dict", found=type(common).__name__)
    return common


def layout(args: Mapping[str, object]) -> Layout:
    """The layout that wrote the files: information only, the chunks do not depend on it."""
    return Layout(
        tp=size_in(args, "tensor_model_parallel_size") or 1,
        pp=size_in(args, "pipeline_model_parallel_size") or 1,
        vpp=size_in(args, "virtual_pipeline_model_parallel_size") or 1,
        ep=size_in(args, "expert_model_parallel_size") or 1,
    )


def join_gated(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Join the halves of a gated `linear_fc1`, where they are stored apart.

    (megatron/core/transformer/mlp.py `apply_swiglu_sharded_factory` with singleton shards.)

    Raises:
        IncompleteError: one half is missing.
        InconsistentError: the halves differ in size or type.
    """
    joined: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if not name.endswith((_GATE, _UP)):
            joined[name] = tensor
            continue
        whole = name[: -len(_GATE)]
        halves = [tensors.get(whole + half) for half in (_GATE, _UP)]
        gate, up = halves
        if gate is None or up is None or whole in tensors:
            raise IncompleteError(
                f"{whole} is incomplete; nothing was written",
                found=name,
                expected=f"{whole}{_GATE} and {whole}{_UP}",
            )
        if (gate.dtype, gate.shape) != (up.dtype, up.shape):
            raise InconsistentError(
                f"the halves of {whole} do not fit together; nothing was written",
                found=f"{gate.dtype} {list(gate.shape)} and {up.dtype} {list(up.shape)}",
                expected="one dtype and one shape",
            )
        joined[whole] = concat([gate, up])
    return joined


def _numbered(name: str, tensor: LazyTensor) -> dict[str, LazyTensor]:
    """Stacked layers apart, under their numbers."""
    hit = _STACKED.fullmatch(name)
    if not hit:
        return {name: tensor}
    layers = tensor.unstack()
    return {f"{hit[1]}.layers.{layer}.{hit[2]}": part for layer, part in enumerate(layers)}


@dataclass(frozen=True, slots=True)
class Stacking:
    """What stands in one tensor: the layers, if they are all alike, and the experts of a layer.

    Attributes:
        num_layers: layers of `encoder` and `decoder`; None if they are numbered.
        num_experts: experts.
    """

    num_layers: Mapping[str, int] | None
    num_experts: int = 1


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a global tensor that one rank writes.

    Attributes:
        name: with the numbers of layer and expert.
        shape: of the whole tensor.
        box: where the part is in it.
        weight: its elements and dtype.
    """

    name: str
    shape: Ints
    box: Box
    weight: Weight


@dataclass(frozen=True, slots=True)
class RankChunks:
    """What one rank writes: tensors, and objects that are empty (`_extra_state`).

    Megatron-Core asks for these objects whatever its strictness, and stores them in a list.
    """

    chunks: tuple[Chunk, ...]
    objects: tuple[str, ...]


def plan_files(
    folder: str,
    ranks: Iterable[RankChunks],
    stacking: Stacking,
    common: Mapping[str, object],
    max_file_bytes: int,
) -> tuple[tuple[PlannedFile, ...], dict[str, bytes]]:
    """The files of one iteration.

    Args:
        folder: the iteration's, as seen from the output folder.
        ranks: by global rank.
        stacking: what is stacked.
        common: what `common.pt` holds besides its tags.
        max_file_bytes: a rank's file is continued in another beyond this.

    Returns:
        The chunk files, and the small files by name: `.metadata` comes last.
    """
    index = _Index()
    files: list[PlannedFile] = []
    for number, rank in enumerate(ranks):
        files += _rank_files(folder, number, rank, index, stacking, max_file_bytes)
    tags = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    content = {**common, "content_metadata": tags}
    backends = {"sharded_backend": NAME, "sharded_backend_version": 1}
    backends |= {"common_backend": "torch", "common_backend_version": 1}
    (_, common_file), *_ = plan(content, {}, "common").fixed
    documents = {
        f"{folder}/common.pt": common_file,
        f"{folder}/metadata.json": document(backends),
        f"{folder}/.metadata": dumps(index.metadata()),
    }
    return tuple(files), documents


def _rank_files(
    folder: str,
    number: int,
    rank: RankChunks,
    index: _Index,
    stacking: Stacking,
    max_file_bytes: int,
) -> list[PlannedFile]:
    """A rank's chunks, one zip after another, in as many files as they need."""
    files: list[PlannedFile] = []
    fixed: list[tuple[int, bytes]] = []
    tensors: list[PlannedTensor] = []
    position = 0

    def close() -> None:
        nonlocal fixed, tensors, position
        if position:
            name = f"{folder}/{_file_name(number, len(files))}"
            files.append(PlannedFile(name, tuple(fixed), tuple(tensors)))
        fixed, tensors, position = [], [], 0

    for name in rank.objects:
        zipped = plan([None], {}, "archive", position)
        name = _object_name(name, stacking)
        index.add_object(name, _file_name(number, 0), position, zipped.end - position)
        fixed += zipped.fixed
        position = zipped.end
    for chunk in rank.chunks:
        if position and position + chunk.weight.num_bytes > max_file_bytes:
            close()
        name, shape, start, weight = _stacked(chunk, stacking)
        zipped = plan(tensor_value(weight, 0), {0: weight}, "archive", position)
        place = (_file_name(number, len(files)), position, zipped.end - position)
        index.add_chunk(name, shape, start, weight, place)
        fixed += zipped.fixed
        tensors += zipped.tensors
        position = zipped.end
    close()
    return files


def _file_name(rank: int, writer: int) -> str:
    return f"__{rank}_{writer}.distcp"


def _axes(name: str, stacking: Stacking) -> tuple[str, Ints, Ints]:
    """A name without the numbers of what is stacked, those numbers, and how many there are."""
    index: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    if hit := _EXPERT.fullmatch(name):
        name, index, sizes = hit[1] + hit[3], (int(hit[2]),), (stacking.num_experts,)
    if (hit := _LAYER.fullmatch(name)) and stacking.num_layers is not None:
        name = f"{hit[1]}.layers.{hit[3]}"
        index, sizes = (int(hit[2]), *index), (stacking.num_layers[hit[1]], *sizes)
    return name, index, sizes


def _stacked(chunk: Chunk, stacking: Stacking) -> tuple[str, Ints, Ints, Weight]:
    """Name, shape, start and part of a chunk within all layers and experts stacked."""
    name, index, sizes = _axes(chunk.name, stacking)
    source = chunk.weight.source
    for _ in index:
        source = stack([source])
    start = (*index, *chunk.box[0])
    label = f"{name} [{', '.join(map(str, start))}]"
    return name, (*sizes, *chunk.shape), start, Weight(label, source, chunk.weight.dtype)


def _object_name(name: str, stacking: Stacking) -> str:
    """An object among those of all layers and experts, or the only one of its name."""
    name, index, sizes = _axes(name, stacking)
    numbers = (".".join(map(str, part)) for part in (index or (0,), sizes or (1,)))
    return f"{name}/shard_{'_'.join(numbers)}"


def _class(path: str) -> Global:
    module, _, name = f"torch.distributed.checkpoint.{path}".rpartition(".")
    return Global(module, name)


def _size(sizes: Ints) -> Call:
    return Call(Global("torch", "Size"), (sizes,))


@dataclass(slots=True)
class _Index:
    """Collects what `.metadata` says: every tensor's chunks, and where each stands."""

    _objects: list[str] = field(default_factory=list)
    _tensors: dict[str, tuple[Ints, DType]] = field(default_factory=dict)
    _chunks: dict[str, list[object]] = field(default_factory=lambda: defaultdict(list))
    _storage: list[tuple[object, object]] = field(default_factory=list)

    def add_object(self, name: str, file: str, offset: int, length: int) -> None:
        """An object that is no tensor."""
        self._objects.append(name)
        self._place(name, None, (file, offset, length))

    def add_chunk(
        self, name: str, shape: Ints, start: Ints, weight: Weight, place: tuple[str, int, int]
    ) -> None:
        """A chunk of a tensor."""
        self._tensors[name] = (shape, weight.dtype)
        state = {"offsets": _size(start), "sizes": _size(weight.source.shape)}
        self._chunks[name].append(Instance(_class("metadata.ChunkStorageMetadata"), state))
        self._place(name, _size(start), place)

    def _place(self, name: str, offset: Call | None, place: tuple[str, int, int]) -> None:
        key = {"fqn": name, "offset": offset, "index": None}
        fields = ("relative_path", "offset", "length")
        info = {**dict(zip(fields, place, strict=True)), "transform_descriptors": None}
        self._storage.append(
            (
                Instance(_class("metadata.MetadataIndex"), key),
                Instance(_class("filesystem._StorageInfo"), info),
            )
        )

    def metadata(self) -> Instance:
        """The object that `.metadata` is a pickle of."""
        entries: dict[str, object] = {
            name: self._tensor(name, shape, dtype) for name, (shape, dtype) in self._tensors.items()
        }
        empty = Instance(_class("metadata.BytesStorageMetadata"), {})
        entries |= dict.fromkeys(self._objects, empty)
        state = {
            "state_dict_metadata": entries,
            "planner_data": None,
            "storage_data": Pairs(tuple(self._storage)),
            "storage_meta": None,
            "version": "1.0.0",
        }
        return Instance(_class("metadata.Metadata"), state)

    def _tensor(self, name: str, shape: Ints, dtype: DType) -> Instance:
        layout = Call(Global("torch.serialization", "_get_layout"), ("torch.strided",))
        contiguous = Call(_class("metadata._MEM_FORMAT_ENCODING"), (0,))
        properties = (dtype, layout, False, contiguous, False)
        state = {
            "properties": Instance(_class("metadata.TensorProperties"), properties),
            "size": _size(shape),
            "chunks": self._chunks[name],
        }
        return Instance(_class("metadata.TensorStorageMetadata"), state)
