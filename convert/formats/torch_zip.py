"""Files written by `torch.save` since torch 1.6: a zip of one pickle and raw storages.

    <name>/data.pkl          the object; tensors are (storage key, offset, shape, strides)
    <name>/byteorder         "little"
    <name>/data/<key>        raw elements of one storage, stored uncompressed
    <name>/version, ...      not needed

Only the zip directory and the pickle are read; tensors come back as `LazyTensor`s that point
into the file. A `.distcp` file is several such zips one after another, so every function takes
the byte range of the zip, or the position it begins at.

`plan` decides every byte of such a file but those of its tensors and their checksums. As torch
does, storages begin at multiples of 64 bytes; the extra field of a record's header makes room.
Sizes of 4 GiB and more stand in ZIP64 fields (PKWARE's APPNOTE.TXT 6.3.10, 4.3 and 4.5.3).
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

from ..boxes import row_major
from ..dtypes import DType
from ..errors import SourceError
from ..open_files import File
from ..plan import PlannedTensor
from ..sources import Window, open_file
from ..tensors import LazyTensor
from . import torch_legacy
from .pickle_writer import Call, Global, StorageKey, dumps
from .pickles import STORAGES, StorageRef, damaged, load_pickle

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_TAIL_BYTES = 64 << 10
# A record may be followed by its sizes once more.
_DESCRIPTOR_SIZES = (0, 16, 24)


def load(path: str, offset: int = 0, length: int | None = None) -> Any:
    """The object saved at `[offset, offset + length)` of a file, in a zip or as before zips.

    Raises:
        UnsafePickleError: its pickle names something that is not data.
        CorruptError: the file is truncated, compressed, or contradicts itself.
        SourceError: it cannot be opened.
    """
    try:
        with open_file(path) as file:
            end = file.size if length is None else offset + length
            if not 0 <= offset < end <= file.size:
                raise damaged(path, f"{file.size} bytes", f"at least {max(end, offset + 1)}")
            if torch_legacy.is_legacy(file, offset):
                return torch_legacy.load(path, file, offset, end)
            if length is None:
                file.expect([(max(offset, end - _TAIL_BYTES), min(_TAIL_BYTES, end - offset))])
            return _Archive(path, file, offset, end).load()
    except OSError as error:
        raise SourceError(f"{path} cannot be read", found=str(error)) from error


class _Archive:
    """One zip inside a file; record positions are absolute in that file."""

    def __init__(self, path: str, file: File, start: int, end: int) -> None:
        self.path, self._file, self._start, self._end = path, file, start, end
        window = cast(BinaryIO, Window(file, start, end))
        try:
            self._zip = zipfile.ZipFile(window)
        except (
            zipfile.BadZipFile,
            NotImplementedError,
            OverflowError,
            ValueError,
            struct.error,
        ) as error:
            found = f"{end - start} bytes, {str(error)[0].lower() + str(error)[1:]}"
            raise damaged(path, found, "a complete file written by torch.save") from error
        self._records = {info.filename: info for info in self._zip.infolist()}
        if len(self._records) < len(self._zip.infolist()):
            raise damaged(path, "two records of one name", "one")
        pickles = [name for name in self._records if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise damaged(path, f"{len(pickles)} records named data.pkl", "one")
        self._prefix = pickles[0].removesuffix("data.pkl")

    def load(self) -> Any:
        self._check_order()
        order = self._records.get(f"{self._prefix}byteorder")
        if order and self._read(order) != b"little":
            raise damaged(self.path, "big-endian storages", "little-endian ones")
        data = self._read(self._records[f"{self._prefix}data.pkl"])
        self._check_sum(data)
        headers = [self._start + info.header_offset for info in self._records.values()]
        self._file.expect((position, _LOCAL_HEADER.size) for position in headers)
        return load_pickle(data, self.path, self._storage)

    def _check_order(self) -> None:
        """Records follow each other: remember what each is followed by."""
        places = sorted(info.header_offset for info in self._records.values())
        if not 0 <= places[0] <= places[-1] < self._zip.start_dir:
            found = f"records from {places[0]} to {places[-1]}"
            raise damaged(self.path, found, f"records before {self._zip.start_dir}")
        self._next = dict(zip(places, [*places[1:], self._zip.start_dir], strict=True))

    def _check_sum(self, data: bytes) -> None:
        """Hold the pickle against its checksum, which torch can be told to leave out."""
        info = self._records[f"{self._prefix}data.pkl"]
        if info.CRC not in (0, zlib.crc32(data)):
            raise damaged(self.path, "a pickle with another checksum", f"{info.CRC:#010x}")
        start = self._data_start(info) - self._start
        self._alignment = _ALIGNMENT if start % _ALIGNMENT == 0 else 1

    def _storage(self, reference: Any) -> StorageRef:
        match reference:
            case ("storage", DType() as dtype, str() as key, _, int() as num_elements, *_):
                name = f"{self._prefix}data/{key}"
                if name not in self._records:
                    raise damaged(self.path, f"no record {name}", "one per storage")
                info = self._records[name]
                if info.file_size != num_elements * dtype.itemsize:
                    expected = f"{num_elements} x {dtype.itemsize} bytes"
                    raise damaged(self.path, f"{name} of {info.file_size} bytes", expected)
                start = self._data_start(info)
                if (start - self._start) % self._alignment:
                    raise damaged(self.path, f"{name} at {start}", "storages in their places")
                return StorageRef(dtype, self.path, start, num_elements)
        raise damaged(self.path, f"storage reference {str(reference)[:80]}", "a torch storage")

    def _data_start(self, info: zipfile.ZipInfo) -> int:
        """Absolute position of a record's bytes, which must be stored as they are."""
        header_start = self._start + info.header_offset
        if not self._start <= header_start < self._end:
            raise damaged(self.path, f"a record at {header_start}", f"before {self._end}")
        header = self._file.pread(_LOCAL_HEADER.size, header_start)
        if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise damaged(self.path, f"no record at {header_start}", info.filename)
        _, name_size, extra_size = _LOCAL_HEADER.unpack(header)
        start: int = header_start + _LOCAL_HEADER.size + name_size + extra_size
        gap = self._start + self._next[info.header_offset] - start - info.file_size
        if gap not in _DESCRIPTOR_SIZES:
            raise damaged(self.path, f"{gap} bytes after {info.filename}", "records without gaps")
        if info.compress_type != zipfile.ZIP_STORED or start + info.file_size > self._end:
            found = f"{info.filename} compressed or longer than the file"
            raise damaged(self.path, found, "records stored as they are")
        return start

    def _read(self, info: zipfile.ZipInfo) -> bytes:
        return self._file.pread(info.file_size, self._data_start(info))


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor to be written: its name in the plan, its elements, and the dtype it gets."""

    name: str
    source: LazyTensor
    dtype: DType

    @property
    def num_bytes(self) -> int:
        """Bytes it takes in the file."""
        return self.source.num_elements * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class PlannedZip:
    """A zip whose tensors are still in other files.

    Attributes:
        fixed: position in the file -> bytes.
        tensors: where the tensors' bytes and checksums belong.
        end: position behind the zip.
    """

    fixed: tuple[tuple[int, bytes], ...]
    tensors: tuple[PlannedTensor, ...]
    end: int


ORDERED_DICT = Global("collections", "OrderedDict")
_STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items() if name != "Untyped"}
_ALIGNMENT = 64
_PADDING_ID = 0x4246  # "FB", caffe2/serialize/inline_container.cc
_ZIP64_ID = 1
_STORED_VERSION, _ZIP64_VERSION = 20, 45
_UTF8 = 1 << 11
_EPOCH_DATE = 0x21  # 1980-01-01, the first date a zip can name
_FULL_16, _FULL_32 = 0xFFFF, 0xFFFFFFFF


def tensor_value(weight: Weight, key: int) -> Call:
    """How torch.save spells a contiguous tensor that fills a storage of its own."""
    storage = Global("torch", f"{_STORAGE_NAMES[weight.dtype.name]}Storage")
    shape = weight.source.shape
    reference = StorageKey(storage, str(key), weight.source.num_elements)
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    return Call(rebuild, (reference, 0, shape, row_major(shape), False, Call(ORDERED_DICT)))


def plan(value: object, weights: Mapping[int, Weight], prefix: str, start: int = 0) -> PlannedZip:
    """Lay out the zip of one object.

    Args:
        value: the object as `pickle_writer` writes it, tensors as `tensor_value(weight, key)`.
        weights: storage key -> the tensor that fills it.
        prefix: the name of the zip's root, e.g. `archive`.
        start: position in the file where the zip begins.
    """
    writer = _ZipPlanner(prefix, start)
    writer.add("data.pkl", dumps(value))
    writer.add(".format_version", b"1")
    writer.add(".storage_alignment", str(_ALIGNMENT).encode())
    writer.add("byteorder", b"little")
    for key, weight in weights.items():
        writer.add(f"data/{key}", weight)
    writer.add("version", b"3\n")
    return writer.finish()


@dataclass(frozen=True, slots=True)
class _Record:
    """A placed record; positions are absolute, and a tensor's checksum is not known yet."""

    name: str
    header_at: int
    data_at: int
    size: int
    checksum: int
    weight: Weight | None


