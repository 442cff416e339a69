"""`mtt_manifest.json`: what a conversion wrote, file by file, with a hash per tensor.

    {"schema": 1, "status": "running" | "complete", "hash": "xxh3_128", "source": {...},
     "files": {name: {"status": "pending" | "complete", "bytes": n, "header": hash,
                      "tensors": {name: hash}, "places": {name: [offset, bytes, dtype]}}},
     "documents": {name: hash}}

`header` is the hash of all bytes that belong to no tensor. `places` says where tensors stand in
files that are no safetensors, which say so themselves.

It stands in the folder from the beginning, is replaced before a complete file gets its name, and
holds neither times nor paths in the end: the same input gives the same bytes. While it is running,
it has for `--resume` the hash of its `work` (see `work.py`), and as `boot` when the machine was
started whose memory may still hold some of it, or null if all of it is on the disk.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any, Protocol, cast

import xxhash

from . import small_files
from .dtypes import DTYPES
from .errors import (
    CorruptError,
    IncompleteError,
    NotACheckpointError,
    SourceError,
    UsageError,
)
from .plan import ConversionPlan, PlannedFile, document

NAME, PARTS = "mtt_manifest.json", ".mtt.parts"
SCHEMA = 1
# The only subfolders mtt writes to: what a manifest names is replaced by `--overwrite`.
_BELOW = re.compile(r"((iter_\d{7,}|release)(/mp_rank_[\d_]+)?|tokenizer)/[^/]+")
ALGORITHMS = {"xxh3": "xxh3_128", "sha256": "sha256", "none": "none"}


class Hasher(Protocol):
    """What hashlib and xxhash objects have in common."""

    def update(self, data: memoryview | bytes) -> None:
        """Take in more bytes."""

    def hexdigest(self) -> str:
        """The hash so far."""


class _NoHasher:
    def update(self, data: memoryview | bytes) -> None:
        pass

    def hexdigest(self) -> str:
        return ""


def new_hasher(algorithm: str) -> Hasher:
    """A hasher for `xxh3_128`, `sha256` or `none`.

    Raises:
        UsageError: another name.
    """
    if algorithm == "xxh3_128":
        return cast(Hasher, xxhash.xxh3_128())
    if algorithm == "sha256":
        import hashlib

        return cast(Hasher, hashlib.sha256())
    if algorithm == "none":
        return _NoHasher()
    raise UsageError(f"unknown hash {algorithm!r}", expected=", ".join(ALGORITHMS))


def planned(plan: ConversionPlan, source: Mapping[str, Any], algorithm: str) -> dict[str, Any]:
    """The manifest of a conversion that has written nothing yet."""
    return {
        "schema": SCHEMA,
        "status": "running",
        "hash": algorithm,
        "source": dict(source),
        "files": {file.name: planned_file(file) for file in plan.files},
        "documents": dict.fromkeys(plan.documents, ""),
    }


def planned_file(file: PlannedFile) -> dict[str, Any]:
    """The entry of a file that is still to be written."""
    entry: dict[str, Any] = {
        "status": "pending",
        "bytes": file.num_bytes,
        "header": "",
        "tensors": {tensor.name: "" for tensor in file.tensors},
    }
    if not file.name.endswith(".safetensors"):
        entry["places"] = {t.name: [t.offset, t.num_bytes, t.dtype.name] for t in file.tensors}
    return entry


def digest(data: bytes, algorithm: str) -> str:
    """The hash of one byte string; small as they are, they are hashed even under `none`."""
    hasher = new_hasher("xxh3_128" if algorithm == "none" else algorithm)
    hasher.update(data)
    return hasher.hexdigest()


def digests(documents: Mapping[str, bytes], algorithm: str) -> dict[str, str]:
    """The hashes of documents."""
    return {name: digest(data, algorithm) for name, data in documents.items()}


def write(
    folder: str,
    manifest: Mapping[str, Any],
    name: str = NAME,
    *,
    suffix: str = ".part",
    keeps: bool = False,
) -> None:
    """Replace the manifest of a folder in one step, which reaches the disk if it `keeps`."""
    small_files.write(os.path.join(folder, name), document(manifest), suffix, keeps=keeps)


def _check(manifest: Any) -> None:
    """Raise one of the usual errors if this is no manifest."""
    if manifest["schema"] != SCHEMA:
        raise ValueError(f"schema {manifest['schema']}")
    if manifest["hash"] not in ALGORITHMS.values():
        raise ValueError(f"hash {manifest['hash']!r}")
    if manifest["status"] not in ("running", "complete") or not manifest["files"]:
        raise ValueError(f"status {manifest['status']!r}, {len(manifest['files'])} files")
    for name in (*manifest["files"], *manifest["documents"].keys()):
        if os.path.basename(name) != name and not _BELOW.fullmatch(name):
            raise ValueError("a file elsewhere")
    for entry in manifest["files"].values():
        if not isinstance(entry["bytes"], int) or not isinstance(entry["header"], str):
            raise TypeError(f"a file of {entry['bytes']!r} bytes")
        if entry["status"] not in ("pending", "complete"):
            raise ValueError(f"a file of status {entry['status']!r}")
        entry["tensors"].items()
        for offset, size, dtype in entry.get("places", {}).values():
            if not (0 <= offset <= offset + size <= entry["bytes"]) or dtype not in DTYPES:
                raise ValueError(f"{size!r} bytes of {dtype!r} at {offset!r}")


def read(folder: str) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        NotACheckpointError: there is none.
        IncompleteError: there will be one when all parts are written.
        CorruptError: it is not readable.
    """
    path = os.path.join(folder, NAME)
    if not os.path.isfile(path) and os.path.isdir(os.path.join(folder, PARTS)):
        raise IncompleteError(
            f"{folder} is written in parts, and some of them are missing",
            found=f"{PARTS}, and no {NAME}",
            expected=f"{NAME}, which the last part writes",
            fix="wait for the others, or run those that died again with --resume",
        )
    if not os.path.isfile(path):
        raise NotACheckpointError(
            f"{folder} has no {NAME}",
            expected="a folder that mtt convert wrote",
            fix="convert the checkpoint again",
        )
    try:
        with open(path, "rb") as file:
            manifest = json.load(file)
        _check(manifest)
    except OSError as error:
        raise SourceError(f"{path} cannot be read", found=str(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptError(
            f"{path} is damaged", found=str(error), expected=f"a manifest of schema {SCHEMA}"
        ) from error
    return cast(dict[str, Any], manifest)
