"""Summarize the paragraphs of a file with a model that was only pretrained.

python examples/summarize.py out texts.txt
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_mtt  # noqa: F401  registers MTT's classes: no remote code is run


def prompt(text: str) -> str:
    """What people write before the short version of a text they just posted."""
    return f"{text}\n\nTL;DR:"


def main() -> None:
    """Print a line for each paragraph."""
    parser = argparse.ArgumentParser(description="Summarize the paragraphs of a file.")
    parser.add_argument("model", help="a converted folder, or a repository on the Hub")
    parser.add_argument("file", type=Path, help="paragraphs with empty lines between them")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model, device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model, truncation_side="left")
    # Of a text that is too long its end is kept: that is where the question stands.
    room = model.config.max_position_embeddings - args.max_new_tokens
    for paragraph in args.file.read_text(encoding="utf-8").split("\n\n"):
        inputs = tokenizer(
            prompt(paragraph.strip()), truncation=True, max_length=room, return_tensors="pt"
        ).to(model.device)
        outputs = model.generate(
            **inputs,
            max_new_tokens=args.max_new_tokens,
            do_sample=False,
            stop_strings=["\n"],
            tokenizer=tokenizer,
        )
        text = tokenizer.decode(
            outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        print(text.strip())


if __name__ == "__main__":
    main()
