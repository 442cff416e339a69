"""Megatron-Core's `torch_dist` format: global tensors in chunks, independent of the layout.

    iter_0001000/metadata.json   {"sharded_backend": "torch_dist", ...}
                 .metadata       pickle: for each global tensor its size and chunks (offsets,
                                 sizes), and where each chunk stands (file, offset, length)
                 __R_W.distcp    chunks of rank R, writer W: one torch.save zip each
                 common.pt       args, iteration, checkpoint_version, optimizer settings

Homogeneous layers are stacked: `decoder.layers.self_attention.linear_qkv.weight` is [L, ...];
otherwise names carry the global layer number. Names under `optimizer.` are never opened.
(megatron/core/dist_checkpointing/strategies/torch.py, core 0.16.1; torch.distributed.checkpoint.)
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from typing import Any

from ..boxes import Ints, tiles
from ..checkpoint import Layout, RawCheckpoint, Shard
from ..errors import CorruptError, IncompleteError, SourceError, UnsupportedError, UsageError
from ..tensors import LazyTensor, Piece
from .folders import Place
from .pickles import Record, load_pickle
from .torch_zip import load
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
