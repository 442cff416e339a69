"""What DeepSpeed's checkpoints share: the files with everything but the weights.

    latest                                   text: the tag
    global_step1000/                         or another tag
        mp_rank_RR_model_states.pt           args, iteration, checkpoint_version, module, ...
        configs/*.yml                        GPT-NeoX's configuration
        [bf16_]zero_pp_rank_D_mp_rank_RR_optim_states.pt       never needed for weights
        zero_pp_rank_D_mp_rank_RR_model_states.pt              ZeRO-3: weights, in flat parts

RR counts pipeline stages and tensor-parallel ranks together, pp * TP + tp. The modules of a
pipeline are numbered, functions included, so that numbers moved from release to release:

    Megatron-DeepSpeed to 2023-07, BigScience    1 embedding, 3 ... layers, L+4 norm
    Megatron-DeepSpeed since                     1 embedding, 2 ... layers, L+2 norm, L+3 head
    GPT-NeoX                                     0 embedding, 2 ... layers, L+3 norm, L+4 head

What a module is shows in its parameters, not in its number. `numbered` gives those of layers the
prefix `layers.N.` and leaves the names of all others as they are.
(deepspeed/runtime/{engine,pipe/module}.py at 0.16.9; get_checkpoint_names of each Megatron.)
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .. import sources
from ..checkpoint import Layout, RawCheckpoint, Shard
from ..errors import CorruptError, IncompleteError, UnsupportedError
from ..replicas import AVERAGE
from ..sources import listing
from .folders import Place
from .pickles import Record
from .state_dicts import STATE, Dropped
from .torch_zip import load
from .values import plain_arguments, plain_entries, scalar, size_in, version
from .yaml_files import read_yaml

_RANK_FILE = re.compile(r"mp_rank_(\d{2,6})_model_states\.pt")
_ZERO_3 = re.compile(r"(bf16_|fp16_)?zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")
_EXPERTS = re.compile(r"layer_\d+_expert_\d+_mp_rank_\d+_model_states\.pt|expp_rank_.*\.pt")
_OPTIMIZER = re.compile(r".*_optim_states\.pt")
_OF_LAYER = re.compile(
    r"((self_)?attention|inter_attention|mlp|(input|post_attention|post_inter_attention)_(layer)?norm)\..*"
)
_CONFIGS, _MOST_CONFIGS = "configs", 64
# First module with parameters, first layer -> who numbers them so.
_WRITERS = {
    (1, 3): "Megatron-DeepSpeed to 2023-07, or BigScience",
    (1, 2): "Megatron-DeepSpeed since 2023-07",
    (0, 2): "GPT-NeoX",
}


@dataclass(frozen=True, slots=True)
class RankStates:
    """What a `mp_rank_RR_model_states.pt` says.

    Attributes:
        where: its name.
        path: its path.
        content: all of it.
        args: Megatron's or GPT-NeoX's arguments, if there are any.
    """

    where: str
    path: str
    content: Mapping[str, object]
    args: Mapping[str, object] | None


def rank_files(folder: str) -> dict[int, str]:
    """Number -> path of the rank files in a folder."""
    hits = ((_RANK_FILE.fullmatch(name), name) for name in listing(folder))
    return {int(hit[1]): os.path.join(folder, name) for hit, name in hits if hit}


def read_rank(path: str) -> RankStates:
    """One rank's file.

    Raises:
        CorruptError, UnsafePickleError: it cannot be read as data.
    """
    content = load(path)
    if not isinstance(content, dict):
        raise CorruptError(
            f"{path} is no DeepSpeed checkpoint",
            found=type(content).__name__,
            expected="a dict with args and module",
        )
    args = content.get("args")
    found = plain_arguments(args) if isinstance(args, Record) else None
    if isinstance(args, dict):
        found = {**_configs(os.path.dirname(path)), **plain_entries(args)}
    return RankStates(os.path.basename(path), path, content, found)


def _configs(folder: str) -> dict[str, object]:
    """GPT-NeoX's configuration files beside the ranks', under names with underscores."""
    folder = os.path.join(folder, _CONFIGS)
    if not sources.is_dir(folder):
        return {}
    merged: dict[str, object] = {}
    names = [name for name in listing(folder) if name.endswith((".yml", ".yaml", ".json"))]
    for name in names[:_MOST_CONFIGS]:
        path = os.path.join(folder, name)
        values = plain_entries(read_yaml(sources.read(path), path))
        merged |= {str(key).replace("-", "_"): value for key, value in values.items()}
    return merged


def refuse_unreadable(folder: str) -> None:
    """Raise for what DeepSpeed keeps elsewhere than in the files this reads.

    Raises:
        UnsupportedError: ZeRO-3's flat parts, or experts.
    """
    names = listing(folder)
    if found := [name for name in names if _ZERO_3.fullmatch(name)]:
        raise UnsupportedError(
            f"{folder} holds the weights in flat parts of ZeRO stage 3",
            found=f"{found[0]} ({len(found)} such files)",
            expected="layer files, mp_rank files with the model, or a universal checkpoint",
            fix="make it a universal checkpoint: python -m deepspeed.checkpoint.ds_to_universal",
        )
    if found := [name for name in names if _EXPERTS.fullmatch(name)]:
        raise UnsupportedError(
            "the checkpoint has parameters of a mixture of experts; mtt cannot convert those yet",
            found=found[0],
            expected="a dense GPT",
        )


def raw_checkpoint(
    name: str,
    place: Place,
    states: RankStates | None,
    *,
    layout: Layout,
    shards: Iterable[Shard],
    dropped: Dropped,
    evidence: str,
    num_files: int,
    may_lack_head: bool = False,
) -> RawCheckpoint:
    """What was found in a folder, with what the first rank's file says of it, if there is one."""
    shards = tuple(shards)
    left = _left_out(place.folder, states)
    for kind, names in dropped.items():
        left[kind] = tuple(sorted({*left.get(kind, ()), *names}))
    return RawCheckpoint(
        format=name,
        folder=place.folder,
        layout=layout,
        shards=shards,
        iteration=_iteration(place, states),
        args=shards[0].args,
        checkpoint_version=version(states.content, states.path, missing=3.0) if states else 3.0,
        is_stamped=states is not None and states.content.get("checkpoint_version") is not None,
        dropped=left,
        evidence=(evidence,),
        num_files=num_files,
        iterations=place.iterations,
        replicated=AVERAGE,  # copies of norms and biases drift apart on tensor-parallel ranks
        vocab_size=_true_vocabulary(states),
        may_lack_head=may_lack_head,
    )


