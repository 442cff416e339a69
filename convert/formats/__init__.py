"""Checkpoint formats: one module each, asked in this order which of them a folder is.

A new format is one new file with the names of `Reader`, and one entry in `READERS`.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Protocol

from .. import sources
from ..checkpoint import RawCheckpoint
from ..errors import IncompleteError, NotACheckpointError, SourceError, UnsupportedError
from ..sources import listing
from . import (
    deepspeed_layers,
    deepspeed_module,
    deepspeed_universal,
    megatron_torch,
    megatron_torch_dcp,
    megatron_torch_dist,
    megatron_zarr,
    nemo,
)
from .deepspeed import refuse_unreadable
from .folders import Place, locate


class Reader(Protocol):
    """What a module that reads Megatron checkpoints has."""

    NAME: str

    def holds_model(self, folder: str) -> bool:
        """Whether a folder has this format's files."""

    def open_folder(self, place: Place, skip_keys: frozenset[str] = ...) -> RawCheckpoint:
        """The metadata of one iteration."""


READERS: tuple[Reader, ...] = (
    megatron_torch_dist,
    megatron_torch_dcp,
    megatron_zarr,
    megatron_torch,
    deepspeed_layers,
    deepspeed_universal,
    deepspeed_module,
    nemo,
)


def find(path: str, iteration: int | None = None) -> tuple[Reader, Place]:
    """The reader for a checkpoint, and the folder it should open.

    Raises:
        NotACheckpointError: no reader knows what is there.
        UnsupportedError: it is a known format that mtt cannot read.
    """
    if sources.is_dir(path) and (refusal := _recognised(path)):
        raise refusal
    if nemo.holds_model(path):
        return nemo, Place(sources.absolute(path), None)

    @cache
    def reader_of(folder: str) -> Reader | None:
        return next((reader for reader in READERS if reader.holds_model(folder)), None)

    place = locate(path, iteration, lambda folder: reader_of(folder) is not None)
    if reader := reader_of(place.folder):
        return reader, place
    raise _recognised(place.folder) or NotACheckpointError(
        f"no model files in {place.folder}",
        found=", ".join(listing(place.folder)[:6]) or "an empty folder",
        expected="mp_rank_*/model_optim_rng.pt, .metadata with *.distcp files, or DeepSpeed's "
        "layer_*-model_states.pt",
        fix="copy the iteration again from where it was written",
    )


def _part(folder: str, names: set[str]) -> SourceError | None:
    """A refusal of files that belong with others, which are not there."""
    is_distributed = any(name.endswith(".distcp") for name in names)
    if is_distributed and not {".metadata", "metadata.json"} & names:
        return IncompleteError(
            f"{os.path.basename(folder)} is incomplete; nothing was written",
            found="*.distcp files of a distributed checkpoint",
            expected=".metadata",
            fix="copy that file again; its name begins with a dot",
        )
    if nemo.is_unpacked(names):
        return UnsupportedError(
            f"{folder} is an archive of NeMo, unpacked",
            found="model_config.yaml",
            expected="the .nemo file, which is read as it stands",
            fix=f"give that file, or pack it again: tar -cf model.nemo -C {folder} .",
        )
    if {".metadata", "common.pt"} <= names and "metadata.json" not in names:
        return UnsupportedError(
            f"{folder} is an incomplete torch_dist checkpoint",
            found=".metadata and common.pt",
            expected="metadata.json beside them",
            fix="copy that file again",
        )
    return None


def _recognised(folder: str) -> SourceError | None:
    """A clear refusal for formats that are known by name only."""
    try:
        refuse_unreadable(folder)
    except UnsupportedError as refusal:
        return refusal
    names = set(listing(folder))
    if refused := _part(folder, names):
        return refused
    found = fix = ""
    if ".zmetadata" in names or ".zarray" in names:
        found = "a zarr array, or several under one .zmetadata"
        fix = "give the folder above, with metadata.json and common.pt, if Megatron wrote it"
    elif "adapter_config.json" in names:
        found = "a PEFT adapter"
        fix = "merge it into its model first, and save that"
    elif "config.json" not in names and any(n.endswith(".safetensors") for n in names):
        found = "safetensors files without a config.json"
        fix = "copy the model's config.json beside them"
    if not found:
        return None
    return UnsupportedError(
        f"{folder} cannot be read as a checkpoint",
        found=found,
        expected="a checkpoint of Megatron, DeepSpeed or NeMo, or a Hugging Face folder",
        fix=fix,
    )
