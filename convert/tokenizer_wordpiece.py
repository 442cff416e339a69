"""BERT's WordPiece vocabulary, `vocab.txt`, as a tokenizer.json of the same ids.

    vocab.txt                   a token a line; its id is the number of the line
    [BOS], [EOS]                Megatron's two, after them, where the vocabulary has none
    <extra_id_0>, ...           `vocab_extra_ids` of them: T5's sentinels

A text is cleaned of control characters, lower-cased and stripped of accents for an uncased
vocabulary, divided at spaces, punctuation and Chinese characters, and each word into the longest
pieces there are. BERT puts `[CLS]` and `[SEP]` around it, T5 nothing. One thing differs from
Megatron: characters that Unicode has not assigned, or leaves to private use, are dropped with the
control characters, where Megatron makes their word `[UNK]`.
(Source: _BertWordPieceTokenizer in training/tokenizer/tokenizer.py and bert_tokenization.py beside
it, core_v0.16.1; [BOS] and [EOS] since v2.1, when vocab_extra_ids became an argument.)
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .argument_tables import NOTHING, Arguments
from .errors import SourceError
from .tokenizer_json import Json, json_of

CASES = {"BertWordPieceLowerCase": True, "BertWordPieceCase": False}
FILE = "vocab.txt"
_MARKS = {"cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]", "pad": "[PAD]", "unk": "[UNK]"}
_ENDS = {"bos": "[BOS]", "eos": "[EOS]"}
_PREFIX = "##"
_LONGEST_WORD = 200
_MOST_SENTINELS = 100_000


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What Megatron makes of a vocab.txt.

    Attributes:
        ids: token -> id, in the order of ids.
        special_tokens: those that are found in a text as they are written.
        is_lower_case: whether texts are lower-cased and stripped of accents.
        is_framed: whether `[CLS]` and `[SEP]` stand around a text.
    """

    ids: Mapping[str, int]
    special_tokens: tuple[str, ...]
    is_lower_case: bool
    is_framed: bool

    @property
    def meanings(self) -> dict[str, str | None]:
        """Which token is which."""
        named = {**_ENDS, **_MARKS}
        return {kind: text if text in self.ids else None for kind, text in named.items()}


def is_vocabulary(data: bytes) -> bool:
    """Whether a file is a WordPiece vocabulary: BERT's marks stand on lines of their own."""
    lines = set(data.split())
    return {b"[CLS]", b"[SEP]", b"[UNK]"} <= lines


def read_vocabulary(data: bytes, name: str, args: Arguments = NOTHING) -> Vocabulary:
    """The vocabulary of a file, with what Megatron adds to it.

    Args:
        data: the file's content.
        name: what it is called in messages.
        args: Megatron's arguments: case, number of sentinels, and whether the model is a T5. From
            the file alone the case is read off its words, and nothing is added.

    Raises:
        SourceError: it is no text, or no vocabulary.
    """
    try:
        lines = [line.strip() for line in io.StringIO(data.decode(), newline=None)]
    except UnicodeDecodeError as error:
        raise SourceError(f"{name} is no readable text", found=str(error)) from error
    ids = {token: number for number, token in enumerate(lines)}
    if _MARKS["unk"] not in ids:
        raise SourceError(
            f"{name} is no WordPiece vocabulary",
            found=f"{len(ids)} tokens",
            expected="[UNK] among them",
        )
    marks = [token for token in (*_MARKS.values(), *_ENDS.values()) if token in ids]
    count = args.get("vocab_extra_ids")
    added = []
    if "vocab_extra_ids" in args and args.get("tokenizer_type") in CASES:
        sentinels = range(min(count, _MOST_SENTINELS) if type(count) is int else 0)
        added = [*_ENDS.values(), *(f"<extra_id_{number}>" for number in sentinels)]
    for token in added:
        ids.setdefault(token, len(ids))
    return Vocabulary(
        ids=dict(sorted(ids.items(), key=lambda item: item[1])),
        special_tokens=tuple(dict.fromkeys((*marks, *added))),
        is_lower_case=CASES.get(str(args.get("tokenizer_type")), not _has_capitals(lines)),
        is_framed=args.get("decoder_seq_length") is None and not count,
    )


def _has_capitals(tokens: list[str]) -> bool:
    return any(token != token.lower() for token in tokens if not token.startswith(("[", "<")))


def tokenizer_json(vocabulary: Vocabulary) -> Json:
    """The vocabulary as a tokenizer.json."""
    special = [(vocabulary.ids[token], token) for token in vocabulary.special_tokens]
    return json_of(
        sorted(special),
        normalizer={
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": vocabulary.is_lower_case,
            "lowercase": vocabulary.is_lower_case,
        },
        pre_tokenizer={"type": "BertPreTokenizer"},
        post_processor=_frame(vocabulary),
        decoder={"type": "WordPiece", "prefix": _PREFIX, "cleanup": True},
        model={
            "type": "WordPiece",
            "unk_token": _MARKS["unk"],
            "continuing_subword_prefix": _PREFIX,
            "max_input_chars_per_word": _LONGEST_WORD,
            "vocab": dict(vocabulary.ids),
        },
    )


def _frame(vocabulary: Vocabulary) -> Json | None:
    """`[CLS] text [SEP]`, and `[CLS] text [SEP] other [SEP]` of two texts."""
    ids = vocabulary.ids
    if not vocabulary.is_framed or not {_MARKS["cls"], _MARKS["sep"]} <= set(ids):
        return None

    def special(kind: str, text: int) -> Json:
        return {"SpecialToken": {"id": _MARKS[kind], "type_id": text}}

    def whole(name: str, text: int) -> Json:
        return {"Sequence": {"id": name, "type_id": text}}

    single = [special("cls", 0), whole("A", 0), special("sep", 0)]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, whole("B", 1), special("sep", 1)],
        "special_tokens": {
            mark: {"id": mark, "ids": [ids[mark]], "tokens": [mark]}
            for mark in (_MARKS["cls"], _MARKS["sep"])
        },
    }


def megatron_arguments(files: Mapping[str, bytes]) -> dict[str, object]:
    """The arguments with which Megatron builds the tokenizer of these files; none if it cannot.

    Its own classes have what T5's data asks for, which its HuggingFaceTokenizer has not.
    """
    try:
        fast = json.loads(files["tokenizer.json"])
        lower = fast["normalizer"]["lowercase"]
        tokens = [token["content"] for token in fast["added_tokens"]]
        if FILE not in files or fast["model"]["type"] != "WordPiece":
            return {}
    except (KeyError, TypeError, ValueError):
        return {}
    sentinels = sum(bool(re.fullmatch(r"<extra_id_\d+>", str(token))) for token in tokens)
    kinds = {is_lower: kind for kind, is_lower in CASES.items()}
    return {"tokenizer_type": kinds[lower is True], "vocab_extra_ids": sentinels}
