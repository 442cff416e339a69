"""Megatron-Core's `zarr` format, which was written up to core 0.15: global tensors as zarr arrays.

    iter_0001000/metadata.json           {"sharded_backend": "zarr", ...}
                 common.pt               args, iteration, checkpoint_version, optimizer settings
                 <tensor>/.zarray        JSON: shape, chunks, dtype, order, compressor: null
                 <tensor>/0.1.0          raw elements of one chunk, of full size at the edges too
                 <state>/shard_0_4.pt    `_extra_state` and random state, which are left out

Tensors are those of `torch_dist`: layers stacked or numbered. Megatron-Core never compresses, so
chunks are read where they stand and no zarr library is needed.
(megatron/core/dist_checkpointing/strategies/zarr.py, core 0.15.0; the zarr v2 specification.)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod

from .. import sources
from ..boxes import Ints, row_major
from ..checkpoint import RawCheckpoint
from ..dtypes import DTYPES, DType
from ..errors import CorruptError, IncompleteError, UnsupportedError
from ..tensors import LazyTensor, Piece
from .dcp import METADATA
from .folders import Place
from .megatron_torch_dist import open_global
from .values import sizes

NAME = "zarr"
_ARRAY = ".zarray"
_DTYPES = {"<f4": "float32", "<f2": "float16", "bfloat16": "bfloat16", "<f8": "float64"}
_MOST_CHUNKS = 1_000_000


def holds_model(folder: str) -> bool:
    """Whether the folder is Megatron-Core's, and without what a torch_dist checkpoint has."""
    if sources.is_file(os.path.join(folder, METADATA)):
        return False
    return sources.is_file(os.path.join(folder, "metadata.json"))


def open_folder(place: Place, skip_keys: frozenset[str] = frozenset()) -> RawCheckpoint:
    """Read the metadata of one iteration; of the chunks only the files' sizes.

    Raises:
        IncompleteError: files are missing.
        UnsupportedError: another sharded backend, compressed chunks, or no plain weights.
        CorruptError, UnsafePickleError: metadata that cannot be read as data.
    """
    names = [name for name in sources.listing(place.folder) if "." in name or "_" in name]
    folders = [n for n in names if sources.is_dir(os.path.join(place.folder, n))]
    arrays = {
        name: sources.is_file(os.path.join(place.folder, name, _ARRAY))
        for name in folders
        if not name.endswith(".sync")
    }
    return open_global(NAME, place, _Arrays(place.folder, arrays), skip_keys)


@dataclass(frozen=True, slots=True)
class _Arrays:
    """The arrays in a folder.

    Attributes:
        folder: where they are.
        entries: name -> whether it is an array; the others are objects.
    """

    folder: str
    entries: Mapping[str, bool]

    def is_tensor(self, name: str) -> bool:
        """Whether an entry is a tensor."""
        return self.entries[name]

    def tensors(self, names: Iterable[str]) -> dict[str, LazyTensor]:
        """The arrays of these names, their chunks as pieces."""
        return {name: self._tensor(name) for name in names}

    def _tensor(self, name: str) -> LazyTensor:
        path = os.path.join(self.folder, name, _ARRAY)
        try:
            array = json.loads(sources.read(path))
            shape, chunks = (
                sizes(array["shape"], name, _ARRAY),
                sizes(array["chunks"], name, _ARRAY),
            )
            kind, order = str(array["dtype"]), array["order"]
            packed = [array.get("compressor"), array.get("filters")]
            separator = str(array.get("dimension_separator", "."))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CorruptError(
                f"{path} is damaged", found=str(error), expected="the description of a zarr array"
            ) from error
        if kind not in _DTYPES or order != "C" or any(packed) or separator not in (".", "/"):
            raise UnsupportedError(
                f"{name} is stored in a way Megatron does not write",
                found=f"dtype {kind}, order {order}, compressor and filters {packed}",
                expected=f"one of {', '.join(_DTYPES)}, order C, no compressor, no filters",
            )
        grid = [
            -(-size // chunk) if chunk else 0 for size, chunk in zip(shape, chunks, strict=False)
        ]
        if len(shape) != len(chunks) or not 0 < prod(grid) <= _MOST_CHUNKS:
            raise CorruptError(f"{path} is damaged", found=f"shape {shape} in chunks of {chunks}")
        dtype = DTYPES[_DTYPES[kind]]
        return LazyTensor(dtype, shape, self._pieces(name, dtype, shape, chunks, grid, separator))

    def _pieces(
        self,
        name: str,
        dtype: DType,
        shape: Ints,
        chunks: Ints,
        grid: list[int],
        separator: str,
    ) -> tuple[Piece, ...]:
        pieces = []
        for index in product(*map(range, grid)):
            path = os.path.join(self.folder, name, separator.join(map(str, index)))
            if not sources.is_file(path):
                raise IncompleteError(
                    f"{os.path.basename(self.folder)} is incomplete; nothing was written",
                    found=f"{name} of {prod(grid)} chunks",
                    expected=sources.relative(path, self.folder),
                    fix="copy that file again",
                )
            found, expected = sources.size(path), prod(chunks) * dtype.itemsize
            if found != expected:
                raise CorruptError(
                    f"{path} is truncated or damaged",
                    found=f"{found} bytes",
                    expected=f"{expected} bytes, a chunk of {list(chunks)} of {dtype}",
                    fix="copy the file again from where it was written",
                )
            start = tuple(i * size for i, size in zip(index, chunks, strict=True))
            extent = tuple(
                min(chunk, size - low)
                for chunk, size, low in zip(chunks, shape, start, strict=True)
            )
            pieces.append(Piece(start, extent, path, 0, row_major(chunks)))
        return tuple(pieces)
