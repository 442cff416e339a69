"""Hugging Face folders: safetensors files, alone or with an index.

config.json, model.safetensors
config.json, model-0000K-of-0000N.safetensors, model.safetensors.index.json

safetensors file
+--------+------------------------------------+-----------------------------+
| u64 N  | N bytes of JSON: name -> dtype,    | tensors, one after another, |
| little | shape, data_offsets; space padded  | without gaps                |
+--------+------------------------------------+-----------------------------+
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from .. import sources
from ..boxes import row_major
from ..dtypes import DTYPES, FROM_SAFETENSORS, DType
from ..errors import CorruptError, IncompleteError, SourceError
from ..plan import PlannedFile, PlannedTensor, document
from ..tensors import LazyTensor

INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000
# The order the safetensors library writes element types in: the largest first.
_ORDER = "U64 I64 F64 F32 U32 I32 BF16 F16 U16 I16 F8_E4M3 F8_E5M2 I8 U8 BOOL".split()
_RANK = {name: rank for rank, name in enumerate(_ORDER)}


def holds_model(folder: str) -> bool:
    """Whether a folder has safetensors weights."""
    return any(sources.is_file(os.path.join(folder, n)) for n in ("model.safetensors", INDEX))


def read_tensors(folder: str) -> dict[str, LazyTensor]:
    """All tensors of a folder, by name; headers are read, tensors are not.

    Raises:
        IncompleteError: the index names a file or tensor that is not there.
        CorruptError: a file contradicts its header.
    """
    index = os.path.join(folder, INDEX)
    if not sources.is_file(index):
        return read_file(os.path.join(folder, "model.safetensors"))
    try:
        content = json.loads(sources.read(index))
        weight_map = {str(k): str(v) for k, v in dict(content["weight_map"]).items()}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptError(
            f"{index} is damaged",
            found=str(error),
            expected="a JSON object with a weight_map",
            fix="copy it again",
        ) from error
    tensors: dict[str, LazyTensor] = {}
    for name in sorted(set(weight_map.values())):
        path = os.path.join(folder, os.path.basename(name))
        if not sources.is_file(path):
            raise IncompleteError(
                f"{folder} is incomplete",
                found=f"{INDEX}, which names {name}",
                expected=name,
                fix="copy that file again",
            )
        tensors.update(read_file(path))
    if missing := sorted(set(weight_map) - set(tensors)):
        raise IncompleteError(
            f"{folder} is incomplete",
            found=f"files without {len(missing)} of the tensors that {INDEX} names",
            expected=", ".join(missing[:8]),
            fix="copy or convert it again",
        )
    return tensors


def read_file(path: str) -> dict[str, LazyTensor]:
    """The tensors of one safetensors file.

    Raises:
        CorruptError: the header is damaged, or the file has another size than it says.
    """
    try:
        with sources.open_file(path) as file:
            size = file.size
            length = int.from_bytes(file.pread(8, 0), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise _damaged(path, f"{size} bytes, a header of {length}")
            header = file.pread(length, 8)
    except OSError as error:
        raise SourceError(f"{path} cannot be read", found=str(error)) from error
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {name: _tensor(path, 8 + length, e) for name, e in entries.items()}
        end = 8 + length
        for start, stop in sorted(entry["data_offsets"] for entry in entries.values()):
            if 8 + length + start != end:
                raise ValueError(f"tensors that overlap or leave a gap at {start}")
            end = 8 + length + stop
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if end != size:
        raise _damaged(path, f"{size} bytes", f"{end} bytes, as its header says")
    return tensors


def _tensor(path: str, data: int, entry: dict[str, Any]) -> LazyTensor:
    dtype, shape = FROM_SAFETENSORS[entry["dtype"]], tuple(entry["shape"])
    start, end = entry["data_offsets"]
    if not all(type(number) is int for number in (*shape, start, end)):
        raise TypeError(f"{entry}")
    tensor = LazyTensor.in_file(dtype, shape, path, data + start, row_major(shape))
    if not 0 <= start <= end or end - start != tensor.num_bytes or min(shape, default=0) < 0:
        raise ValueError(f"{shape} of {dtype} in {end - start} bytes")
    return tensor


def _damaged(path: str, found: str, expected: str = "a safetensors file") -> CorruptError:
    return CorruptError(
        f"{path} is truncated or damaged",
        found=found,
        expected=expected,
        fix="copy or convert it again",
    )


def plan_files(
    tensors: Mapping[str, LazyTensor],
    dtype: str,
    max_shard_bytes: int,
    kept: tuple[str, ...] = (),
) -> tuple[tuple[PlannedFile, ...], bytes | None]:
    """Distribute tensors over safetensors files as transformers does.

    Tensors go to files in the order given, those that are too large each to one of its own; in a
    file they stand by element type and name. So the files are byte for byte those that
    `save_pretrained` writes, given the order of a class's own modules.

    Args:
        tensors: output name -> tensor.
        dtype: `auto` keeps each as it is stored; else a floating dtype's name.
        max_shard_bytes: a file is larger only for a single larger tensor.
        kept: ends of names of tensors that are cast to float32 or not at all.

    Returns:
        The files, and the index document if there is more than one.
    """
    groups: list[list[tuple[str, LazyTensor, DType]]] = []
    current: list[tuple[str, LazyTensor, DType]] = []
    size = 0
    for name, tensor in tensors.items():
        stays = dtype == "auto" or (dtype != "float32" and name.endswith(kept))
        target = tensor.dtype if stays else DTYPES[dtype]
        num_bytes = tensor.num_elements * target.itemsize
        if num_bytes > max_shard_bytes:
            groups.append([(name, tensor, target)])
            continue
        if size + num_bytes > max_shard_bytes:
            groups.append(current)
            current, size = [], 0
        current.append((name, tensor, target))
        size += num_bytes
    if current:
        groups.append(current)
    files = tuple(
        _planned_file(_file_name(number, len(groups)), group)
        for number, group in enumerate(groups, start=1)
    )
    if len(files) == 1:
        return files, None
    planned = [(file.name, tensor) for file in files for tensor in file.tensors]
    metadata = {
        "total_parameters": sum(tensor.source.num_elements for _, tensor in planned),
        "total_size": sum(tensor.num_bytes for _, tensor in planned),
    }
    weight_map = {tensor.name: name for name, tensor in planned}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return files, document(index)


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _planned_file(name: str, group: Sequence[tuple[str, LazyTensor, DType]]) -> PlannedFile:
    group = sorted(group, key=lambda item: (_RANK[item[2].safetensors], item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor_name, tensor, dtype in group:
        end = position + tensor.num_elements * dtype.itemsize
        header[tensor_name] = {
            "dtype": dtype.safetensors,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = len(text).to_bytes(8, "little") + text
    planned, position = [], len(data)
    for tensor_name, tensor, dtype in group:
        planned.append(PlannedTensor(tensor_name, tensor, dtype, position))
        position += planned[-1].num_bytes
    return PlannedFile(name, ((0, data),), tuple(planned))
