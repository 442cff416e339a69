"""Files written in pieces into a folder that one run holds at a time.

name.part      while tensors arrive, each at its own position, from any thread
name           once the last tensor and the bytes between them are there

A run whose finished files stay if it fails sees to it that they are on the disk before they get
their names.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import fcntl
import os
import threading
from collections import Counter
from collections.abc import Callable
from operator import itemgetter
from typing import Any

from . import manifest, page_cache, small_files
from .errors import TargetError
from .plan import PlannedFile, PlannedTensor
from .sums import Sums

LOCK = ".mtt.lock"
# Linux may keep what one call writes in one stretch of memory. The longest are rare where memory
# was in use before, and those a virtual machine has may be its host's to give anew.
_MOST_AT_ONCE = 1 << 20


class FileWriter:
    """Assembles planned files below a folder, and notes in a manifest what they hold.

    Attributes:
        begun: names of files that were opened.
        suffix: what their names end with meanwhile.
    """

    def __init__(
        self, folder: str, record: dict[str, Any], suffix: str = ".part", keeps: bool = False
    ) -> None:
        self.begun: list[str] = []
        self._mutex = threading.Lock()
        self.suffix = suffix
        self._folder, self._record, self._keeps = folder, record, keeps
        self._open: dict[str, int] = {}
        self._fixed: dict[str, list[bytearray]] = {}
        self._closed = False
        num_bytes = sum(entry["bytes"] for entry in record["files"].values())
        self._gives_back = page_cache.is_filled_by(num_bytes)
        self._cached: Counter[int] = Counter()
        self._begun: Counter[tuple[str, str]] = Counter()

    def write(
        self, file: PlannedFile, tensor: PlannedTensor, position: int, data: memoryview
    ) -> None:
        """Bytes of a tensor from `position` bytes after its beginning.

        Raises:
            TargetError: the disk is full or the folder not writable.
        """
        descriptor = self._descriptor(file)
        try:
            _write_all(descriptor, data, tensor.offset + position)
        except OSError as error:
            raise self._error(error) from error
        if self._gives_back:
            self._cached[descriptor] += len(data)
            if self._cached[descriptor] >= page_cache.EVERY_BYTES:
                self._cached[descriptor] = 0
                page_cache.give_back(descriptor)
        elif self._keeps:
            self._begin(descriptor, file, tensor, position + len(data))

    def _begin(
        self, descriptor: int, file: PlannedFile, tensor: PlannedTensor, position: int
    ) -> None:
        """Let the disk have what there is of a tensor now, and not all of a file at last."""
        begun = self._begun[file.name, tensor.name]
        if position - begun >= page_cache.EVERY_BYTES or position == tensor.num_bytes:
            page_cache.begin_writing(descriptor, tensor.offset + begun, position - begun)
            self._begun[file.name, tensor.name] = position

    def _descriptor(self, file: PlannedFile) -> int:
        with self._mutex:
            assert not self._closed, file.name
            if file.name not in self._open:
                path = os.path.join(self._folder, file.name + self.suffix)
                flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC
                try:
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                    self._open[file.name] = os.open(path, flags, 0o666)
                except OSError as error:
                    raise self._error(error) from error
                self.begun.append(file.name)
                self._fixed[file.name] = [bytearray(data) for _, data in file.fixed]
            return self._open[file.name]

    def tensor_done(self, file: PlannedFile, tensor: PlannedTensor, sums: Sums) -> None:
        """Note a tensor's hash, and its checksum where the file asks for it."""
        self._descriptor(file)
        with self._mutex:
            for position in tensor.checksum_at:
                number = bisect.bisect_right(file.fixed, position, key=itemgetter(0)) - 1
                start, _ = file.fixed[number]
                place = slice(position - start, position - start + 4)
                self._fixed[file.name][number][place] = sums.checksum.to_bytes(4, "little")
        self._record["files"][file.name]["tensors"][tensor.name] = sums.digest

    def complete(self, file: PlannedFile, note: Callable[[], None] | None = None) -> None:
        """Write what stands between the tensors, and give the file its name.

        Args:
            file: all its tensors are written.
            note: called between the two, one file at a time: the record says by then that it is
                complete.

        Raises:
            TargetError: the disk is full or the folder not writable.
        """
        self._seal(file)
        path = os.path.join(self._folder, file.name)
        with self._mutex:
            try:
                if note is not None:
                    note()
                os.replace(path + self.suffix, path)
            except OSError as error:
                raise self._error(error) from error

    def _seal(self, file: PlannedFile) -> None:
        """Write what stands between the tensors, and note its hash; nothing is missing then."""
        descriptor = self._descriptor(file)
        with self._mutex:
            try:
                fixed = self._fixed.pop(file.name)
                for (position, _), data in zip(file.fixed, fixed, strict=True):
                    _write_all(descriptor, memoryview(data), position)
                if self._gives_back:
                    page_cache.give_back(descriptor)
                del self._open[file.name]
            except OSError as error:
                raise self._error(error) from error
        try:
            with open(descriptor, "wb", buffering=0):
                if self._keeps:
                    os.fsync(descriptor)
        except OSError as error:
            raise self._error(error) from error
        entry = self._record["files"][file.name]
        entry["header"] = manifest.digest(b"".join(fixed), self._record["hash"])
        entry["status"] = "complete"

    def _error(self, error: OSError) -> TargetError:
        return target_error(self._folder, error, keeps=self._keeps)

    def close(self) -> None:
        """Close what is still open; nothing is written after it."""
        with self._mutex:
            self._closed = True
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()


