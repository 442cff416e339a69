"""What goes into a Hugging Face folder: vocabulary, tokenizer, configuration, weight files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from .architecture import Architecture
from .arguments import OWN
from .checkpoint import Checkpoint
from .documents import config_json, generation_config, model_card, modeling_files
from .dtypes import DTYPES
from .errors import UsageError
from .families import FAMILIES
from .formats.hf_safetensors import INDEX, plan_files
from .plan import ConversionPlan, document, parse_size
from .tensors import LazyTensor
from .tokenizer import Tokenizer, read_tokenizer

CAST_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Conversion:
    """A checkpoint with the plan to write it, and what the user should know about it."""

    checkpoint: Checkpoint
    plan: ConversionPlan
    config: Mapping[str, object]
    dtype: str
    tokenizer: Tokenizer
    warnings: tuple[str, ...]


def plan_conversion(
    checkpoint: Checkpoint,
    *,
    model_type: str = "mtt",
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    vocab_padding: str | None = None,
    tokenizer: str | None = None,
) -> Conversion:
    """Decide everything about a Hugging Face folder; nothing is written.

    Args:
        checkpoint: an open checkpoint.
        model_type: a family of `families/`.
        dtype: `auto` as stored, or one of `CAST_DTYPES`.
        max_shard_size: `5GB` and the like.
        vocab_padding: `trim` the rows that only pad the vocabulary, or `keep` them; None trims
            them where the true size is known.
        tokenizer: path of tokenizer files, `none`, or None for the paths in the arguments.

    Raises:
        UsageError: options that contradict each other or the checkpoint.
    """
    if model_type not in FAMILIES:
        raise UsageError(f"unknown model type {model_type!r}", expected=", ".join(sorted(FAMILIES)))
    if dtype != "auto" and dtype not in CAST_DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}", expected=f"auto, {', '.join(CAST_DTYPES)}")
    family = FAMILIES[model_type]
    warnings = list(checkpoint.warnings)
    words = choose_tokenizer(checkpoint, tokenizer, warnings)
    architecture = _with_vocabulary(checkpoint, words, vocab_padding, warnings)
    tensors = family.rules(architecture).apply(checkpoint.tensors, architecture)
    files, index = plan_files(tensors, dtype, parse_size(max_shard_size))
    fields = family.config(architecture)
    stored = main_dtype(tensors) if dtype == "auto" else dtype
    count = sum(tensor.num_elements for tensor in tensors.values())
    documents = {
        **modeling_files(family),
        **words.files,
        "README.md": model_card(checkpoint, fields, count, stored),
        "generation_config.json": document(generation_config(words)),
        **({INDEX: index} if index is not None else {}),
        "config.json": config_json(family, fields, stored, words),
    }
    plan = ConversionPlan(files, documents, checkpoint.replicas)
    return Conversion(checkpoint, plan, fields, stored, words, tuple(warnings))


def main_dtype(tensors: Mapping[str, LazyTensor]) -> str:
    """The dtype most bytes have: `config.json` names one."""
    sizes = dict.fromkeys(DTYPES, 0)
    for tensor in tensors.values():
        sizes[tensor.dtype.name] += tensor.num_bytes
    return max(sizes, key=lambda name: sizes[name])


def choose_tokenizer(
    checkpoint: Checkpoint, choice: str | None, warnings: list[str] | None = None
) -> Tokenizer:
    """The tokenizer asked for, or the one the arguments name if its files are here.

    What is missing is said in `warnings`, where the target needs a tokenizer.
    """
    if choice == "none":
        return Tokenizer()
    if choice is not None:
        return read_tokenizer(choice)
    named = [checkpoint.args.get(n) for n in ("tokenizer_model", "vocab_file")]
    paths = [name for name in named if isinstance(name, str) and name]
    roots = (checkpoint.folder, os.path.dirname(checkpoint.folder))
    for path in paths:
        for candidate in (path, *(os.path.join(root, path) for root in roots)):
            if os.path.exists(candidate):
                return read_tokenizer(candidate)
    if warnings is None:
        return Tokenizer()
    if paths:
        warnings.append(
            f"the tokenizer the checkpoint names, {paths[0]}, is not here: "
            "add its files with --tokenizer"
        )
    else:
        warnings.append("the checkpoint names no tokenizer: add its files with --tokenizer")
    return Tokenizer()


def _with_vocabulary(
    checkpoint: Checkpoint, words: Tokenizer, vocab_padding: str | None, warnings: list[str]
) -> Architecture:
    """The architecture with the vocabulary size that will be written."""
    architecture = checkpoint.architecture
    padded = architecture.padded_vocab_size
    size = true_vocabulary(checkpoint, words, vocab_padding, warnings)
    if vocab_padding == "keep":
        return replace(architecture, vocab_size=stored_rows(checkpoint))
    if size is None:
        warnings.append(
            f"the vocabulary keeps its {padded} rows, padding included: "
            "give --tokenizer or --set vocab_size=N to trim it"
        )
    return replace(architecture, vocab_size=size or padded)


def true_vocabulary(
    checkpoint: Checkpoint, words: Tokenizer, vocab_padding: str | None, warnings: list[str]
) -> int | None:
    """The number of tokens, from the checkpoint or its tokenizer; None if neither says it.

    Raises:
        UsageError: the tokenizer is another model's, or padding shall go and nobody knows how much.
    """
    padded = checkpoint.architecture.padded_vocab_size
    size = checkpoint.architecture.vocab_size or words.vocab_size
    if words.vocab_size is not None and words.vocab_size > padded:
        raise UsageError(
            "the tokenizer does not belong to this model",
            found=f"{words.vocab_size} tokens",
            expected=f"at most {padded}, the rows of the embedding",
            fix="give the tokenizer the model was trained with",
        )
    if size is not None and words.vocab_size is not None and words.vocab_size != size:
        warnings.append(f"the tokenizer has {words.vocab_size} tokens, the checkpoint says {size}")
        size = max(size, words.vocab_size)
    if size is None and vocab_padding == "trim":
        raise UsageError(
            "the true vocabulary size is not in the checkpoint",
            found=f"{padded} rows, some of them may be padding",
            fix="give --tokenizer, or --set vocab_size=N",
        )
    return size


def stored_rows(checkpoint: Checkpoint) -> int:
    """Rows of the embedding that hold something, be it padding: mtt says how many it added."""
    own, padded = checkpoint.args.get(OWN), checkpoint.architecture.padded_vocab_size
    rows = own.get("rows") if isinstance(own, dict) else None
    return rows if type(rows) is int and 1 <= rows <= padded else padded
