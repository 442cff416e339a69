"""A command's work on several processes of this machine, which end together.

The processes find each other as those that torchrun starts do. They print nothing: what the first
one returns, and what the first one to fail raised, come back to the process that started them.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import LayoutError, MTTError, SourceError

_POLL_SECONDS, _GRACE_SECONDS, _PATIENCE_SECONDS = 0.05, 1.0, 5.0
Processes = Sequence[subprocess.Popen[bytes]]


def launch(target: str, options: Mapping[str, object], num_ranks: int) -> Any:
    """Call a function in new processes.

    Args:
        target: `module:function`; all processes call it with `options`.
        options: anything JSON has.
        num_ranks: how many processes.

    Returns:
        What it returns in the first process, by way of JSON.

    Raises:
        MTTError: what the function raised in the process that failed first.
        LayoutError: there are fewer GPUs than processes.
    """
    import torch
    import torch.distributed as dist

    num_gpus = torch.cuda.device_count()
    if 0 < num_gpus < num_ranks:
        raise LayoutError(
            f"{num_ranks} processes need a GPU each",
            found=f"{num_gpus}",
            expected=f"{num_ranks}",
            fix="use smaller sizes, or the CPU: CUDA_VISIBLE_DEVICES= mtt ...",
        )
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        # This process holds the store, as torchrun's agent does.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
    }
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_ranks))}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "call.json").write_text(json.dumps({"target": target, "options": options}))
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(num_ranks):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(_start(folder, rank, {**threads, **os.environ, **shared, **place}))
            failed = _wait(processes)
        finally:
            _end(processes)
        if failed is not None:
            raise _error(folder, failed, processes)
        return json.loads((folder / "result.json").read_text())


def _start(folder: Path, rank: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with open(folder / f"stderr-{rank}", "wb") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", __name__, str(folder)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            # The first one shows the progress of all.
            stderr=None if rank == 0 else stderr,
            # Ctrl-C is this process's to handle.
            start_new_session=True,
        )


def _wait(processes: Processes) -> int | None:
    """Wait for all to end well, or for one to fail, which is returned.

    The others get a moment to find the same.
    """
    failed, deadline = None, float("inf")
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if None not in codes and not any(codes):
            return None
        if failed is None and any(codes):
            failed = next(rank for rank, code in enumerate(codes) if code)
            deadline = time.monotonic() + _GRACE_SECONDS
        if None not in codes:
            break
        time.sleep(_POLL_SECONDS)
    return failed


def _end(processes: Processes) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + _PATIENCE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _error(folder: Path, failed: int, processes: Processes) -> MTTError:
    """The error that came first; others may only have lost their connection to that process."""
    reports = [json.loads(path.read_text()) for path in folder.glob("error-*.json")]
    if not reports:
        code = processes[failed].returncode
        lines = (folder / f"stderr-{failed}").read_text(errors="replace").splitlines()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return SourceError(
            f"{_name(failed, len(processes))} {how}",
            found=lines[-1] if lines else "nothing it said",
            fix="it may have run out of memory: try more processes, or another --dtype",
        )
    report = min(reports, key=lambda report: (report["time"], report["rank"]))
    same = [other["rank"] for other in reports if other["message"] == report["message"]]
    prefix = "" if 0 in same else f"{_name(report['rank'], len(processes))} "
    details = {name: report[name] for name in ("found", "expected", "fix")}
    error = MTTError(prefix + report["message"], **details)
    error.exit_code, error.code = report["exit_code"], report["code"]
    error.add_note(report["traceback"])
    return error


def _name(rank: int, num_ranks: int) -> str:
    return f"[rank {rank}/{num_ranks} {socket.gethostname()}]"


def _main(folder: Path) -> int:
    """What a started process does."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    rank = int(os.environ["RANK"])
    call = json.loads((folder / "call.json").read_text())
    module, function = call["target"].split(":")
    try:
        result = getattr(importlib.import_module(module), function)(call["options"])
        if rank == 0:
            (folder / "result.json").write_text(json.dumps(result))
        _leave_together()
        return 0
    except Exception as problem:
        error = problem if isinstance(problem, MTTError) else _bug(problem)
        report = {
            "rank": rank,
            "time": time.time(),
            "message": error.message,
            "found": error.found,
            "expected": error.expected,
            "fix": error.fix,
            "code": error.code,
            "exit_code": error.exit_code,
            "traceback": traceback.format_exc(),
        }
        unfinished = folder / f"unfinished-{rank}"
        unfinished.write_text(json.dumps(report))
        unfinished.rename(folder / f"error-{rank}.json")
        return error.exit_code


def _bug(problem: Exception) -> MTTError:
    error = MTTError(
        f"mtt failed: {type(problem).__name__}: {problem}",
        fix="this is a bug of mtt: report it with the output of the same command and --debug",
    )
    error.code = "bug"
    return error


def _leave_together() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    # Without the interpreter's own end, where threads of a backend may still be at work.
    status = _main(Path(sys.argv[1]))
    sys.stderr.flush()
    os._exit(status)
