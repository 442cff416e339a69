r"""tiktoken's mergeable ranks as a tokenizer.json that gives the same ids.

    cl100k_base.tiktoken      a line per token: base64 of its bytes, a space, its rank
    cl100k_base.tiktoken.json beside it, unless the name is OpenAI's: {"pattern": how texts are cut,
                              "special_tokens": {text: id}}
    vocab.json of Megatron's  [{"rank": 0, "token_bytes": base64, "token_str": text}, ...]

Of Megatron's, the ids begin with special tokens: those named, then <SPECIAL_7> and so on. Pairs
that make a token merge in the order of the tokens' ranks; a piece that is a token is looked up.
(Source: CoreBPE of tiktoken; core/tokenizers/text/libraries/tiktoken_tokenizer.py of Megatron-Core
0.16.1, and CustomTikTokenizer of its training/tokenizer for the names of the arguments.)
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TypeGuard

from .errors import SourceError, UsageError
from .tokenizer_json import Json, isolate, json_of

_LETTERS = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++\z|\s+(?!\S)|\s"
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|(?>\p{N}{1,3})| ?[^\s\p{L}\p{N}]++[\r\n]*+|"
    r"\s++\z|\s*[\r\n]|\s+(?!\S)|\s"
)
_O200K = (
    rf"{_LETTERS}{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    rf"{_LETTERS}{_UPPER}+{_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MEGATRON = {
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": rf"{_LETTERS}{_UPPER}*{_LOWER}+|{_LETTERS}{_UPPER}+{_LOWER}*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
_END, _FIM = "<|endoftext|>", ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
PATTERNS: Mapping[str, str] = {
    "r50k_base": _GPT2,
    "p50k_base": _GPT2,
    "cl100k_base": _CL100K,
    "o200k_base": _O200K,
    **_MEGATRON,
}
"""How texts are cut: OpenAI's encodings and Megatron's two, in the syntax of tokenizer.json."""
_OPENAI: Mapping[str, Mapping[str, int]] = {
    "r50k_base": {_END: 50256},
    "p50k_base": {_END: 50256},
    "cl100k_base": {
        _END: 100257,
        **{token: 100258 + number for number, token in enumerate(_FIM)},
        "<|endofprompt|>": 100276,
    },
    "o200k_base": {_END: 199999, "<|endofprompt|>": 200018},
}
_MEGATRON_SPECIAL = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
_MEGATRON_NUM_SPECIAL, _MEGATRON_VOCAB_SIZE = 1000, 2**17


@dataclass(frozen=True, slots=True)
class Ranks:
    """A tokenizer of tiktoken's kind.

    Attributes:
        tokens: bytes -> id.
        pattern: how texts are cut, in tokenizer.json's syntax.
        special_tokens: text -> id.
        bos, eos, pad: which of them have a meaning.
    """

    tokens: Mapping[bytes, int]
    pattern: str
    special_tokens: Mapping[str, int]
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None


def is_ranks(data: bytes) -> bool:
    """Whether bytes are lines of base64 and a rank."""
    return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", data) is not None


def is_megatron_ranks(value: object) -> TypeGuard[list[object]]:
    """Whether a JSON document is Megatron's list of tokens."""
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and ("token_bytes" in value[0])
    )


def read_ranks(data: bytes, name: str, beside: bytes | None) -> Ranks:
    """A `.tiktoken` file.

    Args:
        data: its content.
        name: of the file; OpenAI's say the pattern.
        beside: the content of the file with .json after its name, if there is one.

    Raises:
        SourceError: a file is damaged.
        UsageError: nothing says how texts are cut.
    """
    tokens = {}
    for number, line in enumerate(data.splitlines(), 1):
        text, _, rank = line.partition(b" ")
        if line.strip():
            tokens[_decoded(text, name, number)] = _rank(rank, name, number)
    _check(tokens, name)
    said = _json(beside, name) if beside is not None else {}
    stem = name.removesuffix(".tiktoken")
    pattern = said.get("pattern", stem)
    special = said.get("special_tokens", _OPENAI.get(stem))
    if (pattern not in PATTERNS and "pattern" not in said) or special is None:
        raise UsageError(
            f"{name} does not say how texts are cut, nor its special tokens",
            expected=f"one of OpenAI's names ({', '.join(_OPENAI)}), or {name}.json beside it",
            fix=f'write {name}.json: {{"pattern": "cl100k_base", "special_tokens": '
            f'{{"{_END}": {len(tokens)}}}}}; the pattern is a name or a regular expression',
        )
    if not isinstance(pattern, str) or not _is_special(special):
        raise _damaged(f"{name}.json", "a pattern and special tokens of another kind")
    assert isinstance(special, Mapping)
    end = next((text for text in (_END, "<|end_of_text|>", "</s>") if text in special), None)
    begin = next((t for t in ("<|begin_of_text|>", "<s>") if t in special), end)
    return Ranks(tokens, PATTERNS.get(pattern, pattern), special, begin, end)


