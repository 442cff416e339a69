"""Processes of one group on the CPU, under the names transformers' mixins import."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _get_distributed_backend() -> str:
    return "gloo"


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    torch.set_num_threads(1)  # the processes share the cores


def _start_rank_processes(function: Callable[..., None], args: tuple, nprocs: int) -> None:
    """Call `function(rank, *args)` in new processes; raise what the first one to fail raised."""
    mp.spawn(function, args=args, nprocs=nprocs)


def _in_group(
    rank: int, function: Callable[..., None], world_size: int, port: int, args: tuple, kwargs: dict
) -> None:
    _set_rank_device(rank)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
    )
    store = dist.TCPStore("localhost", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    function(rank, *args, **kwargs)
    dist.barrier()
    dist.destroy_process_group()


def run_distributed(world_size: int) -> Callable:
    """Turn `function(rank, ...)` into one that runs it on each rank of a group."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            # Held until the end: the port stays this group's.
            store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            arguments = (function, world_size, store.port, args, kwargs)
            _start_rank_processes(_in_group, arguments, world_size)

        return run

    return decorate