class FolderLock:
    """A folder's lock file, which its owner removes."""

    def __init__(self, folder: str) -> None:
        self._folder, self._file = folder, -1

    @property
    def held(self) -> bool:
        """Whether this run has it."""
        return self._file >= 0

    def take(self) -> None:
        """Take it.

        Raises:
            TargetError: another run has it.
        """
        path = os.path.join(self._folder, LOCK)
        self._file = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._file)
            self._file = -1
            raise TargetError(
                f"{self._folder} is being written by another run of mtt",
                fix="wait for it, or choose another folder",
            ) from error
        held, here = os.fstat(self._file), os.stat(path) if os.path.exists(path) else None
        if here is None or (held.st_dev, held.st_ino) != (here.st_dev, here.st_ino):
            os.close(self._file)  # its owner ended and removed it before we had it
            self.take()

    def release(self) -> None:
        """Give it back, if it is held."""
        if self._file >= 0:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self._folder, LOCK))
            os.close(self._file)
            self._file = -1


def write_document(
    folder: str, name: str, data: bytes, suffix: str = ".part", *, keeps: bool = False
) -> None:
    """A small file in one step; one that holds just this already stays."""
    path = os.path.join(folder, name)
    if _holds(path, data):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    small_files.write(path, data, suffix, keeps=keeps)


def _holds(path: str, data: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_size == len(data) and file.read() == data
    except OSError:
        return False


def _write_all(descriptor: int, data: memoryview, position: int) -> None:
    done = 0
    while done < len(data):
        most = _MOST_AT_ONCE - (position + done) % _MOST_AT_ONCE
        done += os.pwrite(descriptor, data[done : done + most], position + done)


def target_error(folder: str, error: OSError, *, keeps: bool = False) -> TargetError:
    """What an error of the operating system says about a folder.

    Args:
        folder: where it was written.
        error: what went wrong.
        keeps: whether finished files stay, for `--resume`.
    """
    again = "; the same command goes on then" if keeps else ", or choose another folder"
    rest = "finished files stay" if keeps else "what was written was removed again"
    if error.errno == errno.EFBIG:
        return TargetError(
            f"a file is too large for the disk of {folder}; {rest}",
            found=str(error),
            fix="choose a new folder and a smaller --max-shard-size, or raise ulimit -f",
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TargetError(
            f"the disk of {folder} is full; {rest}",
            found=str(error),
            fix=f"free some space{again}",
        )
    return TargetError(
        f"{folder} cannot be written",
        found=str(error),
        fix=f"make it writable{again}" if keeps else "choose a folder you may write to",
    )
