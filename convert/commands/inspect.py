"""`mtt inspect`: what a checkpoint is."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from dataclasses import asdict

from ..architecture import Architecture
from ..card import active_text, experts_text, latents_text
from ..checkpoint import Checkpoint
from ..cli import source_options
from ..families import exact_families
from ..pipeline import open_checkpoint
from .console import dropped_text, print_json, print_table, print_warnings, say, size


def run(args: argparse.Namespace) -> int:
    """Print the facts of one checkpoint."""
    start = time.monotonic()
    checkpoint = open_checkpoint(args.source, **source_options(args))
    if args.json:
        print_json("inspect", "ok", start, _facts(checkpoint))
    else:
        _print(checkpoint)
        print_warnings(checkpoint.warnings)
    return 0


def _facts(checkpoint: Checkpoint) -> dict[str, object]:
    return {
        "source": checkpoint.folder,
        "format": checkpoint.format,
        "dialect": checkpoint.dialect,
        "generation": checkpoint.generation,
        "evidence": list(checkpoint.evidence),
        "iteration": checkpoint.iteration,
        "iterations": list(checkpoint.iterations),
        "layout": {n: size for n, size in asdict(checkpoint.layout).items() if size is not None},
        "architecture": asdict(checkpoint.architecture),
        "exact_model_types": list(exact_families(checkpoint.architecture)),
        "parameters": checkpoint.num_parameters,
        "tensors": len(checkpoint.tensors),
        "bytes": checkpoint.num_bytes,
        "files": checkpoint.num_files,
        "dtypes": dict(_dtypes(checkpoint)),
        "dropped": {kind: list(names) for kind, names in checkpoint.dropped.items()},
        "warnings": list(checkpoint.warnings),
    }


def _print(checkpoint: Checkpoint) -> None:
    a = checkpoint.architecture
    kind = "gated " if a.gated_linear_unit else ""
    biases = "all linears" if a.add_bias_linear else "qkv only" if a.has_qkv_bias else "none"
    true_size = a.vocab_size or "true size unknown"
    iteration: object = "release" if checkpoint.iteration is None else checkpoint.iteration
    iteration = None if checkpoint.config else iteration
    others = [n for n in checkpoint.iterations if n != checkpoint.iteration]
    say(checkpoint.folder)
    print_table(
        (
            ("format", checkpoint.format),
            ("dialect", checkpoint.dialect),
            ("generation", checkpoint.generation),
            ("evidence", "; ".join(checkpoint.evidence)),
            ("iteration", iteration),
            ("also here", ", ".join(map(str, others))),
            ("layout", None if checkpoint.config else checkpoint.layout),
            ("files", checkpoint.num_files),
            ("parameters", f"{checkpoint.num_parameters:,} in {len(checkpoint.tensors)} tensors"),
            ("active", active_text(a)),
            ("size", size(checkpoint.num_bytes)),
            ("dtypes", ", ".join(f"{n} x {d}" for d, n in _dtypes(checkpoint).items())),
            ("kind", _kind(a)),
            ("layers", _layers(a)),
            ("hidden", a.hidden_size),
            ("attention", f"{a.num_attention_heads} heads of {a.kv_channels}"),
            ("groups", f"{a.num_query_groups}{', qk layernorm' if a.qk_layernorm else ''}"),
            ("latents", latents_text(a)),
            ("mlp", f"{a.ffn_hidden_size}, {kind}{a.activation}"),
            ("experts", experts_text(a)),
            ("further tokens", a.mtp_num_layers or None),
            ("norm", _norms(a)),
            ("positions", f"{a.position_embedding_type}, {a.max_position_embeddings}"),
            ("windows", _windows(a)),
            ("biases", biases),
            ("vocabulary", f"{a.padded_vocab_size} rows, {true_size}"),
            ("head", "own" if a.untie_embeddings_and_output_weights else "tied to the embedding"),
            ("exactly a", ", ".join(exact_families(a))),
            ("left out", dropped_text(checkpoint.dropped)),
        )
    )


def _kind(a: Architecture) -> str:
    """What a model that is no decoder is."""
    if a.kind != "bert":
        return ""
    heads = "masked tokens and the second text" if a.bert_binary_head else "masked tokens"
    return f"bert, {a.num_tokentypes} token types, predicts {heads}"


def _layers(a: Architecture) -> str:
    if a.kind != "t5":
        return str(a.num_layers)
    return f"{a.encoder_num_layers} in the encoder, {a.num_layers} in the decoder: a T5"


def _norms(a: Architecture) -> str:
    final = "" if a.final_layernorm else ", none after the last layers"
    return f"{a.normalization}, eps {a.layernorm_epsilon:g}{final}"


def _windows(a: Architecture) -> str:
    """Which layers see a limited number of tokens."""
    count = sum(a.windowed_layers)
    return f"{a.window_size[0] + 1} tokens in {count} layers" if a.window_size and count else ""


def _dtypes(checkpoint: Checkpoint) -> Counter[str]:
    return Counter(tensor.dtype.name for tensor in checkpoint.tensors.values())
