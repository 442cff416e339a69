"""Megatron-Core's `torch_dist` format: global tensors in chunks, independent of the layout.

    iter_0001000/metadata.json   {"sharded_backend": "torch_dist", ...}
                 .metadata       pickle: for each global tensor its size and chunks (offsets,
                                 sizes), and where each chunk stands (file, offset, length)
                 __R_W.distcp    chunks of rank R, writer W: one torch.save zip each
                 common.pt       args, iteration, checkpoint_version, optimizer settings

Homogeneous layers are stacked: `decoder.layers.self_attention.linear_qkv.weight` is [L, ...];
otherwise names carry the global layer number. Names under `optimizer.` are never opened.
Stacked layers are written, each layer and each tensor-parallel rank's part a chunk of its own,
as Megatron-Core does; what no reader asks for is left out: the plans of the ranks that saved, and
the path and the identifier of the save.
(megatron/core/dist_checkpointing/strategies/torch.py, core 0.16.1; torch.distributed.checkpoint.)
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..boxes import Box, Ints, tiles
from ..checkpoint import Layout, RawCheckpoint, Shard
from ..dtypes import DType
from ..errors import CorruptError, IncompleteError, SourceError, UnsupportedError, UsageError
from ..plan import PlannedFile, PlannedTensor, document
from ..tensors import LazyTensor, Piece, stack
from .folders import Place
from .pickle_writer import Call, Global, Instance, Pairs, dumps
from .pickles import Record, load_pickle
from .torch_zip import Weight, load, plan, tensor_value
from .values import iteration, plain_arguments, records, sizes, version

NAME = "torch_dist"
_STATE = re.compile(
    r"(?P<optimizer>(chained_\d+\.)?optimizer\..*|opt_param_scheduler.*)"
    r"|(?P<rng>rng_state/.*|rng_state)"
    r"|(?P<rerun>rerun_state_machine_state.*)"
    r"|(?P<extra>.*\._extra_state(/.*)?)"
)
_MODEL = re.compile(r"(embedding|encoder|decoder|output_layer|mtp)\b")
_KINDS = {"optimizer": "optimizer", "rng": "rng", "rerun": "rerun state", "extra": "_extra_state"}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_STACKED = re.compile(r"decoder\.layers\.(?!\d+\.)(.+)")


def holds_model(folder: str) -> bool:
    """Whether the folder has this format's metadata."""
    return all(os.path.isfile(os.path.join(folder, n)) for n in (".metadata", "metadata.json"))


def open_folder(place: Place, skip_keys: frozenset[str] = frozenset()) -> RawCheckpoint:
    """Read the metadata of one iteration; of the `.distcp` files only their directories.

    Raises:
        IncompleteError: chunks of a tensor, or files, are missing.
        UnsupportedError: another sharded backend, or quantized weights.
        CorruptError, UnsafePickleError: metadata that cannot be read as data.
    """
    folder = place.folder
    _check_backend(folder)
    common = _common(folder)
    metadata = load_pickle(_read(os.path.join(folder, ".metadata")), f"{folder}/.metadata")
    if not isinstance(metadata, Record):
        raise CorruptError(f"{folder}/.metadata is no checkpoint metadata")
    stored = _stored(metadata)
    dropped: dict[str, list[str]] = defaultdict(list)
    tensors: dict[str, LazyTensor] = {}
    entries = metadata.field("state_dict_metadata")
    if not isinstance(entries, dict):
        raise CorruptError(f"{folder}/.metadata lists no tensors")
    if wanted := sorted(name for name in skip_keys if _MODEL.match(name)):
        raise UsageError(
            "--skip-key cannot leave out a part of the model",
            found=wanted[0],
            expected="an entry that is no model parameter",
            fix="leave out that --skip-key",
        )
    for name, entry in entries.items():
        if not isinstance(name, str):
            raise CorruptError(f"{folder}/.metadata lists tensors without names")
        kind = _STATE.fullmatch(name)
        if kind or name in skip_keys:
            dropped[_KINDS[kind.lastgroup or ""] if kind else "skipped"].append(name)
        elif isinstance(entry, Record) and entry.qualified.endswith(".TensorStorageMetadata"):
            tensors.update(_numbered(name, _tensor(folder, name, entry, stored)))
        else:
            raise UnsupportedError(
                f"{name} is not stored as a tensor; nothing was written",
                found=getattr(entry, "qualified", type(entry).__name__),
                expected="a tensor",
                fix=f"leave it out with --skip-key {name}, if it is not part of the model",
            )
    paths = {piece.path for tensor in tensors.values() for piece in tensor.pieces}
    where = f"{folder}/common.pt"
    fields = plain_arguments(common.get("args"))
    return RawCheckpoint(
        format=NAME,
        folder=folder,
        layout=_layout(fields or {}),
        shards=(Shard(".metadata", tensors, fields),),
        iteration=iteration(common, place, where),
        args=fields,
        checkpoint_version=version(common, where, missing=3.0),
        dropped={kind: tuple(sorted(names)) for kind, names in dropped.items()},
        evidence=("metadata.json names the torch_dist backend",),
        num_files=len(paths),
        iterations=place.iterations,
    )


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise SourceError(f"{path} cannot be read", found=str(error)) from error


