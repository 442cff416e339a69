"""SentencePiece's `.model` files as a tokenizer.json that gives the same ids.

    ModelProto                         a protobuf message: (field << 3 | kind), value, ...
      1 pieces          repeated         1 text  2 score  3 type
      2 trainer_spec                     3 model_type  35 byte_fallback  40-43 ids  45-48 texts
      3 normalizer_spec                  1 name  2 charsmap  3 dummy prefix  4 extra whitespace

    unigram  -> Unigram, with the pieces' scores
    bpe      -> BPE; pieces have no merges: every division of a piece into two others is one, in the
                order of the scores
    char     -> BPE without merges

Types of pieces: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte. (Source:
sentencepiece_model.proto of SentencePiece 0.2; normalizer.cc for the order in which it treats
whitespace.)
"""

from __future__ import annotations

import base64
import re
import struct
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .errors import SourceError, UnsupportedError
from .tokenizer_json import Json, isolate, json_of

_UNIGRAM, _BPE, _WORD, _CHAR = 1, 2, 3, 4
_UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 2, 3, 4, 5, 6
_SPECIAL = (_UNKNOWN, _CONTROL)
_SPACE = "▁"
_RULES = ("nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf")
# Two of the code points that are no characters and never will be, and the one that is kept.
_BREAK, _KEPT, _TILDE = "\ufdd0", "\ufdd1", "\uff5e"


@dataclass(slots=True)
class _Piece:
    text: str = ""
    score: float = 0.0
    type: int = 1


@dataclass(slots=True)
class SentencePieceModel:
    """What a `.model` file says, with the defaults of SentencePiece where it is silent.

    Attributes:
        pieces: in the order of their ids.
        ids: of `unk`, `bos`, `eos` and `pad`; -1 where there is none.
    """

    pieces: list[_Piece] = field(default_factory=list)
    model_type: int = _UNIGRAM
    byte_fallback: bool = False
    whitespace_as_suffix: bool = False
    ids: dict[str, int] = field(default_factory=lambda: {"unk": 0, "bos": 1, "eos": 2, "pad": -1})
    normalizer: str = ""
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True

    def token(self, kind: str) -> str | None:
        """The text of a special token."""
        number = self.ids[kind]
        return self.pieces[number].text if 0 <= number < len(self.pieces) else None


def is_sentencepiece(data: bytes) -> bool:
    """Whether bytes may be a `.model` file: it begins with a piece."""
    return data[:1] == b"\x0a"


def read_model(data: bytes, name: str) -> SentencePieceModel:
    """A `.model` file.

    Raises:
        SourceError: it is none, or damaged.
    """
    model = SentencePieceModel()
    try:
        for number, value in _fields(data):
            if number == 1:
                model.pieces.append(_piece(_bytes(value)))
            elif number == 2:
                _trainer(model, _bytes(value))
            elif number == 3:
                _normalizer(model, _bytes(value))
    except (IndexError, ValueError, TypeError, struct.error) as error:
        raise _damaged(name, str(error)) from error
    texts = {piece.text for piece in model.pieces}
    if not texts or "" in texts or len(texts) < len(model.pieces):
        raise _damaged(name, "no pieces, an empty one, or one twice")
    if not 0 <= model.ids["unk"] < len(model.pieces):
        raise _damaged(name, f"unk_id {model.ids['unk']} of {len(model.pieces)} pieces")
    return model


