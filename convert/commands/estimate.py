"""`mtt estimate`: on how many GPUs a model runs, in which layout, and with which command."""

from __future__ import annotations

import argparse
import os
import shlex
import time
from collections.abc import Mapping
from dataclasses import asdict, replace

from ..architecture import Architecture
from ..checkpoint import Layout
from ..cli import given_source_options, source_options
from ..conversion import main_dtype
from ..errors import LayoutError, UnsupportedError, UsageError
from ..estimate import USABLE, Model, Placement, placements
from ..families import FAMILIES
from ..formats.hf_safetensors import holds_model
from ..hf_source import family_of, read_config
from ..pipeline import open_checkpoint
from ..plan import parse_size
from ..preset_files import preset_config
from ..presets import find_preset
from .console import print_json, print_warnings, say, size

_DEFAULT_LENGTH, _DEFAULT_DTYPE = 2048, "bfloat16"
_GPUS_PER_MACHINE = 8
_MOST_GPUS = 1 << 16
_MOST_LINES = 12
_UNIT_MEANT = 1_000_000
"""Of so few bytes nobody has a GPU: the unit was forgotten."""


def run(args: argparse.Namespace) -> int:
    """Compute, and print the layouts with the commands for the best."""
    start = time.monotonic()
    _check(args)
    memory, bandwidth = parse_size(args.gpu_memory), _bandwidth(args.gpu_bandwidth)
    model, warnings = read_model(args)
    length = _length(args, model.architecture)
    sizes = {
        "gpu_memory": memory,
        "gpu_bandwidth": bandwidth,
        "sequence_length": length,
        "batch_size": args.batch_size,
    }
    found = placements(model, num_gpus=args.gpus, **sizes)
    if not found[0].fits:
        raise _does_not_fit(args, model, found, sizes)
    commands = _commands(args, model, found[0].layout, length)
    if found[0].layout.tp > _GPUS_PER_MACHINE:
        warnings += (
            f"TP{found[0].layout.tp} spans machines of {_GPUS_PER_MACHINE} GPUs: what they send "
            "each other for every layer is not counted",
        )
    if args.json:
        body = {
            "source": args.model,
            "parameters": model.num_parameters,
            "dtype": model.dtype,
            "gpus": args.gpus,
            **sizes,
            "usable": USABLE,
            "placements": [_facts(placement) for placement in found],
            "commands": commands,
            "warnings": list(warnings),
        }
        print_json("estimate", "ok", start, body)
        return 0
    _print(args, model, found, sizes)
    for name, command in commands.items():
        say(f"{name + ':':<7} {command}")
    print_warnings(warnings)
    return 0


def _check(args: argparse.Namespace) -> None:
    """What is wrong whatever the model is."""
    given = {"--gpus": args.gpus, "--batch-size": args.batch_size}
    if args.sequence_length is not None:
        given["--sequence-length"] = args.sequence_length
    for option, value in given.items():
        if value < 1:
            raise UsageError(f"an impossible {option}", found=str(value), expected="at least 1")
    if args.gpus > _MOST_GPUS:
        raise UsageError("too many GPUs", found=str(args.gpus), expected=f"at most {_MOST_GPUS}")
    memory = args.gpu_memory.strip()
    if memory.isdecimal() and 0 < int(memory) < _UNIT_MEANT:
        raise UsageError(
            "--gpu-memory has no unit",
            found=f"{memory}, which means bytes",
            expected="a size like 80GB",
            fix=f"--gpu-memory {memory}GB",
        )


def _bandwidth(text: str) -> int:
    return parse_size(text.lower().removesuffix("/s"))


def read_model(args: argparse.Namespace) -> tuple[Model, tuple[str, ...]]:
    """What `args.model` is: a checkpoint, a folder with config.json, or a preset; and warnings.

    Raises:
        SourceError: it cannot be used.
        UsageError: there is nothing of that name, or something only the user knows is missing.
    """
    path: str = args.model
    config = os.path.join(path, "config.json")
    described = not os.path.exists(path) or os.path.isfile(config)
    if described and (given := given_source_options(args)):
        raise UsageError(
            f"{', '.join(given)}: only for a Megatron checkpoint",
            found=f"{path}, a preset or a folder with config.json",
            fix=f"leave out {', '.join(given)}",
        )
    if not os.path.exists(path):
        preset = find_preset(path)
        fields = {**preset_config(preset), "model_type": "mtt", "dtype": preset.dtype}
        return _from_config(fields, path, args.dtype), ()
    if os.path.isfile(config) or os.path.basename(path) == "config.json":
        folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
        fields = dict(read_config(folder))
        return _from_config(fields, path, args.dtype), family_of(fields, path).warnings(fields)
    checkpoint = open_checkpoint(path, **source_options(args))
    dtype = main_dtype(checkpoint.tensors) if args.dtype == "auto" else args.dtype
    a = checkpoint.architecture
    _refuse_encoder(a, path)
    rows = a.vocab_size or a.padded_vocab_size  # padding is not converted
    return Model(replace(a, padded_vocab_size=rows), dtype), checkpoint.warnings


def _refuse_encoder(architecture: Architecture, path: str) -> None:
    """Raise UnsupportedError for a T5, whose sides have texts of their own lengths, or a BERT."""
    if architecture.kind != "gpt":
        raise UnsupportedError(
            "mtt estimates decoders",
            found=f"{path}, a {architecture.kind.upper()}",
            expected="a GPT",
            fix="its weights take the size that mtt inspect prints"
            + (", divided by --tp" if architecture.kind == "t5" else ""),
        )


