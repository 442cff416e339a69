"""What commands share: progress, summaries, JSON."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from ..execute import Progress

_LINE_EVERY_SECONDS = 30.0


@contextmanager
def progress_bar(label: str) -> Iterator[Progress]:
    """A bar of bytes on a terminal, a line every 30 seconds elsewhere, on stderr."""
    if os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").lower() in ("1", "true", "yes", "on"):
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
    """The largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def print_json(command: str, status: str, body: Mapping[str, object]) -> None:
    """The one JSON object of a command."""
    print(json.dumps({"schema": 1, "command": command, "status": status, **body}, default=str))


def print_table(rows: Iterable[tuple[str, object]]) -> None:
    """Label and value, a line each; empty values are left out."""
    for label, value in rows:
        if value not in (None, "", ()):
            print(f"  {label:<12} {value}")


def print_warnings(warnings: Iterable[str]) -> None:
    """Warnings, on stderr."""
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def dropped_text(dropped: Mapping[str, tuple[str, ...]]) -> str:
    """What was left out on purpose, by kind."""
    return ", ".join(f"{kind} ({len(names)})" for kind, names in sorted(dropped.items()))
