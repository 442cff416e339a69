"""Bytes of lazy tensors: a window of a tensor gathered from its pieces.

Files are read in place, into buffers of about the window's size: no mapping of files, so memory
stays at the window however large the tensor is. One `FileReader` belongs to one thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from math import prod
from types import TracebackType

import numpy as np

from .boxes import Box, intersect, row_major, windows
from .casting import Products, add_windows, scale_window
from .dtypes import DType
from .errors import CorruptError, SourceError
from .sources import File, open_file
from .tensors import MEAN, SUM, SUM_OF_PARTS, Combined, LazyTensor, Piece, Scaled, Source

WINDOW_BYTES = 1 << 20
_TRANSPOSED_WINDOW_BYTES = 32 << 20
_MAX_OPEN_FILES = 64
# What lies between the wanted bytes is read too where that is less work: if it is no more than
# they are, and comes in more pieces than this.
_DENSE = 2
_FEW_RUNS = 1024
Dims = list[tuple[int, int, int]]


class FileReader:
    """Open files of one thread, and how many bytes it has read."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, File] = OrderedDict()
        self._scratch = np.empty(0, np.uint8)
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
        position = 0
        try:
            file = self._open(path)
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
        except OSError as error:
            raise SourceError(f"{path} cannot be read", found=str(error)) from error
        self.num_bytes += position

    def scratch(self, num_bytes: int) -> np.ndarray:
        """A byte buffer that lives until the next call."""
        if self._scratch.size < num_bytes:
            self._scratch = np.empty(num_bytes, np.uint8)
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

    A window is valid until the next one is asked for.
    """
    itemsize = tensor.dtype.itemsize
    window_bytes = window_size(tensor) if window_bytes is None else window_bytes
    buffer = np.empty(min(window_bytes, tensor.num_bytes), np.uint8)
    pending = sorted(tensor.pieces, key=lambda piece: piece.start, reverse=True)
    active: list[Piece] = []
    for window in windows(tensor.shape, max(1, window_bytes // itemsize)):
        start, shape = window
        end = tuple(low + size - 1 for low, size in zip(start, shape, strict=True))
        while pending and pending[-1].start <= end:
            active.append(pending.pop())
        active = [p for p in active if not _before(p, start)]
        out = buffer[: prod(shape) * itemsize]
        for piece in active:
            _copy(piece, window, tensor.dtype, out, reader)
        yield out.data


def _transposed(piece: Piece) -> bool:
    return len(piece.shape) > 1 and piece.shape[-1] > 1 and piece.strides[-1] > 1


def _before(piece: Piece, start: tuple[int, ...]) -> bool:
    """Whether a piece ends before a window that begins at `start`."""
    last = tuple(low + size - 1 for low, size in zip(piece.start, piece.shape, strict=True))
    return last < start


def _copy(piece: Piece, window: Box, dtype: DType, out: np.ndarray, reader: FileReader) -> None:
    """The part of a piece that falls into the window, to its place in `out`."""
    common = intersect((piece.start, piece.shape), window)
    if common is None:
        return
    start, shape = common
    steps = row_major(window[1])
    target = sum((s - w) * step for s, w, step in zip(start, window[0], steps, strict=True))
    if not piece.path:
        _view(out, target, _merged(shape, (0,) * len(shape), steps), 2, dtype)[...] = 0
        return
    skip = sum((s - p) * step for s, p, step in zip(start, piece.start, piece.strides, strict=True))
    dims = _merged(shape, piece.strides, steps)
    _gather(reader, piece.path, piece.offset + skip * dtype.itemsize, dims, out, target, dtype)


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


def _gather(
    reader: FileReader,
    path: Source,
    offset: int,
    dims: Dims,
    out: np.ndarray,
    target: int,
    dtype: DType,
) -> None:
    itemsize = dtype.itemsize
    if not dims or (len(dims) == 1 and dims[0][1] == dims[0][2] == 1):
        count = dims[0][0] if dims else 1
        place = out.data[target * itemsize : (target + count) * itemsize]
        reader.read_into(path, offset, place)
        return
    useful = prod(size for size, _, _ in dims)
    covered = 1 + sum((size - 1) * step for size, step, _ in dims)
    num_runs = useful // dims[-1][0] if dims[-1][1] == dims[-1][2] == 1 else useful
    dense = covered <= _DENSE * useful and (covered == useful or num_runs > _FEW_RUNS)
    if dense or len(dims) == 1:
        if covered > _DENSE * useful and covered * itemsize > _TRANSPOSED_WINDOW_BYTES:
            half = dims[0][0] // 2
            size, step, jump = dims[0]
            _gather(reader, path, offset, [(half, step, jump)], out, target, dtype)
            rest = offset + half * step * itemsize
            _gather(
                reader, path, rest, [(size - half, step, jump)], out, target + half * jump, dtype
            )
            return
        scratch = reader.scratch(covered * itemsize)
        reader.read_into(path, offset, scratch.data)
        _view(out, target, dims, 2, dtype)[...] = _view(scratch, 0, dims, 1, dtype)
        return
    widest = max(range(len(dims)), key=lambda axis: dims[axis][1])
    size, step, jump = dims[widest]
    rest_dims = dims[:widest] + dims[widest + 1 :]
    for row in range(size):
        row_offset = offset + row * step * itemsize
        _gather(reader, path, row_offset, rest_dims, out, target + row * jump, dtype)


def _view(buffer: np.ndarray, offset: int, dims: Dims, column: int, dtype: DType) -> np.ndarray:
    """A strided view of a byte buffer, in elements of the dtype's size."""
    itemsize = dtype.itemsize
    whole = len(buffer) // itemsize * itemsize
    elements = buffer[:whole].view(f"u{itemsize}")[offset:]
    shape = [dim[0] for dim in dims]
    strides = [dim[column] * itemsize for dim in dims]
    return np.lib.stride_tricks.as_strided(elements, shape, strides)
