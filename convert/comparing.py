"""Two checkpoints tensor by tensor, or one against the hashes in its manifest."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np

from . import manifest, replicas, row_order, sources
from .checkpoint import Checkpoint
from .dtypes import DTYPES, DType
from .errors import CorruptError, IncompleteError, UsageError
from .execute import Progress
from .families import FAMILIES, Family
from .formats import hf_safetensors
from .hf_source import family_of, read_config
from .ops import TrimVocab
from .parameters import VOCABULARY
from .pipeline import open_checkpoint
from .reading import FileReader, stream, window_size
from .tensors import LazyTensor


@dataclass(frozen=True, slots=True)
class Difference:
    """What is different about one tensor, in words; `kind` is for scripts."""

    name: str
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """How two checkpoints compare.

    Attributes:
        num_equal: tensors that are equal in every bit.
        differences: all others.
        notes: what was done so that they could be compared.
    """

    num_equal: int
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()


def diff(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    iteration: int | None = None,
    overrides: Mapping[str, object] | None = None,
    skip_keys: Iterable[str] = (),
    qkv_order: str = row_order.AUTO,
    replicated: str | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare two checkpoints of any readable kind, bit by bit.

    Two Megatron checkpoints are compared under canonical names; if one is a Hugging Face folder,
    under its names; if both are and of two families, under canonical names again. Vocabulary
    padding that only one of them has is left out, with a note. Copies of a parameter that ranks
    share are what a conversion takes of them: the first, or their mean.

    Args:
        first, second: see `open_checkpoint`.
        iteration, overrides, skip_keys, qkv_order: the same, for each that is of Megatron.
        replicated: see `convert`; copies are compared with each other only if it is said.
        progress: called with (bytes done, bytes in all).

    Raises:
        SourceError: one of them cannot be read.
        UsageError: options of a Megatron checkpoint, and neither of them is one.
    """
    options: _Options = {
        "iteration": iteration,
        "overrides": overrides or {},
        "skip_keys": tuple(skip_keys),
        "qkv_order": qkv_order,
    }
    replicas.check_choice(replicated)
    notes: list[str] = []
    a, b = (_Side(os.fspath(path), options, replicated, notes) for path in (first, second))
    if a.is_hugging_face and b.is_hugging_face:
        _refuse_options(options, replicated)
    left, right = _alike(a, b, notes)
    found = [Difference(n, "only_first", f"only in {first}") for n in left if n not in right]
    found += [Difference(n, "only_second", f"only in {second}") for n in right if n not in left]
    common = [name for name in left if name in right]
    total, done, num_equal = sum(left[name].num_bytes for name in common), 0, 0
    with FileReader() as reader, FileReader() as other:
        for name in common:
            text = _difference(left[name], right[name], reader, other)
            if text is None:
                num_equal += 1
            else:
                found.append(Difference(name, *text))
            done += left[name].num_bytes
            if progress:
                progress(done, total)
    return Comparison(num_equal, tuple(found), tuple(notes))


class _Options(TypedDict):
    """Options of `open_checkpoint`."""

    iteration: int | None
    overrides: Mapping[str, object]
    skip_keys: tuple[str, ...]
    qkv_order: str


class _Side:
    """One of two checkpoints.

    A folder of safetensors files that is of no family mtt knows is only names and tensors.
    """

    def __init__(
        self, path: str, options: _Options, replicated: str | None, notes: list[str]
    ) -> None:
        self.path = path
        self.is_hugging_face = sources.is_dir(path) and hf_safetensors.holds_model(path)
        self.checkpoint: Checkpoint | None = None
        if not self.is_hugging_face:
            checkpoint = open_checkpoint(path, **options)
            self.checkpoint, policy = replicas.settle(checkpoint, replicated)
            if replicated is not None:
                notes += replicas.compare(checkpoint.replicas, policy)
        elif _has_family(path):
            self.checkpoint = open_checkpoint(path)


def _refuse_options(options: _Options, replicated: str | None) -> None:
    names = {
        "--iteration": options["iteration"] is not None,
        "--set or --config": bool(options["overrides"]),
        "--skip-key": bool(options["skip_keys"]),
        "--qkv-order": options["qkv_order"] != row_order.AUTO,
        "--replicated": replicated is not None,
    }
    if given := ", ".join(name for name, on in names.items() if on):
        raise UsageError(
            f"{given}: only for a Megatron checkpoint",
            found="two Hugging Face folders",
            fix=f"leave out {given}",
        )


