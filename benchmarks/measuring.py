"""Processes from start to end: time, memory, disk, and what others took of the machine meanwhile.

This process must stay small and do little: it shares the cores with what it measures.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_EVERY_SECONDS = 0.02
_MOST_SECONDS = 300
MOST_BY_OTHERS = 0.05  # share of the machine's CPU time


@dataclass(frozen=True)
class Run:
    """One process.

    Attributes:
        peak_mb: the largest VmHWM of it or of a process it started, sampled until it ends.
        temporary_mb: the most that stood in the folders watched, beyond what is there at the end.
        by_others: the share of the machine's CPU time that other processes took.
    """

    seconds: float
    cpu_seconds: float
    peak_mb: float
    temporary_mb: float
    status: int
    by_others: float


class _Sampler(threading.Thread):
    """Looks at a process and at folders until it is told to stop; ends one that takes too long."""

    def __init__(self, pid: int, folders: Sequence[Path]) -> None:
        super().__init__(daemon=True)
        self._pid, self._folders = pid, folders
        self._ended = threading.Event()
        self.peak_kb, self.peak_blocks = 0, 0

    def run(self) -> None:
        end = time.monotonic() + _MOST_SECONDS
        while not self._ended.is_set():
            if time.monotonic() > end:
                for pid in _family(self._pid):
                    os.kill(pid, signal.SIGKILL)
                return
            self.peak_kb = max(self.peak_kb, *map(_peak_kb, _family(self._pid)))
            self.peak_blocks = max(self.peak_blocks, sum(map(_blocks, self._folders)))
            self._ended.wait(_EVERY_SECONDS)

    def stop(self) -> None:
        self._ended.set()
        self.join()


def _family(pid: int) -> list[int]:
    """A process and those it started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        children = []
    return [pid, *(one for child in children for one in _family(int(child)))]


def _peak_kb(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/status") as file:
            return next((int(line.split()[1]) for line in file if line.startswith("VmHWM")), 0)
    except OSError:
        return 0


def _blocks(folder: Path) -> int:
    """Blocks of 512 bytes below a folder."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_blocks
            except OSError:
                continue
    return total


def measure(command: Sequence[str], out: Path, env: dict[str, str] | None = None) -> Run:
    """Run a command that writes to `out`, which is removed before.

    What it says is shown if it fails. After five minutes it is killed: status -9.
    """
    shutil.rmtree(out, ignore_errors=True)
    temporary = out.with_name("tmp")
    temporary.mkdir(exist_ok=True)
    with tempfile.TemporaryFile() as log:
        busy, start = busy_seconds(), time.perf_counter()
        pid = os.posix_spawn(
            command[0],
            command,
            {**os.environ, "TMPDIR": str(temporary), **(env or {})},
            file_actions=[(os.POSIX_SPAWN_DUP2, log.fileno(), number) for number in (1, 2)],
        )
        sampler = _Sampler(pid, (out, temporary))
        sampler.start()
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        seconds = time.perf_counter() - start
        _, status, usage = os.wait4(pid, 0)
        busy = busy_seconds() - busy
        sampler.stop()
        code = os.waitstatus_to_exitcode(status)
        if code:
            log.seek(0)
            print(log.read()[-3000:].decode(errors="replace"), file=sys.stderr)
    own = usage.ru_utime + usage.ru_stime
    left = max(0, sampler.peak_blocks - _blocks(out))
    shutil.rmtree(temporary)
    return Run(
        seconds,
        own,
        sampler.peak_kb * 1024 / 1e6,
        left * 512 / 1e6,
        code,
        max(0.0, busy - own) / (seconds * (os.cpu_count() or 1)),
    )


def busy_seconds() -> float:
    """CPU time that all processes of the machine have used."""
    fields = Path("/proc/stat").read_text().split(maxsplit=8)[1:8]
    user, nice, system, _idle, _wait, interrupts, soft = map(int, fields)
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")


def wait_until_quiet(seconds: float = 20) -> None:
    """Return when others leave the machine alone, or after some time in any case."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        busy = busy_seconds()
        time.sleep(0.25)
        if busy_seconds() - busy <= MOST_BY_OTHERS * 0.25 * (os.cpu_count() or 1) + 0.01:
            return


def machine() -> dict[str, str]:
    """What the figures depend on; no host names, no paths."""
    info = Path("/proc/cpuinfo").read_text()
    model = next((line for line in info.splitlines() if line.startswith("model name")), "?: ?")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    copy = subprocess.run(["cp", "--version"], capture_output=True, text=True, check=True)
    names = ("modeling-mtt", "numpy", "xxhash", "zlib-ng", "torch", "safetensors")
    return {
        "cpu": f"{len(os.sched_getaffinity(0))} x {model.partition(':')[2].strip()}",
        "memory": f"{memory / 2**30:.1f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in names},
        "cp": copy.stdout.splitlines()[0],
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
