"""`mtt_manifest.json`: what a conversion wrote, file by file, with a hash per tensor.

    {"schema": 1, "status": "running" | "complete", "hash": "xxh3_128", "source": {...},
     "files": {name: {"status": "pending" | "complete", "bytes": n, "header": hash,
                      "tensors": {name: hash}}},
     "documents": {name: hash}}

It stands in the folder from the beginning, is replaced as files are completed, and holds
neither times nor paths: the same input gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, Protocol, cast

import xxhash

from .errors import CorruptError, NotACheckpointError, SourceError, UsageError
from .plan import document

NAME = "mtt_manifest.json"
SCHEMA = 1
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
        return cast(Hasher, hashlib.sha256())
    if algorithm == "none":
        return _NoHasher()
    raise UsageError(f"unknown hash {algorithm!r}", expected=", ".join(ALGORITHMS))


def digest(data: bytes, algorithm: str) -> str:
    """The hash of one byte string."""
    hasher = new_hasher(algorithm)
    hasher.update(data)
    return hasher.hexdigest()


def write(folder: str, manifest: Mapping[str, Any]) -> None:
    """Replace the manifest of a folder in one step."""
    temporary = os.path.join(folder, NAME + ".part")
    with open(temporary, "wb") as file:
        file.write(document(manifest))
    os.replace(temporary, os.path.join(folder, NAME))


def read(folder: str) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        NotACheckpointError: there is none.
        CorruptError: it is not readable.
    """
    path = os.path.join(folder, NAME)
    if not os.path.isfile(path):
        raise NotACheckpointError(
            f"{folder} has no {NAME}",
            expected="a folder that mtt convert wrote",
            fix="convert the checkpoint again",
        )
    try:
        with open(path, "rb") as file:
            manifest = json.load(file)
        if manifest["schema"] != SCHEMA or not isinstance(manifest["files"], dict):
            raise ValueError(f"schema {manifest['schema']}")
    except OSError as error:
        raise SourceError(f"{path} cannot be read", found=str(error)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(
            f"{path} is damaged", found=str(error), expected=f"a manifest of schema {SCHEMA}"
        ) from error
    return cast(dict[str, Any], manifest)
