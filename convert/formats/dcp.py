"""What `torch.distributed.checkpoint` writes: global tensors in chunks, and objects.

    .metadata      pickle: for each global tensor its size and chunks (offsets, sizes), which
                   entries are objects, and where each chunk or object stands (file, offset, length)
    __R_W.distcp   of rank R, writer W: one torch.save zip after another, a chunk or object in each

Only `.metadata` and the directories of the wanted zips are read. Megatron-Core before 0.16 stores
a class of its own in `.metadata`, with one field more; it is read alike.
(torch/distributed/checkpoint/{metadata,filesystem}.py, torch 2.13;
megatron/core/dist_checkpointing/strategies/torch.py `MCoreMetadata`, core 0.15.0.)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from .. import sources
from ..boxes import Ints, tiles
from ..errors import CorruptError, IncompleteError, UnsupportedError
from ..tensors import LazyTensor, Piece, stored_bytes
from . import float8
from .pickles import Record, Stub, load_pickle
from .torch_zip import load
from .values import records, sizes

METADATA = ".metadata"
# Of a chunk's zip: the pickle is within its first bytes, the directory within its last.
_END_BYTES = 2048
Stored = tuple[object, object, object]


@dataclass(frozen=True, slots=True)
class DistributedCheckpoint:
    """The metadata of one checkpoint.

    Attributes:
        folder: where its files are.
        entries: name -> what `.metadata` says of a tensor or an object.
        stored: (name, chunk offsets, or None for an object) -> (file, offset, length).
    """

    folder: str
    entries: Mapping[str, Record]
    stored: Mapping[tuple[str, Ints | None], Stored]

    def is_tensor(self, name: str) -> bool:
        """Whether an entry is a tensor; the others are objects."""
        return self.entries[name].qualified.endswith(".TensorStorageMetadata")

    def tensors(self, names: Iterable[str]) -> dict[str, LazyTensor]:
        """Global tensors by name; of the `.distcp` files only directories are read.

        Raises:
            IncompleteError: chunks of a tensor, or files, are missing.
            UnsupportedError: quantized weights, or compressed chunks.
            CorruptError: metadata that contradicts itself or the files.
        """
        chunks = {name: self._chunks(name) for name in names}
        found = [(self._place(n, start), n) for n, parts in chunks.items() for start, _ in parts]
        _check_apart((place for place, _ in found), self.folder)
        places = dict(found)
        self._check_files({path: name for (path, _, _), name in places.items()})
        ends = ((path, at, at + length, min(length, _END_BYTES)) for path, at, length in places)
        sources.expect(
            part
            for path, start, stop, size in ends
            for part in ((path, start, size), (path, stop - size, size))
        )
        return {name: self._tensor(name, parts) for name, parts in chunks.items()}

    def _check_files(self, files: Mapping[str, str]) -> None:
        """Raise IncompleteError for a file that is not there; `files` are path -> a tensor."""
        missing = [path for path in files if not sources.is_file(path)]
        if missing:
            relative = os.path.basename(missing[0])
            raise IncompleteError(
                f"{os.path.basename(self.folder)} is incomplete; nothing was written",
                found=f".metadata, which places {files[missing[0]]} in {relative}",
                expected=", ".join(os.path.basename(path) for path in missing[:4]),
                fix="copy that file again" if len(missing) == 1 else "copy those files again",
            )

    def object(self, name: str) -> object:
        """An object: whatever its pickle holds, as data.

        Raises:
            IncompleteError, CorruptError: it is not where `.metadata` says.
            UnsafePickleError: its pickle names something that is not data.
        """
        path, offset, length = self._place(name, None)
        self._check_files({path: name})
        return load(path, offset, length)

    def _chunks(self, name: str) -> list[tuple[Ints, Ints]]:
        """(offsets, sizes) of the chunks that make up a tensor; empty ones are left out."""
        entry = self.entries[name]
        shape = sizes(entry.field("size"), name)
        chunks = [
            (sizes(chunk.field("offsets"), name), sizes(chunk.field("sizes"), name))
            for chunk in records(entry.field("chunks"), name)
        ]
        filled = [(start, extent) for start, extent in chunks if prod(extent)]
        ranks = {len(part) for chunk in filled for part in chunk}
        if ranks - {len(shape)} or not filled or not tiles(filled, shape):
            raise IncompleteError(
                f"the chunks of {name} do not make up the tensor; nothing was written",
                found=f"{len(chunks)} chunks",
                expected=f"chunks that cover {list(shape)} once",
            )
        return filled

    def _tensor(self, name: str, chunks: list[tuple[Ints, Ints]]) -> LazyTensor:
        pieces: list[Piece] = []
        dtypes = set()
        for start, extent in chunks:
            part = self._chunk(name, start, extent)
            dtypes.add(part.dtype)
            pieces += [Piece(start, extent, p.path, p.offset, p.strides) for p in part.pieces]
        dtype = dtypes.pop()
        if dtypes or not dtype.is_floating or dtype.itemsize == 1:
            raise UnsupportedError(
                f"{name} holds no plain weights; nothing was written",
                found=", ".join(sorted(map(str, {dtype, *dtypes}))),
                expected="float32, bfloat16 or float16 (quantized and fp8 weights are refused)",
                fix="save the checkpoint with plain weights",
            )
        return LazyTensor(dtype, sizes(self.entries[name].field("size"), name), tuple(pieces))

    def _chunk(self, name: str, start: Ints, extent: Ints) -> LazyTensor:
        path, offset, length = self._place(name, start)
        part = load(path, offset, length)
        if isinstance(part, Stub):
            part = float8.weight_of(part, name, os.path.basename(path)) or part
        if not isinstance(part, LazyTensor) or part.shape != extent or stored_bytes(part) > length:
            raise CorruptError(
                f"{os.path.basename(path)} holds something else at {offset} than .metadata says",
                found=str(list(part.shape))
                if isinstance(part, LazyTensor)
                else type(part).__name__,
                expected=f"{name} {list(extent)}",
            )
        return part

    def _place(self, name: str, start: Ints | None) -> tuple[str, int, int]:
        """File, offset and length of a chunk or an object."""
        if (name, start) not in self.stored:
            part = f"{name} {list(start)}" if start is not None else name
            raise IncompleteError(f".metadata does not say where {part} is stored")
        relative, offset, length = self.stored[name, start]
        if not (isinstance(relative, str) and type(offset) is int and type(length) is int):
            raise CorruptError(f".metadata is inconsistent about {name}")
        if os.path.basename(relative) != relative or "\0" in relative:
            raise CorruptError(
                f".metadata points outside the checkpoint for {name}",
                found=relative,
                expected="a file beside .metadata",
            )
        return os.path.join(self.folder, relative), offset, length


def open_metadata(folder: str) -> DistributedCheckpoint:
    """Read `.metadata`.

    Raises:
        CorruptError, UnsafePickleError: it cannot be read as data.
        UnsupportedError: chunks are stored compressed.
    """
    path = os.path.join(folder, METADATA)
    metadata = load_pickle(sources.read(path), path)
    if not isinstance(metadata, Record) or not metadata.qualified.endswith("Metadata"):
        raise CorruptError(f"{path} is no checkpoint metadata")
    entries = metadata.field("state_dict_metadata")
    if not isinstance(entries, dict):
        raise CorruptError(f"{path} lists no tensors")
    for name, entry in entries.items():
        if not isinstance(name, str) or not isinstance(entry, Record):
            raise CorruptError(f"{path} lists tensors without names or sizes")
    return DistributedCheckpoint(folder, entries, _stored(metadata))


def _stored(metadata: Record) -> dict[tuple[str, Ints | None], Stored]:
    stored: dict[tuple[str, Ints | None], Stored] = {}
    storage = metadata.field("storage_data")
    for index, info in storage.items() if isinstance(storage, dict) else ():
        if not (isinstance(index, Record) and isinstance(info, Record)):
            raise CorruptError("storage_data of .metadata is of an unknown kind")
        name, offsets = index.field("fqn"), index.fields.get("offset")
        if not isinstance(name, str):
            raise CorruptError("storage_data of .metadata lists tensors without names")
        if info.fields.get("transform_descriptors"):
            raise UnsupportedError(
                f"{name} is stored transformed",
                found=str(info.fields["transform_descriptors"])[:200],
                expected="chunks as torch.save writes them",
                fix="save the checkpoint without stream extensions, such as compression",
            )
        start = None if offsets is None else sizes(offsets, name)
        place = (info.field("relative_path"), info.field("offset"), info.field("length"))
        stored[name, start] = place
    return stored


def _check_apart(places: Iterable[tuple[str, int, int]], folder: str) -> None:
    """Raise CorruptError where two chunks stand in the same place, or one in another."""
    end, last = 0, ""
    for path, offset, length in sorted(places):
        if path == last and offset < end:
            raise CorruptError(
                f"{folder}/{METADATA} places two chunks in the same bytes",
                found=f"{os.path.basename(path)} from {offset}",
                expected=f"nothing before {end}",
                fix="copy that file again",
            )
        end, last = offset + length, path