def _left_out(folder: str, states: RankStates | None) -> dict[str, tuple[str, ...]]:
    """Kinds of state that are not read, with what holds them."""
    kinds: dict[str, set[str]] = {}
    content = states.content if states else {}
    for key in content:
        if (kind := STATE.get(str(key))) and content[key] is not None:
            kinds.setdefault(kind, set()).add(str(key))
    if any(_OPTIMIZER.fullmatch(name) for name in listing(folder)):
        kinds.setdefault("optimizer", set()).add("*_optim_states.pt")
    return {kind: tuple(sorted(names)) for kind, names in sorted(kinds.items())}


def tensor_parallel_size(args: Mapping[str, object] | None) -> int | None:
    """The tensor-parallel size the arguments name."""
    return size_in(args, "tensor_model_parallel_size", "model_parallel_size")


def pipeline_size(states: RankStates | None, tp: int) -> int:
    """Pipeline stages of the run that saved, as far as the files say; 1 if they do not."""
    if states is None:
        return 1
    if said := size_in(states.args, "pipeline_model_parallel_size", "pipe_parallel_size"):
        return said
    world = scalar(states.content, "mp_world_size", states.where)
    return world // tp if isinstance(world, int) and world >= tp and world % tp == 0 else 1


def _iteration(place: Place, states: RankStates | None) -> int | None:
    """The iteration the tag names, or the one the files say; a tag counts DeepSpeed's own steps."""
    if place.iteration is not None or states is None:
        return place.iteration
    said = scalar(states.content, "iteration", states.where)
    return said if isinstance(said, int) else None


