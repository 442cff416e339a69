"""Files behind URLs, read by range through fsspec; never downloaded whole.

    hf://owner/repo[@revision][/folder]   huggingface_hub's file system: token, endpoint, offline
    http(s)://host/folder                 a server that lists folders and answers range requests
    s3:// gs:// az:// memory:// ...       the file system fsspec knows under that name

Folders are listed once, and small parts that a reader announces are fetched together, which is
what opening a checkpoint of hundreds of files needs. Everything that goes wrong on the way is a
`HubError` (exit code 5).
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import unquote

from .errors import HubError, MTTError, UnsupportedError, UsageError
from .open_files import File

_PACKAGES = {
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
}
_REPOSITORY = re.compile(r"hf://[^/@]+/[^/@]+")
# Whose URLs all belong to one file system, whatever stands before the first slash.
_HOST_IS_PATH = ("hf", "http", "https", "memory", "s3", "s3a", "gs", "gcs")
# Exceptions of many clients, which are not imported, by name.
_REFUSALS = {
    "offline": ("OfflineModeIsEnabled",),
    "access": ("GatedRepoError", "PermissionError", "NoCredentialsError", "DisabledRepoError"),
    "missing": (
        "RepositoryNotFoundError",
        "RevisionNotFoundError",
        "EntryNotFoundError",
        "HFValidationError",
    ),
}
_BREAKS = (
    "ClientConnectionError",
    "ClientPayloadError",
    "ConnectionError",
    "HTTPClientError",
    "TimeoutError",
    "TransportError",
)
_NUM_CONNECTIONS = 16
_JOINED_GAP = 4 << 10
_LONGEST_JOINED = 1 << 20
_BLOCK_BYTES, _MOST_AHEAD, _MOST_BLOCKS = 1 << 20, 8, 64
_NUM_ATTEMPTS = 3
_KEPT_BYTES = 64 << 20

_systems: dict[str, Any] = {}
_listings: dict[str, dict[str, str]] = {}
_sizes: dict[str, int] = {}
_kept: dict[str, list[tuple[int, bytes]]] = {}
_blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
_lock = threading.Lock()


def begin(url: str) -> None:
    """Look at a place anew: all listings and fetched parts are forgotten.

    Raises:
        HubError: it is not there, or cannot be reached.
        UsageError: it names no repository of the Hub.
    """
    if url.startswith("hf:") and not _REPOSITORY.match(url):
        raise UsageError(
            f"{url} names no repository of the Hub",
            expected="hf://owner/repo[@revision][/folder]",
            fix="give its owner and its name",
        )
    with _lock:
        for system in _systems.values():
            system.invalidate_cache()
        _listings.clear()
        _sizes.clear()
        _kept.clear()
        _blocks.clear()
    kind = _kind(url)
    if kind is None:
        raise _failure(url, FileNotFoundError(url))
    if kind == "directory":
        entries(url)


def entries(folder: str) -> dict[str, str]:
    """Names in a folder, and whether each is a `file` or a `directory`.

    Raises:
        HubError: the folder cannot be reached.
    """
    folder = folder.rstrip("/")
    if folder not in _listings:
        fs, path = _file_system(folder)
        try:
            found = fs.ls(path + "/" if _is_http(folder) else path, detail=True)
        except Exception as error:
            raise _failure(folder, error) from error
        names = {}
        for entry in found:
            name = str(entry["name"]).rstrip("/")
            short = _plain(name.rpartition("/")[2], folder)
            if name != path.rstrip("/") and short and not short.startswith("?"):
                names[short] = str(entry["type"])
        _listings[folder] = names
    return _listings[folder]


def is_file(url: str) -> bool:
    """Whether a URL is a file's."""
    return _kind(url.rstrip("/")) == "file"


def is_dir(url: str) -> bool:
    """Whether a URL is a folder's."""
    return _kind(url.rstrip("/")) == "directory"


def _kind(url: str) -> str | None:
    """`file`, `directory`, or None if there is nothing."""
    parent, _, name = url.rpartition("/")
    above, _, folder = parent.rpartition("/")
    if _listings.get(above, {}).get(_plain(folder, url)) == "directory":
        entries(parent)
    if known := _listings.get(parent):
        return known.get(_plain(name, url))
    if _is_http(url) and _shows_names(url):
        return "directory"
    fs, path = _file_system(url)
    try:
        return str(fs.info(path)["type"])
    except Exception as error:
        if _is_absence(error):
            return None
        raise _failure(url, error) from error


