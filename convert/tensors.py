"""Tensors that have not been read: strided blocks of files, placed in a global tensor.

A `LazyTensor` is metadata alone. Joining shards, splitting QKV, cutting a vocabulary or
transposing are exact integer operations on its pieces; bytes are touched once, by whoever
finally copies them. Every operation returns a new value.

    LazyTensor [6, 4]                Piece(start=(0, 0), shape=(3, 4), a.bin @ 512)
    +--------------+                 Piece(start=(3, 0), shape=(3, 4), b.bin @ 512)
    | a.bin @ 512  |
    +--------------+     .narrow(0, 2, 2) -> last row of a.bin, first row of b.bin
    | b.bin @ 512  |     .permute(1, 0)   -> the same blocks, strides swapped
    +--------------+
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TypeAlias

from .boxes import Box, Ints, row_major, split_interval
from .dtypes import DType, refuse_state


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of a tensor and where its elements stand in a file.

    Attributes:
        start: first index of the block in the tensor.
        shape: size of the block.
        path: the file; empty for a block of zeros, which stands in no file; or what is computed of
            other tensors, and read like a file of its elements.
        offset: byte position of the block's first element in that file.
        strides: distance, in elements, between neighbours along each axis in the file.
    """

    start: Ints
    shape: Ints
    path: Source
    offset: int
    strides: Ints

    @property
    def paths(self) -> tuple[str, ...]:
        """The files its elements come from."""
        if not isinstance(self.path, str):
            return tuple(p for t in self.path.tensors for piece in t.pieces for p in piece.paths)
        return (self.path,) if self.path else ()


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor of known dtype and shape whose bytes are still in files.

    The pieces do not overlap and together cover the shape.
    """

    dtype: DType
    shape: Ints
    pieces: tuple[Piece, ...]

    __setstate__ = refuse_state

    @classmethod
    def in_file(
        cls,
        dtype: DType,
        shape: Ints,
        path: Source,
        offset: int,
        strides: Ints | None = None,
    ) -> LazyTensor:
        """A tensor that is one strided block of one file (row-major if `strides` is None)."""
        strides = row_major(shape) if strides is None else strides
        return cls(dtype, shape, (Piece((0,) * len(shape), shape, path, offset, strides),))

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return self.num_elements * self.dtype.itemsize

    def narrow(self, axis: int, start: int, length: int) -> LazyTensor:
        """Elements `[start, start + length)` along `axis`."""
        assert 0 <= start and start + length <= self.shape[axis], (self.shape, axis, start, length)
        pieces = []
        for piece in self.pieces:
            low = max(piece.start[axis], start)
            high = min(piece.start[axis] + piece.shape[axis], start + length)
            if high <= low:
                continue
            skip = (low - piece.start[axis]) * piece.strides[axis] * self.dtype.itemsize
            pieces.append(
                replace(
                    piece,
                    start=_put(piece.start, axis, low - start),
                    shape=_put(piece.shape, axis, high - low),
                    offset=piece.offset + skip,
                )
            )
        return replace(self, shape=_put(self.shape, axis, length), pieces=tuple(pieces))

    def part(self, box: Box) -> LazyTensor:
        """The elements in a box."""
        result = self
        for axis, (start, length) in enumerate(zip(*box, strict=True)):
            if (start, length) != (0, self.shape[axis]):
                result = result.narrow(axis, start, length)
        return result

    def chunk(self, count: int, axis: int = 0) -> tuple[LazyTensor, ...]:
        """`count` equal parts along `axis`."""
        size, rest = divmod(self.shape[axis], count)
        assert rest == 0, (self.shape, axis, count)
        return tuple(self.narrow(axis, part * size, size) for part in range(count))

    def unstack(self) -> tuple[LazyTensor, ...]:
        """The tensors along the first axis, which disappears; one pass over the pieces."""
        parts: list[list[Piece]] = [[] for _ in range(self.shape[0])]
        for piece in self.pieces:
            step = piece.strides[0] * self.dtype.itemsize
            for row in range(piece.shape[0]):
                parts[piece.start[0] + row].append(
                    Piece(
                        piece.start[1:],
                        piece.shape[1:],
                        piece.path,
                        piece.offset + row * step,
                        piece.strides[1:],
                    )
                )
        return tuple(LazyTensor(self.dtype, self.shape[1:], tuple(part)) for part in parts)

    def permute(self, *order: int) -> LazyTensor:
        """Axes reordered as numpy's transpose does."""

        def pick(values: Ints) -> Ints:
            return tuple(values[axis] for axis in order)

        pieces = tuple(
            replace(p, start=pick(p.start), shape=pick(p.shape), strides=pick(p.strides))
            for p in self.pieces
        )
        return replace(self, shape=pick(self.shape), pieces=pieces)

    def unflatten(self, axis: int, *sizes: int) -> LazyTensor:
        """Axis `axis` seen as axes of these sizes, whose product it must be."""
        assert prod(sizes) == self.shape[axis], (self.shape, axis, sizes)
        if len(sizes) == 1:
            return self
        inner = prod(sizes[1:])
        pieces = []
        for piece in self.pieces:
            step = piece.strides[axis]
            first = piece.start[axis]
            for row, num_rows, column, num_columns in split_interval(
                first, piece.shape[axis], inner
            ):
                skip = (row * inner + column - first) * step * self.dtype.itemsize
                pieces.append(
                    Piece(
                        _put(piece.start, axis, row, column),
                        _put(piece.shape, axis, num_rows, num_columns),
                        piece.path,
                        piece.offset + skip,
                        _put(piece.strides, axis, step * inner, step),
                    )
                )
        shape = _put(self.shape, axis, sizes[0], inner)
        return replace(self, shape=shape, pieces=tuple(pieces)).unflatten(axis + 1, *sizes[1:])

    def flatten(self, axis: int, count: int = 2) -> LazyTensor:
        """`count` axes beginning with `axis` seen as one.

        A block whose rows are not neighbours in the result falls into one piece per row.
        """
        if count == 1:
            return self
        inner = self.shape[axis + 1]
        pieces = []
        for piece in self.pieces:
            num_rows, num_columns = piece.shape[axis : axis + 2]
            row_step, step = piece.strides[axis : axis + 2]
            first = piece.start[axis] * inner + piece.start[axis + 1]
            if num_columns == 1:
                step = row_step
            if num_rows == 1 or (num_columns == inner and row_step == inner * step):
                rows = [(first, num_rows * num_columns, piece.offset)]
            else:
                skip = row_step * self.dtype.itemsize
                rows = [
                    (first + row * inner, num_columns, piece.offset + row * skip)
                    for row in range(num_rows)
                ]
            if num_rows == 1:
                step = piece.strides[axis + 1]
            for start, size, offset in rows:
                pieces.append(
                    Piece(
                        _put(piece.start, axis, start, width=2),
                        _put(piece.shape, axis, size, width=2),
                        piece.path,
                        offset,
                        _put(piece.strides, axis, step, width=2),
                    )
                )
        shape = _put(self.shape, axis, self.shape[axis] * inner, width=2)
        return replace(self, shape=shape, pieces=tuple(pieces)).flatten(axis, count - 1)


