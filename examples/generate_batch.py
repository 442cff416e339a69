"""Continue several prompts at once.

python examples/generate_batch.py out "Once upon a time" "Tensor parallelism"
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_mtt  # noqa: F401  registers MTT's classes: no remote code is run


def main() -> None:
    """Generate greedily, and print each text in full."""
    parser = argparse.ArgumentParser(description="Continue several prompts at once.")
    parser.add_argument("model", help="a converted folder, or a repository on the Hub")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model, device_map="auto")
    # New tokens follow the prompt, so what fills shorter prompts up has to come before it.
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    inputs = tokenizer(args.prompts, padding=True, return_tensors="pt").to(model.device)
    outputs = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
    for text in tokenizer.batch_decode(outputs, skip_special_tokens=True):
        print(text)


if __name__ == "__main__":
    main()