def _shows_names(url: str) -> bool:
    """Whether a web server lists what is in a folder, which is how one is told from a file."""
    try:
        return bool(entries(url))
    except HubError as error:
        if not isinstance(error.__cause__, Exception) or not _is_absence(error.__cause__):
            raise
        return False


def _is_absence(error: Exception) -> bool:
    """Whether an exception says no more than that there is nothing of this name."""
    names = {base.__name__ for cause in _chain(error) for base in type(cause).__mro__}
    if names & {"RepositoryNotFoundError", "RevisionNotFoundError", "HFValidationError"}:
        return False
    return "FileNotFoundError" in names and _status(error) in (None, 404) and not _broken(error)


def _broken(error: Exception) -> bool:
    """Whether a connection failed on the way."""
    return any(base.__name__ in _BREAKS for cause in _chain(error) for base in type(cause).__mro__)


def size(url: str) -> int:
    """Bytes of a file.

    Raises:
        HubError: it cannot be reached.
    """
    if url not in _sizes:
        fs, path = _file_system(url)
        try:
            _sizes[url] = int(fs.info(path)["size"] or 0)
        except Exception as error:
            raise _failure(url, error) from error
    return _sizes[url]


class RemoteFile(File):
    """One file behind a URL. It belongs to one thread."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._system, self._path = _file_system(url)
        self.size = size(url)
        self._handle: Any = None
        self._ahead, self._next = 1, -1

    def pread(self, count: int, offset: int) -> bytes:
        """Up to `count` bytes from `offset`."""
        count = max(0, min(count, self.size - offset))
        start, data = _part(self._url, offset, count) or (offset, self._fetch(offset, count))
        return data[offset - start : offset - start + count]

    def read_into(self, out: memoryview, offset: int) -> int:
        """Fill `out` from `offset`, or some of it, from blocks of 1 MB that are kept a while."""
        number, within = divmod(offset, _BLOCK_BYTES)
        block = _blocks.get((self._url, number))
        if block is None:
            block = self._fetch_blocks(number, len(out) + within)
        data = block[within : within + len(out)]
        out[: len(data)] = data
        return len(data)

    def _fetch_blocks(self, first: int, num_bytes: int) -> bytes:
        """Fetch blocks from `first` on: what is asked for, more where misses follow each other."""
        self._ahead = min(2 * self._ahead, _MOST_AHEAD) if first == self._next else 1
        count = max(self._ahead, -(-num_bytes // _BLOCK_BYTES))
        start = first * _BLOCK_BYTES
        data = self._fetch(start, min(count * _BLOCK_BYTES, self.size - start))
        self._next = first + count
        blocks = [data[at : at + _BLOCK_BYTES] for at in range(0, len(data), _BLOCK_BYTES)]
        with _lock:
            for number, block in enumerate(blocks, start=first):
                _blocks[self._url, number] = block
            while len(_blocks) > _MOST_BLOCKS:
                _blocks.popitem(last=False)
        return blocks[0] if blocks else b""

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Fetch these (offset, count) together."""
        fetch((self._url, offset, count) for offset, count in ranges)

    def close(self) -> None:
        """Close the connection, if the file system keeps one."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def _fetch(self, offset: int, count: int) -> bytes:
        if count <= 0:
            return b""
        for attempt in range(1, _NUM_ATTEMPTS + 1):
            try:
                data = self._fetch_once(offset, count)
                break
            except Exception as error:
                if attempt == _NUM_ATTEMPTS or not _broken(error):
                    raise _failure(self._url, error) from error
                self.close()
                time.sleep(attempt)
        if len(data) != count:
            raise HubError(
                f"{self._url} cannot be read by range",
                found=f"{len(data)} bytes for a request of {count}",
                expected="a server that answers range requests with the bytes asked for",
                fix="copy the checkpoint to this machine",
            )
        return data

    def _fetch_once(self, offset: int, count: int) -> bytes:
        if type(self._system).__name__ == "MemoryFileSystem":
            return bytes(self._system.cat_file(self._path, start=offset, end=offset + count))
        if self._handle is None:
            known = {"size": self.size} if _is_http(self._url) else {}
            self._handle = self._system.open(self._path, "rb", cache_type="none", **known)
        self._handle.seek(offset)
        return bytes(self._handle.read(count))


def fetch(ranges: Iterable[tuple[str, int, int]]) -> None:
    """Fetch (URL, offset, count), several at a time, and keep them for `pread`.

    Ranges near each other are joined. Nothing happens to those that reach beyond a file's end:
    whoever asks for them finds out.
    """
    jobs = list(_joined(wanted for wanted in ranges if not _part(*wanted)))
    if not jobs:
        return

    def run(job: tuple[str, int, int]) -> None:
        url, offset, count = job
        with RemoteFile(url) as file:
            data = file._fetch(offset, min(count, file.size - offset))
        with _lock:
            if sum(len(part) for _, part in _kept.get(url, ())) > _KEPT_BYTES:
                _kept.pop(url)
            _kept.setdefault(url, []).append((offset, data))

    with ThreadPoolExecutor(min(_NUM_CONNECTIONS, len(jobs)), thread_name_prefix="mtt") as pool:
        for _ in pool.map(run, jobs):
            pass


def _part(url: str, offset: int, count: int) -> tuple[int, bytes] | None:
    """A kept part that covers a range, and where it begins."""
    for start, data in _kept.get(url, ()):
        if start <= offset and offset + count <= start + len(data):
            return start, data
    return None


def _joined(ranges: Iterable[tuple[str, int, int]]) -> Iterator[tuple[str, int, int]]:
    current: tuple[str, int, int] | None = None
    for url, offset, count in sorted(ranges):
        if current and current[0] == url and offset <= current[1] + current[2] + _JOINED_GAP:
            length = max(current[2], offset + count - current[1])
            if length <= _LONGEST_JOINED:
                current = (url, current[1], length)
                continue
        if current:
            yield current
        current = (url, offset, count)
    if current:
        yield current


def _plain(name: str, url: str) -> str:
    """A name as a person writes it, from one in a URL."""
    return unquote(name) if _is_http(url) else name


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _file_system(url: str) -> tuple[Any, str]:
    """The file system a URL is of, and what it calls the path.

    Raises:
        UnsupportedError: a package is missing that reads such URLs.
        UsageError: there is no such kind of URL.
    """
    scheme, _, rest = url.partition("://")
    key = scheme if scheme in _HOST_IS_PATH else f"{scheme}://{rest.partition('/')[0]}"
    with _lock:
        if key not in _systems:
            _systems[key] = _connect(scheme, url)
        system = _systems[key]
    return system, system._strip_protocol(url)


def _connect(scheme: str, url: str) -> Any:
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)[0]
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        raise UnsupportedError(
            f"{url} needs a package that is not installed",
            found=str(error),
            expected=package or f"a package that lets fsspec read {scheme}://",
            fix=f"pip install {package}" if package else str(error),
        ) from error
    except ValueError as error:
        raise UsageError(
            f"{url} is no place mtt can read from",
            found=f"{scheme}://",
            expected="a path, hf://owner/repo, or a URL that fsspec knows: s3://, gs://, https://",
        ) from error


def _failure(url: str, error: Exception) -> MTTError:
    """What went wrong on the way to a URL, in words that help."""
    if isinstance(error, MTTError):
        return error
    found = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
    is_hub = url.startswith("hf://")
    login = "log in with hf auth login, or set HF_TOKEN" if is_hub else "check the credentials"
    refusal, status = _refusal(error), _status(error)
    if refusal == "offline":
        return HubError(f"{url} cannot be reached", found=found, fix="unset HF_HUB_OFFLINE")
    if refusal == "missing" or (not refusal and _is_absence(error)):
        private = f"; if it is private, {login}" if is_hub else ""
        return HubError(f"{url} was not found", found=found, fix=f"check the name{private}")
    if refusal == "access" or status in (401, 403):
        return HubError(f"{url} may not be read", found=found, expected="access to it", fix=login)
    if isinstance(error, ValueError) and "range request" in str(error):
        return HubError(
            f"{url} cannot be read by range",
            found=found,
            expected="a server that answers range requests",
            fix="copy the checkpoint to this machine",
        )
    return HubError(f"{url} cannot be reached", found=found, fix="check the network, and try again")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those it was raised from or while handling."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _refusal(error: Exception) -> str | None:
    """What kind of answer an exception stands for: `offline`, `missing`, `access` or none."""
    for cause in _chain(error):
        for kind, names in _REFUSALS.items():
            if any(base.__name__ in names for base in type(cause).__mro__):
                return kind
    return None


def _status(error: Exception) -> int | None:
    """The HTTP status an exception carries, whichever client raised it."""
    for cause in _chain(error):
        response = getattr(cause, "response", None)
        for holder in (cause, response):
            for name in ("status", "status_code", "code"):
                if isinstance(status := getattr(holder, name, None), int):
                    return status
    return None
