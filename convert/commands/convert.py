"""`mtt convert`: any checkpoint to a Hugging Face folder, on the Hub too, or a Megatron layout."""

from __future__ import annotations

import argparse
import os
import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from ..checkpoint import Checkpoint
from ..cli import LAYOUT_OPTIONS, source_options
from ..conversion import Conversion
from ..dropping import without_mtp
from ..errors import UsageError
from ..execute import memory, num_cores
from ..hf_source import is_hf_folder
from ..hub import is_hub
from ..iterations import convert_iteration, list_iterations
from ..parts import AUTO, parse_part, share
from ..pipeline import Result, check_target, convert, open_checkpoint, plan_conversion
from ..plan import render
from ..replicas import settle
from .console import (
    dropped_text,
    print_json,
    print_table,
    print_warnings,
    progress_bar,
    say,
    size,
)

_MOST_DEFAULT_WORKERS = 8


def run(args: argparse.Namespace) -> int:
    """Convert, or print the plan."""
    start = time.monotonic()
    # numpy copies here and multiplies nothing; its threads would spin beside the workers.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    workers = default_workers() if args.workers is None else args.workers
    part = None if args.part is None else parse_part(args.part)
    _check(args, workers)
    choices: dict[str, Any] = {
        "to": args.to,
        **_layout(args),
        "model_type": args.model_type,
        "dtype": args.dtype,
        "max_shard_size": args.max_shard_size,
        "vocab_padding": args.vocab_padding,
        "tokenizer": args.tokenizer,
    }
    source = source_options(args)
    if args.dry_run:
        opened = open_checkpoint(args.source, **source)
        checkpoint, _ = settle(without_mtp(opened) if args.drop_mtp else opened, args.replicated)
        conversion = plan_conversion(checkpoint, **choices)
        if part is not None:
            conversion = replace(conversion, plan=share(conversion.plan, part))
        _print_plan(args, conversion, workers, start)
        return 0
    choices |= {
        "replicated": args.replicated,
        "drop_mtp": args.drop_mtp,
        "num_workers": workers,
        "overwrite": args.overwrite,
        "hash_name": args.hash,
        "resume": args.resume,
        "part": args.part,
        **_upload(args),
    }
    if args.all_iterations:
        del source["iteration"]
        return _convert_all(args, start, {**source, **choices})
    # Of the processes of a launcher the first shows progress, and the others errors.
    quiet = args.part == AUTO and part is not None and part.number > 1
    label = "uploading" if is_hub(args.target) else "converting"
    with nullcontext() if quiet else progress_bar(label) as progress:
        result = convert(args.source, args.target, progress=progress, **source, **choices)
    if args.json:
        body = _body(args, result.conversion) | _what_was_done(result)
        print_json("convert", "unchanged" if result.unchanged else "ok", start, body)
    elif quiet:
        if result.whole and not result.unchanged:
            say(f"{result.output}  {_parts(result)}")
    else:
        _print_result(args, result, time.monotonic() - start)
    return 0


def _what_was_done(result: Result) -> dict[str, object]:
    """What a result adds to the description of a conversion."""
    body: dict[str, object] = {"output": result.output, "hashes": result.hashes}
    if result.part is not None:
        body |= {
            "part": str(result.part),
            "parts_complete": result.num_complete,
            "whole": result.whole,
        }
    return body


def _print_result(args: argparse.Namespace, result: Result, seconds: float) -> None:
    """The summary."""
    conversion, plan = result.conversion, result.conversion.plan
    checkpoint = conversion.checkpoint
    say(result.output)
    rate = f"{size(result.num_bytes)} in {seconds:.1f} s, {size(result.num_bytes / seconds)}/s"
    if result.unchanged:
        rate = "nothing: it holds just this already"
    elif args.resume and not is_hub(args.target) and not result.num_bytes:
        rate = "no weights: they were finished before"
    print_table(
        (
            ("from", _source(checkpoint)),
            ("to", _target(args, conversion)),
            ("model", _model(conversion)),
            ("tensors", f"{plan.num_tensors} in {len(plan.files)} files"),
            ("part", _parts(result)),
            ("written", rate),
            ("left out", dropped_text(checkpoint.dropped)),
        )
    )
    for note in conversion.notes:
        say(f"  {note}")
    print_warnings(conversion.warnings)


def _parts(result: Result) -> str:
    """How far the parts are, as the one that ends now sees it."""
    if result.part is None:
        return ""
    done = f"{result.num_complete} of {result.part.count} parts are written"
    if result.whole:
        return f"{result.part}; {done}, and what they share"
    return f"{result.part}, {len(result.hashes)} files; {done}, the last one makes the folder whole"


