"""What is different about the model card of a BERT."""

from __future__ import annotations

from .architecture import Architecture
from .families.megatron_bert import MASKED_LM, PRETRAINING
from .tokenizer import Tokenizer


def bert_class(architecture: Architecture) -> str:
    """The class of transformers with the heads that the model has."""
    return PRETRAINING if architecture.bert_binary_head else MASKED_LM


def bert_rows(a: Architecture) -> list[tuple[str, object]]:
    """Lines of the table of sizes; none for other models."""
    if a.kind != "bert":
        return []
    second = ", and whether one text follows the other" if a.bert_binary_head else ""
    return [
        ("Token types", a.num_tokentypes or "none"),
        ("Predicts", f"masked tokens{second}"),
    ]


def bert_python(architecture: Architecture, tokenizer: Tokenizer) -> str:
    """An example of use."""
    name = bert_class(architecture)
    logits = "prediction_logits" if architecture.bert_binary_head else "logits"
    if not tokenizer.files:
        return f"""\
from transformers import {name}

path = "FOLDER"
model = {name}.from_pretrained(path, device_map="auto")"""
    return f"""\
from transformers import AutoTokenizer, {name}

path = "FOLDER"
model = {name}.from_pretrained(path, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(path)
text = f"The capital of France is {{tokenizer.mask_token}}."
inputs = tokenizer(text, return_tensors="pt").to(model.device)
best = model(**inputs).{logits}.argmax(-1)[0]
print(tokenizer.decode(best[inputs.input_ids[0] == tokenizer.mask_token_id]))"""