@dataclass(slots=True)
class _ZipPlanner:
    """Places records one after another, then the directory of them all."""

    prefix: str
    start: int
    _fixed: list[tuple[int, bytes]] = field(default_factory=list)
    _records: list[_Record] = field(default_factory=list)
    _position: int = 0

    def __post_init__(self) -> None:
        self._position = self.start

    def add(self, name: str, content: bytes | Weight) -> None:
        """One record, stored as it is."""
        name = f"{self.prefix}/{name}"
        weight = content if isinstance(content, Weight) else None
        size = content.num_bytes if isinstance(content, Weight) else len(content)
        checksum = 0 if isinstance(content, Weight) else zlib.crc32(content)
        header_at = self._position
        extra = struct.pack("<HHQQ", _ZIP64_ID, 16, size, size) if size >= _FULL_32 else b""
        before = _LOCAL_HEADER.size + len(name) + len(extra) + 4
        padding = -(header_at - self.start + before) % _ALIGNMENT
        extra += struct.pack("<HH", _PADDING_ID, padding) + b"Z" * padding
        version = _ZIP64_VERSION if size >= _FULL_32 else _STORED_VERSION
        header = struct.pack("<4sH", b"PK\x03\x04", version)
        header += _shared_fields(name, size, checksum, extra)
        header += name.encode() + extra
        data = content if isinstance(content, bytes) else b""
        self._put(header_at, header + data)
        data_at = header_at + len(header)
        self._records.append(_Record(name, header_at, data_at, size, checksum, weight))
        self._position = data_at + size

    def finish(self) -> PlannedZip:
        """The directory, and with it the whole plan."""
        directory_at = entry_at = self._position
        entries, tensors = [], []
        for record in self._records:
            entries.append(_directory_entry(record, record.header_at - self.start))
            if (weight := record.weight) is not None:
                # Where the header and the directory's entry have the checksum.
                places = (record.header_at + 14, entry_at + 16)
                tensors.append(
                    PlannedTensor(weight.name, weight.source, weight.dtype, record.data_at, places)
                )
            entry_at += len(entries[-1])
        directory = b"".join(entries)
        end = _directory_end(len(self._records), len(directory), directory_at - self.start)
        self._put(directory_at, directory + end)
        return PlannedZip(
            tuple(self._fixed), tuple(tensors), directory_at + len(directory) + len(end)
        )

    def _put(self, position: int, data: bytes) -> None:
        """Bytes at a position; what follows known bytes directly is joined to them."""
        if self._fixed and self._fixed[-1][0] + len(self._fixed[-1][1]) == position:
            position, data = self._fixed[-1][0], self._fixed[-1][1] + data
            self._fixed.pop()
        self._fixed.append((position, data))


