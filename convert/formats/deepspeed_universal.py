"""DeepSpeed's universal checkpoints: a folder for each parameter, tensor-parallel ranks merged.

    global_step1000_universal/zero/2.mlp.dense_4h_to_h.weight/fp32.pt    {"param": tensor, ...}
                                                              exp_avg.pt, exp_avg_sq.pt, step.pt
                              zero/optimizer_state.pt
                              mp_rank_00_model_states.pt                 args; its module is None

    2.self_attention...                    module 2 of a pipeline
    tied_modules.embed.word_embeddings...  modules that are used twice
    language_model.encoder...              without a pipeline

Weights are float32. The vocabulary is cut to its true size. Where a matrix has two halves, as gate
and up of a gated MLP, `param_n_sub_params` says that each was merged on its own; in older files
without it ranks stand one after another.
(deepspeed/checkpoint/ds_to_universal.py, 0.16.9.)
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from .. import sources
from ..checkpoint import Layout, RawCheckpoint, Shard
from ..errors import CorruptError, IncompleteError, InconsistentError
from ..sources import listing
from ..tensors import LazyTensor
from .deepspeed import (
    pipeline_size,
    rank_files,
    raw_checkpoint,
    read_rank,
    renamed,
    tensor_parallel_size,
)
from .folders import Place
from .state_dicts import Dropped, tensors_of
from .torch_zip import load

NAME = "deepspeed_universal"
_WEIGHTS, _ZERO = "fp32.pt", "zero"
_NUMBERED = re.compile(r"(?:sequential\.)?(0|[1-9]\d{0,6})\.(.+)")
_TIED = re.compile(r"tied_modules\.[A-Za-z_]\w{0,60}\.(.+)")
_GATED = re.compile(r"(.*\.)?mlp\.dense_h_to_4h\.(weight|bias)")

_NO_FOLDER = object()


def holds_model(folder: str) -> bool:
    """Whether the folder has folders of parameters."""
    zero = os.path.join(folder, _ZERO)
    if not sources.is_dir(zero):
        return False
    return any(sources.is_file(os.path.join(zero, name, _WEIGHTS)) for name in listing(zero))


def open_folder(place: Place, skip_keys: frozenset[str] = frozenset()) -> RawCheckpoint:
    """Read the metadata of all parameters and of the first rank.

    Args:
        place: the folder of one tag.
        skip_keys: of no use here: beside the model, tensors are known state.

    Raises:
        IncompleteError: a parameter's weights are missing, or what says how to join them.
        CorruptError, UnsafePickleError: a file cannot be read as data.
    """
    folder = place.folder
    numbers = rank_files(folder)
    states = read_rank(numbers[min(numbers)]) if numbers else None
    args = dict(states.args) if states and states.args is not None else None
    tp = tensor_parallel_size(args) or 1
    gated = args is not None and args.get("swiglu") is True
    dropped: Dropped = defaultdict(list, optimizer=["exp_avg.pt and the like"])
    named, unmarked = _parameters(os.path.join(folder, _ZERO), tp if gated else 1, dropped)
    if args is None:
        _check_halves(unmarked, named, folder)
    tensors, note = _renamed(named, folder, has_args=args is not None)
    for name, tensor in tensors.items():
        if args is not None and name.endswith("word_embeddings.weight") and tensor.shape:
            args["padded_vocab_size"] = tensor.shape[0]
    return raw_checkpoint(
        NAME,
        place,
        states,
        layout=Layout(tp, pipeline_size(states, tp)),
        shards=[Shard(f"{_ZERO}/*/{_WEIGHTS}", tensors, args)],
        dropped=dropped,
        evidence=f"{len(named)} folders with {_WEIGHTS} in {_ZERO}, {note}",
        num_files=len(named),
        may_lack_head=True,
    )


def _parameters(
    zero: str, tp: int, dropped: Dropped
) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    """Name -> whole parameter; and which may have the halves of several ranks in turn."""
    tensors: dict[str, LazyTensor] = {}
    unmarked = []
    folders = [os.path.join(zero, name) for name in listing(zero)]
    for folder, content in zip(folders, sources.each(_parameter, folders), strict=True):
        if content is _NO_FOLDER:
            continue
        name, path = os.path.basename(folder), os.path.join(folder, _WEIGHTS)
        if not isinstance(content, dict) or not isinstance(content.get("param"), LazyTensor):
            raise CorruptError(
                f"{path} is no parameter of a universal checkpoint",
                found=type(content).__name__,
                expected="a dict with the tensor param",
            )
        for tensor in tensors_of({name: content["param"]}, name, path, dropped).values():
            tensors[name] = _halves_joined(name, tensor, content, tp)
        if _GATED.fullmatch(name) and content.get("param_n_sub_params") != 2:
            unmarked.append(name)
    return tensors, tuple(unmarked)


def _parameter(folder: str) -> object:
    """What a parameter's file holds; `_NO_FOLDER` if it is none."""
    if not sources.is_dir(folder):
        return _NO_FOLDER
    path = os.path.join(folder, _WEIGHTS)
    if not sources.is_file(path):
        raise IncompleteError(
            f"{folder} has no weights; nothing was written",
            found=", ".join(listing(folder)[:4]) or "an empty folder",
            expected=_WEIGHTS,
            fix="copy that file again",
        )
    return load(path)


def _check_halves(unmarked: Iterable[str], named: Mapping[str, LazyTensor], folder: str) -> None:
    """Raise for a gated matrix of which nothing says on how many ranks its halves were."""
    for name in unmarked:
        other = named.get(name.replace("dense_h_to_4h", "dense_4h_to_h"))
        if other is not None and other.shape[1:] == (named[name].shape[0] // 2,):
            raise IncompleteError(
                f"{os.path.basename(folder)} does not say how many ranks hold gate and up in turn",
                found=f"{name} without param_n_sub_params, and no rank's file",
                expected="mp_rank_00_model_states.pt",
                fix="copy that file again",
            )


def _halves_joined(
    name: str, tensor: LazyTensor, content: Mapping[str, object], tp: int
) -> LazyTensor:
    """A gated matrix as [gate | up] where ranks' [gate_r | up_r] stand one after another."""
    merged = content.get("param_n_sub_params") == 2
    if merged or tp == 1 or not _GATED.fullmatch(name) or tensor.shape[0] % (2 * tp):
        return tensor
    size = tensor.shape[0] // (2 * tp)
    rest = range(3, len(tensor.shape) + 2)
    return tensor.unflatten(0, tp, 2, size).permute(1, 0, 2, *rest).flatten(0, 3)


def _renamed(
    named: Mapping[str, LazyTensor], folder: str, *, has_args: bool
) -> tuple[dict[str, LazyTensor], str]:
    """Names as files of layers have them, or as they are where no module has a number."""
    hits = {name: hit for name in named if (hit := _NUMBERED.fullmatch(name))}
    if not hits:
        return dict(named), "no pipeline"
    names, note = renamed(hits, folder, has_args=has_args)
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in named.items():
        tied = _TIED.fullmatch(name)
        new = names.get(name) or (tied[1] if tied else name)
        if new in tensors:
            raise InconsistentError(
                "two modules of the pipeline have one parameter; nothing was written",
                found=f"{name}, and another {new}",
                expected="every parameter once",
            )
        tensors[new] = tensor
    return tensors, note