MEAN, SUM, SUM_OF_PARTS = "mean", "sum", "sum_of_parts"


@dataclass(frozen=True, slots=True)
class Combined:
    """Tensors of one dtype and shape, and what is computed of them, element by element.

    The one exception to copying bytes, for the few parameters that ranks hold parts of to be
    added (GPT-NeoX), or copies that drifted apart. `how` is `mean`; `sum`; or `sum_of_parts`,
    where tensors that are all equal are copies of one and are not added.
    """

    tensors: tuple[LazyTensor, ...]
    how: str


def combined(tensors: Sequence[LazyTensor], how: str) -> LazyTensor:
    """The sum or mean of tensors of at least one axis, still unread."""
    first = tensors[0]
    return LazyTensor.in_file(first.dtype, first.shape, Combined(tuple(tensors), how), 0)


@dataclass(frozen=True, slots=True)
class Scaled:
    """8-bit floats, and numbers that they are multiplied by, block by block.

    Attributes:
        values: [rows, columns] in an 8-bit type.
        scales: [block rows, block columns]; in uint8 they are exponents, 127 standing for 1.
        block: rows and columns of a block.
        dtype: the type of the products.
    """

    values: LazyTensor
    scales: LazyTensor
    block: tuple[int, int]
    dtype: DType

    __setstate__ = refuse_state

    @property
    def tensors(self) -> tuple[LazyTensor, ...]:
        """What it is computed of."""
        return (self.values, self.scales)


Source: TypeAlias = str | Combined | Scaled


def stored_bytes(tensor: LazyTensor) -> int:
    """Bytes of the elements as they stand in files, scales not counted."""
    in_eight_bits = any(isinstance(piece.path, Scaled) for piece in tensor.pieces)
    return tensor.num_elements if in_eight_bits else tensor.num_bytes


def scaled(
    values: LazyTensor, scales: LazyTensor, block: tuple[int, int], dtype: DType
) -> LazyTensor:
    """8-bit floats times their scales, still unread; all axes but the last one are rows."""
    shape = values.shape
    matrix = values.flatten(0, len(shape)).unflatten(0, prod(shape[:-1]), shape[-1])
    return LazyTensor.in_file(dtype, shape, Scaled(matrix, scales, block, dtype), 0)


def concat(tensors: Sequence[LazyTensor], axis: int = 0) -> LazyTensor:
    """Tensors of one dtype joined along `axis`; the other sizes must agree."""
    first = tensors[0]
    pieces: list[Piece] = []
    position = 0
    for tensor in tensors:
        assert tensor.dtype == first.dtype
        assert _put(tensor.shape, axis, 0) == _put(first.shape, axis, 0), (tensor, first)
        pieces.extend(
            replace(piece, start=_put(piece.start, axis, piece.start[axis] + position))
            for piece in tensor.pieces
        )
        position += tensor.shape[axis]
    return replace(first, shape=_put(first.shape, axis, position), pieces=tuple(pieces))


def zeros(dtype: DType, shape: Ints) -> LazyTensor:
    """A tensor of zeros that stands in no file."""
    return LazyTensor.in_file(dtype, shape, "", 0, (0,) * len(shape))


def stack(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """Tensors of one dtype and shape as one, along a new first axis."""
    return concat([_leading_axis(tensor) for tensor in tensors])


def _leading_axis(tensor: LazyTensor) -> LazyTensor:
    pieces = tuple(
        replace(p, start=(0, *p.start), shape=(1, *p.shape), strides=(0, *p.strides))
        for p in tensor.pieces
    )
    return replace(tensor, shape=(1, *tensor.shape), pieces=pieces)


def _put(values: Ints, axis: int, *new: int, width: int = 1) -> Ints:
    """`values` with `width` entries at `axis` replaced by `new`."""
    return (*values[:axis], *new, *values[axis + width :])