def read_megatron_ranks(values: Sequence[object], name: str, args: Mapping[str, object]) -> Ranks:
    """Megatron's list of tokens.

    Args:
        values: the document.
        name: of the file, for messages.
        args: Megatron's arguments, which say the pattern and the special tokens.

    Raises:
        SourceError: it is damaged.
        UsageError: it has fewer tokens than the arguments ask for, or another pattern.
    """
    pattern = args.get("tiktoken_pattern") or "v2"
    special = args.get("tiktoken_special_tokens") or list(_MEGATRON_SPECIAL)
    count = args.get("tiktoken_num_special_tokens") or _MEGATRON_NUM_SPECIAL
    size = args.get("vocab_size") or _MEGATRON_VOCAB_SIZE
    if (
        pattern not in _MEGATRON
        or not isinstance(special, list)
        or not isinstance(count, int)
        or not isinstance(size, int)
        or not len(special) <= count < size
    ):
        raise UsageError(
            "the arguments of Megatron's tiktoken tokenizer cannot be used",
            found=f"tiktoken_pattern = {pattern!r}, {count!r} special tokens of {size!r} in all",
            expected=f"{' or '.join(_MEGATRON)}, and fewer special tokens than tokens",
        )
    texts = [str(text) for text in special]
    texts += [f"<SPECIAL_{number}>" for number in range(len(texts), count)]
    if len(values) < size - count:
        raise UsageError(
            f"{name} has too few tokens",
            found=f"{len(values)} tokens",
            expected=f"{size - count}: vocab_size {size} without {count} special tokens",
            fix="give the tokenizer the model was trained with",
        )
    tokens: dict[bytes, int] = {}
    for rank, value in enumerate(values[: size - count]):
        if not isinstance(value, dict) or value.get("rank") != rank:
            raise _damaged(name, f"token {rank}: {str(value)[:60]}")
        tokens[_decoded(str(value.get("token_bytes")).encode(), name, rank)] = rank + count
    _check(tokens, name)
    ids = {text: number for number, text in enumerate(texts)}
    named = {"bos": "<s>", "eos": "</s>", "pad": "<pad>"}
    found = {kind: text for kind, text in named.items() if text in ids}
    return Ranks(tokens, PATTERNS[str(pattern)], ids, **found)


def _is_special(value: object) -> bool:
    return isinstance(value, dict) and all(type(number) is int for number in value.values())


def _json(data: bytes, name: str) -> Mapping[str, object]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _damaged(f"{name}.json", str(error)) from error
    if not isinstance(value, dict):
        raise _damaged(f"{name}.json", type(value).__name__)
    return value


def _decoded(text: bytes, name: str, number: int) -> bytes:
    try:
        token = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _damaged(name, f"token {number}: {text[:40]!r}") from error
    if not token:
        raise _damaged(name, f"token {number} has no bytes")
    return token


def _rank(text: bytes, name: str, number: int) -> int:
    if not text.strip().isdigit():
        raise _damaged(name, f"line {number}: rank {text[:40]!r}")
    return int(text)


def _check(tokens: Mapping[bytes, int], name: str) -> None:
    missing = [byte for byte in range(256) if bytes([byte]) not in tokens]
    if missing or len(set(tokens.values())) < len(tokens):
        found = f"no token for byte {missing[0]}" if missing else "two tokens of one rank"
        raise _damaged(name, found)


def _damaged(name: str, found: str) -> SourceError:
    return SourceError(
        f"{name} is no tokenizer",
        found=found,
        expected="a token for every byte, each with bytes and a rank of its own",
        fix="copy it again, or give another with --tokenizer PATH",
    )


def tokenizer_json(ranks: Ranks) -> Json:
    """The tokenizer.json with the same ids."""
    names = {token: _written(token) for token in ranks.tokens}
    vocab = {names[token]: number for token, number in ranks.tokens.items()}
    special = [(number, text) for text, number in ranks.special_tokens.items()]
    bytewise = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    return json_of(
        sorted(special, key=itemgetter(0)),
        normalizer=None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [isolate(ranks.pattern), bytewise]},
        post_processor=None,
        decoder=bytewise,
        model={
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {**ranks.special_tokens, **vocab},
            "merges": [[names[left], names[right]] for left, right in _merges(ranks.tokens)],
        },
    )


def _merges(tokens: Mapping[bytes, int]) -> Iterable[tuple[bytes, bytes]]:
    """Pairs of tokens that make another, the one with the lowest rank first."""
    for token in sorted(tokens, key=lambda token: tokens[token]):
        for end in range(1, len(token)):
            if token[:end] in tokens and token[end:] in tokens:
                yield token[:end], token[end:]


def _written(token: bytes) -> str:
    """GPT-2's letters for bytes, in which tokenizer.json spells tokens."""
    return "".join(map(_BYTES.__getitem__, token))


def _letters_of_bytes() -> tuple[str, ...]:
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters, free = [], 0x100
    for byte in range(256):
        letters.append(chr(byte) if byte in shown else chr(free))
        free += byte not in shown
    return tuple(letters)


_BYTES = _letters_of_bytes()
