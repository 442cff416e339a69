"""Two Megatron checkpoints of one layout and format, object by object, as torch reads them.

    torch        every rank's file: keys in order, tensors with dtype, strides and bits, arguments
    torch_dist   every attribute of .metadata, every chunk's bytes and place, common.pt

`differences` says where two are not the same. Nothing of mtt takes part.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)

from tests.convert.surgery import is_stand_in, megatron_modules

TRACKER = "latest_checkpointed_iteration.txt"


class Absent:
    """What one of the two does not have."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = Absent()


class Difference(NamedTuple):
    """One place where two checkpoints differ."""

    where: str
    ours: object
    theirs: object


def differences(ours: Path, theirs: Path) -> list[Difference]:
    """All differences between two checkpoint roots."""
    found = []
    for name in (TRACKER, "format"):
        a, b = (_format(r) if name == "format" else (r / name).read_text() for r in (ours, theirs))
        found += _values(name, a, b)
    compare = _torch if _format(theirs) == "torch" else _torch_dist
    return [*found, *compare(iteration_folder(ours), iteration_folder(theirs))]


def iteration_folder(root: Path) -> Path:
    """The folder that the tracker file names."""
    step = (root / TRACKER).read_text().strip()
    return root / (step if step == "release" else f"iter_{int(step):07d}")


def _format(root: Path) -> str:
    return "torch_dist" if (iteration_folder(root) / "metadata.json").exists() else "torch"


def load(source: Path | io.BytesIO) -> Any:
    """A file of torch.save, whoever wrote it."""
    with megatron_modules():
        return torch.load(source, weights_only=False)


def _torch(ours: Path, theirs: Path) -> Iterator[Difference]:
    names = [sorted(str(p.relative_to(f)) for p in f.rglob("*.pt")) for f in (ours, theirs)]
    yield from _values("files", *names)
    for name in sorted({*names[0]} & {*names[1]}):
        if name.endswith("model_optim_rng.pt"):
            yield from _values(name, load(ours / name), load(theirs / name))


def _torch_dist(ours: Path, theirs: Path) -> Iterator[Difference]:
    documents = [json.loads((folder / "metadata.json").read_text()) for folder in (ours, theirs)]
    yield from _values("metadata.json", *documents)
    yield from _values("common.pt", *(load(folder / "common.pt") for folder in (ours, theirs)))
    a, b = (pickle.loads((folder / ".metadata").read_bytes()) for folder in (ours, theirs))
    where = ".metadata"
    yield from _values(where, type(a), type(b))
    indices = dict.fromkeys([*a.storage_data, *b.storage_data])
    for index in indices:
        place = f"{where}.storage_data[{index.fqn}, {_list(index.offset)}, {index.index}]"
        if index in a.storage_data and index in b.storage_data:
            yield from _values(f"{place}.{{}}", *(_stored(m, index) for m in (a, b)))
            yield from _values(
                f"{place} bytes", stored_value(ours, a, index), stored_value(theirs, b, index)
            )
        else:
            values = (metadata.storage_data.get(index, ABSENT) for metadata in (a, b))
            yield from _values(place, *values)
    state_a, state_b = vars(a), vars(b)
    yield from _values(f"{where} attributes", list(state_a), list(state_b))
    for name in dict.fromkeys([*state_a, *state_b]):
        if name != "storage_data":
            values = state_a.get(name, ABSENT), state_b.get(name, ABSENT)
            yield from _values(f"{where}.{name}", *values)


def _stored(metadata: Metadata, index: Any) -> dict[str, Any]:
    """All that is said about a stored object, besides where it is."""
    info = vars(metadata.storage_data[index]).copy()
    for name in ("relative_path", "offset", "length"):
        assert info.pop(name) is not None
    return info


def stored_bytes(folder: Path, metadata: Metadata, index: Any) -> bytes:
    """The slice of a file that holds one stored object."""
    info = metadata.storage_data[index]
    with (folder / info.relative_path).open("rb") as file:
        file.seek(info.offset)
        data = file.read(info.length)
    assert len(data) == info.length
    return data


def stored_value(folder: Path, metadata: Metadata, index: Any) -> Any:
    """One stored object, and that its slice is a whole zip file with right checksums."""
    data = stored_bytes(folder, metadata, index)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
    return load(io.BytesIO(data))


def _values(where: str, ours: Any, theirs: Any) -> Iterator[Difference]:
    """Where two values differ: type, order, content."""
    if ours is ABSENT or theirs is ABSENT:
        yield Difference(f"{where} {'absent' if ours is ABSENT else 'added'}", ours, theirs)
    elif isinstance(theirs, torch.Tensor) and isinstance(ours, torch.Tensor):
        yield from _tensors(where, ours, theirs)
    elif is_stand_in(ours) and is_stand_in(theirs):
        if (type(ours).__qualname__, ours.args) != (type(theirs).__qualname__, theirs.args):
            yield Difference(where, ours, theirs)
    elif type(ours) is not type(theirs):
        yield Difference(where, ours, theirs)
    elif isinstance(theirs, dict):
        both = [key for key in theirs if key in ours]
        if [key for key in ours if key in theirs] != both:
            yield Difference(f"{where} order", list(ours), list(theirs))
        for key in dict.fromkeys([*theirs, *ours]):
            yield from _values(f"{where}[{key}]", ours.get(key, ABSENT), theirs.get(key, ABSENT))
    elif isinstance(theirs, Namespace):
        a, b = vars(ours), vars(theirs)
        for name in sorted({*a, *b}):
            yield from _values(f"args.{name}", a.get(name, ABSENT), b.get(name, ABSENT))
    elif isinstance(theirs, TensorStorageMetadata | BytesStorageMetadata):
        yield from _values(f"{where}.", _fields(ours), _fields(theirs))
    elif isinstance(theirs, (list, tuple)) and len(ours) == len(theirs):
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from _values(f"{where}[{number}]", *pair)
    elif repr(ours) != repr(theirs):
        yield Difference(where, ours, theirs)


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _tensors(where: str, ours: torch.Tensor, theirs: torch.Tensor) -> Iterator[Difference]:
    for name in ("dtype", "shape", "device", "requires_grad", "is_contiguous"):
        a, b = getattr(ours, name), getattr(theirs, name)
        yield from _values(f"{where}.{name}", *((a(), b()) if callable(a) else (a, b)))
    yield from _values(f"{where}.stride", ours.stride(), theirs.stride())
    yield from _values(f"{where}.storage_offset", ours.storage_offset(), theirs.storage_offset())
    yield from _values(f"{where} class", type(ours), type(theirs))
    if _bits(ours) != _bits(theirs):
        yield Difference(f"{where} bits", ours, theirs)


def _bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _list(offset: torch.Size | None) -> list[int] | None:
    return None if offset is None else list(offset)
