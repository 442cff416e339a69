"""Plain values of bounded size, from whatever a file holds.

What is read from a pickle may be deep, endless (a list within itself), huge when written out (a
list of lists of the same list), or a number of a million digits. Metadata of Megatron is none of
that: these functions let through what metadata can be, and stop at the rest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from ..boxes import Ints
from ..dtypes import DType
from ..errors import CorruptError, InconsistentError
from ..tensors import LazyTensor
from .folders import Place
from .pickles import Record, Stub, is_opaque

_MAX_DEPTH = 6
_MAX_VALUES = 20_000
_MAX_INTEGER = 2**63
_MOST_VERSIONS = 1000


class _TooMuch(Exception):
    """A value is deeper or larger than metadata can be."""


def plain_arguments(args: object) -> dict[str, object] | None:
    """Megatron's arguments: plain values as they are, all others opaque; None if there are none.

    Raises:
        CorruptError: names that are no text.
    """
    if not isinstance(args, Record):
        return None
    return plain_entries(args.fields)


def plain_entries(fields: Mapping[Any, object]) -> dict[str, object]:
    """Named values: plain ones as they are, all others opaque.

    Raises:
        CorruptError: names that are no text.
    """
    if odd := [name for name in fields if not isinstance(name, str)]:
        raise CorruptError(
            "the arguments in the checkpoint are damaged",
            found=f"{len(odd)} names that are no text",
            expected="argument names",
        )
    return {str(name): _plain_or_opaque(value) for name, value in fields.items()}


def plain_values(values: Mapping[str, object]) -> dict[str, object]:
    """Arguments from elsewhere than a pickle, held to the same bounds."""
    return {str(name): _plain_or_opaque(value) for name, value in values.items()}


def _plain_or_opaque(value: object) -> object:
    try:
        return _plain(value, _MAX_DEPTH, [_MAX_VALUES])
    except _TooMuch:
        return Stub()


def _plain(value: object, depth: int, budget: list[int]) -> object:
    budget[0] -= 1
    if depth == 0 or budget[0] < 0:
        raise _TooMuch
    if isinstance(value, int) and abs(value) >= _MAX_INTEGER:
        raise _TooMuch
    if value is None or isinstance(value, (bool, int, float, str, DType)):
        return value
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item, depth - 1, budget) for item in value)
    if isinstance(value, dict):
        return {
            _plain(key, depth - 1, budget): _plain(item, depth - 1, budget)
            for key, item in value.items()
        }
    if is_opaque(value) and isinstance(value, Stub):
        for argument in value.args:
            _plain(argument, depth - 1, budget)
        return value
    return Stub()


def scalar(content: Mapping[str, object], key: str, where: str) -> int | float | str | None:
    """A number, a word or nothing under one key.

    Raises:
        CorruptError: something else, or a number no counter reaches.
    """
    value = content.get(key)
    if value is None or isinstance(value, (str, float)):
        return value
    if isinstance(value, int) and abs(value) < _MAX_INTEGER:
        return value
    raise CorruptError(
        f"{where} has no readable {key}", found=f"a {type(value).__name__}", expected="a number"
    )


def size_in(args: Mapping[str, object] | None, *names: str) -> int | None:
    """The first argument of these names that is a size, i.e. a positive whole number."""
    values = ((args or {}).get(name) for name in names)
    return next((value for value in values if type(value) is int and value > 0), None)


def version(content: Mapping[str, object], where: str, missing: float) -> float:
    """Megatron's `checkpoint_version`.

    Raises:
        CorruptError: it is no version.
    """
    value = scalar(content, "checkpoint_version", where)
    if value is None:
        return missing
    if not isinstance(value, (int, float)) or not 0 <= value < _MOST_VERSIONS:
        raise CorruptError(
            f"{where} has no readable checkpoint_version",
            found=repr(value)[:60],
            expected="0, 1, 2 or 3",
            fix="copy the file again from where it was written",
        )
    return float(value)


def iteration(content: Mapping[str, object], place: Place, where: str) -> int | None:
    """The iteration a file says it is of, which must be the one its folder is named after.

    Raises:
        InconsistentError: it is another one.
    """
    value = scalar(content, "iteration", where)
    if isinstance(value, int) and place.iteration is not None and value != place.iteration:
        raise InconsistentError(
            f"{os.path.basename(place.folder)} holds another iteration",
            found=str(value),
            expected=str(place.iteration),
            fix="rename the folder, or copy the right files into it",
        )
    if place.iteration is None and os.path.basename(place.folder) == "release":
        return None
    return value if isinstance(value, int) else place.iteration


def check_ranks_agree(ranks: Sequence[tuple[str, str, Mapping[str, object]]]) -> None:
    """Hold the stamps of ranks' files against the first one's.

    Args:
        ranks: what messages call a rank's file, its path, and what it holds.

    Raises:
        InconsistentError: they stem from different saves.
        CorruptError: a stamp is none.
    """
    for key in ("iteration", "checkpoint_version"):
        stamps = [(where, scalar(content, key, path)) for where, path, content in ranks]
        for where, found in stamps[1:]:
            if found != stamps[0][1]:
                raise InconsistentError(
                    f"ranks disagree about {key}; nothing was written",
                    found=f"{found} in {where}",
                    expected=f"{stamps[0][1]}, as in {stamps[0][0]}",
                    fix="use files of one and the same save",
                )


def check_ranks_rise(places: Sequence[tuple[str, Mapping[str, object] | None]]) -> None:
    """Hold ranks' places against the global ranks in their arguments.

    Global ranks rise with pipeline and tensor rank: files copied to a wrong place show.
    (megatron/core/parallel_state.py, the default order tp-cp-ep-dp-pp. Tools that write all
    files from one process leave one and the same number in them.)

    Args:
        places: what messages call a rank's files, and its arguments, in that order.

    Raises:
        InconsistentError: a file stands in another rank's place.
    """
    numbers = [(args or {}).get("rank") for _, args in places]
    known = [number for number in numbers if type(number) is int]
    if len(known) < len(numbers) or len(set(known)) <= 1:
        return
    for ((before, _), low), ((where, _), high) in pairwise(zip(places, known, strict=True)):
        if low >= high:
            raise InconsistentError(
                f"{where} holds the file of another rank; nothing was written",
                found=f"global rank {high} in {where}, {low} in {before}",
                expected="ranks that rise with the pipeline stage and the tensor-parallel rank",
                fix="copy the files again from where they were written",
            )


def sizes(value: object, what: str, file: str = ".metadata") -> Ints:
    """A tuple of sizes or offsets of something, as a file names them.

    Raises:
        CorruptError: it is something else.
    """
    if isinstance(value, (tuple, list)) and all(
        type(size) is int and 0 <= size < _MAX_INTEGER for size in value
    ):
        return tuple(value)
    raise CorruptError(
        f"{file} is inconsistent about {what}",
        found=f"a {type(value).__name__}",
        expected="sizes or offsets",
    )


def records(value: object, what: str) -> list[Record]:
    """A list of records.

    Raises:
        CorruptError: it is something else.
    """
    if isinstance(value, list) and all(isinstance(item, Record) for item in value):
        return value
    raise CorruptError(f".metadata is inconsistent about {what}", found=f"a {type(value).__name__}")


def holds_tensors(value: object) -> bool:
    """Whether there is a tensor anywhere in a value, however deep or endless it is."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, LazyTensor):
            return True
        if id(item) not in seen:
            seen.add(id(item))
            waiting.extend(_parts(item))
    return False


def _parts(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        yield from value
        yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from value
    elif isinstance(value, (Record, Stub)):
        yield from value.__dict__.values()