def _has_family(folder: str) -> bool:
    if not sources.is_file(os.path.join(folder, "config.json")):
        return False
    return read_config(folder).get("model_type") in FAMILIES


def _alike(
    a: _Side, b: _Side, notes: list[str]
) -> tuple[Mapping[str, LazyTensor], Mapping[str, LazyTensor]]:
    """The tensors of both under the same names."""
    if a.checkpoint is None or b.checkpoint is None:
        for side in (a, b):
            if not side.is_hugging_face:  # the other one must be of a family, and is not
                other = b if side is a else a
                family_of(read_config(other.path), other.path)
        return hf_safetensors.read_tensors(a.path), hf_safetensors.read_tensors(b.path)
    checkpoints = (a.checkpoint, b.checkpoint)
    rows = None
    padded = {checkpoint.architecture.padded_vocab_size for checkpoint in checkpoints}
    if len(padded) > 1:
        rows = min(padded)
    names = {c.dialect for c in checkpoints if c.config}
    family = FAMILIES[names.pop()] if len(names) == 1 else None
    if family and any(family.misfits(checkpoint.architecture) for checkpoint in checkpoints):
        family = None
    if names:
        notes.append("two families: compared under Megatron's names")
    left, right = (
        _renamed(side.path, checkpoint, family, rows, notes)
        for side, checkpoint in zip((a, b), checkpoints, strict=True)
    )
    return left, right


def _renamed(
    path: str, checkpoint: Checkpoint, family: Family | None, rows: int | None, notes: list[str]
) -> Mapping[str, LazyTensor]:
    """Tensors under a family's names, or canonical ones, with that many vocabulary rows."""
    architecture, tensors = checkpoint.architecture, checkpoint.tensors
    if checkpoint.config and checkpoint.dropped:
        notes.append(f"{path}: not compared: {', '.join(sorted(checkpoint.dropped))}")
    if rows is not None and rows < architecture.padded_vocab_size:
        notes.append(f"{path}: {rows} of {architecture.padded_vocab_size} vocabulary rows compared")
    architecture = replace(architecture, vocab_size=rows or architecture.padded_vocab_size)
    if family is not None:
        return family.rules(architecture).apply(tensors, architecture)
    cut = {name: tensors[name] for name in VOCABULARY if name in tensors}
    return {**tensors, **{n: TrimVocab().apply((t,), architecture)[0] for n, t in cut.items()}}


def _difference(
    a: LazyTensor, b: LazyTensor, reader: FileReader, other: FileReader
) -> tuple[str, str] | None:
    """(kind, text) of a difference."""
    if a.shape != b.shape:
        return "shape", f"shape {list(a.shape)} and {list(b.shape)}"
    if a.dtype != b.dtype:
        return "dtype", f"{a.dtype} and {b.dtype}"
    size = window_size(a, b)
    count, largest = 0, 0.0
    for x, y in zip(stream(a, reader, size), stream(b, other, size), strict=True):
        if x != y:
            left, right = as_float(x, a.dtype), as_float(y, b.dtype)
            bits = np.frombuffer(x, f"u{a.dtype.itemsize}") != np.frombuffer(
                y, f"u{a.dtype.itemsize}"
            )
            count += int(bits.sum())
            with np.errstate(invalid="ignore", over="ignore"):
                largest = max(largest, float(np.nanmax(np.abs(left - right), initial=0.0)))
    if not count:
        return None
    return "values", f"{count} of {a.num_elements} elements differ, by up to {largest:.3g}"


