"""The system's cache of files, given back by conversions that would fill it.

What is read once and written once pushes out what other programs keep there. A conversion that is
small beside the memory leaves all of it: the next command finds its files there.
"""

from __future__ import annotations

import contextlib
import os

# Reads of less than this hardly cover whole pages.
LEAST_BYTES = 64 << 10
# Bytes written to a file between two looks at what of it has reached the disk.
EVERY_BYTES = 32 << 20
_LARGE = 0.5
_CGROUP_LIMIT = "/sys/fs/cgroup/memory.max"


def is_filled_by(num_bytes: int) -> bool:
    """Whether reading or writing that much leaves little room for anything else."""
    return num_bytes > _LARGE * _memory()


def _memory() -> int:
    """Bytes of memory that this process may have cached."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError), open(_CGROUP_LIMIT, "rb") as file:
        found = min(found, int(file.read()))  # ValueError: "max"
    return found


def begin_writing(descriptor: int, offset: int, num_bytes: int) -> None:
    """Have the disk begin with what was just written to a range of a file; nobody waits for it.

    It is what `give_back` does at first: what is on its way to the disk is not dropped.
    """
    give_back(descriptor, offset, num_bytes)


def give_back(descriptor: int, offset: int = 0, num_bytes: int = 0) -> None:
    """Drop a range of a file from the cache; 0 bytes: up to its end.

    Linux begins to write what is not on the disk yet, and drops it when it is asked again
    (mm/fadvise.c). Where there is no such call, or the file system has none, nothing happens.
    """
    if hasattr(os, "posix_fadvise"):  # not on macOS
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, offset, num_bytes, os.POSIX_FADV_DONTNEED)
