"""What the processes of `test_ranks.py` do."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from mtt_convert.errors import CorruptError

RANK = int(os.environ.get("RANK", "0"))


def add_up(options: dict[str, Any]) -> dict[str, int]:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    values = torch.tensor([RANK + options["start"]])
    dist.all_reduce(values)
    return {"sum": int(values)}


def fail_on(options: dict[str, Any]) -> None:
    if options["rank"] in (RANK, "all"):
        raise CorruptError("a file ended", found="3 bytes", expected="4 bytes")
    time.sleep(60)


def crash(options: dict[str, Any]) -> None:
    if RANK == 1:
        raise ZeroDivisionError("nothing to share")
    time.sleep(60)


def be_killed(options: dict[str, Any]) -> None:
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def wait(options: dict[str, Any]) -> None:
    with open(options["file"], "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(60)
