"""`mtt convert`: Megatron to Hugging Face."""

from __future__ import annotations

import argparse
import os
import time

from ..cli import overrides
from ..hf_folder import Conversion, plan_conversion
from ..pipeline import convert, open_checkpoint
from ..plan import render
from .console import (
    dropped_text,
    peak_rss,
    print_json,
    print_table,
    print_warnings,
    progress_bar,
    size,
)

_MOST_DEFAULT_WORKERS = 8


def run(args: argparse.Namespace) -> int:
    """Convert, or print the plan."""
    choices = {
        "model_type": args.model_type,
        "dtype": args.dtype,
        "max_shard_size": args.max_shard_size,
        "vocab_padding": args.vocab_padding,
        "tokenizer": args.tokenizer,
    }
    source = {
        "iteration": args.iteration,
        "overrides": overrides(args),
        "skip_keys": args.skip_key,
    }
    if args.dry_run:
        checkpoint = open_checkpoint(args.source, **source)
        _print_plan(args, plan_conversion(checkpoint, **choices))
        return 0
    start = time.monotonic()
    with progress_bar("converting") as progress:
        result = convert(
            args.source,
            args.target,
            to=args.to,
            replicated=args.replicated,
            num_workers=default_workers() if args.workers is None else args.workers,
            overwrite=args.overwrite,
            hash_name=args.hash,
            progress=progress,
            **source,
            **choices,
        )
    seconds = time.monotonic() - start
    conversion, plan = result.conversion, result.conversion.plan
    if args.json:
        body = _body(args, conversion)
        body |= {"output": result.output, "hashes": result.hashes}
        print_json("convert", "ok", body | {"seconds": seconds, "peak_rss": peak_rss()})
        return 0
    checkpoint = conversion.checkpoint
    print(result.output)
    rate = f"{size(plan.num_bytes)} in {seconds:.1f} s, {size(plan.num_bytes / seconds)}/s"
    print_table(
        (
            ("from", f"{checkpoint.format}, {checkpoint.layout}, {checkpoint.num_files} files"),
            ("model", f"{conversion.dtype}, vocabulary {conversion.config['vocab_size']}"),
            ("tensors", f"{plan.num_tensors} in {len(plan.files)} files"),
            ("written", rate),
            ("left out", dropped_text(checkpoint.dropped)),
        )
    )
    print_warnings(conversion.warnings)
    return 0


def default_workers() -> int:
    """Threads to use when the user does not say."""
    return max(1, min(_MOST_DEFAULT_WORKERS, len(os.sched_getaffinity(0))))


def _body(args: argparse.Namespace, conversion: Conversion) -> dict[str, object]:
    return {
        "source": conversion.checkpoint.folder,
        "output": args.target,
        "tensors": conversion.plan.num_tensors,
        "bytes": conversion.plan.num_bytes,
        "dropped": {kind: list(names) for kind, names in conversion.checkpoint.dropped.items()},
        "warnings": list(conversion.warnings),
        "hashes": {},
    }


def _print_plan(args: argparse.Namespace, conversion: Conversion) -> None:
    if args.json:
        files = {
            file.name: {t.name: [str(t.dtype), list(t.source.shape)] for t in file.tensors}
            for file in conversion.plan.files
        }
        print_json("convert", "planned", _body(args, conversion) | {"files": files})
        return
    print(render(conversion.plan))
    print(f"{size(conversion.plan.num_bytes)} would be written to {args.target}")
    print_warnings(conversion.warnings)
