"""Bytes of lazy tensors: a window of a tensor gathered from its pieces.

Files are read in place, into buffers of about the window's size: no mapping of files, so memory
stays at the window however large the tensor is. One `FileReader` belongs to one thread.

    a stretch of a file            read straight into the window
    columns of a matrix            its rows are read, up to the gaps that are cheaper to skip, and
                                   the columns copied from there
    all columns, for several       the rows are read once for all of them: `stream_together`
    tensors of one shape
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from types import TracebackType
from typing import TYPE_CHECKING

from . import page_cache
from .boxes import Box, intersect, row_major, windows
from .casting import Products, add_windows, scale_window
from .dtypes import DType
from .errors import CorruptError, SourceError
from .open_files import File
from .sources import open_file
from .tensors import MEAN, SUM, SUM_OF_PARTS, Combined, LazyTensor, Piece, Scaled, Source

if TYPE_CHECKING:
    import numpy as np

WINDOW_BYTES = 2 << 20
_TRANSPOSED_WINDOW_BYTES = 32 << 20
# A window of one of several tensors that are read together has at least this many bytes.
_SHARED_WINDOW_BYTES = 128 << 10
_MOST_SCRATCH_BYTES = 32 << 20
_MAX_OPEN_FILES = 64
# Runs that begin no farther from each other are read at once, with what lies between them, and
# copied: that takes as long as a call for each.
_NEAR_BYTES = 32 << 10
# More than is wanted is read only up to this many times, and where it saves this many calls.
_DENSE = 2
_FEW_RUNS = 1024
_SOURCE, _TARGET = 1, 2
Dims = list[tuple[int, int, int]]


class FileReader:
    """Open files of one thread, its buffers, and how many bytes it has read.

    Attributes:
        num_bytes: bytes read.

    Args:
        num_windows: how many windows are in use at a time.
        gives_back: let the system forget what was read.
    """

    def __init__(self, num_windows: int = 1, *, gives_back: bool = False) -> None:
        self._files: OrderedDict[str, File] = OrderedDict()
        self._scratch = memoryview(b"")
        self._windows = deque([memoryview(b"")] * num_windows)
        self._gives_back = gives_back
        self.num_bytes = 0

    def __enter__(self) -> FileReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def read_into(self, path: Source, offset: int, out: memoryview) -> None:
        """Fill `out` from a file, or from the elements that are computed of other tensors.

        Raises:
            CorruptError: the file ends before.
            SourceError: it cannot be read.
        """
        if isinstance(path, Combined):
            self.num_bytes += _combine(path, offset, out)
            return
        if isinstance(path, Scaled):
            self.num_bytes += _scale(path, offset, out)
            return
        try:
            file = self._open(path)
            position = file.read_into(out, offset)
            while position < len(out):
                count = file.read_into(out[position:], offset + position)
                if count == 0:
                    raise CorruptError(
                        f"{path} ended while it was read",
                        found=f"{offset + position} bytes",
                        expected=f"at least {offset + len(out)}",
                        fix="make sure nothing writes to the checkpoint, and copy the file again",
                    )
                position += count
            if self._gives_back and position >= page_cache.LEAST_BYTES:
                file.give_back(offset, position)
        except OSError as error:
            raise SourceError(f"{path} cannot be read", found=str(error)) from error
        self.num_bytes += position

    def window(self, num_bytes: int) -> memoryview:
        """A buffer that lives until the next call, or as many calls as there are windows."""
        window = self._windows.popleft()
        if len(window) < num_bytes:
            window = memoryview(bytearray(num_bytes))
        self._windows.append(window)
        return window[:num_bytes]

    def scratch(self, num_bytes: int) -> memoryview:
        """A buffer that lives until the next call."""
        if len(self._scratch) < num_bytes:
            self._scratch = memoryview(bytearray(num_bytes))
        return self._scratch[:num_bytes]

    def _open(self, path: str) -> File:
        if path in self._files:
            self._files.move_to_end(path)
            return self._files[path]
        while len(self._files) >= _MAX_OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        self._files[path] = open_file(path)
        return self._files[path]


def _combine(source: Combined, offset: int, out: memoryview) -> int:
    """Fill `out` with elements of a sum or mean; returns the bytes that were read for it."""
    dtype = source.tensors[0].dtype
    start, count = offset // dtype.itemsize, len(out) // dtype.itemsize
    flat = [tensor.flatten(0, len(tensor.shape)) for tensor in source.tensors]
    with FileReader() as reader:  # another may be in use for what `out` is a part of
        parts = [_whole(tensor.narrow(0, start, count), reader) for tensor in flat]
        is_copy = all(part == parts[0] for part in parts)
        if is_copy and source.how == SUM_OF_PARTS:
            is_copy = len({bytes(_whole(tensor, reader)) for tensor in flat}) == 1
        if is_copy and source.how != SUM:
            out[:] = parts[0]
        else:
            out[:] = add_windows(parts, dtype, mean=source.how == MEAN)
        return reader.num_bytes


def _scale(source: Scaled, offset: int, out: memoryview) -> int:
    """Fill `out` with products; returns the bytes that were read for it."""
    columns = source.values.shape[1]
    start, count = offset // source.dtype.itemsize, len(out) // source.dtype.itemsize
    first, last = start // columns, (start + count - 1) // columns
    top = first // source.block[0]
    height = last // source.block[0] - top + 1
    with FileReader() as reader:  # another may be in use for what `out` is a part of
        values = _whole(source.values.flatten(0, 2).narrow(0, start, count), reader)
        scales = _whole(source.scales.narrow(0, top, height), reader)
        place = Products(start, columns, source.block, top, source.scales.shape[1])
        out[:] = scale_window(
            values, scales, (source.values.dtype, source.scales.dtype, source.dtype), place
        )
        return reader.num_bytes


def _whole(tensor: LazyTensor, reader: FileReader) -> memoryview:
    """All bytes of a small tensor."""
    whole = bytearray()
    for window in stream(tensor, reader):
        whole += window
    return memoryview(whole)


def window_size(*tensors: LazyTensor) -> int:
    """Bytes per window that suit all of these tensors: more where axes are transposed."""
    strided = any(_transposed(piece) for tensor in tensors for piece in tensor.pieces)
    return _TRANSPOSED_WINDOW_BYTES if strided else WINDOW_BYTES


def stream(
    tensor: LazyTensor, reader: FileReader, window_bytes: int | None = None
) -> Iterator[memoryview]:
    """The bytes of a tensor in row-major order, window by window.

    A window is valid until the next one is asked for, or as many as the reader has windows.
    """
    window_bytes = window_size(tensor) if window_bytes is None else window_bytes
    stretches = _stretches(tensor)
    if stretches is not None:
        yield from _stream_stretches(tensor, stretches, reader, window_bytes)
        return
    for (window,) in _stream_pieces((tensor,), (0,), reader, window_bytes):
        yield window


def stream_together(
    tensors: Sequence[LazyTensor], reader: FileReader
) -> Iterator[tuple[memoryview, ...]]:
    """The bytes of tensors that are `neighbours`, a window of each at a time.

    Args:
        tensors: the first has the lowest columns.
        reader: what reads; windows are valid as those of `stream` are.
    """
    first = tensors[0].pieces[0].offset
    shifts = [(t.pieces[0].offset - first) // t.dtype.itemsize for t in tensors]
    size = max(WINDOW_BYTES // len(tensors), _SHARED_WINDOW_BYTES)
    yield from _stream_pieces(tensors, shifts, reader, size)


def columns(tensor: LazyTensor) -> Hashable:
    """Where the rows stand that a tensor is columns of, as far as it can tell; else None.

    `neighbours` have the same.
    """
    if not tensor.pieces or any(_row_gap(piece) <= 0 for piece in tensor.pieces):
        return None
    places = [(p.start, p.shape, p.path, p.strides) for p in tensor.pieces]
    return (tensor.dtype, tensor.shape, *places)


def neighbours(first: LazyTensor, other: LazyTensor) -> bool:
    """Whether a tensor of the same `columns` is further right in just the same rows."""
    pairs = list(zip(first.pieces, other.pieces, strict=True))
    shift = pairs[0][1].offset - pairs[0][0].offset
    return 0 < shift and all(
        b.offset - a.offset == shift <= _row_gap(a) * first.dtype.itemsize for a, b in pairs
    )


def _row_gap(piece: Piece) -> int:
    """Elements between the end of a row of a piece and the beginning of the next."""
    steps = [step for size, step in zip(piece.shape, piece.strides, strict=True) if size > 1]
    if not isinstance(piece.path, str) or not piece.path or len(steps) < 2 or steps[-1] != 1:
        return 0
    return min(steps[:-1]) - piece.shape[-1]


def _transposed(piece: Piece) -> bool:
    return len(piece.shape) > 1 and piece.shape[-1] > 1 and piece.strides[-1] > 1


def _stretches(tensor: LazyTensor) -> list[tuple[Source, int, int]] | None:
    """(path, offset, bytes) of what a tensor is one after another, or None if it is more than that.

    An empty path is zeros.
    """
    steps, itemsize = row_major(tensor.shape), tensor.dtype.itemsize
    found: list[tuple[int, Source, int, int]] = []
    for piece in tensor.pieces:
        dims = _merged(piece.shape, piece.strides if piece.path else steps, steps)
        if len(dims) > 1 or (dims and dims[0][1:] != (1, 1)):
            return None
        at = sum(low * step for low, step in zip(piece.start, steps, strict=True))
        count = dims[0][0] if dims else 1
        found.append((at, piece.path, piece.offset, count * itemsize))
    found.sort(key=lambda stretch: stretch[0])
    return [(path, offset, size) for _, path, offset, size in found]


def _stream_stretches(
    tensor: LazyTensor,
    stretches: list[tuple[Source, int, int]],
    reader: FileReader,
    window_bytes: int,
) -> Iterator[memoryview]:
    itemsize = tensor.dtype.itemsize
    left = iter(stretches)
    path, offset, size = next(left, ("", 0, 0))
    for _, shape in windows(tensor.shape, max(1, window_bytes // itemsize)):
        num_bytes = prod(shape) * itemsize
        buffer = reader.window(num_bytes)
        done = 0
        while done < num_bytes:
            if size == 0:
                path, offset, size = next(left)
            count = min(size, num_bytes - done)
            _fill(reader, path, offset, buffer[done : done + count])
            done, offset, size = done + count, offset + count, size - count
        yield buffer


def _fill(reader: FileReader, path: Source, offset: int, out: memoryview) -> None:
    if path:
        reader.read_into(path, offset, out)
    else:
        out[:] = bytes(len(out))


def _stream_pieces(
    tensors: Sequence[LazyTensor], shifts: Sequence[int], reader: FileReader, window_bytes: int
) -> Iterator[tuple[memoryview, ...]]:
    """Windows of tensors whose pieces stand `shifts` elements behind those of the first one."""
    tensor, count = tensors[0], len(tensors)
    itemsize = tensor.dtype.itemsize
    pending = sorted(tensor.pieces, key=lambda piece: piece.start, reverse=True)
    active: list[Piece] = []
    for window in windows(tensor.shape, max(1, window_bytes // itemsize)):
        start, shape = window
        end = tuple(low + size - 1 for low, size in zip(start, shape, strict=True))
        while pending and pending[-1].start <= end:
            active.append(pending.pop())
        active = [p for p in active if not _before(p, start)]
        size = prod(shape) * itemsize
        buffer = reader.window(count * size)
        outs = tuple(buffer[number * size : (number + 1) * size] for number in range(count))
        target = _Target(outs, shifts, tensor.dtype, reader)
        for piece in active:
            target.copy(piece, window)
        yield outs


def _before(piece: Piece, start: tuple[int, ...]) -> bool:
    """Whether a piece ends before a window that begins at `start`."""
    last = tuple(low + size - 1 for low, size in zip(piece.start, piece.shape, strict=True))
    return last < start


@dataclass(frozen=True, slots=True)
class _Target:
    """Where a window's bytes go.

    Attributes:
        outs: a buffer per tensor.
        shifts: how many elements behind the first tensor's the tensors' own stand in the files.
    """

    outs: Sequence[memoryview]
    shifts: Sequence[int]
    dtype: DType
    reader: FileReader

    def copy(self, piece: Piece, window: Box) -> None:
        """The part of a piece that falls into the window, to its place."""
        common = intersect((piece.start, piece.shape), window)
        if common is None:
            return
        start, shape = common
        steps = row_major(window[1])
        at = sum((s - w) * step for s, w, step in zip(start, window[0], steps, strict=True))
        if not piece.path:
            dims = _merged(shape, (0,) * len(shape), steps)
            _view(self.outs[0], at, dims, _TARGET, self.dtype)[...] = 0
            return
        skip = sum(
            (s - p) * step for s, p, step in zip(start, piece.start, piece.strides, strict=True)
        )
        dims = _merged(shape, piece.strides, steps)
        self.gather(piece.path, piece.offset + skip * self.dtype.itemsize, dims, at)

    def gather(self, path: Source, offset: int, dims: Dims, at: int) -> None:
        """Elements of a file from `offset` bytes on, to `at` elements in the window."""
        itemsize = self.dtype.itemsize
        if not dims or (len(dims) == 1 and dims[0][1:] == (1, 1)):
            begin, end = at * itemsize, (at + (dims[0][0] if dims else 1)) * itemsize
            for out, shift in zip(self.outs, self.shifts, strict=True):
                self.reader.read_into(path, offset + shift * itemsize, out[begin:end])
            return
        widest = max(range(len(dims)), key=lambda axis: dims[axis][1])
        size, step, jump = dims[widest]
        covered = 1 + sum((size - 1) * step for size, step, _ in dims) + self.shifts[-1]
        if not self._at_once(dims, covered):
            rest = dims[:widest] + dims[widest + 1 :]
            for row in range(size):
                self.gather(path, offset + row * step * itemsize, rest, at + row * jump)
            return
        if covered * itemsize > _MOST_SCRATCH_BYTES and size > 1:
            for low, high in ((0, size // 2), (size // 2, size)):
                half = [*dims[:widest], (high - low, step, jump), *dims[widest + 1 :]]
                self.gather(path, offset + low * step * itemsize, half, at + low * jump)
            return
        scratch = self.reader.scratch(covered * itemsize)
        self.reader.read_into(path, offset, scratch)
        for out, shift in zip(self.outs, self.shifts, strict=True):
            source = _view(scratch, shift, dims, _SOURCE, self.dtype)
            _view(out, at, dims, _TARGET, self.dtype)[...] = source

    def _at_once(self, dims: Dims, covered: int) -> bool:
        """Whether to read all elements from the first to the last that is wanted, and copy."""
        if _distance(dims) * self.dtype.itemsize > _NEAR_BYTES:
            return False
        useful = prod(size for size, _, _ in dims)
        num_runs = useful // dims[-1][0] if dims[-1][1:] == (1, 1) else useful
        wanted = useful * len(self.outs)
        return (
            len(dims) == 1
            or covered <= wanted
            or (covered <= _DENSE * wanted and num_runs > _FEW_RUNS)
        )


def _merged(shape: tuple[int, ...], source: tuple[int, ...], target: tuple[int, ...]) -> Dims:
    """(size, source stride, target stride) with neighbours joined wherever both sides allow."""
    dims: Dims = []
    for size, a, b in zip(shape, source, target, strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * a and dims[-1][2] == size * b:
            dims[-1] = (dims[-1][0] * size, a, b)
        else:
            dims.append((size, a, b))
    return dims


def _distance(dims: Dims) -> int:
    """The most elements of a file between what is wanted and what is wanted next."""
    farthest = reach = 0
    for size, step, _ in sorted(dims, key=lambda dim: dim[1]):
        if step > 1:
            farthest = max(farthest, step - reach)
            reach += (size - 1) * step
    return farthest


def _view(buffer: memoryview, offset: int, dims: Dims, column: int, dtype: DType) -> np.ndarray:
    """A strided view of a byte buffer, in elements of the dtype's size."""
    import numpy as np

    itemsize = dtype.itemsize
    shape = [dim[0] for dim in dims]
    strides = [dim[column] * itemsize for dim in dims]
    return np.ndarray(shape, f"u{itemsize}", buffer, offset * itemsize, strides)
