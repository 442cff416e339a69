"""What will be written, decided before a byte moves: files, offsets, sources, documents.

A plan is a frozen value made from metadata alone. The modules of `formats/` that write say how
tensors are laid out in files; `render` prints a plan for `--dry-run`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from . import sources
from .boxes import Ints
from .checkpoint import Replicas
from .dtypes import DType
from .errors import UsageError
from .tensors import LazyTensor

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_MOST_SOURCES = 4
_BINARY_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of an output file.

    Attributes:
        name: its name there.
        source: where its elements come from, in the dtype they are stored in.
        dtype: the dtype it is written in.
        offset: position of its first byte in the file.
        checksum_at: positions in the file that take the CRC-32 of its bytes, 4 bytes each.
    """

    name: str
    source: LazyTensor
    dtype: DType
    offset: int
    checksum_at: Ints = ()

    @property
    def num_bytes(self) -> int:
        """Bytes it takes in the output."""
        return self.source.num_elements * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file: bytes that are known beforehand, and the tensors between them.

    Attributes:
        name: its path below the output folder.
        fixed: position and bytes, in rising order and without overlap.
        tensors: in the order of their offsets.
    """

    name: str
    fixed: tuple[tuple[int, bytes], ...]
    tensors: tuple[PlannedTensor, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        ends = [position + len(data) for position, data in self.fixed]
        ends += [tensor.offset + tensor.num_bytes for tensor in self.tensors]
        return max(ends, default=0)


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """Everything a conversion will do.

    Attributes:
        files: weight files, in order.
        documents: small files by name, in the order they are written: the last one makes the
            folder whole.
        replicas: copies to compare before anything is written.
    """

    files: tuple[PlannedFile, ...]
    documents: Mapping[str, bytes]
    replicas: tuple[Replicas, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(file.num_bytes for file in self.files)

    @property
    def num_tensors(self) -> int:
        """Number of tensors written."""
        return sum(len(file.tensors) for file in self.files)


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500MB`, `2GiB` or a plain number; decimal units as huggingface_hub has.

    Raises:
        UsageError: not a size.
    """
    hit = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    unit = hit[2].upper() if hit else ""
    factor = (_BINARY_UNITS if hit and hit[3] else _UNITS).get(unit)
    size = float(hit[1]) * factor if hit and factor else 0.0
    if not 1 <= size < math.inf:
        raise UsageError(f"{text!r} is no size", expected="a size like 5GB, 500MB or 2GiB")
    return int(size)


def document(value: object) -> bytes:
    """A JSON document as it is written: two spaces, keys in order, a newline at the end.

    Names of files that are no text get JSON's escapes.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")


def render(plan: ConversionPlan, folder: str) -> str:
    """The plan as text: a line per file and per tensor, with its sources.

    Args:
        plan: what would be written.
        folder: the checkpoint's; sources are named as seen from there.
    """
    lines = []
    for file in plan.files:
        lines.append(f"{file.name}  {file.num_bytes:,} bytes  {len(file.tensors)} tensors")
        for tensor in file.tensors:
            cast = "" if tensor.dtype == tensor.source.dtype else f" from {tensor.source.dtype}"
            paths = sorted(
                {
                    sources.relative(path, folder)
                    for piece in tensor.source.pieces
                    for path in piece.paths
                }
            )
            more = f" and {len(paths) - _MOST_SOURCES} more" if len(paths) > _MOST_SOURCES else ""
            shape = " x ".join(map(str, tensor.source.shape))
            lines.append(
                f"  {tensor.name}  {tensor.dtype}{cast}  [{shape}]  "
                f"{len(tensor.source.pieces)} pieces of {', '.join(paths[:_MOST_SOURCES])}{more}"
            )
    lines += [f"{name}  {len(data):,} bytes" for name, data in plan.documents.items()]
    lines.append(f"to compare first: {len(plan.replicas)} parameters that ranks hold copies of")
    return "\n".join(lines)
