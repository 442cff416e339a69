"""Changing a window's element type; the one place of the byte path that needs torch."""

from __future__ import annotations

from .dtypes import DType


def cast_window(window: memoryview, source: DType, target: DType) -> memoryview:
    """The elements of a window in another floating dtype, rounded to nearest even."""
    if source == target:
        return window
    import torch

    values = torch.frombuffer(window, dtype=getattr(torch, source.name))
    return values.to(getattr(torch, target.name)).view(torch.uint8).numpy().data
