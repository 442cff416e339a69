"""Translate sentences with a model that was only pretrained: examples first, then the sentence.

python examples/translate.py out --to French "The weather is fine."
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_mtt  # noqa: F401  registers MTT's classes: no remote code is run

EXAMPLES = {
    "French": [("Good morning.", "Bonjour."), ("Where is the station?", "Où est la gare ?")],
    "German": [
        ("Good morning.", "Guten Morgen."),
        ("Where is the station?", "Wo ist der Bahnhof?"),
    ],
}


def prompt(sentence: str, language: str) -> str:
    """Two solved examples and an open one; the model goes on after the last colon."""
    solved = [f"English: {source}\n{language}: {target}\n" for source, target in EXAMPLES[language]]
    return "\n".join([*solved, f"English: {sentence}\n{language}:"])


def main() -> None:
    """Print the translation of each sentence."""
    parser = argparse.ArgumentParser(description="Translate sentences.")
    parser.add_argument("model", help="a converted folder, or a repository on the Hub")
    parser.add_argument("sentences", nargs="+")
    parser.add_argument("--to", choices=sorted(EXAMPLES), default="French")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model, device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for sentence in args.sentences:
        inputs = tokenizer(prompt(sentence, args.to), return_tensors="pt").to(model.device)
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
