"""Parts of one conversion for several machines: which files of a plan are whose.

Every part makes the whole plan, from metadata alone, and finds its own share by the same rule: the
largest file that is left goes to the part with the fewest bytes. No part asks another.
"""

from __future__ import annotations

import heapq
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from .errors import UsageError
from .plan import ConversionPlan

AUTO = "auto"
# Rank and number of processes, as launchers name them.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),  # torchrun
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),  # MPICH, Intel MPI
)
_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class Part:
    """One of `count` parts; `number` counts from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def parse_part(text: str, environment: Mapping[str, str] = os.environ) -> Part:
    """The part that `3/64` names, or with `auto` the one of this process under its launcher.

    Raises:
        UsageError: there is no such part, or no launcher that says one.
    """
    if text == AUTO:
        return _of_launcher(environment)
    hit = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    part = Part(int(hit[1]), int(hit[2])) if hit else Part(0, 0)
    if not 1 <= part.number <= part.count:
        raise UsageError(
            "there is no such part",
            found=f"--part {text}",
            expected="1/8 to 8/8 for eight parts, or auto",
        )
    return part


def _of_launcher(environment: Mapping[str, str]) -> Part:
    for rank_name, size_name in _LAUNCHERS:
        if rank_name not in environment or size_name not in environment:
            continue
        rank, size = environment[rank_name], environment[size_name]
        if rank.isdecimal() and size.isdecimal() and int(rank) < int(size):
            return Part(int(rank) + 1, int(size))
        raise UsageError(
            "the launcher names no part",
            found=f"{rank_name}={rank}, {size_name}={size}",
            expected="a rank below the number of processes",
            fix="give --part 1/8 to 8/8 yourself",
        )
    raise UsageError(
        "--part auto finds no launcher",
        found="none of the pairs " + ", ".join(f"{a}/{b}" for a, b in _LAUNCHERS),
        expected="a process that torchrun, srun or mpirun started",
        fix="start it with one of them, or give --part 1/8 to 8/8 yourself",
    )


def share(plan: ConversionPlan, part: Part) -> ConversionPlan:
    """The files of one part, in the order of the plan, and the copies it compares; no documents."""
    files = shares(plan.files, [file.num_bytes for file in plan.files], part.count)
    sizes = [sum(tensor.num_bytes for tensor in group.tensors) for group in plan.replicas]
    copies = shares(plan.replicas, sizes, part.count)
    mine = part.number - 1
    return replace(plan, files=files[mine], documents={}, replicas=copies[mine])


def shares(
    items: Sequence[_Item], sizes: Sequence[int], count: int
) -> tuple[tuple[_Item, ...], ...]:
    """Items dealt to `count` parts so that their sizes add up to about the same, in their order."""
    loads = [(0, number) for number in range(count)]
    dealt: list[list[int]] = [[] for _ in range(count)]
    for index in sorted(range(len(items)), key=lambda index: (-sizes[index], index)):
        load, number = heapq.heappop(loads)
        dealt[number].append(index)
        heapq.heappush(loads, (load + sizes[index], number))
    return tuple(tuple(items[index] for index in sorted(own)) for own in dealt)
