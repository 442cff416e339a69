"""Claims on a place that machines share: files that only one run can make.

    name        {"host": ..., "boot": ..., "process": ..., "started": ..., "token": ...}

Locks of the operating system do not reach over every network file system; exclusive creation
does. A claim outlives a run that is killed: whoever takes it over says so (`take_over`), and a run
that lost its claim finds out before it shows another file.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from typing import Any

from .errors import TargetError

_BOOT = "/proc/sys/kernel/random/boot_id"
_WRITTEN_WITHIN = 0.2  # seconds


class Claim:
    """A file that says which run has a piece of work.

    Attributes:
        token: of this run, in the names of its unfinished files.
    """

    def __init__(self, path: str, what: str) -> None:
        self.token = secrets.token_hex(8)
        self._path, self._what, self._held = path, what, False

    def try_take(self) -> bool:
        """Make the file; False if another run made it."""
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        try:
            descriptor = os.open(self._path, flags, 0o666)
        except FileExistsError:
            return False
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump({**_this_run(), "token": self.token}, file)
        except OSError:
            os.unlink(self._path)
            raise
        self._held = True
        return True

    def take(self, *, take_over: bool) -> None:
        """Make the file, in the place of a dead run's if `take_over`.

        Raises:
            TargetError: another run has it.
        """
        while not self.try_take():
            holder = self.holder()
            if not holder:  # its run may be about to write it
                time.sleep(_WRITTEN_WITHIN)
                holder = self.holder()
            alive = _is_alive(holder)
            if alive or not take_over:
                raise TargetError(
                    f"{self._what} is being written by another run of mtt"
                    + ("" if alive else ", or was by one that died"),
                    found=_named(holder),
                    fix="wait for it" + ("" if alive else "; if it died, add --resume"),
                )
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)

    def holder(self) -> dict[str, Any]:
        """What the file says; empty if it says nothing."""
        try:
            with open(self._path, "rb") as file:
                content = json.load(file)
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def check(self) -> None:
        """See that it is still this run's.

        Raises:
            TargetError: another run took it over.
        """
        holder = self.holder()
        if holder.get("token") != self.token:
            self._held = False
            raise TargetError(
                f"{self._what} was taken over by another run of mtt",
                found=_named(holder),
                fix="let that run go on",
            )

    def release(self) -> None:
        """Remove the file, if it is this run's."""
        if self._held and self.holder().get("token") == self.token:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
        self._held = False


def boot_id() -> str:
    """What names the time since this machine was started; empty where nothing does."""
    try:
        with open(_BOOT, encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def _this_run() -> dict[str, Any]:
    process = os.getpid()
    return {
        "host": os.uname().nodename,
        "boot": boot_id(),
        "processes": _processes(),
        "process": process,
        "started": _started(process),
    }


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether a run is seen to be alive; of one on another machine nothing is seen."""
    here = _this_run()
    if any(holder.get(name) != here[name] for name in ("host", "boot", "processes")):
        return False
    process = holder.get("process")
    if not isinstance(process, int) or process < 1:
        return False
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return bool(holder.get("started") == _started(process))


def _processes() -> str:
    """What process numbers are counted in: containers have numbers of their own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(process: int) -> str:
    """When a process started, unless it ended: numbers are used again.

    (proc_pid_stat(5): field 22, and the state in field 3.)
    """
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return ""


def _named(holder: dict[str, Any]) -> str:
    if not holder:
        return "a claim that says nothing"
    return f"process {holder.get('process')} on {holder.get('host')}"
