"""Disks that fill up or refuse, simulated at the call that would fail."""

from __future__ import annotations

import errno
import os
import threading
from typing import Any

import pytest

NUM_BYTES = 918_256
"""About what the converted model takes; the tests use parts of it."""


def full_after(monkeypatch: pytest.MonkeyPatch, limit: int, code: int = errno.ENOSPC) -> None:
    """os.pwrite that has room for `limit` bytes in all."""
    real, written, lock = os.pwrite, [0], threading.Lock()

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        with lock:
            room = limit - written[0]
            if room <= 0:
                raise OSError(code, os.strerror(code))
            count = real(descriptor, memoryview(data)[:room], offset)
            written[0] += count
            return count

    monkeypatch.setattr(os, "pwrite", pwrite)


def fail_rename(monkeypatch: pytest.MonkeyPatch, name: str, code: int = errno.ENOSPC) -> None:
    real = os.replace

    def replace(old: Any, new: Any) -> None:
        if os.path.basename(new) == name and str(old).endswith(".part"):
            raise OSError(code, os.strerror(code))
        real(old, new)

    monkeypatch.setattr(os, "replace", replace)