def _true_vocabulary(states: RankStates | None) -> int | None:
    """Rows that are tokens, which Megatron-DeepSpeed and BigScience note since 2022."""
    for key in ("universal_checkpoint_info", "checkpoint_info"):
        info = states.content.get(key) if states else None
        size = info.get("original_vocab_size") if isinstance(info, dict) else None
        if type(size) is int and 0 < size < 2**31:
            return size
    return None


def renamed(
    hits: Mapping[str, re.Match[str]], where: str, *, has_args: bool
) -> tuple[dict[str, str], str]:
    """What parameters are called here whose names begin with their module's number.

    Args:
        hits: name -> what matched it, with the number and the rest of the name.
        where, has_args: see `numbered`.
    """
    modules: dict[int, list[str]] = defaultdict(list)
    for hit in hits.values():
        modules[int(hit[1])].append(hit[2])
    prefixes, note = numbered(modules, where, has_args=has_args)
    return {name: prefixes[int(hit[1])] + hit[2] for name, hit in hits.items()}, note


def numbered(
    modules: Mapping[int, Iterable[str]], where: str, *, has_args: bool
) -> tuple[dict[int, str], str]:
    """What a module's parameters are called here, by what they are.

    Args:
        modules: a module's number in the pipeline -> its parameters' names.
        where: the files, for messages.
        has_args: whether arguments say how many layers there are.

    Returns:
        Number -> prefix, `layers.N.` for a layer and nothing for all others; and where layers
        begin, in words.

    Raises:
        IncompleteError: a layer's number is left out, or may be.
    """
    layers = sorted(n for n, names in modules.items() if any(map(_OF_LAYER.fullmatch, names)))
    if not layers:
        raise IncompleteError(
            f"there are no layers in {where}",
            found=f"modules {', '.join(map(str, sorted(modules)))}",
            expected="modules with attention and an MLP",
        )
    first, last = layers[0], layers[-1]
    if len(layers) != last - first + 1:
        absent = next(n for n in range(first, last) if n not in layers)
        raise IncompleteError(
            "a layer is missing; nothing was written",
            found=f"{len(layers)} layers between modules {first} and {last} in {where}",
            expected=f"a layer in module {absent} of the pipeline",
            fix="copy its files again from where they were written",
        )
    if not has_args:
        _check_ends(modules, first, last, where)
    prefixes = {n: f"layers.{n - first}." if first <= n <= last else "" for n in modules}
    writer = _WRITERS.get((min(modules), first), "no release known")
    return prefixes, f"layers in modules {first} to {last} ({writer})"


def _check_ends(modules: Mapping[int, Iterable[str]], first: int, last: int, where: str) -> None:
    """Raise where the norm is not as far behind the layers as the embedding is before them.

    Modules without parameters surround the layers of every release evenly. Without arguments
    this alone shows that the first or the last layer is missing. An embedding that is tied has
    no number in a universal checkpoint.
    """
    is_neox = any(name.startswith("attention.") for name in modules[last])
    embedding = max((n for n in modules if n < first), default=0 if is_neox else 1)
    norm = min((n for n in modules if n > last), default=None)
    if norm is not None and norm - last != first - embedding:
        raise IncompleteError(
            "the first or the last layer seems to be missing; nothing was written",
            found=f"layers in modules {first} to {last}, the embedding in {embedding} and the "
            f"norm in {norm} in {where}",
            expected="the same distance on both sides",
            fix="copy all files of the tag again, mp_rank_00_model_states.pt with them: it says "
            "how many layers there are",
        )
