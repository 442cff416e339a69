"""What tells one piece of work from another, and whether its source files are still the same.

`work` hashes say what is read and written: notes of an interrupted run are good for exactly the
same work. Source files count by name, size and time of their last change.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping

import xxhash

from . import sources
from .errors import CorruptError
from .plan import ConversionPlan, PlannedFile
from .tensors import LazyTensor, Scaled


def work_of_upload(plan: ConversionPlan, algorithm: str) -> str:
    """A hash of what an upload reads and writes: its files, and whence every byte of them."""
    hasher = xxhash.xxh3_128(algorithm.encode())
    for file in plan.files:
        hasher.update(repr((file.name, file.fixed)).encode())
        for tensor in file.tensors:
            facts = (tensor.name, str(tensor.dtype), tensor.offset, tensor.source)
            hasher.update(repr(facts).encode())
    for path in sorted(_paths_of(plan.files)):
        hasher.update(repr(_stamp(path)).encode())
    return str(hasher.hexdigest())


def work_of_folder(plan: ConversionPlan, folder: str, *options: object) -> str:
    """A hash of all that a conversion to a folder reads and writes, documents included.

    Args:
        plan: the conversion.
        folder: the checkpoint's; its files count as seen from there, so that machines that have
            it in different places agree.
        options: what else must be the same.
    """
    hasher = xxhash.xxh3_128(repr(options).encode())
    paths = sorted(source_paths(plan))
    names = {path: sources.relative(path, folder) for path in paths}
    for file in plan.files:
        hasher.update(repr((file.name, file.fixed)).encode())
        for tensor in file.tensors:
            facts = (tensor.name, str(tensor.dtype), tensor.offset, tensor.checksum_at)
            hasher.update(repr((facts, list(_facts(tensor.source, names)))).encode())
    hasher.update(repr(list(plan.documents.items())).encode())
    for path in paths:
        hasher.update(repr((names[path], *_stamp(path)[1:])).encode())
    return str(hasher.hexdigest())


def _facts(tensor: LazyTensor, names: Mapping[str, str]) -> Iterator[object]:
    """What a tensor is and where it stands, with other names for files."""
    yield str(tensor.dtype), tensor.shape
    for piece in tensor.pieces:
        yield piece.start, piece.shape, piece.offset, piece.strides
        if isinstance(piece.path, str):
            yield names.get(piece.path, "")
            continue
        of = piece.path
        yield (of.block, str(of.dtype)) if isinstance(of, Scaled) else of.how
        for part in of.tensors:
            yield from _facts(part, names)


def work_of_files(paths: Mapping[str, str]) -> str:
    """A hash of files by name, size and time of their last change."""
    stamps = [(name, _stamp(path)) for name, path in sorted(paths.items())]
    return str(xxhash.xxh3_128(repr(stamps).encode()).hexdigest())


def _stamp(path: str) -> tuple[object, ...]:
    """What tells whether a file changed; of one that is not on this machine only its name."""
    try:
        facts = os.stat(path)
    except (OSError, ValueError):
        return (path,)
    return (path, facts.st_size, facts.st_mtime_ns)


def source_paths(plan: ConversionPlan) -> set[str]:
    """All files a conversion reads, copies to compare included."""
    copies = (tensor for group in plan.replicas for tensor in group.tensors)
    return _paths_of(plan.files) | _paths_in(copies)


def _paths_of(files: Iterable[PlannedFile]) -> set[str]:
    return _paths_in(tensor.source for file in files for tensor in file.tensors)


def _paths_in(tensors: Iterable[LazyTensor]) -> set[str]:
    return {path for tensor in tensors for piece in tensor.pieces for path in piece.paths}


class SourceWatch:
    """Notices when a source file is not what it was when the plan was made."""

    def __init__(self, plan: ConversionPlan) -> None:
        self._seen = {path: sources.first_seen(path) for path in source_paths(plan)}

    def check(self, file: PlannedFile | None = None) -> None:
        """Compare the files that an output file comes from, or all.

        Raises:
            CorruptError: one of them was changed, replaced or removed.
        """
        for path in sorted(self._seen if file is None else _paths_of([file])):
            now = sources.identity(path)
            if now != self._seen[path]:
                raise CorruptError(
                    f"{path} was changed while it was read",
                    found=str(now or "no file any more"),
                    expected=str(self._seen[path]),
                    fix="convert again, once nothing writes to the checkpoint",
                )
