"""Boxes in integer space: the arithmetic under every split, join and reshard.

A box is a pair `(start, shape)` of equally long integer tuples inside a tensor of known shape.
Nothing here knows about files, ranks or element types.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

Ints = tuple[int, ...]
Box = tuple[Ints, Ints]


def intersect(a: Box, b: Box) -> Box | None:
    """The common part of two boxes, or None when they do not overlap."""
    start, shape = [], []
    for a_start, a_size, b_start, b_size in zip(a[0], a[1], b[0], b[1], strict=True):
        low = max(a_start, b_start)
        high = min(a_start + a_size, b_start + b_size)
        if high <= low:
            return None
        start.append(low)
        shape.append(high - low)
    return tuple(start), tuple(shape)


def split_interval(start: int, length: int, inner: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut the flat interval `[start, start + length)` at rows of `inner` elements.

    Yields at most three `(row, num_rows, column, num_columns)` boxes in order: the rest of a
    first partial row, all whole rows, the beginning of a last partial row.
    """
    row, column = divmod(start, inner)
    if column:
        head = min(inner - column, length)
        yield row, 1, column, head
        row, length = row + 1, length - head
    whole, tail = divmod(length, inner)
    if whole:
        yield row, whole, 0, inner
    if tail:
        yield row + whole, 1, 0, tail


def row_major(shape: Sequence[int]) -> Ints:
    """Strides, in elements, of a contiguous tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def tiles(boxes: Sequence[Box], shape: Ints) -> bool:
    """Whether the boxes cover a tensor of this shape exactly once, without overlap."""
    if any(
        low < 0 or size <= 0 or low + size > limit
        for start, sizes in boxes
        for low, size, limit in zip(start, sizes, shape, strict=True)
    ):
        return not boxes and prod(shape) == 0
    if sum(prod(sizes) for _, sizes in boxes) != prod(shape):
        return False
    active: list[Box] = []
    for box in sorted(boxes):
        active = [other for other in active if not shape or other[0][0] + other[1][0] > box[0][0]]
        if any(intersect(box, other) for other in active):
            return False
        active.append(box)
    return True


def windows(shape: Ints, max_elements: int) -> Iterator[Box]:
    """Cut a tensor into boxes that are contiguous in row-major order, in that order.

    Every box has at most `max_elements` elements, and covers whole rows wherever one fits.
    """
    if prod(shape) == 0:
        return
    axis, inner = len(shape), 1
    while axis > 0 and inner * shape[axis - 1] <= max_elements:
        axis -= 1
        inner *= shape[axis]
    if axis == 0:
        yield (0,) * len(shape), shape
        return
    axis -= 1
    step = max(1, max_elements // inner)
    for index in _indices(shape[:axis]):
        for low in range(0, shape[axis], step):
            size = min(step, shape[axis] - low)
            tail = shape[axis + 1 :]
            yield (*index, low, *(0,) * len(tail)), (*(1,) * axis, size, *tail)


def _indices(shape: Ints) -> Iterator[Ints]:
    if not shape:
        yield ()
        return
    for first in range(shape[0]):
        for rest in _indices(shape[1:]):
            yield (first, *rest)
