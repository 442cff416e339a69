"""Tokenizer files for the output folder, and what they say about special tokens.

    HF folder                      copied: tokenizer.json, tokenizer_config.json, ...
    GPT-2 vocab.json + merges.txt  copied, with a tokenizer_config.json (names may have a prefix)
    tokenizer.json                 copied, with a tokenizer_config.json

Nothing is downloaded and no tokenizer library is loaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from . import sources
from .errors import SourceError, UnsupportedError, UsageError
from .plan import document

_FOLDER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
_END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Files to write, and the facts a model configuration needs of them.

    Attributes:
        files: name -> content.
        vocab_size: highest token id + 1, None if the files do not tell.
        bos_token_id, eos_token_id, pad_token_id: None where there is no such token.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    vocab_size: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None


def has_tokenizer(folder: str) -> bool:
    """Whether a folder has the files of a tokenizer that `read_tokenizer` reads."""

    def has(name: str) -> bool:
        return sources.is_file(os.path.join(folder, name))

    pairs = (("vocab.json", "merges.txt"), ("tokenizer.model", "tokenizer_config.json"))
    return has("tokenizer.json") or any(has(a) and has(b) for a, b in pairs)


def read_tokenizer(path: str) -> Tokenizer:
    """The tokenizer at a path: a folder, a vocab.json with its merges, or a tokenizer.json.

    Raises:
        UsageError: there is no tokenizer at the path.
        UnsupportedError: it is of a kind mtt cannot write yet.
        SourceError: a file is not readable.
    """
    if sources.is_dir(path):
        return _from_folder(path)
    if not sources.is_file(path):
        raise UsageError(
            f"there is no tokenizer at {path}",
            expected="a folder, a vocab.json beside its merges.txt, or a tokenizer.json",
            fix="give another path, or --tokenizer none",
        )
    name = os.path.basename(path)
    if name.endswith("tokenizer.json"):
        return _from_tokenizer_json(sources.read(path))
    if name.endswith((".txt", ".json", ".bpe")):
        return _from_vocab(path)
    raise UnsupportedError(
        f"{path} is a tokenizer mtt cannot write yet",
        found=name,
        expected="a folder, a vocab.json beside its merges.txt, or a tokenizer.json",
        fix="give its Hugging Face files with --tokenizer PATH, or --tokenizer none",
    )


def _json(data: bytes, name: str) -> dict[str, object]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{name} is no readable JSON", found=str(error)) from error
    if not isinstance(value, dict):
        raise SourceError(f"{name} is no JSON object", found=type(value).__name__)
    return value


def _from_folder(path: str) -> Tokenizer:
    files = {
        name: sources.read(os.path.join(path, name))
        for name in _FOLDER_FILES
        if sources.is_file(os.path.join(path, name))
    }
    if "tokenizer_config.json" not in files:
        if "tokenizer.json" in files:
            return _from_tokenizer_json(files["tokenizer.json"])
        return _from_vocab(os.path.join(path, _find(path, "vocab.json")))
    config = _json(files["tokenizer_config.json"], "tokenizer_config.json")
    ids = _token_ids(files)
    special = {
        kind: ids.get(_content(config.get(f"{kind}_token"), kind)) for kind in ("bos", "eos", "pad")
    }
    return Tokenizer(
        files,
        max(ids.values()) + 1 if ids else None,
        special["bos"],
        special["eos"],
        special["pad"],
    )


def _from_tokenizer_json(data: bytes) -> Tokenizer:
    ids = _token_ids({"tokenizer.json": data})
    end = ids.get(_END_OF_TEXT)
    config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if end is not None:
        config |= {"bos_token": _END_OF_TEXT, "eos_token": _END_OF_TEXT}
    files = {"tokenizer.json": data, "tokenizer_config.json": document(config)}
    return Tokenizer(files, max(ids.values()) + 1 if ids else None, end, end)


def _from_vocab(path: str) -> Tokenizer:
    """GPT-2 byte-level BPE; the pair may be called gpt2-vocab.json and gpt2-merges.txt."""
    folder = os.path.dirname(path)
    vocab_path = os.path.join(folder, _find(folder, "vocab.json"))
    merges_path = os.path.join(folder, _find(folder, "merges.txt"))
    vocab, merges = sources.read(vocab_path), sources.read(merges_path)
    ids = _token_ids({"vocab.json": vocab})
    end = ids.get(_END_OF_TEXT)
    if not ids or end is None:
        raise SourceError(
            f"{vocab_path} is no GPT-2 vocabulary",
            found=f"{len(ids)} tokens",
            expected=f"tokens with numbers, {_END_OF_TEXT} among them",
        )
    tokens = {f"{kind}_token": _END_OF_TEXT for kind in ("bos", "eos", "unk")}
    config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, **tokens}
    files = {
        "vocab.json": vocab,
        "merges.txt": merges,
        "tokenizer_config.json": document(config),
    }
    return Tokenizer(files, max(ids.values()) + 1, end, end)


def _find(folder: str, ending: str) -> str:
    found = [name for name in sources.listing(folder or ".") if name.endswith(ending)]
    if not found:
        raise UsageError(
            f"there is no tokenizer in {folder or '.'}",
            expected=f"a file ending in {ending}, or tokenizer.json",
            fix="give another path, or --tokenizer none",
        )
    return found[0]


def _token_ids(files: Mapping[str, bytes]) -> dict[str, int]:
    """Token -> id as the fast or the slow files say."""
    ids: dict[str, object] = {}
    if "tokenizer.json" in files:
        name = "tokenizer.json"
        fast = _json(files[name], name)
        model = fast.get("model")
        ids |= _vocabulary(model.get("vocab") if isinstance(model, dict) else None)
        added = fast.get("added_tokens") or []
        tokens: list[object] = added if isinstance(added, list) else [added]
        for token in tokens:
            content = token.get("content") if isinstance(token, dict) else None
            if not isinstance(token, dict) or not isinstance(content, str):
                raise _damaged(
                    name, f"an added token {_short(token)}", "tokens with id and content"
                )
            ids[content] = token.get("id")
    elif "vocab.json" in files:
        name = "vocab.json"
        ids |= _json(files[name], name)
        if "added_tokens.json" in files:
            ids |= _json(files["added_tokens.json"], "added_tokens.json")
    return {token: _number(token, number, name) for token, number in ids.items()}


def _vocabulary(vocab: object) -> dict[str, object]:
    """The vocabulary of a tokenizer.json: an object, or a list of tokens with their scores."""
    if vocab is None or isinstance(vocab, dict):
        return vocab or {}
    if not isinstance(vocab, list):
        raise _damaged("tokenizer.json", f"a vocabulary {_short(vocab)}", "an object or a list")
    for item in vocab:
        if not (isinstance(item, list) and item and isinstance(item[0], str)):
            raise _damaged("tokenizer.json", f"a token {_short(item)}", "a text and its score")
    return {item[0]: number for number, item in enumerate(vocab)}


def _number(token: str, number: object, name: str) -> int:
    if type(number) is not int or number < 0:
        raise _damaged(name, f"{_short(token)}: {_short(number)}", "a number for each token")
    return number


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _damaged(name: str, found: str, expected: str) -> SourceError:
    return SourceError(
        f"{name} is no tokenizer",
        found=found,
        expected=expected,
        fix="copy it again, or give another with --tokenizer PATH",
    )


def _content(token: object, kind: str) -> str:
    """A special token's text: a string, or an AddedToken as JSON; empty if there is none."""
    text = token.get("content") if isinstance(token, dict) else token
    if text is None or text is False or isinstance(text, str):
        return text or ""
    raise _damaged("tokenizer_config.json", f"{kind}_token {_short(token)}", "a text")
