"""Talk to a model, a line each; an empty line or the end of the input stops.

python examples/chat.py out
"""

import argparse
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_mtt  # noqa: F401  registers MTT's classes: no remote code is run

# For models without a template of their own. One that was trained for chats has to get the format
# it was trained with: save it as chat_template.jinja in the folder.
TEMPLATE = """\
{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"""


def main() -> None:
    """Answer every line of the input, with all turns before it as context."""
    parser = argparse.ArgumentParser(description="Talk to a model.")
    parser.add_argument("model", help="a converted folder, or a repository on the Hub")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model, device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = TEMPLATE

    messages: list[dict[str, str]] = []
    for line in sys.stdin:
        if not line.strip():
            break
        messages.append({"role": "user", "content": line.strip()})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        outputs = model.generate(**inputs, max_new_tokens=args.max_new_tokens)
        answer = outputs[0, inputs["input_ids"].shape[1] :]
        # A model without turns goes on with the next one itself: the answer ends there.
        text = tokenizer.decode(answer, skip_special_tokens=True).partition("\nUser:")[0].strip()
        messages.append({"role": "assistant", "content": text})
        print(text)


if __name__ == "__main__":
    main()
