"""Conversions that die at one call of the system, and what the next run makes of what they left.

    python -m tests.convert.dying '{"source": ..., "place": ..., "runs": [...], "points": 60}'

Run as a program of its own, which has one thread: every conversion is a fork of it. The one that is
to die counts its calls that change the file system, and at the n-th it is gone, as with SIGKILL:
before the call, after it, or in the middle of what was to be written.
"""

from __future__ import annotations

import builtins
import json
import os
import random
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mtt_convert
from mtt_convert import small_files

DEAD, FAILED = 99, 98
_CALLS = ("pwrite", "replace", "rename", "fsync", "unlink", "mkdir", "rmdir", "open")
Facts = dict[str, tuple[int, int]]


class _Count:
    """Calls so far, and at which one to die; `how` is 0 before, 1 after, 2 in the middle."""

    def __init__(self, last: int, how: int) -> None:
        self.calls, self.last, self.how = 0, last, how

    def wrap(self, real: Callable[..., Any], changes: Callable[..., bool]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if not changes(*args, **options):
                return real(*args, **options)
            self.calls += 1
            if self.calls != self.last:
                return real(*args, **options)
            if self.how == 2 and real.__name__ == "pwrite":
                real(args[0], memoryview(args[1])[: len(args[1]) // 2], args[2])
            elif self.how:
                real(*args, **options)
            os._exit(DEAD)

        return call


def _patch(count: _Count) -> None:
    for name in _CALLS:
        changes = _creates if name == "open" else lambda *args, **options: True
        setattr(os, name, count.wrap(getattr(os, name), changes))
    builtins.open = count.wrap(builtins.open, _writes)
    small_files._exchange = count.wrap(small_files._exchange, lambda *args: True)


def _creates(path: object, flags: int, *args: object, **options: object) -> bool:
    return bool(flags & os.O_CREAT)


def _writes(path: object, mode: str = "r", *args: object, **options: object) -> bool:
    return "w" in mode


def apart(work: Callable[[], None], last: int = 0, how: int = 0) -> tuple[int, int, str]:
    """Exit code, calls that change the file system, and traceback of some work in a fork."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code, text, count = 0, "", _Count(last, how)
        _patch(count)
        try:
            work()
        except BaseException:
            code, text = FAILED, traceback.format_exc()
        os.write(write, json.dumps([count.calls, text]).encode()[:60_000])
        os._exit(code)
    os.close(write)
    status = os.waitpid(child, 0)[1]
    answer = b"".join(iter(lambda: os.read(read, 65_536), b""))
    os.close(read)
    calls, text = json.loads(answer) if answer else (0, "")
    return os.waitstatus_to_exitcode(status), calls, text


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    found = sorted(folder.rglob("*")) if folder.is_dir() else []
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if path.is_file()}


def weights(folder: Path, record: dict[str, Any]) -> Facts:
    """Inode and time of the weight files that have their names."""
    paths = {name: folder / name for name in record["files"]}
    stats = {name: path.stat() for name, path in paths.items() if path.exists()}
    return {name: (facts.st_ino, facts.st_mtime_ns) for name, facts in stats.items()}


def main(arguments: dict[str, Any]) -> dict[str, Any]:
    """Let runs die at random points, and finish them.

    Args:
        arguments: `source`; `place` for folders; `options` of the conversion; `runs`, the options
            that each run adds (one run, or one per part); `last`, the file that makes a folder
            whole; `points`, `seed`; `before`, options of an earlier conversion that is replaced.
    """
    source, place = arguments["source"], Path(arguments["place"])
    options, runs, last = arguments["options"], arguments["runs"], arguments["last"]
    random.seed(arguments["seed"])
    mtt_convert.convert(source, place / "expected", **options)
    expected = contents(place / "expected")
    record = json.loads(expected["mtt_manifest.json"])
    out = place / "out"

    def convert(run: dict[str, Any], **more: Any) -> Callable[[], None]:
        return lambda: void(mtt_convert.convert(source, out, **options, **run, **more))

    def begin(victim: int, resume: dict[str, Any]) -> list[tuple[int, int, str]]:
        if "before" in arguments:
            mtt_convert.convert(source, out, **arguments["before"])
        return [apart(convert(run, **resume)) for run in runs[:victim]]

    problems, num_kept, num_dead = [], 0, 0
    totals: dict[tuple[int, bool], int] = {}
    for point in range(arguments["points"]):
        victim = random.randrange(len(runs))
        resume = {"resume": True} if point % 2 or "before" in arguments else {}
        if (victim, bool(resume)) not in totals:
            begin(victim, resume)
            _, totals[victim, bool(resume)], text = apart(convert(runs[victim], **resume))
            problems += [text] if text else []
            remove(out)
        total = totals[victim, bool(resume)]
        healthy = begin(victim, resume)
        where = f"point {point}, call {(call := random.randint(1, total))} of {total}"
        code, _, text = apart(convert(runs[victim], **resume), call, how := point % 3)
        where += f", how {how}"
        num_dead += code == DEAD
        healthy += [apart(convert(run, **resume)) for run in runs[victim + 1 :]]
        problems += [f"{where}: {text}" for _, _, text in healthy if text]
        if code not in (DEAD, 0):
            problems.append(f"{where}: exit {code}, {text}")
        left = contents(out)
        differing = {name for name, data in expected.items() if left.get(name) != data}
        if "before" not in arguments and last in left and differing - {"mtt_manifest.json"}:
            problems.append(f"{where}: it looks whole without {differing}")
        kept = weights(out, record) if "before" not in arguments else {}
        num_kept += len(kept)
        code, _, text = apart(convert(runs[victim], resume=True))
        if code:
            problems.append(f"{where}: it was not resumed: {text}")
        after = weights(out, record)
        if any(after.get(name) != facts for name, facts in kept.items()):
            problems.append(f"{where}: finished files were written again")
        if (there := contents(out)) != expected:
            names = [n for n in {**there, **expected} if there.get(n) != expected.get(n)]
            problems.append(f"{where}: {names} differ after all, of {sorted(left)}")
        remove(out)
    return {"problems": problems, "kept": num_kept, "dead": num_dead, "files": len(record["files"])}


def remove(folder: Path) -> None:
    """A folder and all that is in it."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def void(value: object) -> None:
    """Nothing."""


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
