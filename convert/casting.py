"""Arithmetic on windows: other element types, sums, means, scales; the one place with torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .dtypes import DType

if TYPE_CHECKING:
    import torch


def cast_window(window: memoryview, source: DType, target: DType) -> memoryview:
    """The elements of a window in another floating dtype, rounded to nearest even."""
    if source == target:
        return window
    import torch

    values = torch.frombuffer(window, dtype=getattr(torch, source.name))
    return values.to(getattr(torch, target.name)).view(torch.uint8).numpy().data


def add_windows(windows: Sequence[memoryview], dtype: DType, *, mean: bool) -> memoryview:
    """The sum or mean of windows, computed in float64 and rounded once."""
    import torch

    kind = getattr(torch, dtype.name)
    total = torch.frombuffer(windows[0], dtype=kind).to(torch.float64)
    for window in windows[1:]:
        total += torch.frombuffer(window, dtype=kind)
    if mean:
        total /= len(windows)
    return total.to(kind).view(torch.uint8).numpy().data


@dataclass(frozen=True, slots=True)
class Products:
    """Which elements of a matrix a window has, and which scales are theirs.

    Attributes:
        start: the first one, counted by rows.
        columns: of the matrix.
        block: rows and columns of elements that share a scale.
        top: the row of scales that the given ones begin with.
        num_scales: scales in a row.
    """

    start: int
    columns: int
    block: tuple[int, int]
    top: int
    num_scales: int


def scale_window(
    values: memoryview, scales: memoryview, dtypes: tuple[DType, DType, DType], place: Products
) -> memoryview:
    """8-bit floats times their scales in float32, rounded once to nearest even.

    Args:
        values: the window's elements.
        scales: rows of scales; in uint8 they are exponents, 127 standing for 1 and 255 for NaN.
        dtypes: of values, of scales, and of the result.
        place: which elements they are.
    """
    import torch

    source, kind, target = (getattr(torch, dtype.name) for dtype in dtypes)
    numbers = torch.frombuffer(values, dtype=source).to(torch.float32)
    if kind == torch.uint8:
        exponents = torch.frombuffer(scales, dtype=torch.uint8).to(torch.int32)
        bits = (exponents << 23).masked_fill_(exponents == 0, 1 << 22)  # 2 ** -127
        factors = bits.masked_fill_(exponents == 255, 0x7FFFFFFF).view(torch.float32)
    else:
        factors = torch.frombuffer(scales, dtype=kind).to(torch.float32)
    if factors.numel() == 1:
        return _bytes(numbers.mul_(factors).to(target))
    factors = factors.view(-1, place.num_scales)
    height, width = place.block[0], min(place.block[1], place.columns)
    first, rest = divmod(place.start, place.columns)
    num_rows = -(-(rest + len(numbers)) // place.columns)
    of_row = torch.div(torch.arange(first, first + num_rows), height, rounding_mode="floor")
    wide = factors.repeat_interleave(width, dim=1)[:, : place.columns]
    for row, number in enumerate((of_row - place.top).tolist()):
        low = max(0, row * place.columns - rest)
        high = min(len(numbers), (row + 1) * place.columns - rest)
        skip = low - (row * place.columns - rest)
        numbers[low:high].mul_(wide[number, skip : skip + high - low])
    return _bytes(numbers.to(target))


def _bytes(values: torch.Tensor) -> memoryview:
    import torch

    return values.view(torch.uint8).numpy().data
