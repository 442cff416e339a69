"""Copies of one parameter on several ranks: they must be equal before anything is written."""

from __future__ import annotations

from collections.abc import Sequence

from .checkpoint import Replicas
from .errors import InconsistentError
from .mapping import shorten
from .reading import FileReader, stream, window_size
from .tensors import LazyTensor

POLICIES = ("error", "first")


def compare(replicas: Sequence[Replicas], policy: str) -> tuple[str, ...]:
    """Compare copies byte by byte.

    Args:
        replicas: groups of copies.
        policy: `error`, or `first` to take the first rank's copy and warn.

    Returns:
        Warnings: which parameters differ, under `first`.

    Raises:
        InconsistentError: copies differ under `error`, or a head that should be tied is not.
    """
    differing = []
    with FileReader() as reader, FileReader() as other:
        for group in replicas:
            where = _first_difference(group, reader, other)
            if where is None:
                continue
            if group.tied or policy == "error":
                raise _refusal(group, where)
            differing.append(group.name)
    if not differing:
        return ()
    count = f"{len(differing)} parameters differ" if differing[1:] else "1 parameter differs"
    return (f"{count} between ranks, the first rank's copy was taken: {shorten(differing)}",)


def _first_difference(group: Replicas, reader: FileReader, other: FileReader) -> str | None:
    """Where the first copy stands that is not like the one before all others."""
    first, *copies = group.tensors
    for where, copy in zip(group.where[1:], copies, strict=True):
        if not _same_bytes(first, copy, reader, other):
            return where
    return None


def _same_bytes(a: LazyTensor, b: LazyTensor, reader: FileReader, other: FileReader) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    size = window_size(a, b)
    pairs = zip(stream(a, reader, size), stream(b, other, size), strict=True)
    return all(left == right for left, right in pairs)


def _refusal(group: Replicas, where: str) -> InconsistentError:
    if group.tied:
        return InconsistentError(
            "the tied output layer is no copy of the embedding; nothing was written",
            found=f"one value in {group.where[0]}, another in {where}",
            expected="equal bytes, since untie_embeddings_and_output_weights is off",
            fix="if the head is its own: --set untie_embeddings_and_output_weights=True",
        )
    return InconsistentError(
        f"copies of {group.name} differ; nothing was written",
        found=f"one value in {group.where[0]}, another in {where}",
        expected="equal bytes on all ranks",
        fix="use files of one save, or --replicated first to take the first rank's",
    )
