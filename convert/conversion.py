"""What every target decides: the element type, the tokenizer, and how many rows are tokens."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from . import sources
from .arguments import OWN
from .checkpoint import Checkpoint
from .documents import special_tokens
from .dtypes import DTYPES
from .errors import UsageError
from .families import FAMILIES
from .plan import ConversionPlan
from .tensors import LazyTensor
from .tokenizer import Tokenizer, read_tokenizer

CAST_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Conversion:
    """A checkpoint with the plan to write it, and what the user should know about it.

    Attributes:
        config: the fields of `config.json` that describe the model; of a Megatron target its
            layout and the rows of its vocabulary.
        tokens: its special tokens, as configurations spell them.
        dtype: the element type `config.json` names.
        model_type: the family that is written; empty for a Megatron target.
        exact: families of transformers itself that compute exactly the same.
    """

    checkpoint: Checkpoint
    plan: ConversionPlan
    config: Mapping[str, object]
    tokens: Mapping[str, object]
    dtype: str
    tokenizer: Tokenizer
    warnings: tuple[str, ...]
    model_type: str = "mtt"
    exact: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What else could have been written."""
        others = [name for name in self.exact if name != self.model_type]
        family = FAMILIES.get(self.model_type)
        if family is None or family.code is None or not others:
            return ()
        return (
            f"also exactly a {others[0]}: add --model-type {others[0]} for a folder that needs "
            f"no {self.model_type} code",
        )


def check_dtype(dtype: str) -> None:
    """Raise UsageError for an element type that nothing is cast to."""
    if dtype != "auto" and dtype not in CAST_DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}", expected=f"auto, {', '.join(CAST_DTYPES)}")


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
        return read_tokenizer(choice, checkpoint.args)
    named = [checkpoint.args.get(n) for n in ("tokenizer_model", "vocab_file")]
    paths = [name for name in named if isinstance(name, str) and name]
    for path in paths:
        for candidate in _places(path, checkpoint.folder):
            if sources.exists(candidate):
                return read_tokenizer(candidate, checkpoint.args)
    if warnings is None:
        return Tokenizer()
    if checkpoint.config:
        warnings.append("the folder has no tokenizer mtt can read: add its files with --tokenizer")
    elif paths:
        warnings.append(
            f"the tokenizer the checkpoint names, {paths[0]}, is not here: "
            "add its files with --tokenizer"
        )
    else:
        warnings.append("the checkpoint names no tokenizer: add its files with --tokenizer")
    return Tokenizer()


def _places(path: str, folder: str) -> list[str]:
    """Where a tokenizer that a checkpoint names may be: never where no one asked mtt to go."""
    if sources.is_remote(path):
        return [path] if path == folder else []
    if sources.is_remote(folder):
        return [path, os.path.join(folder, path)]
    return [path, os.path.join(folder, path), os.path.join(os.path.dirname(folder), path)]


def true_vocabulary(
    checkpoint: Checkpoint, words: Tokenizer, vocab_padding: str | None, warnings: list[str]
) -> int | None:
    """The number of tokens, from the checkpoint or its tokenizer; None if neither says it.

    Raises:
        UsageError: the tokenizer is another model's, or padding shall go and nobody knows how much.
    """
    padded = checkpoint.architecture.padded_vocab_size
    size = checkpoint.architecture.vocab_size or words.vocab_size
    if words.vocab_size is not None and words.vocab_size > padded and checkpoint.config:
        warnings.append(f"the tokenizer has {words.vocab_size} tokens, the tables {padded} rows")
        return size if size and size <= padded else padded
    if words.vocab_size is not None and words.vocab_size > padded:
        raise UsageError(
            "the tokenizer does not belong to this model",
            found=f"{words.vocab_size} tokens",
            expected=f"at most {padded}, the rows of the embedding",
            fix="give the tokenizer the model was trained with",
        )
    # Hugging Face tables often have more rows than there are tokens; nobody takes them for tokens.
    unlike = words.vocab_size is not None and words.vocab_size != size and not checkpoint.config
    if size is not None and words.vocab_size is not None and unlike:
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


def stored_tokens(checkpoint: Checkpoint) -> Mapping[str, object]:
    """The special tokens that mtt stored beside Megatron's arguments."""
    own = checkpoint.args.get(OWN)
    tokens = own.get("special_tokens") if isinstance(own, dict) else None
    if not isinstance(tokens, dict):
        return {}
    known = special_tokens(Tokenizer(), kind="t5")
    return {n: v for n, v in tokens.items() if n in known and _is_token(v)}


def _is_token(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(type(item) is int for item in value)
    return value is None or type(value) is int
