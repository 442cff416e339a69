"""Megatron checkpoints as Hugging Face models: no GPU, no Megatron, no pickle executed.

    checkpoint = mtt_convert.open_checkpoint(path)      metadata only
    mtt_convert.convert(path, "out")                    a Hugging Face folder
    mtt_convert.convert(path, "new", to="torch", tp=4)  a Megatron checkpoint of another layout
    model = mtt_convert.from_megatron(path)             MTTForCausalLM without files

Names are loaded on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .comparing import Comparison, Verification, diff, verify
    from .conversion import Conversion
    from .errors import (
        CorruptError,
        HubError,
        IncompleteError,
        InconsistentError,
        LayoutError,
        MappingError,
        MTTError,
        NotACheckpointError,
        SourceError,
        TargetError,
        UnsafePickleError,
        UnsupportedError,
        UsageError,
    )
    from .iterations import convert_iterations
    from .loading import from_megatron
    from .pipeline import Result, convert, open_checkpoint, plan_conversion
    from .uploading import PushResult, push

_MODULES = {
    "checkpoint": ("Checkpoint",),
    "comparing": ("Comparison", "Verification", "diff", "verify"),
    "errors": (
        "CorruptError",
        "HubError",
        "IncompleteError",
        "InconsistentError",
        "LayoutError",
        "MTTError",
        "MappingError",
        "NotACheckpointError",
        "SourceError",
        "TargetError",
        "UnsafePickleError",
        "UnsupportedError",
        "UsageError",
    ),
    "iterations": ("convert_iterations",),
    "loading": ("from_megatron",),
    "conversion": ("Conversion",),
    "pipeline": ("Result", "convert", "open_checkpoint", "plan_conversion"),
    "uploading": ("PushResult", "push"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Checkpoint",
    "Comparison",
    "Conversion",
    "CorruptError",
    "HubError",
    "IncompleteError",
    "InconsistentError",
    "LayoutError",
    "MTTError",
    "MappingError",
    "NotACheckpointError",
    "PushResult",
    "Result",
    "SourceError",
    "TargetError",
    "UnsafePickleError",
    "UnsupportedError",
    "UsageError",
    "Verification",
    "__version__",
    "convert",
    "convert_iterations",
    "diff",
    "from_megatron",
    "open_checkpoint",
    "plan_conversion",
    "push",
    "verify",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
