"""Tokenizer files for the output folder, and what they say about special tokens.

    HF folder                      copied: tokenizer.json, tokenizer_config.json, ...
    GPT-2 vocab.json + merges.txt  copied, with a tokenizer_config.json (names may have a prefix)
    tokenizer.json                 copied, with a tokenizer_config.json
    BERT's vocab.txt               copied, with a tokenizer.json of the same ids
    SentencePiece .model           copied, with a tokenizer.json of the same ids
    tiktoken ranks                 a tokenizer.json of the same ids; .tiktoken, or Megatron's JSON

A chat_template.jinja beside any of them is copied too. Nothing is downloaded and no tokenizer
library is loaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from . import sources
from . import tokenizer_sentencepiece as sentencepiece
from . import tokenizer_tiktoken as tiktoken
from . import tokenizer_wordpiece as wordpiece
from .argument_tables import NOTHING, Arguments
from .errors import SourceError, UnsupportedError, UsageError
from .plan import document

_FOLDER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
_CHAT_TEMPLATE = "chat_template.jinja"
_END_OF_TEXT = "<|endoftext|>"
# What a tokenizer.json alone does not say: names that tokenizers of Megatron models give to them.
_MEANINGS = {
    "bos": ("<|begin_of_text|>", "<s>", _END_OF_TEXT),
    "eos": (_END_OF_TEXT, "<|end_of_text|>", "</s>"),
    "pad": ("<pad>", "<|pad|>"),
    "unk": ("<unk>",),
}
_EXPECTED = (
    "a folder, a vocab.json beside its merges.txt, a tokenizer.json, BERT's vocab.txt, a "
    "SentencePiece .model, or tiktoken's ranks"
)


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

    pairs = (
        ("vocab.json", "merges.txt"),
        ("vocab.txt", "tokenizer_config.json"),
        ("tokenizer.model", "tokenizer_config.json"),
    )
    return has("tokenizer.json") or any(has(a) and has(b) for a, b in pairs)


def read_tokenizer(path: str, args: Arguments = NOTHING) -> Tokenizer:
    """The tokenizer at a path: a folder, or one of the files the module's docstring names.

    Args:
        path: of the folder or the file.
        args: Megatron's arguments, which say what a file alone does not: special tokens, and
            whether texts begin with one.

    Raises:
        UsageError: there is no tokenizer at the path, or it does not say everything.
        UnsupportedError: it is of a kind mtt cannot write.
        SourceError: a file is not readable.
    """
    if sources.is_dir(path):
        return _from_folder(path, args)
    if not sources.is_file(path):
        raise UsageError(
            f"there is no tokenizer at {path}",
            expected=_EXPECTED,
            fix="give another path, or --tokenizer none",
        )
    return _with_chat_template(_from_file(path, args), os.path.dirname(path))


def _from_file(path: str, args: Arguments) -> Tokenizer:
    name, data = os.path.basename(path), sources.read(path)
    if tiktoken.is_ranks(data):
        beside = f"{path}.json"
        said = sources.read(beside) if sources.is_file(beside) else None
        return _from_ranks(tiktoken.read_ranks(data, name, said))
    if data.lstrip()[:1] == b"[" and name.endswith(".json"):
        values = _parsed(data, name)
        if tiktoken.is_megatron_ranks(values):
            return _from_ranks(tiktoken.read_megatron_ranks(values, name, args))
    if name.endswith("tokenizer.json"):
        return _from_tokenizer_json(data)
    if name.endswith(".txt") and wordpiece.is_vocabulary(data):
        return _from_wordpiece(data, name, args)
    if name.endswith((".txt", ".json", ".bpe")):
        return _from_vocab(path)
    if sentencepiece.is_sentencepiece(data):
        return _from_sentencepiece(data, name, args)
    raise UnsupportedError(
        f"{path} is a tokenizer mtt cannot write",
        found=name,
        expected=_EXPECTED,
        fix="give its Hugging Face files with --tokenizer PATH, or --tokenizer none",
    )


def _with_chat_template(tokenizer: Tokenizer, folder: str) -> Tokenizer:
    path = os.path.join(folder, _CHAT_TEMPLATE)
    if _CHAT_TEMPLATE in tokenizer.files or not sources.is_file(path):
        return tokenizer
    return replace(tokenizer, files={**tokenizer.files, _CHAT_TEMPLATE: sources.read(path)})


def _parsed(data: bytes, name: str) -> object:
    try:
        value: object = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{name} is no readable JSON", found=str(error)) from error
    return value


def _json(data: bytes, name: str) -> dict[str, object]:
    value = _parsed(data, name)
    if not isinstance(value, dict):
        raise SourceError(f"{name} is no JSON object", found=type(value).__name__)
    return value


def _from_folder(path: str, args: Arguments) -> Tokenizer:
    files = {
        name: sources.read(os.path.join(path, name))
        for name in _FOLDER_FILES
        if sources.is_file(os.path.join(path, name))
    }
    if "tokenizer_config.json" not in files:
        return _with_chat_template(_from_file(_main_file(path, files), args), path)
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


def _main_file(folder: str, files: Mapping[str, bytes]) -> str:
    """The file to begin with in a folder without a tokenizer_config.json."""
    if "tokenizer.json" in files:
        return os.path.join(folder, "tokenizer.json")
    names = sorted(sources.listing(folder))
    for ending in (".model", ".tiktoken", "vocab.txt"):
        if found := [name for name in names if name.endswith(ending)]:
            return os.path.join(folder, found[0])
    return os.path.join(folder, _find(folder, "vocab.json"))


def _from_tokenizer_json(data: bytes) -> Tokenizer:
    return _fast(data, _token_ids({"tokenizer.json": data}))


def _from_ranks(ranks: tiktoken.Ranks) -> Tokenizer:
    ids = {**ranks.special_tokens, **{str(n): n for n in ranks.tokens.values()}}
    meanings = {"bos": ranks.bos, "eos": ranks.eos, "pad": ranks.pad}
    return _fast(document(tiktoken.tokenizer_json(ranks)), ids, meanings)


def _from_wordpiece(data: bytes, name: str, args: Arguments) -> Tokenizer:
    vocabulary = wordpiece.read_vocabulary(data, name, args)
    content = document(wordpiece.tokenizer_json(vocabulary))
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    config = {"model_input_names": inputs} if vocabulary.is_framed else {}
    tokenizer = _fast(content, vocabulary.ids, vocabulary.meanings, config)
    return replace(tokenizer, files={**tokenizer.files, "vocab.txt": data})


def _from_sentencepiece(data: bytes, name: str, args: Arguments) -> Tokenizer:
    """A `.model`, with what Megatron's tokenizer of that type adds to it."""
    model, trained_with = sentencepiece.read_model(data, name), args.get("tokenizer_type")
    more: list[str] = []
    meanings = {kind: model.token(kind) for kind in ("bos", "eos", "pad", "unk")}
    if trained_with == "SentencePieceTokenizer":
        more = sentencepiece.megatron_tokens(model, args.get("vocab_extra_ids"))
        if args.get("decoder_seq_length") is None:
            meanings["eos"] = "<EOD>"
        else:  # a T5 (T5MaskedWordPieceDataset in core/datasets/t5_dataset.py)
            meanings |= {k: meanings[k] or f"<{k.upper()}>" for k in ("bos", "eos", "pad")}
    content = sentencepiece.tokenizer_json(
        model, name, add_bos=trained_with == "Llama2Tokenizer", more=more
    )
    texts = [*(piece.text for piece in model.pieces), *more]
    ids = {text: number for number, text in enumerate(texts)}
    tokenizer = _fast(document(content), ids, meanings)
    return replace(tokenizer, files={**tokenizer.files, "tokenizer.model": data})