def _damaged(name: str, found: str) -> SourceError:
    return SourceError(
        f"{name} is no SentencePiece model",
        found=found,
        expected="a .model file that SentencePiece trained",
        fix="copy it again, or give another with --tokenizer PATH",
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a message."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if kind == 2:
            size, position = _varint(data, position)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if position + size > len(data):
            raise ValueError(f"{size} bytes at {position} of {len(data)}")
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
    raise ValueError(f"a number without an end at {position}")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise TypeError(f"a number, {value}, where bytes should be")
    return value


def _number(value: int | bytes) -> int:
    """A number; negative ones are written with 64 bits."""
    if isinstance(value, bytes):
        raise TypeError("bytes where a number should be")
    return value - (1 << 64) if value >> 63 else value


def _piece(data: bytes) -> _Piece:
    piece = _Piece()
    for number, value in _fields(data):
        if number == 1:
            piece.text = _bytes(value).decode()
        elif number == 2:
            (piece.score,) = struct.unpack("<f", _bytes(value))
        elif number == 3:
            piece.type = _number(value)
    return piece


def _trainer(model: SentencePieceModel, data: bytes) -> None:
    kinds = {40: "unk", 41: "bos", 42: "eos", 43: "pad"}
    for number, value in _fields(data):
        if number == 3:
            model.model_type = _number(value)
        elif number == 24:
            model.whitespace_as_suffix = bool(_number(value))
        elif number == 35:
            model.byte_fallback = bool(_number(value))
        elif number in kinds:
            model.ids[kinds[number]] = _number(value)


def _normalizer(model: SentencePieceModel, data: bytes) -> None:
    for number, value in _fields(data):
        if number == 1:
            model.normalizer = _bytes(value).decode()
        elif number == 2:
            model.charsmap = _bytes(value)
        elif number == 3:
            model.add_dummy_prefix = bool(_number(value))
        elif number == 4:
            model.remove_extra_whitespaces = bool(_number(value))
        elif number == 5:
            model.escape_whitespaces = bool(_number(value))


def megatron_tokens(model: SentencePieceModel, vocab_extra_ids: object) -> list[str]:
    """What Megatron-LM's SentencePieceTokenizer adds after the pieces, <EOD> among them.

    (Source: _SentencePieceTokenizer of megatron/training/tokenizer/tokenizer.py, core_v0.12.)
    """
    wanted = ["<CLS>", "<SEP>", "<EOD>", "<MASK>"]
    wanted += [model.token(kind) or f"<{kind.upper()}>" for kind in ("pad", "bos", "eos")]
    count = vocab_extra_ids if isinstance(vocab_extra_ids, int) else 0
    wanted += [f"<extra_id_{number}>" for number in range(count)]
    there = {piece.text for piece in model.pieces}
    return [text for text in dict.fromkeys(wanted) if text not in there]


def tokenizer_json(
    model: SentencePieceModel, name: str, *, add_bos: bool = False, more: Sequence[str] = ()
) -> Json:
    """The tokenizer.json with the same ids.

    Args:
        model: what the file says.
        name: of the file, for messages.
        add_bos: whether every text begins with the token for a beginning.
        more: special tokens with the ids after those of the pieces.

    Raises:
        UnsupportedError: a kind of model that tokenizer.json has no word for.
    """
    _refuse(model, name)
    special = [(n, p.text) for n, p in enumerate(model.pieces) if p.type in _SPECIAL]
    return json_of(
        [*special, *enumerate(more, len(model.pieces))],
        normalizer={"type": "Sequence", "normalizers": list(_normalizers(model))},
        pre_tokenizer=_divide(model),
        post_processor=_begin(model) if add_bos else None,
        decoder=_decoder(model),
        model=_unigram(model) if model.model_type == _UNIGRAM else _merging(model),
    )


def _refuse(model: SentencePieceModel, name: str) -> None:
    odd = {
        "pieces of whole words (model_type word)": model.model_type == _WORD,
        "spaces at the end of words (treat_whitespace_as_suffix)": model.whitespace_as_suffix,
        "spaces that are no ▁ (escape_whitespaces is off)": not model.escape_whitespaces,
        "pieces that are not used": any(piece.type == _UNUSED for piece in model.pieces),
        f"model_type {model.model_type}": model.model_type not in (1, 2, 3, 4),
    }
    if found := [text for text, holds in odd.items() if holds]:
        raise UnsupportedError(
            f"{name} is a tokenizer mtt cannot write",
            found=", ".join(found),
            expected="a unigram, bpe or char model with spaces as ▁ before words",
            fix="give its Hugging Face files with --tokenizer PATH, or --tokenizer none",
        )


def _normalizers(model: SentencePieceModel) -> Iterator[Json]:
    """What SentencePiece does with a text before it looks for pieces, in its order."""
    if model.charsmap:
        table = base64.b64encode(model.charsmap).decode()
        precompiled: Json = {"type": "Precompiled", "precompiled_charsmap": table}
        if model.normalizer in _RULES:
            yield from _composed(precompiled, keeps_tilde=model.normalizer.startswith("nmt"))
        else:
            yield precompiled
    if model.remove_extra_whitespaces:
        yield _replace(r"\A +| +\z", "", regex=True)
        yield _replace(" {2,}", " ", regex=True)
    if model.add_dummy_prefix:
        yield {"type": "Prepend", "prepend": _SPACE}
    yield _replace(" ", _SPACE)


def _composed(precompiled: Json, *, keeps_tilde: bool) -> Iterator[Json]:
    r"""The rules that SentencePiece brings, all of which begin with NFKC.

    `Precompiled` looks up what a reader takes for one character and forgets what follows the part
    it knows: `\r\n` becomes one space, an accent after a superscript is lost. So letters are
    composed by NFKC before, and then looked up one by one. Unlike NFKC, SentencePiece does not
    reorder marks, and some rules keep one character.

    What remains different: marks newer than Unicode 3.2 in an order of their own, U+0344, and two
    code points that are no characters, which are lost.
    """
    yield _replace(_disorder(), _BREAK, regex=True)
    if keeps_tilde:
        yield _replace(_TILDE, _KEPT)
    yield {"type": "NFKC"}
    if keeps_tilde:
        yield _replace(_KEPT, _TILDE)
    yield _replace(_BREAK, "")
    yield _replace(r"(?!\A)(?=[\p{M}\n])", _BREAK, regex=True)
    yield precompiled
    yield _replace(_BREAK, "")


def _disorder() -> str:
    """A pattern of the places between two marks that NFKC would exchange.

    The classes of marks are those of Unicode 3.2, which every Python has.
    """
    classes: dict[int, list[int]] = {}
    for code in range(0x110000):
        if number := unicodedata.ucd_3_2_0.combining(chr(code)):
            classes.setdefault(number, []).append(code)
    numbers = sorted(classes)
    places = [
        f"(?<=[{_ranges(classes[number])}])"
        f"(?=[{_ranges([code for below in numbers[:rank] for code in classes[below]])}])"
        for rank, number in enumerate(numbers)
        if rank
    ]
    return rf"(?=\p{{M}})(?:{'|'.join(places)})"


def _ranges(codes: list[int]) -> str:
    """The inside of a character class."""
    runs: list[list[int]] = []
    for code in sorted(codes):
        if runs and runs[-1][1] == code - 1:
            runs[-1][1] = code
        else:
            runs.append([code, code])
    ends = [(rf"\x{{{first:X}}}", rf"\x{{{last:X}}}", first == last) for first, last in runs]
    return "".join(first if one else f"{first}-{last}" for first, last, one in ends)


def _replace(text: str, content: str, *, regex: bool = False) -> Json:
    kind = "Regex" if regex else "String"
    return {"type": "Replace", "pattern": {kind: text}, "content": content}


def _divide(model: SentencePieceModel) -> Json | None:
    """User-defined pieces stand alone, wherever they are."""
    texts = [piece.text for piece in model.pieces if piece.type == _USER]
    if not texts:
        return None
    pattern = "|".join(map(re.escape, sorted(texts, key=lambda text: (-len(text), text))))
    return isolate(pattern)


def _begin(model: SentencePieceModel) -> Json | None:
    token = model.token("bos")
    if token is None:
        return None
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            first,
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {
            token: {"id": token, "ids": [model.ids["bos"]], "tokens": [token]},
        },
    }