def as_float(window: memoryview, dtype: DType) -> np.ndarray:
    """Elements of a window as float32 or float64, for arithmetic."""
    if dtype.name == "bfloat16":
        return (np.frombuffer(window, np.uint16).astype(np.uint32) << 16).view(np.float32)
    kinds = {"float64": np.float64, "float32": np.float32, "float16": np.float16}
    values = np.frombuffer(window, kinds.get(dtype.name, f"u{dtype.itemsize}"))
    return values if dtype.name == "float64" else values.astype(np.float32)


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found.

    Attributes:
        num_tensors, num_bytes: what was read and hashed.
        problems: bytes that are not those that were written.
        warnings: bytes that are, but look wrong (NaN, infinity).
        hashed: whether the conversion kept hashes; without them only sizes and names were compared.
    """

    num_tensors: int
    num_bytes: int
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    hashed: bool


def verify(folder: str | os.PathLike[str], *, progress: Progress | None = None) -> Verification:
    """Read a converted folder again and compare every byte with its manifest.

    Raises:
        NotACheckpointError: it has no manifest.
        IncompleteError: its conversion did not finish.
        UsageError: it is on another machine.
    """
    folder = os.fspath(folder)
    if sources.is_remote(folder):
        raise UsageError(
            "only folders of this machine are verified",
            found=folder,
            expected="a folder that mtt convert wrote, or a copy of it",
            fix="download it first, from the Hub with hf download OWNER/REPO --local-dir FOLDER",
        )
    record = manifest.read(folder)
    if record["status"] != "complete":
        raise IncompleteError(
            f"the conversion of {folder} did not finish",
            found=f"status {record['status']}",
            expected="complete",
            fix="convert again",
        )
    files: dict[str, dict[str, Any]] = record["files"]
    problems, warnings = list(_documents(folder, record)), []
    if record["hash"] == "none":
        warnings.append("the conversion kept no hashes: tensors were only compared in size")
    total, done = sum(file["bytes"] for file in files.values()), 0
    num_tensors = 0
    for name, entry in files.items():
        try:
            tensors = _file_tensors(folder, name, entry, record["hash"])
        except (CorruptError, IncompleteError) as error:
            problems.append(error.message)
            continue
        with FileReader() as reader:
            for tensor_name, tensor in tensors.items():
                digest, finite = _digest(tensor, record["hash"], reader)
                if digest != entry["tensors"][tensor_name]:
                    problems.append(f"{tensor_name} in {name} is not what was written")
                elif not finite:
                    warnings.append(f"{tensor_name} has values that are not finite")
                num_tensors += 1
                done += tensor.num_bytes
                if progress:
                    progress(done, total)
    hashed = record["hash"] != "none"
    return Verification(num_tensors, done, tuple(problems), tuple(warnings), hashed)


def _documents(folder: str, record: Mapping[str, Any]) -> Iterator[str]:
    for name, expected in record["documents"].items():
        try:
            with open(os.path.join(folder, name), "rb") as file:
                if manifest.digest(file.read(), record["hash"]) != expected:
                    yield f"{name} was changed since it was written"
        except OSError:
            yield f"{name} is missing"


def _file_tensors(
    folder: str, name: str, entry: Mapping[str, Any], algorithm: str
) -> dict[str, LazyTensor]:
    """The tensors of a file whose other bytes are what was written."""
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        raise IncompleteError(f"{name} is missing")
    if "places" in entry:
        tensors = {
            tensor: _bytes_at(path, DTYPES[dtype], offset, size)
            for tensor, (offset, size, dtype) in entry["places"].items()
        }
    else:
        tensors = hf_safetensors.read_file(path)
    if (
        os.path.getsize(path) != entry["bytes"]
        or set(tensors) != set(entry["tensors"])
        or manifest.digest(_bytes_between(path, tensors), algorithm) != entry["header"]
    ):
        raise CorruptError(f"the header of {name} is not what was written")
    return tensors


def _bytes_at(path: str, dtype: DType, offset: int, size: int) -> LazyTensor:
    return LazyTensor.in_file(dtype, (size // dtype.itemsize,), path, offset)


def _bytes_between(path: str, tensors: Mapping[str, LazyTensor]) -> bytes:
    """What belongs to no tensor of a file; each tensor is one block."""
    parts, position = [], 0
    blocks = [(t.pieces[0].offset, t.num_bytes) for t in tensors.values() if t.num_bytes]
    with open(path, "rb") as file:
        for start, size in sorted(blocks):
            file.seek(position)
            parts.append(file.read(max(0, start - position)))
            position = start + size
        file.seek(position)
        parts.append(file.read())
    return b"".join(parts)


def _digest(tensor: LazyTensor, algorithm: str, reader: FileReader) -> tuple[str, bool]:
    hasher = manifest.new_hasher(algorithm)
    finite = True
    for window in stream(tensor, reader):
        hasher.update(window)
        finite = finite and bool(np.isfinite(as_float(window, tensor.dtype)).all())
    return hasher.hexdigest(), finite
