"""Checkpoints of formats and layouts that no golden has, cut from those that there are.

Everything is done with torch on files that real code wrote; mtt only converts the result. The
model, and so its bytes and logits, stay those of the golden it was made from.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from unittest import mock

import torch

import mtt_convert

State = dict[str, Any]
COLUMN = ("query_key_value.", "dense_h_to_4h.", "word_embeddings.weight", "lm_head.", "linear1.")
COLUMN += ("final_linear.", "mlp.w1.", "mlp.w3.", ".query.", ".key_value.")
ROW = ("attention.dense.weight", "dense_4h_to_h.weight", "linear2.weight", "mlp.w2.weight")


class _Object:
    """An object of a class that is not here."""

    def __init__(self, *args: object) -> None:
        self.args = args

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), self.args


class _Module(ModuleType):
    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (_Object,), {"__module__": self.__name__}))
        return self.__dict__[name]


_ABSENT = """
    deepspeed deepspeed.runtime deepspeed.runtime.fp16 deepspeed.runtime.fp16.loss_scaler
    deepspeed.runtime.zero deepspeed.runtime.zero.config deepspeed.utils
    deepspeed.utils.tensor_fragment megatron megatron.core megatron.core.enums
    megatron.core.transformer megatron.core.transformer.enums megatron.enums megatron.fp16
    megatron.core.rerun_state_machine megatron.fp16.loss_scaler megatron.model
    megatron.model.enums
""".split()
_MODULES = {name: _Module(name) for name in _ABSENT}


@contextlib.contextmanager
def _absent_modules() -> Iterator[None]:
    with mock.patch.dict(sys.modules, _MODULES):
        yield


def read(path: Path) -> Any:
    """An object of torch.save, whatever it names."""
    with _absent_modules():
        return torch.load(path, weights_only=False, map_location="cpu")


def write(value: Any, path: Path, *, zipped: bool = True) -> None:
    """The same, back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _absent_modules():
        torch.save(value, path, _use_new_zipfile_serialization=zipped)


@contextlib.contextmanager
def edited(path: Path, *, zipped: bool = True) -> Iterator[Any]:
    """An object whose changes go back to the file."""
    value = read(path)
    yield value
    write(value, path, zipped=zipped)


def copied(golden: Path, target: Path) -> Path:
    """A checkpoint to change at will."""
    return Path(shutil.copytree(golden, target))


def layer_files(folder: Path) -> dict[tuple[int, int], Path]:
    """(module, rank) -> file."""
    hits = [(re.fullmatch(r"layer_(\d+)-model_(\d+)-.*", p.name), p) for p in folder.iterdir()]
    return {(int(hit[1]), int(hit[2])): path for hit, path in hits if hit}


def split(name: str, value: torch.Tensor, tp: int) -> list[torch.Tensor]:
    """A whole tensor as ranks hold it; replicated ones are copied."""
    if any(part in name for part in COLUMN):
        return [part.clone() for part in value.chunk(tp, 0)]
    if any(part in name for part in ROW):
        return [part.clone() for part in value.chunk(tp, 1)]
    return [value.clone() for _ in range(tp)]


def resharded(root: Path, target: Path, tp: int, changes: Mapping[str, Any] | None = None) -> Path:
    """A TP1 checkpoint of layer files as one of more ranks.

    Args:
        root: the checkpoint, with one tag.
        target: where to.
        tp: ranks.
        changes: a part of a name -> function of (whole tensor, ranks) that cuts it instead.
    """
    (tag,) = (path for path in root.iterdir() if path.is_dir())
    for (module, _), path in layer_files(tag).items():
        states: list[State] = [{} for _ in range(tp)]
        for name, value in read(path).items():
            cut = next((c for part, c in (changes or {}).items() if part in name), None)
            parts = cut(value, tp) if cut else split(name, value, tp)
            for state, part in zip(states, parts, strict=True):
                state[name] = part
        for rank, state in enumerate(states):
            write(state, target / tag.name / f"layer_{module:02d}-model_{rank:02d}-model_states.pt")
    states_file = read(tag / "mp_rank_00_model_states.pt")
    states_file["mp_world_size"] = tp
    if not isinstance(states_file["args"], dict):
        states_file["args"].tensor_model_parallel_size = tp
    for rank in range(tp):
        write(states_file, target / tag.name / f"mp_rank_{rank:02d}_model_states.pt")
    (target / "latest").write_text(tag.name)
    return target


def whole_module(folder: Path, module: int) -> State:
    """A module of Megatron-DeepSpeed's llama golden, its two ranks joined."""
    states = [read(layer_files(folder)[module, rank]) for rank in (0, 1)]
    whole = {}
    for name, first in states[0].items():
        parts = [state[name] for state in states]
        if "norm" in name or name == "weight":
            whole[name] = first
        elif "dense_h_to_4h" in name:
            whole[name] = torch.cat([p.chunk(2)[half] for half in (0, 1) for p in parts])
        else:
            whole[name] = torch.cat(parts, int("dense" in name))
    return whole


def head_to_block(rows: torch.Tensor, heads: int, groups: int) -> torch.Tensor:
    """Rows by head as all queries, all keys, all values."""
    size = rows.shape[0] // (heads + 2 * groups)
    each = rows.view(groups, heads // groups + 2, size, *rows.shape[1:])
    parts = (each[:, :-2], each[:, -2:-1], each[:, -1:])
    return torch.cat([part.reshape(-1, *rows.shape[1:]) for part in parts])


def head_to_element(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows by head as query, key and value of each channel side by side."""
    size = rows.shape[0] // (3 * heads)
    each = rows.view(heads, 3, size, *rows.shape[1:])
    return each.transpose(1, 2).reshape(rows.shape).contiguous()


def digest(source: Path, target: Path, **options: Any) -> str:
    """A hash of the safetensors file that a checkpoint becomes."""
    options = {"tokenizer": "none", "overrides": {"vocab_size": 497}, **options}
    mtt_convert.convert(source, target, **options)
    return hashlib.sha256((target / "model.safetensors").read_bytes()).hexdigest()
