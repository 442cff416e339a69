"""Where bytes come from: local files, and whatever a URL leads to, read by range.

    /checkpoints/gpt                       files, with pread
    hf://owner/repo[@revision][/folder]    a repository on the Hub
    s3://..., gs://..., https://...        whatever fsspec has a file system for

A place is a string all along, so readers join and take apart paths as they always do, and ask
here for what is there and for bytes. Local paths never leave this file; URLs go to `remote.py`,
which is imported when one is met.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from . import page_cache
from .errors import SourceError
from .open_files import File

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_LOCAL = re.compile(r"(file|local)://")
_MOST_AT_ONCE = 8
Range = tuple[str, int, int]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells whether a local file is still the same: size, time of its last change, inode."""

    size: int
    changed_ns: int
    inode: int

    @classmethod
    def of(cls, facts: os.stat_result) -> Identity:
        """From what the system says about a file."""
        return cls(facts.st_size, facts.st_mtime_ns, facts.st_ino)

    def __str__(self) -> str:
        changed = datetime.fromtimestamp(self.changed_ns / 1e9).isoformat(" ", "milliseconds")
        return f"{self.size:,} bytes, last changed {changed}, inode {self.inode}"


# As local files were when they were first opened, since the last `begin`.
_seen: dict[str, Identity] = {}


class LocalFile(File):
    """A file of this machine."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        facts = os.fstat(self._descriptor)
        self.size = facts.st_size
        _seen.setdefault(path, Identity.of(facts))

    def pread(self, count: int, offset: int) -> bytes:
        """Up to `count` bytes from `offset`."""
        return os.pread(self._descriptor, count, offset)

    def read_into(self, out: memoryview, offset: int) -> int:
        """Fill `out` from `offset`, or some of it."""
        try:
            return os.preadv(self._descriptor, [out], offset)
        except AttributeError:  # macOS before 11
            pass
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
        data = os.pread(self._descriptor, len(out), offset)
        out[: len(data)] = data
        return len(data)

    def give_back(self, offset: int, count: int) -> None:
        """Let the system drop them from its cache."""
        page_cache.give_back(self._descriptor, offset, count)

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Nothing: the system reads ahead by itself."""

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._descriptor)


class Window:
    """The part `[start, end)` of an open file, as a file object of Python."""

    def __init__(self, file: File, start: int, end: int) -> None:
        self._file, self._start, self._size, self._position = file, start, end - start, 0

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Bytes from the beginning of the part."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move, within the part or beyond its end."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if origin + offset < 0:
            raise OSError("seek before the beginning")
        self._position = origin + offset
        return self._position

    def read(self, count: int = -1) -> bytes:
        """Up to `count` bytes, or all that is left."""
        left = max(0, self._size - self._position)
        count = left if count is None or count < 0 else min(count, left)
        data = self._file.pread(count, self._start + self._position)
        self._position += len(data)
        return data


def is_remote(path: str) -> bool:
    """Whether a path is a URL of another machine."""
    return bool(_URL.match(path)) and not _LOCAL.match(path)


def absolute(path: str) -> str:
    """A path that means the same from everywhere."""
    if is_remote(path):
        return path.rstrip("/")
    return os.path.abspath(_LOCAL.sub("", path, count=1))


def relative(path: str, folder: str) -> str:
    """A path as seen from a folder."""
    if is_remote(path) or is_remote(folder):
        return path.removeprefix(folder.rstrip("/") + "/")
    return os.path.relpath(path, folder)


def exists(path: str) -> bool:
    """Whether there is anything."""
    return is_dir(path) or is_file(path) if is_remote(path) else os.path.exists(path)


def is_file(path: str) -> bool:
    """Whether there is a file."""
    if is_remote(path):
        from . import remote

        return remote.is_file(path)
    return os.path.isfile(path)


def is_dir(path: str) -> bool:
    """Whether there is a folder."""
    if is_remote(path):
        from . import remote

        return remote.is_dir(path)
    return os.path.isdir(path)


def listing(folder: str) -> list[str]:
    """Names in a folder, sorted.

    Raises:
        SourceError: the folder cannot be read.
        HubError: it cannot be reached.
    """
    if is_remote(folder):
        from . import remote

        return sorted(remote.entries(folder))
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise SourceError(f"{folder} cannot be read", found=str(error)) from error


def open_file(path: str) -> File:
    """Open a file for reading.

    Raises:
        OSError: it cannot be opened.
        HubError: it cannot be reached.
    """
    if is_remote(path):
        from . import remote

        return remote.RemoteFile(path)
    return LocalFile(path)


def size(path: str) -> int:
    """Bytes of a file.

    Raises:
        SourceError: it cannot be seen.
        HubError: it cannot be reached.
    """
    if is_remote(path):
        from . import remote

        return remote.size(path)
    try:
        return os.path.getsize(path)
    except OSError as error:
        raise SourceError(f"{path} cannot be read", found=str(error)) from error


def read(path: str) -> bytes:
    """All of a small file.

    Raises:
        SourceError: it cannot be read.
        HubError: it cannot be reached.
    """
    try:
        with open_file(path) as file:
            return file.pread(file.size, 0)
    except OSError as error:
        raise SourceError(f"{path} cannot be read", found=str(error)) from error


def expect(ranges: Iterable[Range]) -> None:
    """Say that these (path, offset, count) will be asked for next, by whatever opens the files.

    Remote ones are fetched now, many at a time; local ones need no announcement.
    """
    wanted = [(path, offset, count) for path, offset, count in ranges if is_remote(path)]
    if wanted:
        from . import remote

        remote.fetch(wanted)


def identity(path: str) -> Identity | None:
    """What tells whether a file is still the same; None if it is remote, or not there."""
    try:
        return None if is_remote(path) else Identity.of(os.stat(path))
    except OSError:
        return None


def first_seen(path: str) -> Identity | None:
    """The identity of a file when it was first opened, or now if it was not yet."""
    return _seen.get(path) or identity(path)


def each(function: Callable[[str], T], paths: Iterable[str]) -> Iterator[T]:
    """What a function makes of each path, in order; of remote ones several at a time.

    Raises:
        BaseException: what the function raises for the first path it fails for.
    """
    paths = list(paths)
    if not any(map(is_remote, paths)):
        yield from map(function, paths)
        return
    with ThreadPoolExecutor(_MOST_AT_ONCE, thread_name_prefix="mtt") as pool:
        yield from pool.map(function, paths)


def begin(path: str) -> str:
    """What to call a place from now on; what was seen of files before is forgotten.

    Raises:
        HubError: a remote place is not there, or cannot be reached.
    """
    _seen.clear()
    if not is_remote(path):
        return _LOCAL.sub("", path, count=1)
    from . import remote

    remote.begin(absolute(path))
    return absolute(path)