def _from_config(config: Mapping[str, object], path: str, dtype: str) -> Model:
    """The model a `config.json` describes, whether or not mtt could convert it."""
    family = family_of(config, path)
    fields = dict(config)
    if family is FAMILIES["mtt"]:
        # What is left out has no parameters and takes no memory.
        fields = {name: value for name, value in fields.items() if name not in family.neutral}
    architecture = family.architecture(fields)
    _refuse_encoder(architecture, path)
    if dtype == "auto":
        dtype = architecture.params_dtype or _DEFAULT_DTYPE
    return Model(architecture, dtype)


def _length(args: argparse.Namespace, a: Architecture) -> int:
    """Tokens of a sequence: what was asked for, which a table of positions may not have."""
    most = a.max_position_embeddings
    length: int = args.sequence_length or min(_DEFAULT_LENGTH, most)
    if a.has_position_table and length > most:
        raise UsageError(
            "the model has no positions for such a sequence",
            found=f"--sequence-length {length}",
            expected=f"at most {most}, the rows of its table of positions",
            fix=f"--sequence-length {most}",
        )
    return length


def _does_not_fit(
    args: argparse.Namespace,
    model: Model,
    found: tuple[Placement, ...],
    sizes: Mapping[str, int],
) -> LayoutError:
    smallest = min(found, key=lambda placement: placement.memory.total)
    usable = sizes["gpu_memory"] * USABLE
    count = args.gpus
    while count < _MOST_GPUS:
        count = 2 * count
        if (best := placements(model, num_gpus=count, **sizes)[0]).fits:
            fix = f"--gpus {count}: {best.layout} takes {size(best.memory.total)} of each"
            break
    else:
        fix = "a smaller --batch-size or --sequence-length, or GPUs with more memory"
    return LayoutError(
        f"{args.model} does not fit on {_count(args.gpus)} of {size(sizes['gpu_memory'])}",
        found=f"{smallest.layout} takes {size(smallest.memory.total)} of each: {_parts(smallest)}",
        expected=f"at most {size(usable)}, {USABLE:.0%} of a GPU",
        fix=fix,
    )


def _count(num_gpus: int) -> str:
    return f"{num_gpus} GPU" + "s" * (num_gpus > 1)


def _parts(placement: Placement) -> str:
    memory = placement.memory
    return (
        f"weights {size(memory.weights)}, KV cache {size(memory.kv_cache)}, "
        f"activations {size(memory.activations)}"
    )


def _facts(placement: Placement) -> dict[str, object]:
    layout = asdict(placement.layout)
    del layout["vpp"], layout["etp"]
    return {
        **layout,
        "gpus": placement.num_gpus,
        **asdict(placement.memory),
        "total": placement.memory.total,
        "fits": placement.fits,
        "seconds_per_token": placement.seconds_per_token,
    }


def _print(
    args: argparse.Namespace,
    model: Model,
    found: tuple[Placement, ...],
    sizes: Mapping[str, int],
) -> None:
    usable = size(sizes["gpu_memory"] * USABLE)
    say(f"{args.model}: {model.num_parameters:,} parameters in {model.dtype}")
    say(
        f"  {_count(args.gpus)} of {size(sizes['gpu_memory'])}, {usable} of it usable; "
        f"{sizes['sequence_length']} tokens, batch {args.batch_size}"
    )
    say(f"  seconds per token: at least, at {size(sizes['gpu_bandwidth'])}/s (--gpu-bandwidth)")
    say("")
    heads: tuple[str, ...] = (
        "layout",
        "GPUs",
        "weights",
        "KV cache",
        "activations",
        "total",
        "per token",
        "",
    )
    rows = [heads]
    for placement in found[:_MOST_LINES]:
        memory = placement.memory
        rows.append(
            (
                _name(placement.layout),
                str(placement.num_gpus),
                *map(size, (memory.weights, memory.kv_cache, memory.activations, memory.total)),
                f"{placement.seconds_per_token * 1000:.3g} ms",
                "fits" if placement.fits else "too much",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:-1], widths[1:-1]), row[-1]]
        say("  " + "  ".join(cells).rstrip())
    if len(found) > _MOST_LINES:
        say(f"  ... and {len(found) - _MOST_LINES} more: --json has all")
    say("")
    say(f"best:   {_name(found[0].layout)}, the lowest floor of those that fit")


def _name(layout: Layout) -> str:
    return f"TP{layout.tp} x PP{layout.pp} x EP{layout.ep}"


def _commands(
    args: argparse.Namespace, model: Model, layout: Layout, length: int
) -> dict[str, str]:
    """What to run: mtt itself, and vLLM."""
    exists = os.path.exists(args.model)
    source = shlex.quote(args.model) if exists else "CKPT"
    folder = source if exists and holds_model(args.model) else "OUT"
    world = layout.tp * layout.pp
    generate = f'generate {source} --tp {layout.tp} --pp {layout.pp} --prompt "Once upon a time"'
    vllm = (
        f"vllm serve {folder} --tensor-parallel-size {layout.tp} "
        f"--pipeline-parallel-size {layout.pp} --max-model-len {length} --dtype {model.dtype}"
    )
    if world <= _GPUS_PER_MACHINE:
        commands = {"mtt": f"mtt {generate}"}
    else:
        local = max(n for n in range(1, _GPUS_PER_MACHINE + 1) if world % n == 0)
        commands = {
            "mtt": f"torchrun --nnodes {world // local} --nproc-per-node {local} "
            f"--rdzv-backend c10d --rdzv-endpoint HOST:29500 --rdzv-id 1 -m mtt_convert {generate}"
        }
        vllm += " --distributed-executor-backend ray"
    alibi = model.architecture.position_embedding_type == "alibi"
    commands["vLLM"] = "vLLM's attention takes no ALiBi" if alibi else vllm
    return commands
