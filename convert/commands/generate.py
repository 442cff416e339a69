"""`mtt generate`: continue a text."""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import TYPE_CHECKING

from ..cli import overrides
from ..errors import UsageError
from ..formats import hf_safetensors
from ..hf_folder import plan_conversion
from ..loading import from_megatron
from ..logits import load_model
from ..pipeline import open_checkpoint
from ..tokenizer import Tokenizer, read_tokenizer
from .console import print_json, progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run(args: argparse.Namespace) -> int:
    """Load, generate, print."""
    if args.max_new_tokens < 1 or args.temperature < 0:
        raise UsageError(
            "nothing to generate",
            found=f"--max-new-tokens {args.max_new_tokens}, --temperature {args.temperature}",
            expected="at least one token and a temperature of 0 or more",
        )
    tokenizer = load_tokenizer(_tokenizer_files(args))
    model = _model(args)
    text = generate(model, tokenizer, args.prompt, args.max_new_tokens, args.temperature, args.seed)
    if args.json:
        print_json("generate", "ok", {"source": args.source, "prompt": args.prompt, "text": text})
    else:
        print(text)
    return 0


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """The prompt and its continuation."""
    import torch

    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt")
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    with torch.no_grad():
        output = model.generate(
            **inputs, max_new_tokens=max_new_tokens, **(sampling or {"do_sample": False})
        )
    text: str = tokenizer.decode(output[0], skip_special_tokens=True)
    return text


def load_tokenizer(files: Tokenizer) -> PreTrainedTokenizerBase:
    """A tokenizer object from its files."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.files.items():
            with open(os.path.join(folder, name), "wb") as file:
                file.write(data)
        return AutoTokenizer.from_pretrained(folder)


def _tokenizer_files(args: argparse.Namespace) -> Tokenizer:
    if args.tokenizer:
        files = read_tokenizer(args.tokenizer)
    elif _is_converted(args.source):
        files = _folder_tokenizer(args.source)
    else:
        checkpoint = open_checkpoint(
            args.source,
            iteration=args.iteration,
            overrides=overrides(args),
            skip_keys=args.skip_key,
        )
        files = plan_conversion(checkpoint).tokenizer
    if not files.files:
        raise UsageError(f"{args.source} has no tokenizer", fix="give one with --tokenizer PATH")
    return files


def _folder_tokenizer(folder: str) -> Tokenizer:
    try:
        return read_tokenizer(folder)
    except UsageError:
        return Tokenizer()


def _is_converted(path: str) -> bool:
    return os.path.isdir(path) and hf_safetensors.holds_model(path)


def _model(args: argparse.Namespace) -> PreTrainedModel:
    if _is_converted(args.source):
        return load_model(args.source, args.dtype)
    with progress_bar("loading") as progress:
        return from_megatron(
            args.source,
            iteration=args.iteration,
            overrides=overrides(args),
            skip_keys=args.skip_key,
            dtype=args.dtype,
            tokenizer=args.tokenizer,
            progress=progress,
        )
