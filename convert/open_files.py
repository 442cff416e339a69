"""What an open file can do, wherever it is.

`sources.py` opens those of this machine, and `remote.py` others.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Protocol, Self


class File(Protocol):
    """An open file: its size, and any part of it."""

    size: int

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def pread(self, count: int, offset: int) -> bytes:
        """Up to `count` bytes from `offset`; fewer only at the end of the file."""

    def read_into(self, out: memoryview, offset: int) -> int:
        """Fill `out` from `offset`, or some of it; how many bytes, 0 at the end of the file."""

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Say that these (offset, count) will be asked for next, each by `pread`."""

    def give_back(self, offset: int, count: int) -> None:
        """Say that these bytes will not be asked for again soon."""
        return None  # what is fetched from elsewhere is not in the system's cache

    def close(self) -> None:
        """Give back what it holds."""