def _shared_fields(name: str, size: int, checksum: int, extra: bytes) -> bytes:
    """What a record's header and its entry in the directory say alike."""
    short = min(size, _FULL_32)
    names = (len(name), len(extra))
    return struct.pack("<HHHHIIIHH", _UTF8, 0, 0, _EPOCH_DATE, checksum, short, short, *names)


def _directory_entry(record: _Record, header_at: int) -> bytes:
    size = record.size
    large = [size, size] if size >= _FULL_32 else []
    large += [header_at] if header_at >= _FULL_32 else []
    extra = struct.pack(f"<HH{len(large)}Q", _ZIP64_ID, 8 * len(large), *large) if large else b""
    version = _ZIP64_VERSION if large else _STORED_VERSION
    entry = struct.pack("<4sHH", b"PK\x01\x02", version, version)
    entry += _shared_fields(record.name, size, record.checksum, extra)
    entry += struct.pack("<HHHII", 0, 0, 0, 0, min(header_at, _FULL_32))
    return entry + record.name.encode() + extra


def _directory_end(count: int, size: int, position: int) -> bytes:
    end = b""
    if count >= _FULL_16 or size >= _FULL_32 or position >= _FULL_32:
        version = _ZIP64_VERSION
        end += struct.pack(
            "<4sQHHIIQQQQ", b"PK\x06\x06", 44, version, version, 0, 0, count, count, size, position
        )
        end += struct.pack("<4sIQI", b"PK\x06\x07", 0, position + size, 1)
    short = min(count, _FULL_16)
    end += struct.pack(
        "<4sHHHHIIH",
        b"PK\x05\x06",
        0,
        0,
        short,
        short,
        min(size, _FULL_32),
        min(position, _FULL_32),
        0,
    )
    return end
