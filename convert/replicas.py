"""Copies of one parameter on several ranks: compared before anything is written.

error      copies must be equal
first      the first rank's is taken, with a warning where others differ
average    their mean is taken, with the same warning; equal copies stay what they are
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .checkpoint import Checkpoint, Replicas
from .errors import InconsistentError, UsageError
from .mapping import shorten
from .reading import FileReader, stream, window_size
from .tensors import MEAN, LazyTensor, combined

ERROR, FIRST, AVERAGE = POLICIES = ("error", "first", "average")


def check_choice(policy: str | None) -> None:
    """Raise UsageError for a policy that is none; None is the checkpoint's own."""
    if policy not in (None, *POLICIES):
        raise UsageError(
            f"unknown way to treat replicated tensors {policy!r}", expected=" or ".join(POLICIES)
        )


def settle(checkpoint: Checkpoint, policy: str | None) -> tuple[Checkpoint, str]:
    """The checkpoint with what a policy takes for each copied parameter, and the policy.

    Nothing is read: a mean is computed when it is written.

    Args:
        checkpoint: an open checkpoint.
        policy: one of `POLICIES`; None for the one that suits where the checkpoint is from.
    """
    policy = policy or checkpoint.replicated
    if policy != AVERAGE:
        return checkpoint, policy
    means = {
        group.name: combined(group.tensors, MEAN)
        for group in checkpoint.replicas
        if not group.tied and group.name in checkpoint.tensors
    }
    tensors = {name: means.get(name, tensor) for name, tensor in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors), policy


def compare(replicas: Sequence[Replicas], policy: str) -> tuple[str, ...]:
    """Compare copies byte by byte.

    Args:
        replicas: groups of copies.
        policy: one of `POLICIES`.

    Returns:
        Warnings: which parameters differ, unless that is an error.

    Raises:
        InconsistentError: copies differ under `error`, or a head that should be tied is not.
    """
    differing = []
    with FileReader() as reader, FileReader() as other:
        for group in replicas:
            where = _first_difference(group, reader, other)
            if where is None:
                continue
            if group.tied or group.within or policy == ERROR:
                raise _refusal(group, where)
            differing.append(group.name)
    if not differing:
        return ()
    count = f"{len(differing)} parameters differ" if differing[1:] else "1 parameter differs"
    taken = "the mean" if policy == AVERAGE else "the first rank's copy"
    return (f"{count} between ranks, {taken} was taken: {shorten(differing)}",)


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
    if group.within:
        return InconsistentError(
            f"{group.name} is no copy of what it should be; nothing was written",
            found=f"one value in {group.where[0]}, another in {where}",
            expected="equal bytes: Megatron shares the embedding and the head",
            fix="--drop-mtp leaves out the layers that predict further tokens, and their copies",
        )
    return InconsistentError(
        f"copies of {group.name} differ; nothing was written",
        found=f"one value in {group.where[0]}, another in {where}",
        expected="equal bytes on all ranks",
        fix="use files of one save, or --replicated first to take the first rank's, or average",
    )
