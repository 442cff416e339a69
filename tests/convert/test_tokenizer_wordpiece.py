"""BERT's vocab.txt becomes a tokenizer with the ids that Megatron's own gives."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase

from mtt_convert.errors import SourceError
from mtt_convert.tokenizer import has_tokenizer, read_tokenizer

MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = (
    "once upon a time the model cafe naive angstrom shard ##s ##ing ##ed in 1984 ' . , ! ? - $ ^ "
    "中 文 字 o ##ne un ##aff ##able i é e ##t ##at us usa don t"
).split()
CAPITALS = ["Once", "Upon", "USA", "É", "caf", "##é", "A"]
TEXTS = [
    "Once upon a time, the model's sharding: in 1984!",
    "  Café\tnaïve\r\nÅngström  unaffable\x00\x07 ",
    "中文字 and 中", "USA-us ^$ İi É", "",
    "x" * 300, "once\u2028upon\u00a0a\u3000time", "e\u0301tat", "[once] <extra_id_1> upon",
    "<extra_id_0>",
]  # fmt: skip
T5_ARGS = {"vocab_extra_ids": 3, "decoder_seq_length": 16}


def write(folder: Path, tokens: list[str]) -> Path:
    path = folder / "my-vocab.txt"
    path.write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    return path


def load(path: Path, out: Path, args: dict[str, Any]) -> PreTrainedTokenizerBase:
    out.mkdir()
    for name, data in read_tokenizer(str(path), args).files.items():
        (out / name).write_bytes(data)
    return AutoTokenizer.from_pretrained(out)


def pieces(text: str, vocabulary: dict[str, int], lower: bool) -> list[str]:
    """BERT's algorithm, said once more in a few lines."""
    text = "".join(
        " " if c in "\t\n\r" or unicodedata.category(c) == "Zs" else c
        for c in text
        if c in "\t\n\r" or unicodedata.category(c) not in ("Cc", "Cf")
    )
    if lower:
        text = unicodedata.normalize("NFD", text.lower())
        text = "".join(c for c in text if unicodedata.category(c) != "Mn")
    alone = {c for c in text if "\u4e00" <= c <= "\u9fff" or unicodedata.category(c)[0] == "P"}
    alone |= set("$+<=>^`|~")
    for c in alone:
        text = text.replace(c, f" {c} ")
    found: list[str] = []
    for word in text.split():
        parts: list[str] = []
        rest = word
        while rest and len(word) <= 200:
            prefix = "##" if parts else ""
            sizes = range(len(rest), 0, -1)
            size = next((n for n in sizes if prefix + rest[:n] in vocabulary), 0)
            if not size:
                break
            parts.append(prefix + rest[:size])
            rest = rest[size:]
        found += ["[UNK]"] if rest else parts
    return found


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("text", [text for text in TEXTS if "extra_id" not in text])
def test_ids_are_those_of_berts_algorithm(text: str, lower: bool, tmp_path: Path) -> None:
    tokens = MARKS + WORDS + ([] if lower else CAPITALS)
    kind = "BertWordPieceLowerCase" if lower else "BertWordPieceCase"
    tokenizer = load(write(tmp_path, tokens), tmp_path / "out", {**T5_ARGS, "tokenizer_type": kind})
    ids = {token: number for number, token in enumerate(tokens)}
    assert tokenizer(text).input_ids == [ids[piece] for piece in pieces(text, ids, lower)]


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_transformers_own_class(text: str, lower: bool, tmp_path: Path) -> None:
    path = write(tmp_path, MARKS + WORDS + ([] if lower else CAPITALS))
    theirs = BertTokenizer(vocab=str(path), do_lower_case=lower)
    assert load(path, tmp_path / "out", {})(text).input_ids == theirs(text).input_ids


def test_a_t5_has_megatrons_tokens_after_the_vocabulary_and_no_frame(tmp_path: Path) -> None:
    path, size = write(tmp_path, MARKS + WORDS), len(MARKS + WORDS)
    args = {**T5_ARGS, "tokenizer_type": "BertWordPieceLowerCase"}
    tokenizer = load(path, tmp_path / "out", args)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (size, size + 1)
    assert tokenizer.convert_tokens_to_ids("<extra_id_2>") == size + 4
    assert tokenizer("<extra_id_0>once<extra_id_1>").input_ids == [size + 2, 5, size + 3]
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 1)
    assert tokenizer.decode([5, 6, 14, 15, 21, 23]) == "once upon shards.!"
    read = read_tokenizer(str(path), args)
    assert (read.vocab_size, read.bos_token_id, read.eos_token_id) == (size + 5, size, size + 1)
    assert has_tokenizer(str(tmp_path / "out"))


def test_tokens_that_are_there_are_not_added(tmp_path: Path) -> None:
    path = write(tmp_path, ["[BOS]", *MARKS, *WORDS, "<extra_id_1>"])
    read = read_tokenizer(str(path), {**T5_ARGS, "tokenizer_type": "BertWordPieceCase"})
    size = 2 + len(MARKS + WORDS)
    assert (read.bos_token_id, read.eos_token_id, read.vocab_size) == (0, size, size + 3)


def test_a_bert_has_a_frame_and_a_second_text(tmp_path: Path) -> None:
    args = {"vocab_extra_ids": 0, "tokenizer_type": "BertWordPieceLowerCase"}
    tokenizer = load(write(tmp_path, MARKS + WORDS), tmp_path / "out", args)
    pair = tokenizer("once", "time")
    assert pair.input_ids == [2, 5, 3, 8, 3]
    assert pair["token_type_ids"] == [0, 0, 0, 1, 1]
    assert tokenizer.mask_token_id == 4


def test_old_releases_and_a_file_alone_have_the_vocabulary_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path, MARKS + WORDS)
    for args in ({"tokenizer_type": "BertWordPieceLowerCase"}, {}):
        read = read_tokenizer(str(path), args)
        assert (read.vocab_size, read.bos_token_id) == (len(MARKS + WORDS), None)


def test_the_case_of_a_file_alone_is_that_of_its_words(tmp_path: Path) -> None:
    for tokens, lower in ((MARKS + WORDS[:20], True), (MARKS + CAPITALS, False)):
        files = read_tokenizer(str(write(tmp_path, tokens))).files
        assert json.loads(files["tokenizer.json"])["normalizer"]["lowercase"] is lower


def test_carriage_returns_and_repeated_lines(tmp_path: Path) -> None:
    """Megatron counts lines, keeps the last number of a repeated token, and appends at `len`."""
    path = tmp_path / "vocab.txt"
    path.write_bytes("\r\n".join([*MARKS, "a", "a", "b", ""]).encode())
    args = {"vocab_extra_ids": 0, "tokenizer_type": "BertWordPieceCase"}
    content = json.loads(read_tokenizer(str(path), args).files["tokenizer.json"])
    vocabulary = content["model"]["vocab"]
    assert (vocabulary["a"], vocabulary["b"], vocabulary["[BOS]"]) == (6, 7, 7)


@pytest.mark.parametrize("data", [b"[CLS]\n[SEP]\n[UNK]\n\xff", b"x[UNK] \n[CLS] [SEP] [UNK]"])
def test_what_is_no_vocabulary_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes(data)
    with pytest.raises(SourceError) as caught:
        read_tokenizer(str(tmp_path / "vocab.txt"))
    assert "vocab.txt" in str(caught.value)


def test_a_folder_with_only_a_vocabulary(tmp_path: Path) -> None:
    write(tmp_path, MARKS + WORDS)
    assert read_tokenizer(str(tmp_path)).vocab_size == len(MARKS + WORDS)
