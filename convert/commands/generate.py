"""`mtt generate`: continue a text."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..bert_logits import refuse_bert
from ..cli import given_source_options, source_options
from ..errors import SourceError, UsageError
from ..formats import hf_safetensors
from ..hf_folder import plan_conversion
from ..loading import from_megatron
from ..logits import load_model, position_limit
from ..pipeline import open_checkpoint
from ..seq2seq import check_start, is_seq2seq
from ..tokenizer import Tokenizer, read_tokenizer
from .console import print_json, print_warnings, progress_bar, quiet_transformers, say
from .ranks import launch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run(args: argparse.Namespace) -> int:
    """Load, generate, print."""
    start = time.monotonic()
    _check(args)
    num_ranks = args.tp * args.pp
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks == 1 or started == num_ranks:
        answer = continue_text(vars(args))
    elif started == 1:
        answer = launch(f"{__name__}:continue_text", vars(args), num_ranks)
    else:
        raise UsageError(
            "torchrun started another number of processes",
            found=f"{started} processes",
            expected=f"{num_ranks}, TP{args.tp} x PP{args.pp}",
            fix="let the sizes agree, or leave torchrun out",
        )
    if int(os.environ.get("RANK", "0")):
        return 0
    if args.json:
        body = {"source": args.source, "prompt": args.prompt, **answer}
        print_json("generate", "ok", start, body)
    else:
        say(answer["text"], keep="\n\t")
        print_warnings(answer["warnings"])
    return 0


def continue_text(options: Mapping[str, Any]) -> dict[str, Any]:
    """The text and warnings for the options of the command; on one process or on all of them."""
    args = argparse.Namespace(**options)
    quiet_transformers()
    tokenizer = load_tokenizer(_tokenizer_files(args))
    model = _model(args)
    refuse_bert(model, args.source)
    length = len(_ids(model, tokenizer, args.prompt))
    after = "after the prompt"
    if is_seq2seq(model):
        check_start(model, args.source)
        length, after = 1, "of an answer"
    room = _positions(model) - length + 1
    warnings = []
    if args.max_new_tokens > room:
        warnings.append(f"the model has positions for {room} tokens {after}, not more")
    count = min(args.max_new_tokens, room)
    text = generate(model, tokenizer, args.prompt, count, args.temperature, args.seed)
    return {"text": text, "warnings": warnings}


def _check(args: argparse.Namespace) -> None:
    """What is wrong whatever the model is."""
    if args.max_new_tokens < 1 or not 0 <= args.temperature < float("inf"):
        raise UsageError(
            "nothing to generate",
            found=f"--max-new-tokens {args.max_new_tokens}, --temperature {args.temperature}",
            expected="at least one token and a temperature of 0 or more",
        )
    if args.tp < 1 or args.pp < 1:
        raise UsageError(
            "no processes",
            found=f"--tp {args.tp} --pp {args.pp}",
            expected="sizes of at least 1",
        )
    if not -(2**63) <= args.seed < 2**63:
        raise UsageError("--seed is too large", found=str(args.seed), expected="64 bits")
    if not args.prompt or not _is_text(args.prompt):
        raise UsageError(
            "there is no text to continue",
            found="an empty prompt" if not args.prompt else "a prompt that is no text",
            expected="at least one word",
            fix='--prompt "Once upon a time"',
        )
    given = given_source_options(args)
    if given and _is_converted(args.source):
        raise UsageError(
            f"{', '.join(given)}: only for a Megatron checkpoint",
            found=f"{args.source}, a converted folder",
            fix=f"leave out {', '.join(given)}, or give the checkpoint",
        )


def _is_text(text: str) -> bool:
    """Whether the shell gave something that can be encoded."""
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """The prompt and its continuation; of an encoder-decoder what it writes about the prompt.

    Raises:
        UsageError: the prompt is nothing this model can read.
    """
    import torch

    _ids(model, tokenizer, prompt)
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    with torch.no_grad():
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            max_length=None,  # transformers warns about two limits where the folder has one
            **(sampling or {"do_sample": False}),
        )
    text: str = tokenizer.decode(output[0], skip_special_tokens=True)
    return text


def _ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The prompt's token numbers, all of them within the model."""
    ids: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
    rows = model.config.vocab_size
    if not ids or max(ids) >= rows:
        raise UsageError(
            "the tokenizer does not belong to this model",
            found=f"token {max(ids)}" if ids else "no tokens in the prompt",
            expected=f"tokens 0 to {rows - 1}",
            fix="give the tokenizer the model was trained with: --tokenizer PATH",
        )
    if len(ids) > _positions(model):
        raise UsageError(
            "the prompt is too long for this model",
            found=f"{len(ids)} tokens",
            expected=f"at most {model.config.max_position_embeddings}",
            fix="give a shorter prompt",
        )
    return ids


def _positions(model: PreTrainedModel) -> int:
    """How many tokens the model can number; rotary positions go on for ever."""
    limit = position_limit(model)
    return sys.maxsize if limit is None else limit


def load_tokenizer(files: Tokenizer) -> PreTrainedTokenizerBase:
    """A tokenizer object from its files.

    Raises:
        SourceError: transformers cannot load it.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.files.items():
            with open(os.path.join(folder, name), "wb") as file:
                file.write(data)
        try:
            return AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # whatever a tokenizer's own code raises
            raise SourceError(
                "the tokenizer cannot be loaded",
                found=str(error) or type(error).__name__,
                expected="files that AutoTokenizer reads",
                fix="give another with --tokenizer PATH",
            ) from error


def _tokenizer_files(args: argparse.Namespace) -> Tokenizer:
    if args.tokenizer == "none":
        files = Tokenizer()
    elif args.tokenizer:
        files = read_tokenizer(args.tokenizer)
    elif _is_converted(args.source):
        files = _folder_tokenizer(args.source)
    else:
        checkpoint = open_checkpoint(args.source, **source_options(args))
        files = plan_conversion(checkpoint).tokenizer
    if not files.files:
        raise UsageError(
            "there is no tokenizer to read the prompt with",
            found=f"{args.source}, " + ("--tokenizer none" if args.tokenizer else "without one"),
            expected="the tokenizer the model was trained with",
            fix="give it with --tokenizer PATH",
        )
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
        return load_model(args.source, args.dtype, tp_size=args.tp, pp_size=args.pp)
    with progress_bar("loading") as progress:
        return from_megatron(
            args.source,
            tp_size=args.tp,
            pp_size=args.pp,
            **source_options(args),
            replicated=args.replicated,
            dtype=args.dtype,
            tokenizer=args.tokenizer,
            progress=progress,
        )