def _convert_all(args: argparse.Namespace, start: float, options: dict[str, Any]) -> int:
    """Every iteration after the other, a line each."""
    done: dict[int, Result] = {}
    for iteration in list_iterations(args.source):
        with progress_bar(f"iteration {iteration}") as progress:
            result = convert_iteration(
                args.source, args.target, iteration, progress=progress, **options
            )
        done[iteration] = result
        if not args.json:
            there = "  there already" if result.unchanged else ""
            say(f"{result.output}  {size(result.conversion.plan.num_bytes)}{there}")
    conversions = [result.conversion for result in done.values()]
    if args.json:
        each = [
            {
                "iteration": iteration,
                "output": result.output,
                "status": "unchanged" if result.unchanged else "ok",
                "hashes": result.hashes,
            }
            for iteration, result in done.items()
        ]
        body = _body(args, conversions[-1]) | {"source": args.source, "iterations": each}
        body["bytes"] = sum(conversion.plan.num_bytes for conversion in conversions)
        body["tensors"] = sum(conversion.plan.num_tensors for conversion in conversions)
        print_json("convert", "ok", start, body)
        return 0
    for note in conversions[-1].notes:
        say(f"  {note}")
    print_warnings(dict.fromkeys(w for conversion in conversions for w in conversion.warnings))
    return 0


def _upload(args: argparse.Namespace) -> dict[str, bool]:
    """The options that only a target on the Hub has."""
    return {"private": args.private, "create_pr": args.create_pr}


def _source(checkpoint: Checkpoint) -> str:
    files = f"{checkpoint.num_files} files"
    if checkpoint.config:
        return f"{checkpoint.dialect}, {files}"
    return f"{checkpoint.format}, {checkpoint.layout}, {files}"


def _target(args: argparse.Namespace, conversion: Conversion) -> str:
    layout = conversion.config.get("layout")
    return f"{args.to}, {layout}" if layout else ""


def _model(conversion: Conversion) -> str:
    facts = (conversion.model_type, conversion.dtype)
    return f"{', '.join(filter(None, facts))}, vocabulary {conversion.config['vocab_size']}"


def default_workers() -> int:
    """Threads to use when the user does not say."""
    return min(_MOST_DEFAULT_WORKERS, num_cores())


def _check(args: argparse.Namespace, workers: int) -> None:
    """What is wrong whatever the checkpoint is."""
    check_target(
        args.source,
        args.target,
        {f"--{n.replace('_', '-')}": on for n, on in _upload(args).items()},
        None
        if args.part is None
        else {"--overwrite": args.overwrite, "--all-iterations": args.all_iterations},
    )
    if args.all_iterations and (args.iteration is not None or args.dry_run):
        raise UsageError(
            "--all-iterations stands alone",
            found="--iteration" if args.iteration is not None else "--dry-run",
            fix="leave out one of the two; --dry-run goes with --iteration",
        )
    if args.to is None:
        if is_hf_folder(args.source):
            raise UsageError(
                "--to is missing: a Hugging Face folder has no usual target",
                found=f"{args.source}, a Hugging Face folder",
                fix="--to torch or --to torch_dist, or --to hf with --model-type NAME",
            )
        args.to = "hf"
    given = [f"--{name.replace('_', '-')}" for name in _layout(args)]
    if given and args.to == "hf":
        raise UsageError(
            f"{', '.join(given)}: a layout is only for a Megatron target",
            found=f"--to {args.to}",
            expected="a Hugging Face folder has no layout",
            fix=f"leave out {', '.join(given)}, or add --to torch or --to torch_dist",
        )
    if workers < 1:
        raise UsageError(
            "no workers",
            found=f"--workers {workers}",
            expected="at least 1",
            fix="leave out --workers to use the CPUs there are",
        )


def _layout(args: argparse.Namespace) -> dict[str, object]:
    """The options of a Megatron target that were given."""
    names = [option.lstrip("-").replace("-", "_") for option in LAYOUT_OPTIONS]
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _body(args: argparse.Namespace, conversion: Conversion) -> dict[str, object]:
    return {
        "source": conversion.checkpoint.folder,
        "output": args.target,
        "tensors": conversion.plan.num_tensors,
        "bytes": conversion.plan.num_bytes,
        "dropped": {kind: list(names) for kind, names in conversion.checkpoint.dropped.items()},
        "warnings": list(conversion.warnings),
        "model_type": conversion.model_type,
        "exact_model_types": list(conversion.exact),
    }


def _print_plan(
    args: argparse.Namespace, conversion: Conversion, workers: int, start: float
) -> None:
    plan = conversion.plan
    if args.json:
        files = {
            file.name: {t.name: [str(t.dtype), list(t.source.shape)] for t in file.tensors}
            for file in plan.files
        }
        body = _body(args, conversion) | {"files": files, "memory": memory(plan, workers)}
        print_json("convert", "planned", start, body)
        return
    for line in render(plan, conversion.checkpoint.folder).splitlines():
        say(line)
    say(f"about {size(memory(plan, workers))} of memory for the windows of {workers} workers")
    say(f"{size(plan.num_bytes)} would be written to {args.target}")
    for note in conversion.notes:
        say(note)
    print_warnings(conversion.warnings)
