"""Small files that are written, and replaced, in one step, without waiting for the disk.

To rename a file over another has ext4 write the new one out first (auto_da_alloc, fs/ext4/namei.c),
behind all that waits for the disk: a tenth of a second while a model is written. To exchange their
names, and remove the one that is old then, has not. What must be on the disk is synced by whoever
wrote it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def write(path: str, data: bytes, suffix: str = ".part", *, keeps: bool = False) -> None:
    """Write a file, or replace it; it reaches the disk before it gets its name if it `keeps`.

    Args:
        path: of the file.
        data: all of it.
        suffix: what its name ends with meanwhile.
        keeps: whether it is to survive the machine.

    Raises:
        OSError: it cannot be done; nothing under the unfinished name is left.
    """
    try:
        with open(path + suffix, "wb") as file:
            file.write(data)
            if keeps:
                file.flush()
                os.fsync(file.fileno())
        replace(path + suffix, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path + suffix)
        raise


def replace(new: str, old: str) -> None:
    """Give a file the name of another, which may be there; at all times one of them has it.

    Raises:
        OSError: it cannot be done, and the old file stays; or it was, and the old file stays under
            the new one's former name.
    """
    if _exchange(new, old):
        os.unlink(new)
    else:
        os.replace(new, old)


def _exchange(first: str, second: str) -> bool:
    """Exchange the names of two files, if system and file system can and both are there."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):  # only Linux has it
        return False
    names = os.fsencode(first), os.fsencode(second)
    return bool(call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)