def _check_backend(folder: str) -> None:
    path = os.path.join(folder, "metadata.json")
    try:
        backend = json.loads(_read(path))["sharded_backend"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptError(f"{path} is not readable JSON", found=str(error)) from error
    if backend != NAME:
        raise UnsupportedError(
            f"{folder} uses another sharded backend", found=str(backend), expected=NAME
        )


def _common(folder: str) -> dict[Any, Any]:
    path = os.path.join(folder, "common.pt")
    if not os.path.isfile(path):
        raise IncompleteError(
            f"{os.path.basename(folder)} is incomplete; nothing was written",
            found=".metadata without common.pt",
            expected="common.pt",
            fix="copy that file again",
        )
    common = load(path)
    if not isinstance(common, dict):
        raise CorruptError(f"{path} is no dict", found=type(common).__name__)
    return common


def _layout(args: dict[str, object]) -> Layout:
    """The layout that wrote the files: information only, the chunks do not depend on it."""

    def size(name: str) -> int:
        value = args.get(name)
        return value if type(value) is int and value > 0 else 1

    return Layout(
        tp=size("tensor_model_parallel_size"),
        pp=size("pipeline_model_parallel_size"),
        vpp=size("virtual_pipeline_model_parallel_size"),
        ep=size("expert_model_parallel_size"),
    )


def _stored(metadata: Record) -> dict[tuple[str, Ints], tuple[str, int, int]]:
    """(tensor name, chunk offsets) -> (file, offset, length)."""
    stored = {}
    storage = metadata.field("storage_data")
    for index, info in storage.items() if isinstance(storage, dict) else ():
        if not (isinstance(index, Record) and isinstance(info, Record)):
            raise CorruptError("storage_data of .metadata is of an unknown kind")
        offsets = index.fields.get("offset")
        if offsets is not None:
            name = index.field("fqn")
            place = (info.field("relative_path"), info.field("offset"), info.field("length"))
            if not isinstance(name, str):
                raise CorruptError("storage_data of .metadata lists tensors without names")
            stored[name, sizes(offsets, name)] = place
    return stored


def _tensor(
    folder: str,
    name: str,
    entry: Record,
    stored: dict[tuple[str, Ints], tuple[str, int, int]],
) -> LazyTensor:
    """One global tensor from its chunks."""
    shape = sizes(entry.field("size"), name)
    chunks = [
        (sizes(chunk.field("offsets"), name), sizes(chunk.field("sizes"), name))
        for chunk in records(entry.field("chunks"), name)
    ]
    ranks = {len(part) for chunk in chunks for part in chunk}
    if ranks - {len(shape)} or not tiles(chunks, shape):
        raise IncompleteError(
            f"the chunks of {name} do not make up the tensor; nothing was written",
            found=f"{len(chunks)} chunks",
            expected=f"chunks that cover {list(shape)} once",
        )
    pieces: list[Piece] = []
    dtypes = set()
    for start, extent in chunks:
        part = _chunk(folder, name, start, extent, stored)
        dtypes.add(part.dtype)
        pieces += [
            Piece(start, extent, piece.path, piece.offset, piece.strides) for piece in part.pieces
        ]
    dtype = dtypes.pop()
    if dtypes or not dtype.is_floating or dtype.itemsize == 1:
        raise UnsupportedError(
            f"{name} holds no plain weights; nothing was written",
            found=", ".join(sorted(map(str, {dtype, *dtypes}))),
            expected="float32, bfloat16 or float16 (quantized and fp8 weights are refused)",
            fix="save the checkpoint with plain weights",
        )
    return LazyTensor(dtype, shape, tuple(pieces))


def _chunk(
    folder: str,
    name: str,
    start: Ints,
    extent: Ints,
    stored: dict[tuple[str, Ints], tuple[str, int, int]],
) -> LazyTensor:
    if (name, start) not in stored:
        raise IncompleteError(f".metadata does not say where {name} {list(start)} is stored")
    relative, offset, length = stored[name, start]
    if not (isinstance(relative, str) and type(offset) is int and type(length) is int):
        raise CorruptError(f".metadata is inconsistent about {name}")
    if os.path.basename(relative) != relative or "\0" in relative:
        raise CorruptError(
            f".metadata points outside the checkpoint for {name}",
            found=relative,
            expected="a file beside .metadata",
        )
    path = os.path.join(folder, relative)
    if not os.path.isfile(path):
        raise IncompleteError(
            f"{os.path.basename(folder)} is incomplete; nothing was written",
            found=f".metadata, which places {name} in {relative}",
            expected=relative,
            fix="copy that file again",
        )
    part = load(path, offset, length)
    if not isinstance(part, LazyTensor) or part.shape != extent or part.num_bytes > length:
        raise CorruptError(
            f"{relative} holds something else at {offset} than .metadata says",
            found=str(list(part.shape)) if isinstance(part, LazyTensor) else type(part).__name__,
            expected=f"{name} {list(extent)}",
        )
    return part


def _numbered(name: str, tensor: LazyTensor) -> dict[str, LazyTensor]:
    """Stacked layers apart, under their numbers."""
    hit = _STACKED.fullmatch(name)
    if not hit:
        return {name: tensor}
    layers = tensor.unstack()
    return {f"decoder.layers.{layer}.{hit[1]}": part for layer, part in enumerate(layers)}


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a global tensor that one rank writes.

    Attributes:
        name: canonical, with the layer's number.
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
    num_layers: int,
    common: Mapping[str, object],
    max_file_bytes: int,
) -> tuple[tuple[PlannedFile, ...], dict[str, bytes]]:
    """The files of one iteration.

    Args:
        folder: the iteration's, as seen from the output folder.
        ranks: by global rank.
        num_layers: layers that are stacked.
        common: what `common.pt` holds besides its tags.
        max_file_bytes: a rank's file is continued in another beyond this.

    Returns:
        The chunk files, and the small files by name: `.metadata` comes last.
    """
    index = _Index(num_layers)
    files: list[PlannedFile] = []
    for number, rank in enumerate(ranks):
        files += _rank_files(folder, number, rank, index, max_file_bytes)
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
    folder: str, number: int, rank: RankChunks, index: _Index, max_file_bytes: int
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
        name = _object_name(name, index.num_layers)
        index.add_object(name, _file_name(number, 0), position, zipped.end - position)
        fixed += zipped.fixed
        position = zipped.end
    for chunk in rank.chunks:
        if position and position + chunk.weight.num_bytes > max_file_bytes:
            close()
        name, shape, start, weight = _stacked(chunk, index.num_layers)
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


