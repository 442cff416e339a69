"""Files written by `torch.save` since torch 1.6: a zip of one pickle and raw storages.

    <name>/data.pkl          the object; tensors are (storage key, offset, shape, strides)
    <name>/byteorder         "little"
    <name>/data/<key>        raw elements of one storage, stored uncompressed
    <name>/version, ...      not needed

Only the zip directory and the pickle are read; tensors come back as `LazyTensor`s that point
into the file. A `.distcp` file is several such zips one after another, so every function takes
the byte range of the zip.
"""

from __future__ import annotations

import os
import struct
import zipfile
from typing import Any, BinaryIO, cast

from ..dtypes import DType
from ..errors import CorruptError, SourceError, UnsupportedError
from .pickles import StorageRef, load_pickle

_OLD_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch/serialization.py MAGIC_NUMBER
_LOCAL_HEADER = struct.Struct("<4s22xHH")


def load(path: str, offset: int = 0, length: int | None = None) -> Any:
    """The object saved in the zip at `[offset, offset + length)` of a file.

    Raises:
        UnsafePickleError: its pickle names something that is not data.
        CorruptError: the file is truncated, compressed, or contradicts itself.
        SourceError: it cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            end = size if length is None else offset + length
            if not 0 <= offset < end <= size:
                raise _damaged(path, f"{size} bytes", f"at least {end}")
            return _Archive(path, file, offset, end).load()
    except OSError as error:
        raise SourceError(f"{path} cannot be read", found=str(error)) from error


def _damaged(path: str, found: str, expected: str) -> CorruptError:
    return CorruptError(
        f"{path} is truncated or damaged",
        found=found,
        expected=expected,
        fix="copy the file again from where it was written",
    )


class _Archive:
    """One zip inside a file; record positions are absolute in that file."""

    def __init__(self, path: str, file: BinaryIO, start: int, end: int) -> None:
        self.path, self._file, self._start, self._end = path, file, start, end
        if os.pread(file.fileno(), len(_OLD_MAGIC), start) == _OLD_MAGIC:
            raise UnsupportedError(
                f"{path} was written by torch before 1.6; mtt cannot read that yet",
                found="a file of consecutive pickles",
                expected="a zip file, as torch.save writes since torch 1.6",
                fix="load and save it once with a newer torch, if you trust its author",
            )
        window = cast(BinaryIO, _Window(file, start, end))
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
            raise _damaged(path, found, "a complete file written by torch.save") from error
        self._records = {info.filename: info for info in self._zip.infolist()}
        if len(self._records) < len(self._zip.infolist()):
            raise _damaged(path, "two records of one name", "one")
        pickles = [name for name in self._records if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise _damaged(path, f"{len(pickles)} records named data.pkl", "one")
        self._prefix = pickles[0].removesuffix("data.pkl")

    def load(self) -> Any:
        order = self._records.get(f"{self._prefix}byteorder")
        if order and self._read(order) != b"little":
            raise _damaged(self.path, "big-endian storages", "little-endian ones")
        data = self._read(self._records[f"{self._prefix}data.pkl"])
        return load_pickle(data, self.path, self._storage)

    def _storage(self, reference: Any) -> StorageRef:
        match reference:
            case ("storage", DType() as dtype, str() as key, _, int() as num_elements, *_):
                name = f"{self._prefix}data/{key}"
                if name not in self._records:
                    raise _damaged(self.path, f"no record {name}", "one per storage")
                info = self._records[name]
                if info.file_size != num_elements * dtype.itemsize:
                    expected = f"{num_elements} x {dtype.itemsize} bytes"
                    raise _damaged(self.path, f"{name} of {info.file_size} bytes", expected)
                return StorageRef(dtype, self.path, self._data_start(info), num_elements)
        raise _damaged(self.path, f"storage reference {str(reference)[:80]}", "a torch storage")

    def _data_start(self, info: zipfile.ZipInfo) -> int:
        """Absolute position of a record's bytes, which must be stored as they are."""
        header_start = self._start + info.header_offset
        header = os.pread(self._file.fileno(), _LOCAL_HEADER.size, header_start)
        if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise _damaged(self.path, f"no record at {header_start}", info.filename)
        _, name_size, extra_size = _LOCAL_HEADER.unpack(header)
        start: int = header_start + _LOCAL_HEADER.size + name_size + extra_size
        if info.compress_type != zipfile.ZIP_STORED or start + info.file_size > self._end:
            found = f"{info.filename} compressed or longer than the file"
            raise _damaged(self.path, found, "records stored as they are")
        return start

    def _read(self, info: zipfile.ZipInfo) -> bytes:
        return os.pread(self._file.fileno(), info.file_size, self._data_start(info))


class _Window:
    """The part `[start, end)` of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, end: int) -> None:
        self._file, self._start, self._size, self._position = file, start, end - start, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if origin + offset < 0:
            raise OSError("seek before the beginning")
        self._position = origin + offset
        return self._position

    def read(self, count: int = -1) -> bytes:
        left = max(0, self._size - self._position)
        count = left if count is None or count < 0 else min(count, left)
        data = os.pread(self._file.fileno(), count, self._start + self._position)
        self._position += len(data)
        return data
