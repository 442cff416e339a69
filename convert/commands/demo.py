"""`mtt demo`: the main job on the sample checkpoint, one printed step after the other."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import tempfile
from importlib.resources import as_file, files

from ..cli import EXIT_DIFFERENT, build_parser
from ..logits import compare_logits, load_model
from ..tokenizer import read_tokenizer
from . import convert, diff, inspect, verify
from .console import quiet_transformers, say
from .generate import continue_text, generate, load_tokenizer
from .ranks import launch

_TOLERANCE = 1e-4


def run(args: argparse.Namespace) -> int:
    """Inspect, convert, compare, load, generate; 1 if any step gives the wrong result."""
    quiet_transformers()
    with (
        as_file(files("mtt_convert") / "sample") as sample,
        tempfile.TemporaryDirectory() as scratch,
    ):
        output = args.output or os.path.join(scratch, "sample-hf")
        return _steps(str(sample), output, args.overwrite)


def _steps(sample: str, output: str, overwrite: bool) -> int:
    print("A tiny GPT in four Megatron shards (TP2 x PP2) becomes a Hugging Face model.\n")
    for handler, words in (
        (inspect, ["inspect", sample]),
        (convert, ["convert", sample, output, *(["--overwrite"] if overwrite else [])]),
        (verify, ["verify", output]),
        (diff, ["diff", sample, output]),
    ):
        say(f"$ mtt {' '.join(map(shlex.quote, words))}")
        status: int = handler.run(build_parser().parse_args(words))
        if status:
            return status
        print()
    print("compare with the logits Megatron-Core computed")
    difference = compare_logits(output, os.path.join(sample, "reference.npz"))
    print(f"  largest difference {difference:.2g}, allowed {_TOLERANCE:g}\n")
    with open(os.path.join(sample, "prompts.json"), encoding="utf-8") as file:
        examples = json.load(file)
    print("load with AutoModelForCausalLM and AutoTokenizer, continue twelve prompts")
    right = _texts(output, examples) and _text_of_two(sample, examples[0])
    return EXIT_DIFFERENT if not right or difference > _TOLERANCE else 0


def _texts(output: str, examples: list[dict[str, str]]) -> bool:
    model = load_model(output)
    tokenizer = load_tokenizer(read_tokenizer(output))
    num_right = 0
    for example in examples:
        text = generate(model, tokenizer, example["prompt"])
        num_right += text == example["text"]
        print(f"  {example['prompt']}|{text.removeprefix(example['prompt'])}")
    print(
        f"\n{num_right} of {len(examples)} texts are word for word what the model was trained on.\n"
    )
    return num_right == len(examples)


def _text_of_two(sample: str, example: dict[str, str]) -> bool:
    """The same text from two processes, each of which reads its half from the shards."""
    say(f"$ mtt generate {sample} --tp 2 --prompt {shlex.quote(example['prompt'])}")
    words = ["generate", sample, "--tp", "2", "--prompt", example["prompt"]]
    options = vars(build_parser().parse_args(words))
    text: str = launch(f"{continue_text.__module__}:continue_text", options, 2)["text"]
    same = text == example["text"]
    print(f"  {text}\n")
    print(
        f"Two processes, each with half of every layer: {'the same' if same else 'another'} text."
    )
    return same
