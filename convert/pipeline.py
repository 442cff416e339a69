"""From a path to a written folder; read this file first.

    formats.find        which format is it, which folder           bytes on disk
    reader.open_folder  shards, names as in the files              -> RawCheckpoint
    experts             every expert under a name with its number
    dialects            canonical names, and which generation has the files' own
    topology, row_order     layer numbers, order of rows, joins        -> Checkpoint
    hf_source           all of this for a Hugging Face folder      -> Checkpoint
    hf_folder           names and re-layouts of a family, files    -> Conversion, with its plan
    megatron_folder     ranks' parts, arguments, files             -> or this one
    execute.run         bytes                                      -> sink

Until the last line nothing but metadata is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypedDict, Unpack

from . import (
    dialects,
    experts,
    formats,
    hf_folder,
    hf_source,
    megatron_folder,
    parameters,
    replicas,
    row_order,
    sources,
    topology,
)
from .architecture import Architecture
from .arguments import (
    architecture_from_args,
    architecture_from_shapes,
    low_precision,
    notes,
    unknown_arguments,
)
from .bert_arguments import bert_architecture
from .checkpoint import Checkpoint, RawCheckpoint
from .conversion import Conversion
from .dialects import foreign
from .documents import source_facts
from .dropping import without_mtp
from .errors import InconsistentError, UsageError
from .execute import Progress, run
from .formats import epfl, float8
from .hub import is_hub, parse_place
from .hub_target import HubSink
from .manifest import ALGORITHMS
from .mapping import shorten
from .part_target import PartSink
from .parts import Part, parse_part
from .target import FolderSink
from .unchanged import is_same
from .work import work_of_folder


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    iteration: int | None = None,
    overrides: Mapping[str, object] | None = None,
    skip_keys: Iterable[str] = (),
    qkv_order: str = row_order.AUTO,
) -> Checkpoint:
    """Open a checkpoint: its metadata under canonical names, no tensor bytes.

    Args:
        path: Megatron's `--save` folder, or one iteration in it, or a Hugging Face folder; a
            path, `hf://owner/repo[@revision][/folder]`, or a URL that fsspec knows.
        iteration: which one; None follows the tracker file.
        overrides: Megatron arguments that replace or complete those in the checkpoint.
        skip_keys: entries that are not part of the model and may be left out.
        qkv_order: the order of the rows of query_key_value on each rank, where the checkpoint is
            wrong about it: `head`, `block` or `element` (see `row_order.py`); `auto` believes it.

    Raises:
        SourceError: it cannot be used; the subclass and message say why.
        HubError: it cannot be reached.
        UsageError: something only the user knows is missing.
    """
    path = sources.begin(os.fspath(path))
    row_order.check_choice(qkv_order)
    if hf_source.is_hf_folder(path):
        if qkv_order != row_order.AUTO:
            raise UsageError(
                "an order of rows is only for a Megatron source",
                found=f"{path}, a Hugging Face folder",
                fix="leave out --qkv-order",
            )
        return hf_source.open_hf_folder(
            path, iteration=iteration, overrides=overrides, skip_keys=skip_keys
        )
    reader, place = formats.find(path, iteration)
    raw = reader.open_folder(place, frozenset(skip_keys))
    if epfl.is_epfl(raw):
        raw = epfl.in_core_words(raw)
    raw = replace(raw, shards=experts.numbered(raw.shards))
    names = {name for shard in raw.shards for name in shard.tensors}
    foreign.refuse(raw.shards, raw.args)
    dialect = dialects.detect(raw.shards)
    shards = dialects.canonical(dialect, raw.shards)
    overrides = overrides or {}
    if raw.args is None and dialect.has_tied_copy(names):
        overrides = {"untie_embeddings_and_output_weights": False, **overrides}
    tp, etp = (1 + max(getattr(s, rank) for s in shards) for rank in ("tp", "expert_tp"))
    numbered, idle = topology.without_idle_heads(topology.number_layers(shards))
    held = topology.holders(numbered)
    shapes = topology.joined_shapes(held, tp, etp)
    remarks: tuple[str, ...] = ()
    if dialect.arguments:
        args, remarks = dialect.arguments(raw.args or {}, shapes, overrides)
        shards = [replace(shard, args=None) for shard in raw.shards]
        raw = replace(raw, args=args, shards=tuple(shards))
    architecture = _architecture(raw, shapes, overrides, dialect)
    order, reason = _row_order(raw, dialect, names, architecture, qkv_order)
    held = row_order.in_head_order(held, order, architecture, raw.layout.tp, tp)
    if raw.has_up_first or dialect.has_up_first(names):
        held = row_order.gate_first(held, architecture, raw.layout.tp, tp)
    tensors, copies = topology.join(held, tp, etp, architecture, dialect.summed)
    parameters.check_complete({n: t.shape for n, t in tensors.items()}, architecture)
    tied = topology.TIED_HEAD in held and topology.TIED_HEAD not in tensors
    left_out = {
        "tied copy": (topology.TIED_HEAD,) if tied else (),
        "second name": tuple(name for name in held if name in parameters.COPIES),
        "idle head": idle,
    }
    dropped = dict(raw.dropped) | {kind: found for kind, found in left_out.items() if found}
    generation, shown = dialect.generation(names)
    return Checkpoint(
        format=raw.format,
        folder=raw.folder,
        layout=raw.layout,
        dialect=dialect.name,
        generation=generation,
        architecture=architecture,
        tensors={name: tensors[name] for name in parameters.expected(architecture)},
        iteration=raw.iteration,
        args=raw.args or {},
        replicas=copies,
        dropped=dropped,
        warnings=(
            *float8.note(tensors.values()),
            *remarks,
            *notes(raw.args or {}, overrides),
            *_unknown_arguments(raw),
            *low_precision(raw.args or {}),
        ),
        evidence=(*raw.evidence, f"names like {shown}", reason),
        num_files=raw.num_files,
        iterations=raw.iterations,
        replicated=raw.replicated,
    )


def _row_order(
    raw: RawCheckpoint,
    dialect: dialects.Dialect,
    names: Iterable[str],
    architecture: Architecture,
    choice: str,
) -> tuple[str, str]:
    """The order of the rows of query_key_value on a rank, and why it is taken to be that."""
    if choice != row_order.AUTO:
        return choice, f"rows of query_key_value by {choice}, as asked for"
    grouped = architecture.num_query_groups != architecture.num_attention_heads
    order, reason = dialect.qkv_order(
        names, raw.args or {}, raw.checkpoint_version, is_stamped=raw.is_stamped, grouped=grouped
    )
    return order, f"{reason}: rows of query_key_value by {order}"


def _architecture(
    raw: RawCheckpoint,
    shapes: Mapping[str, tuple[int, ...]],
    overrides: Mapping[str, object],
    dialect: dialects.Dialect,
) -> Architecture:
    legacy = not dialect.is_core

    def read(args: Mapping[str, object]) -> Architecture:
        found = architecture_from_args(
            args, overrides=overrides, legacy=legacy, shapes=dict(shapes)
        )
        return finish(found, args)

    def finish(found: Architecture, args: Mapping[str, object]) -> Architecture:
        if dialect.kind != "bert":
            return found
        return bert_architecture(found, args, overrides, shapes, legacy=legacy)

    rows = shapes.get("embedding.word_embeddings.weight", (0,))[0]
    if raw.vocab_size is not None and raw.vocab_size <= rows:
        overrides = {"vocab_size": raw.vocab_size, **overrides}
    if raw.args is None:
        may_lack = raw.may_lack_head
        return finish(architecture_from_shapes(shapes, overrides, may_lack_head=may_lack), {})
    if rows and not isinstance(raw.args.get("padded_vocab_size"), int):
        overrides = {"padded_vocab_size": rows, **overrides}
    first = read(raw.args)
    for shard in raw.shards:
        if shard.args is None or shard.args is raw.args:
            continue
        other = read(shard.args)
        if other != first:
            names = [n for n in first.__dataclass_fields__ if _value(first, n) != _value(other, n)]
            raise InconsistentError(
                "ranks disagree about the model; nothing was written",
                found=", ".join(f"{n} = {_value(other, n)}" for n in names) + f" in {shard.where}",
                expected=", ".join(f"{n} = {_value(first, n)}" for n in names)
                + f", as in {raw.shards[0].where}",
                fix="use files of one and the same run",
            )
    return first


def _value(architecture: Architecture, name: str) -> object:
    return getattr(architecture, name)


def _unknown_arguments(raw: RawCheckpoint) -> list[str]:
    unknown = unknown_arguments(raw.args or {})
    if not unknown:
        return []
    return [
        f"the checkpoint has arguments mtt does not know: {shorten(unknown)}; "
        "if one of them changes what the model computes, the result is wrong"
    ]


FORMATS = ("hf", *megatron_folder.FORMATS)


class LayoutOptions(TypedDict, total=False):
    """Options of a Megatron target; None is as good as absent."""

    tp: int | None
    pp: int | None
    vpp: int | None
    ep: int | None
    etp: int | None
    pipeline_model_parallel_layout: str | None
    transformer_impl: str | None
    make_vocab_size_divisible_by: int | None


@dataclass(frozen=True, slots=True)
class Result:
    """What `convert` did.

    Attributes:
        output: the folder, or the URL on the Hub.
        conversion: the checkpoint and its plan.
        hashes: file -> tensor -> hash, of the files of this part.
        unchanged: whether all of it was there before.
        num_bytes: what was written now, in weight files.
        part: which part of the conversion this was, if it was one.
        num_complete: how many parts are written.
        whole: whether the output is.
    """

    output: str
    conversion: Conversion
    hashes: Mapping[str, Mapping[str, str]]
    unchanged: bool = False
    num_bytes: int = 0
    part: Part | None = None
    num_complete: int = 0
    whole: bool = True


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str = "hf",
    iteration: int | None = None,
    overrides: Mapping[str, object] | None = None,
    skip_keys: Iterable[str] = (),
    model_type: str = "mtt",
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    vocab_padding: str | None = None,
    tokenizer: str | None = None,
    replicated: str | None = None,
    qkv_order: str = row_order.AUTO,
    drop_mtp: bool = False,
    num_workers: int = 1,
    overwrite: bool = False,
    keep_same: bool = False,
    resume: bool = False,
    private: bool = False,
    create_pr: bool = False,
    part: str | None = None,
    hash_name: str = "xxh3",
    progress: Progress | None = None,
    **layout: Unpack[LayoutOptions],
) -> Result:
    """Convert a checkpoint to a Hugging Face folder, or to a Megatron checkpoint of any layout.

    A target on the Hub gets file by file while it is converted, with at most two files on the
    disk, in `$HF_HOME/mtt`, and shows all of them at the end. It is left alone if it holds exactly
    what would be written.

    Args:
        source: see `open_checkpoint`, with `iteration`, `overrides`, `skip_keys` and `qkv_order`.
        target: an empty or new folder, or `hf://owner/repo[@branch]`.
        to: `hf`, `torch` or `torch_dist`.
        model_type: see `hf_folder.plan_conversion`; only for `hf`.
        dtype, max_shard_size, vocab_padding, tokenizer: see `plan_conversion` of `hf_folder` and
            `megatron_folder`.
        replicated: `error` if ranks hold different copies of a parameter, or take the `first` or
            the `average`; None: `average` for DeepSpeed's checkpoints, else `error`.
        num_workers: threads that write. Each holds about 4 MB; where there are more cores than
            workers, another thread reads for it, and both hold 8 MB. A target on the Hub has one
            that converts.
        drop_mtp: leave out layers that predict further tokens.
        overwrite: replace an earlier conversion in `target`.
        keep_same: leave a folder alone that holds exactly what would be written.
        resume: go on with a conversion or an upload that was interrupted, and keep what this one
            has finished if it fails.
        private, create_pr: hide a repository that is made, and open a pull request; only for a
            target on the Hub.
        part: write only the files of one part: `3/8`, or `auto` for the one of this process under
            torchrun, srun or mpirun. The last of the parts makes the folder whole. See
            `docs/scale.md`.
        hash_name: `xxh3`, `sha256` or `none`.
        progress: called with (bytes done, bytes in all); bytes uploaded, if to the Hub.
        layout: see `megatron_folder.plan_conversion`; only for `torch` and `torch_dist`.

    Raises:
        SourceError, TargetError, UsageError: nothing that looks whole is left behind.
        HubError: the same; what was uploaded stays for `resume`.
    """
    share = None if part is None else parse_part(part)
    source, target = os.fspath(source), os.fspath(target)
    _check_choice("target format", to, FORMATS)
    replicas.check_choice(replicated)
    _check_choice("hash", hash_name, tuple(ALGORITHMS))
    if num_workers < 1:
        raise UsageError("no workers", found=str(num_workers), expected="at least 1")
    upload = {"private": private, "create_pr": create_pr}
    check_target(source, target, upload, {"overwrite": overwrite} if share else None)
    checkpoint = open_checkpoint(
        source,
        iteration=iteration,
        overrides=overrides,
        skip_keys=skip_keys,
        qkv_order=qkv_order,
    )
    checkpoint = without_mtp(checkpoint) if drop_mtp else checkpoint
    checkpoint, policy = replicas.settle(checkpoint, replicated)
    conversion = plan_conversion(
        checkpoint,
        to=to,
        model_type=model_type,
        dtype=dtype,
        max_shard_size=max_shard_size,
        vocab_padding=vocab_padding,
        tokenizer=tokenizer,
        **layout,
    )
    sink = _sink(
        target,
        conversion,
        ALGORITHMS[hash_name],
        policy,
        share=share,
        overwrite=overwrite,
        keep_same=keep_same,
        resume=resume,
        num_workers=num_workers,
        progress=progress,
        **upload,
    )
    if isinstance(sink, HubSink):
        num_workers, progress = sink.max_workers, None
    with sink:
        differences = replicas.compare(sink.pending.replicas, policy)
        run(
            sink.pending,
            sink,
            num_workers=num_workers,
            algorithm=ALGORITHMS[hash_name],
            progress=progress,
            file_by_file=resume or isinstance(sink, HubSink),
        )
        sink.finish()
    hashes = {name: file["tensors"] for name, file in sink.manifest["files"].items()}
    conversion = replace(conversion, warnings=(*conversion.warnings, *differences))
    result = Result(sink.place, conversion, hashes, sink.unchanged, sink.pending.num_bytes)
    if isinstance(sink, PartSink):
        return replace(result, part=share, num_complete=sink.num_complete, whole=sink.whole)
    return result


def _sink(
    target: str,
    conversion: Conversion,
    algorithm: str,
    policy: str,
    *,
    share: Part | None,
    overwrite: bool,
    keep_same: bool,
    resume: bool,
    num_workers: int,
    progress: Progress | None,
    **upload: bool,
) -> FolderSink | PartSink | HubSink:
    """What takes the files: a branch on the Hub, a part of a folder, or a folder.

    Args:
        policy: what becomes of copies that differ; see `replicas.settle`.
        share: which part, if it is one; for the other arguments see `convert`.
    """
    plan, facts = conversion.plan, source_facts(conversion.checkpoint)
    if is_hub(target):
        return HubSink(
            parse_place(target),
            plan,
            facts,
            algorithm,
            overwrite=overwrite,
            resume=resume,
            num_workers=num_workers,
            progress=progress,
            **upload,
        )
    work = work_of_folder(plan, conversion.checkpoint.folder, algorithm, policy, facts)
    if share is not None:
        return PartSink(target, plan, facts, algorithm, part=share, work=work, resume=resume)

    def unchanged(there: Mapping[str, Any]) -> bool:
        return is_same(there, plan, facts, algorithm, num_workers=num_workers, progress=progress)

    return FolderSink(
        target,
        plan,
        facts,
        algorithm,
        work=work,
        overwrite=overwrite,
        resume=resume,
        is_same=unchanged if keep_same else None,
    )


def plan_conversion(
    checkpoint: Checkpoint,
    *,
    to: str = "hf",
    model_type: str = "mtt",
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    vocab_padding: str | None = None,
    tokenizer: str | None = None,
    **layout: Unpack[LayoutOptions],
) -> Conversion:
    """Decide everything about a conversion; nothing is written. For arguments see `convert`.

    Raises:
        UsageError: options that contradict each other or the checkpoint.
        SourceError: the target cannot represent the model.
    """
    _check_choice("target format", to, FORMATS)
    if to == "hf" and (given := [name for name, value in layout.items() if value is not None]):
        raise UsageError(
            f"{', '.join(given)}: a layout is only for a Megatron target",
            expected="a Hugging Face folder has no layout",
            fix=f"leave out {', '.join(given)}, or convert to torch or torch_dist",
        )
    common: dict[str, Any] = {
        "dtype": dtype,
        "max_shard_size": max_shard_size,
        "vocab_padding": vocab_padding,
        "tokenizer": tokenizer,
    }
    if to == "hf":
        return hf_folder.plan_conversion(checkpoint, model_type=model_type, **common)
    if model_type != "mtt":
        raise UsageError(
            "a model type is only for a Hugging Face target",
            found=f"{model_type}, to {to}",
            fix="leave it out, or convert to hf",
        )
    sizes: dict[str, Any] = {name: size for name, size in layout.items() if size is not None}
    return megatron_folder.plan_conversion(checkpoint, to=to, **common, **sizes)


def check_target(
    source: str,
    target: str,
    upload: Mapping[str, bool] | None = None,
    part: Mapping[str, bool] | None = None,
) -> None:
    """What can be said about a target before it is touched.

    Args:
        source: the checkpoint.
        target: where to.
        upload: options that only a target on the Hub has, by name, and whether they are wanted.
        part: options that a part has not, the same; None if all is written.

    Raises:
        UsageError: it is empty, remote but not on the Hub, inside the source, or a folder that
            has no such options.
    """
    if not source or not target:
        raise UsageError(
            "a path is empty", found=f"{source!r} and {target!r}", expected="two folders"
        )
    if is_hub(target) and part is not None:
        raise UsageError(
            "an upload has no parts",
            found=target,
            expected="a folder on a file system that all machines share",
            fix="write the parts to a folder, then upload it with mtt push",
        )
    if given := [name for name, wanted in (part or {}).items() if wanted]:
        raise UsageError(
            f"{', '.join(given)}: not for a part",
            found="--part",
            expected="a new or empty folder, or one that other parts have begun",
            fix=f"leave out {', '.join(given)}, and choose a new folder or remove the old one",
        )
    if is_hub(target):
        parse_place(target)
        return
    if "://" in target:
        raise UsageError(
            "mtt cannot write there",
            found=target,
            expected="a folder, or hf://owner/repo for the Hub",
            fix="convert to a folder, then copy it",
        )
    if given := [name for name, wanted in (upload or {}).items() if wanted]:
        raise UsageError(
            f"{', '.join(given)}: only for a target on the Hub",
            found=target,
            expected="hf://owner/repo",
            fix=f"leave out {', '.join(given)}",
        )
    if not sources.is_remote(source) and _inside(target, source):
        raise UsageError(
            "the output would stand inside the checkpoint",
            found=target,
            expected="a folder outside of it",
            fix="choose another folder",
        )


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"unknown {what} {value!r}", expected=" or ".join(choices))


def _inside(path: str, folder: str) -> bool:
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    return os.path.commonpath((path, folder)) == folder