def _decoder(model: SentencePieceModel) -> Json:
    steps: list[Json] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.add_dummy_prefix or model.remove_extra_whitespaces:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _unigram(model: SentencePieceModel) -> Json:
    return {
        "type": "Unigram",
        "unk_id": model.ids["unk"],
        # No score of a normal piece is above 0: a user-defined one wins where it stands alone.
        "vocab": [[p.text, 0.0 if p.type == _USER else p.score] for p in model.pieces],
        "byte_fallback": model.byte_fallback,
    }


def _merging(model: SentencePieceModel) -> Json:
    vocab = {piece.text: number for number, piece in enumerate(model.pieces)}
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.token("unk"),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        # What stands alone is looked up: user-defined pieces have no merges.
        "ignore_merges": any(piece.type == _USER for piece in model.pieces),
        "vocab": vocab,
        "merges": _merges(model) if model.model_type == _BPE else [],
    }


def _merges(model: SentencePieceModel) -> list[list[str]]:
    """Pairs of pieces that make another, the one with the highest score first."""
    normal = [piece for piece in model.pieces if piece.type not in (_UNKNOWN, _CONTROL, _BYTE)]
    texts = {piece.text for piece in normal}
    return [
        [piece.text[:end], piece.text[end:]]
        for piece in sorted(normal, key=lambda piece: -piece.score)
        for end in range(1, len(piece.text))
        if piece.text[:end] in texts and piece.text[end:] in texts
    ]
