"""Layers that predict further tokens, left out of a checkpoint as it was opened."""

from __future__ import annotations

from dataclasses import replace

from .checkpoint import Checkpoint

_PREFIX = "mtp."


def without_mtp(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without these layers, and without the copies that were stored for them.

    What the model predicts for the next token does not change. A warning says how many there were;
    where there are none, the checkpoint is returned as it is.
    """
    count = checkpoint.architecture.mtp_num_layers
    if not count:
        return checkpoint
    names = tuple(name for name in checkpoint.tensors if name.startswith(_PREFIX))
    layers = (
        "1 layer that predicts a further token was"
        if count == 1
        else (f"{count} layers that predict further tokens were")
    )
    return replace(
        checkpoint,
        architecture=replace(checkpoint.architecture, mtp_num_layers=0),
        tensors={n: tensor for n, tensor in checkpoint.tensors.items() if n not in names},
        replicas=tuple(
            group
            for group in checkpoint.replicas
            if not group.within and not group.name.startswith(_PREFIX)
        ),
        dropped={**checkpoint.dropped, "layers for further tokens": names},
        warnings=(*checkpoint.warnings, f"{layers} left out, as asked for"),
    )