def _fast(
    data: bytes,
    ids: Mapping[str, int],
    meanings: Mapping[str, str | None] | None = None,
    more: Mapping[str, object] = NOTHING,
) -> Tokenizer:
    """A tokenizer.json with the tokenizer_config.json it needs.

    Args:
        data: its content.
        ids: token -> id.
        meanings: which token is which; None goes by their usual names.
        more: further fields of the configuration.
    """
    if meanings is None:
        meanings = {
            kind: next((name for name in names if name in ids), None)
            for kind, names in _MEANINGS.items()
        }
    named = {kind: text for kind, text in meanings.items() if text is not None}
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{f"{kind}_token": text for kind, text in named.items()},
        **more,
    }
    special = {kind: ids[named[kind]] if kind in named else None for kind in ("bos", "eos", "pad")}
    files = {"tokenizer.json": data, "tokenizer_config.json": document(config)}
    size = max(ids.values()) + 1 if ids else None
    return Tokenizer(files, size, special["bos"], special["eos"], special["pad"])


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
    elif "tokenizer.model" in files and sentencepiece.is_sentencepiece(files["tokenizer.model"]):
        name = "tokenizer.model"
        pieces = sentencepiece.read_model(files[name], name).pieces
        ids |= {piece.text: number for number, piece in enumerate(pieces)}
        if "added_tokens.json" in files:
            ids |= _json(files["added_tokens.json"], "added_tokens.json")
    elif "vocab.txt" in files:
        name = "vocab.txt"
        ids |= wordpiece.read_vocabulary(files[name], name).ids
        if "added_tokens.json" in files:
            ids |= _json(files["added_tokens.json"], "added_tokens.json")
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
