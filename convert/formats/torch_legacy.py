"""Files written by `torch.save` before torch 1.6: five pickles, then raw storages.

    pickle    0x1950a86a20f9469cfc6c                           the magic number
    pickle    1001                                             the protocol
    pickle    {"protocol_version", "little_endian", ...}       the machine that wrote it
    pickle    the object; tensors are (storage key, offset, shape, strides)
    pickle    ["94738705280592", "94738705280704", ...]        keys, in the order of the storages
    storage   int64 count of elements, then the elements       one for each key, end to end

All of 2019 to the middle of 2020 is stored like this, NVIDIA's published 345M models among it; a
newer torch does it on request (`_use_new_zipfile_serialization=False`). Where a storage begins
follows from the sizes of those before it, and those stand in the object: it is decoded twice, once
for the sizes and once for the tensors. Of the storages only the counts are read.
(torch/serialization.py, `_legacy_save` and `_legacy_load`.)
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from ..dtypes import DType
from ..errors import UnsupportedError
from ..open_files import File
from .opcodes import EndlessError, check
from .pickles import StorageRef, damaged, load_pickle

_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_MAGIC_NUMBER, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_NUM_PICKLES = 5
_FIRST_READ, _MOST_METADATA = 1 << 20, 1 << 28
_COUNT = struct.Struct("<q")
Sizes = dict[str, tuple[DType, int]]


def is_legacy(file: File, start: int) -> bool:
    """Whether a file of this kind begins at `start`."""
    return file.pread(len(_MAGIC), start) == _MAGIC


def load(path: str, file: File, start: int, end: int) -> Any:
    """The object saved at `[start, end)` of an open file.

    Raises:
        UnsafePickleError: one of its pickles names something that is not data.
        UnsupportedError: it was written on a machine of another byte order.
        CorruptError: it is truncated, or contradicts itself.
    """
    data, ends = _pickles(path, file, start, end)
    magic, protocol, system, body, order = (
        data[low:high] for low, high in zip((0, *ends), ends, strict=False)
    )
    if (load_pickle(magic, path), load_pickle(protocol, path)) != (_MAGIC_NUMBER, _PROTOCOL):
        raise damaged(path, "another magic number or protocol", f"protocol {_PROTOCOL}")
    machine = load_pickle(system, path)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise UnsupportedError(
            f"{path} was written on a machine of another byte order",
            found="big-endian storages",
            expected="little-endian ones",
        )
    sizes: Sizes = {}
    load_pickle(body, path, _measuring(path, sizes))
    keys = _keys(load_pickle(order, path), path)
    storages = _places(path, file, keys, sizes, start + ends[-1], end)
    return load_pickle(body, path, _placing(path, storages))


def _pickles(path: str, file: File, start: int, end: int) -> tuple[bytes, list[int]]:
    """The beginning of the file, and where each pickle in it ends.

    How long it is shows only at the last pickle's end: reads grow until that is found.
    """
    most = min(end - start, _MOST_METADATA)
    size = min(_FIRST_READ, most)
    while True:
        data = file.pread(size, start)
        ends = [0]
        try:
            while len(ends) <= _NUM_PICKLES:
                ends.append(check(data, path, ends[-1]))
            return data, ends[1:]
        except EndlessError:
            if size == most:
                raise
        size = min(2 * size, most)


def _reference(path: str, reference: Any) -> tuple[str, DType, int, Any]:
    """(key, dtype, elements, view) of a storage reference."""
    match reference:
        case ("storage", DType() as dtype, str() as key, _, int() as count, *rest) if (
            0 <= count < 2**63 and len(rest) <= 1
        ):
            return key, dtype, count, rest[0] if rest else None
    raise damaged(path, f"storage reference {str(reference)[:80]}", "a torch storage")


def _measuring(path: str, sizes: Sizes) -> Callable[[Any], StorageRef]:
    """A resolver of storage references that notes sizes; its tensors are of no use."""

    def resolve(reference: Any) -> StorageRef:
        key, dtype, count, _ = _reference(path, reference)
        if sizes.setdefault(key, (dtype, count)) != (dtype, count):
            raise damaged(path, f"storage {key} of two sizes or types", "one")
        return StorageRef(dtype, path, 0, count)

    return resolve


def _placing(path: str, storages: dict[str, StorageRef]) -> Callable[[Any], StorageRef]:
    """A resolver of storage references, once it is known where storages are."""

    def resolve(reference: Any) -> StorageRef:
        key, dtype, count, view = _reference(path, reference)
        storage = storages[key]
        match view:
            case None:
                return storage
            # A part of a storage, as torch before 0.4 had: (its own key, first element, size).
            case (_, int() as first, int() as size) if (
                first >= 0 and size >= 0 and first + size <= count
            ):
                offset = storage.offset + first * dtype.itemsize
                return StorageRef(dtype, path, offset, size)
        raise damaged(path, f"view {str(view)[:80]}", f"a part of {count} elements")

    return resolve


def _keys(value: Any, path: str) -> list[str]:
    if (
        not isinstance(value, list)
        or not all(isinstance(key, str) for key in value)
        or len(set(value)) < len(value)
    ):
        raise damaged(path, "keys that are not", "one key for each storage")
    return value


def _places(
    path: str, file: File, keys: list[str], sizes: Sizes, position: int, end: int
) -> dict[str, StorageRef]:
    """Where each storage's elements stand; the counts before them must be those of the object."""
    if set(keys) != set(sizes):
        raise damaged(
            path, f"{len(keys)} storages", f"the {len(sizes)} storages that its tensors refer to"
        )
    storages = {}
    for key in keys:
        dtype, count = sizes[key]
        head = file.pread(_COUNT.size, position)
        position += _COUNT.size
        if len(head) < _COUNT.size or position + count * dtype.itemsize > end:
            raise damaged(path, f"{end} bytes", f"at least {position + count * dtype.itemsize}")
        if _COUNT.unpack(head)[0] != count:
            found = f"{_COUNT.unpack(head)[0]} elements in storage {key}"
            raise damaged(path, found, f"{count}, as its tensors say")
        storages[key] = StorageRef(dtype, path, position, count)
        position += count * dtype.itemsize
    if position != end:
        raise damaged(path, f"{end} bytes", f"{position}, where its last storage ends")
    return storages
