"""Whether a conversion would write exactly what a manifest says is there already.

First the plan is compared: source, files, sizes, names, headers, documents. If it is the same, the
source is read once, and the hash of every tensor compared; nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import manifest
from .errors import MTTError
from .execute import Progress, run
from .plan import ConversionPlan, PlannedFile, PlannedTensor
from .sums import Sums

_CARD = "README.md"  # people edit it


def is_same(
    there: Mapping[str, Any],
    plan: ConversionPlan,
    source: Mapping[str, Any],
    algorithm: str,
    *,
    num_workers: int = 1,
    progress: Progress | None = None,
) -> bool:
    """Compare a manifest with what a plan would write, every hash included.

    Args:
        there: a manifest.
        plan: the conversion.
        source: its facts, as the manifest has them.
        algorithm: the hash it would use.
        num_workers: threads that read the source.
        progress: called with (bytes read, bytes in all).

    Raises:
        SourceError: the source cannot be read.
    """
    if algorithm == "none" or not is_same_plan(there, plan, source, algorithm):
        return False
    try:
        run(
            plan,
            _Comparer(there),
            num_workers=num_workers,
            algorithm=algorithm,
            progress=progress,
        )
    except _DifferentError:
        return False
    return True


def is_same_plan(
    there: Mapping[str, Any], plan: ConversionPlan, source: Mapping[str, Any], algorithm: str
) -> bool:
    """The same without reading a tensor: a finished conversion of the same names and sizes."""
    if there["status"] != "complete" or there["hash"] != algorithm:
        return False
    if there["source"] != dict(source) or not _same_documents(there, plan, algorithm):
        return False
    if {file.name for file in plan.files} != set(there["files"]):
        return False
    return all(_same_layout(there["files"][file.name], file, algorithm) for file in plan.files)


def _same_documents(there: Mapping[str, Any], plan: ConversionPlan, algorithm: str) -> bool:
    planned = {n: manifest.digest(data, algorithm) for n, data in plan.documents.items()}
    written = dict(there["documents"])
    return {**planned, _CARD: ""} == {**written, _CARD: ""}


def _same_layout(entry: Mapping[str, Any], file: PlannedFile, algorithm: str) -> bool:
    planned = manifest.planned_file(file)
    if not any(tensor.checksum_at for tensor in file.tensors):
        header = manifest.digest(b"".join(data for _, data in file.fixed), algorithm)
        if entry["header"] != header:
            return False
    return (
        entry["bytes"] == planned["bytes"]
        and list(entry["tensors"]) == list(planned["tensors"])
        and entry.get("places") == planned.get("places")
    )


class _DifferentError(MTTError):
    """Ends the comparison at the first tensor that differs."""


class _Comparer:
    """A sink that only looks."""

    def __init__(self, there: Mapping[str, Any]) -> None:
        self._there = there

    def write(
        self, file: PlannedFile, tensor: PlannedTensor, position: int, data: memoryview
    ) -> None:
        """Nothing: bytes were hashed on the way."""

    def tensor_done(self, file: PlannedFile, tensor: PlannedTensor, sums: Sums) -> None:
        """Compare a hash."""
        if self._there["files"][file.name]["tensors"][tensor.name] != sums.digest:
            raise _DifferentError(f"{tensor.name} differs")

    def file_done(self, file: PlannedFile) -> None:
        """Nothing."""