def _stacked(chunk: Chunk, num_layers: int) -> tuple[str, Ints, Ints, Weight]:
    """Name, shape, start and part of a chunk within all layers stacked."""
    name, shape, start = chunk.name, chunk.shape, chunk.box[0]
    source = chunk.weight.source
    if hit := _LAYER.fullmatch(name):
        name = f"decoder.layers.{hit[2]}"
        shape, start, source = (num_layers, *shape), (int(hit[1]), *start), stack([source])
    label = f"{name} [{', '.join(map(str, start))}]"
    return name, shape, start, Weight(label, source, chunk.weight.dtype)


def _object_name(name: str, num_layers: int) -> str:
    """An object among those of all layers, or the only one of its name."""
    if hit := _LAYER.fullmatch(name):
        return f"decoder.layers.{hit[2]}/shard_{hit[1]}_{num_layers}"
    return f"{name}/shard_0_1"


def _class(path: str) -> Global:
    module, _, name = f"torch.distributed.checkpoint.{path}".rpartition(".")
    return Global(module, name)


def _size(sizes: Ints) -> Call:
    return Call(Global("torch", "Size"), (sizes,))


@dataclass(slots=True)
class _Index:
    """Collects what `.metadata` says: every tensor's chunks, and where each stands."""

    num_layers: int
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
