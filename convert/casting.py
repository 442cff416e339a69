"""Arithmetic on windows: another element type, sums and means; the one place that needs torch."""

from __future__ import annotations

from collections.abc import Sequence

from .dtypes import DType


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
