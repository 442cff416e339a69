"""Megatron's `torch_dcp` and `fsdp_dtensor` formats: its state dict, saved by torch alone.

    iter_0001000/.metadata      tensors, objects, their chunks and places: see `dcp.py`
                 __R_W.distcp   the chunks; also args, iteration and checkpoint_version, as objects

                torch_dcp (torch FSDP2)             fsdp_dtensor (Megatron-FSDP)
    names       model.decoder.layers.0...           model.module.decoder.layers.0...
    gated fc1   mlp.linear_fc1.weight               mlp.linear_fc1.weight_w (gate), weight_v (up)

Names are those of the modules, so both dialects of Megatron-Core occur. There is neither a
`common.pt` nor a `metadata.json`. Weights of `fsdp_dtensor` are float32 whatever the model
computes in. (megatron/training/checkpointing.py and
megatron/core/transformer/fsdp_dtensor_checkpoint.py, core 0.16.1.)
"""

from __future__ import annotations

import os
import re
from collections import defaultdict

from .. import sources
from ..checkpoint import RawCheckpoint
from ..errors import MappingError, UnsupportedError
from ..mapping import shorten
from ..tensors import LazyTensor
from .dcp import METADATA, DistributedCheckpoint, open_metadata
from .folders import Place
from .megatron_torch_dist import join_gated, raw_checkpoint
from .values import iteration, plain_arguments, version

NAME = "torch_dcp"
_FSDP = "fsdp_dtensor"
_MODEL = re.compile(r"model\.(?P<wrapper>module\.)*(?P<name>.+)")
_CHUNKED = re.compile(r"model\d+\..*")
_STATE = {
    "optimizer": "optimizer",
    "opt_param_scheduler": "optimizer",
    "rng_state": "rng",
    "rerun_state_machine": "rerun state",
    "rerun_state_machine_state": "rerun state",
}
_OBJECTS = ("args", "iteration", "checkpoint_version")


def holds_model(folder: str) -> bool:
    """Whether the folder has torch's metadata, and none of Megatron-Core's beside it."""

    def has(name: str) -> bool:
        return sources.is_file(os.path.join(folder, name))

    return has(METADATA) and not has("metadata.json") and not has("common.pt")


def open_folder(place: Place, skip_keys: frozenset[str] = frozenset()) -> RawCheckpoint:
    """Read the metadata of one iteration; of the `.distcp` files only their directories.

    Raises:
        IncompleteError: chunks of a tensor, or files, are missing.
        MappingError: a tensor that is neither the model's nor of a known kind of state.
        UnsupportedError: it is of another program, has several model chunks, or no plain weights.
        CorruptError, UnsafePickleError: metadata that cannot be read as data.
    """
    stored = open_metadata(place.folder)
    names, dropped = _sort(stored, skip_keys)
    tensors: dict[str, LazyTensor] = {}
    is_wrapped = False
    for name, tensor in stored.tensors(names).items():
        hit = _MODEL.fullmatch(name)
        assert hit is not None, name
        is_wrapped |= hit["wrapper"] is not None
        if hit["name"] in tensors:
            raise MappingError(
                f"{place.folder} has one parameter twice; nothing was written",
                found=name,
                expected="every parameter once",
            )
        tensors[hit["name"]] = tensor
    content = {
        name: stored.object(name)
        for name in _OBJECTS
        if name in stored.entries and not stored.is_tensor(name)
    }
    where = os.path.join(place.folder, METADATA)
    joined = join_gated(tensors)
    is_fsdp = is_wrapped or len(joined) < len(tensors)
    prefix = "model.module." if is_wrapped else "model."
    writer = "Megatron-FSDP" if is_fsdp else "torch FSDP2"
    return raw_checkpoint(
        _FSDP if is_fsdp else NAME,
        place,
        (joined, dropped),
        arguments=plain_arguments(content.get("args")),
        iteration=iteration(content, place, where),
        checkpoint_version=version(content, where, missing=3.0),
        evidence=(
            ".metadata without metadata.json and common.pt",
            f"names begin with {prefix}, as {writer} saves them",
        ),
    )


def _sort(
    stored: DistributedCheckpoint, skip_keys: frozenset[str]
) -> tuple[list[str], dict[str, list[str]]]:
    """The names of the model's tensors, and what is left out, by kind."""
    names: list[str] = []
    others: list[str] = []
    dropped: dict[str, list[str]] = defaultdict(list)
    for name in stored.entries:
        root = name.partition(".")[0]
        if name.endswith("._extra_state"):
            dropped["_extra_state"].append(name)
        elif root in _STATE:
            dropped[_STATE[root]].append(name)
        elif _MODEL.fullmatch(name) and stored.is_tensor(name):
            names.append(name)
        elif name in skip_keys:
            dropped["skipped"].append(name)
        elif _MODEL.fullmatch(name):
            raise UnsupportedError(
                f"{name} is not stored as a tensor; nothing was written",
                found=stored.entries[name].qualified,
                expected="a tensor",
                fix=f"leave it out with --skip-key {name}, if it is not part of the model",
            )
        elif stored.is_tensor(name):
            others.append(name)
    _check_others(stored, names, others)
    return names, dropped


def _check_others(stored: DistributedCheckpoint, names: list[str], others: list[str]) -> None:
    """Refuse state dicts that are not as Megatron writes them."""
    if chunked := [name for name in others if _CHUNKED.fullmatch(name)]:
        raise UnsupportedError(
            f"{stored.folder} holds several model chunks, whose layers are numbered apart",
            found=shorten(chunked, 2),
            expected="one model, under model.",
            fix="save it without virtual pipeline stages, or as torch_dist",
        )
    if not names:
        raise UnsupportedError(
            f"{stored.folder} is a torch.distributed checkpoint, but none of Megatron's",
            found=shorten(stored.entries, 4) or "no entries",
            expected="names like model.decoder.layers.0.self_attention.linear_qkv.weight",
            fix="copy metadata.json and common.pt too, if it is one of the torch_dist format",
        )
    if others:
        raise MappingError(
            f"{stored.folder} has tensors that are not under model.; nothing was written",
            found=shorten(others, 4),
            expected="tensors under model. only, beside optimizer and random state",
            fix=f"leave it out with --skip-key {others[0]}, if it is not part of the model",
        )
