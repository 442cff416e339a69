"""The parts of a tokenizer.json that are alike whatever the tokenizer was.

    added_tokens    special tokens: found as they are written, before anything else
    pre_tokenizer   a pattern whose matches stand alone

(Source: AddedToken and pre_tokenizers.Split of Hugging Face's tokenizers.)
"""

from __future__ import annotations

from collections.abc import Iterable

Json = dict[str, object]


def json_of(special_tokens: Iterable[tuple[int, str]], **parts: object) -> Json:
    """A tokenizer.json.

    Args:
        special_tokens: id and text of each.
        parts: `normalizer`, `pre_tokenizer`, `post_processor`, `decoder` and `model`, which are
            written in the order given.
    """
    added = [
        {
            "id": number,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, text in special_tokens
    ]
    head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    return {**head, **parts}


def isolate(pattern: str) -> Json:
    """A pre-tokenizer that divides a text at the matches of a regular expression."""
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
