"""What commands share: progress, summaries, JSON."""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress

from ..cli import printable
from ..execute import Progress

_LINE_EVERY_SECONDS = 30.0


@contextmanager
def progress_bar(label: str) -> Iterator[Progress]:
    """A bar of bytes on a terminal, a line every 30 seconds elsewhere, on stderr."""
    if _no_bars():
        yield lambda done, total: None
    elif sys.stderr.isatty():
        from tqdm import tqdm

        ascii_only = True if os.environ.get("NO_COLOR") else None
        bar = tqdm(
            desc=label, unit="B", unit_scale=True, dynamic_ncols=True, ascii=ascii_only, leave=False
        )

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        with bar:
            yield update
    else:
        yield _Lines(label)


def _no_bars() -> bool:
    value = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "")
    return value.lower() in ("1", "true", "yes", "on")


def quiet_transformers() -> None:
    """Keep bars of transformers out of logs, and away from who wants none.

    And what torchao says when transformers imports it: of GPUs' kernels that a CPU has no use for.
    """
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if _no_bars() or not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


class _Lines:
    """Progress for logs."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._start = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last >= _LINE_EVERY_SECONDS:
            self._last = now
            rate = done / (now - self._start)
            left = (total - done) / rate if rate else 0.0
            text = (
                f"{self._label}: {size(done)} of {size(total)}, {size(rate)}/s, {left:.0f} s left"
            )
            print(text, file=sys.stderr, flush=True)


def size(num_bytes: float) -> str:
    """Bytes for people: `2.07 GB`."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.2f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} TB"


def peak_rss() -> int:
    """The largest resident size of this process so far, in bytes.

    On Linux getrusage's figure is at least what the process that started this one had, so the
    kernel's own count for the program is read (VmHWM; proc_pid_status(5), getrusage(2)).
    """
    if sys.platform == "linux":
        with suppress(OSError), open("/proc/self/status", "rb") as file:
            for line in file:
                if line.startswith(b"VmHWM:"):
                    return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def print_json(command: str, status: str, start: float, body: Mapping[str, object]) -> None:
    """The one JSON object of a command.

    Args:
        command: its name.
        status: how it ended.
        start: `time.monotonic()` when it began.
        body: what it has to say; the names all commands share are null or empty where absent.
    """
    shared = {
        "schema": 1,
        "command": command,
        "status": status,
        "source": None,
        "output": None,
        "tensors": None,
        "bytes": None,
        "dropped": {},
        "warnings": [],
        "hashes": {},
        "seconds": time.monotonic() - start,
        "peak_rss": peak_rss(),
    }
    print(json.dumps({**shared, **body}, default=str))


def say(text: str, keep: str = "") -> None:
    """A line on stdout, whatever names are in it."""
    text = printable(text, keep)
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def print_table(rows: Iterable[tuple[str, object]]) -> None:
    """Label and value, a line each; empty values are left out."""
    for label, value in rows:
        if value not in (None, "", ()):
            say(f"  {label:<12} {value}")


def print_warnings(warnings: Iterable[str]) -> None:
    """Warnings, on stderr."""
    for warning in warnings:
        print(f"warning: {printable(warning)}", file=sys.stderr)


def dropped_text(dropped: Mapping[str, tuple[str, ...]]) -> str:
    """What was left out on purpose, by kind."""
    return ", ".join(f"{kind} ({len(names)})" for kind, names in sorted(dropped.items()))
