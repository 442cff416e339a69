"""State dicts as they were pickled: dotted names and tensors, and what is no part of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..errors import CorruptError, MappingError, UnsupportedError
from ..tensors import LazyTensor
from . import float8
from .pickles import Stub, is_opaque

# Top-level entries of a rank's file beside the model -> what they are.
STATE = {
    "optimizer": "optimizer",
    "opt_param_scheduler": "optimizer",
    "lr_scheduler": "optimizer",
    "rng_state": "rng",
    "random_rng_state": "rng",
    "np_rng_state": "rng",
    "torch_rng_state": "rng",
    "cuda_rng_state": "rng",
    "rng_tracker_states": "rng",
    "rerun_state_machine": "rerun state",
}
_BUFFERS = {"_extra_state": "_extra_state", "inv_freq": "inv_freq"}
_MAX_DEPTH = 6
Dropped = dict[str, list[str]]


def tensors_of(
    model: Mapping[str, object], where: str, path: str, dropped: Dropped
) -> dict[str, LazyTensor]:
    """Dotted names and tensors of a flat or nested state dict.

    Args:
        model: the state dict.
        where, path: the file, as short messages name it and in full.
        dropped: takes the names of buffers that are no weights, by kind.

    Raises:
        UnsupportedError: weights that are quantized, or objects of unknown classes.
        MappingError: one parameter stands there twice.
        CorruptError: something else than tensors.
    """
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in _flatten(model, where, path, dropped):
        if name in tensors:
            raise MappingError(
                f"{path} has one parameter twice; nothing was written",
                found=f"nested and dotted: {name}",
                expected="every parameter once",
            )
        tensors[name] = tensor
    return tensors


def _flatten(
    model: Mapping[str, object], where: str, path: str, dropped: Dropped
) -> Iterator[tuple[str, LazyTensor]]:
    for name, value in _leaves(model, path):
        kind = _BUFFERS.get(name.rpartition(".")[2])
        if isinstance(value, Stub):
            value = float8.weight_of(value, name, where) or value
        if kind:
            dropped[kind].append(name)
        elif isinstance(value, LazyTensor) and value.dtype.is_floating and value.dtype.itemsize > 1:
            yield name, value
        elif isinstance(value, LazyTensor) or is_opaque(value):
            raise UnsupportedError(
                f"{name} in {where} is no plain weight; nothing was written",
                found=str(value.dtype) if isinstance(value, LazyTensor) else repr(value)[:200],
                expected="float32, bfloat16 or float16, or fp8 with its scales",
                fix="save the checkpoint with plain weights",
            )
        elif value is not None:
            found = f"a {type(value).__name__}"
            raise CorruptError(f"{name} in {where} is no tensor", found=found)


def _leaves(
    model: Mapping[str, object], path: str, prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, object]]:
    if depth > _MAX_DEPTH:
        raise CorruptError(f"{path} nests its model too deeply", found=prefix[:80])
    for key, value in model.items():
        if not isinstance(key, str):
            raise CorruptError(f"{path} has parameters without names", found=prefix[:80])
        name = prefix + key
        if isinstance(value, dict):
            yield from _leaves(value, path, f"{name}.", depth + 1)
        else:
            yield name, value
