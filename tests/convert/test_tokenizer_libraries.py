"""Tokenizers of other libraries become files whose ids are those of the library itself."""

from __future__ import annotations

import base64
import io
import json
import random
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from tiktoken_ext import openai_public
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from mtt_convert import convert
from mtt_convert.errors import SourceError, UnsupportedError, UsageError
from mtt_convert.tokenizer import read_tokenizer
from mtt_convert.tokenizer_tiktoken import PATTERNS

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "convert" / "sample"
LANGUAGES = [
    "Once upon a time, in 1984, there were 12345 shards.",
    "مرحبا بالعالم، هذه جملة باللغة العربية.",
    "عَرَّبَ مُحَمَّدٌ الكِتَابَ",
    "שָׁלוֹם עוֹלָם, דָּגֵשׁ חָזָק",
    "你好，世界。这是一个测试句子。",
    "こんにちは、世界。これはテストです。がぎぐげご",
    "안녕하세요 세계, 한국어 문장입니다",
    "Привет, мир! Как дела?",
    "नमस्ते दुनिया, यह एक परीक्षण है क्ष",
    "Tiếng Việt có dấu thanh, naïve façade Ångström",
    "It's what they'll've said: don't; I'M, WE'RE",
]
CORPUS = [line for line in (ROOT / "README.md").read_text().splitlines() if line] + LANGUAGES * 20
ODD = [
    "",
    " ",
    "   ",
    "\n",
    "\r\n",
    "\t\t x",
    "  two  before and   three inside  ",
    "line\r\nline\n\nline\rline\n",
    "tab\tand\u00a0no-break\u3000wide\u2003em",
    "😀👨‍👩‍👧‍👦🇫🇷👍🏽 emoji",
    "\x00\x01\x1b[31m\x7f\u0085",
    "\u200b\u200d\ufeff\u00ad\u2060",
    "ｶﾞｷﾞﾊﾟ ﬁ ﬀ ① ½ Å K ㌔ ～〜",
    "³\u0617 e\u0301a\u0323\u0302 か\u3099",
    "▁already▁there",
    "\u0301starts with a mark",
    "x" * 300,
    "a" * 50 + "b" * 50,
    "\ue000\U0010ffff\ufffd",
    "ſtraße ǅ İı ΑΣ",
    "3.14159 1234567890 ٣٤٥ ४५६",
]
# All that has been assigned since 2002, so that every library knows it alike.
LETTERS = [
    chr(code)
    for first, end in [
        (0x20, 0x250), (0x300, 0x345), (0x391, 0x530), (0x5D0, 0x5EB), (0x621, 0x656),
        (0x904, 0x94E), (0xE01, 0xE3B), (0x2010, 0x2040), (0x3041, 0x3100), (0x4E00, 0x4F00),
        (0xAC00, 0xAD00), (0xFF01, 0xFF5F), (0x1F600, 0x1F640), (0x09, 0x0E),
    ]
    for code in range(first, end)
    if (code != 0x344 and unicodedata.ucd_3_2_0.category(chr(code)) != "Cn") or code > 0x1F000
]  # fmt: skip


def texts() -> list[str]:
    """Languages, also decomposed; what breaks tokenizers; and letters at random."""
    chosen = random.Random(7)
    noise = ["".join(chosen.choices(LETTERS, k=chosen.randint(1, 30))) for _ in range(400)]
    forms = [unicodedata.normalize(form, line) for form in ("NFD", "NFKD") for line in LANGUAGES]
    words = [" ".join(chosen.choices(" ".join(LANGUAGES).split(), k=12)) for _ in range(50)]
    return [*LANGUAGES, *forms, *ODD, *noise, *words, *CORPUS[:60]]


def load(files: dict[str, bytes], folder: Path) -> Any:
    """The tokenizer that AutoTokenizer makes of files."""
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return AutoTokenizer.from_pretrained(folder)


def train(**options: Any) -> bytes:
    """A small SentencePiece model."""
    model = io.BytesIO()
    defaults = {
        "sentence_iterator": iter(CORPUS),
        "vocab_size": 700,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        "num_threads": 1,
    }
    sentencepiece.SentencePieceTrainer.train(model_writer=model, **{**defaults, **options})
    return model.getvalue()


def llama(kind: str) -> dict[str, Any]:
    """How Llama 2's tokenizer was trained."""
    return {
        "model_type": kind,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
    }


MODELS: dict[str, dict[str, Any]] = {
    "unigram": {"model_type": "unigram"},
    "bpe": {"model_type": "bpe"},
    "char": {"model_type": "char"},
    "unigram-llama": llama("unigram"),
    "bpe-llama": llama("bpe"),
    "unigram-bytes": {"model_type": "unigram", "byte_fallback": True},
    "bpe-bytes": {"model_type": "bpe", "byte_fallback": True},
    "no-prefix": {
        "model_type": "bpe",
        "add_dummy_prefix": False,
        "byte_fallback": True,
        "normalization_rule_name": "nfkc",
    },
    "case-folded": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc_cf"},
    "symbols": {
        "model_type": "bpe",
        "user_defined_symbols": ["<sep>", "<|im_start|>", "12"],
        "byte_fallback": True,
        "pad_id": 3,
    },
    "unigram-symbols": {"model_type": "unigram", "user_defined_symbols": ["<sep>", "shard"]},
}


@pytest.fixture(scope="module", params=MODELS)
def trained(request: pytest.FixtureRequest) -> bytes:
    return train(**MODELS[request.param])


def test_ids_are_those_of_sentencepiece(trained: bytes, tmp_path: Path) -> None:
    original = sentencepiece.SentencePieceProcessor(model_proto=trained)
    (tmp_path / "tok.model").write_bytes(trained)
    read = read_tokenizer(str(tmp_path / "tok.model"))
    assert read.files["tokenizer.model"] == trained
    assert read.vocab_size == original.vocab_size()
    assert (read.bos_token_id, read.eos_token_id) == (original.bos_id(), original.eos_id())
    assert read.pad_token_id == (original.pad_id() if original.pad_id() >= 0 else None)
    tokenizer = load(dict(read.files), tmp_path / "out")
    assert len(tokenizer) == original.vocab_size()
    for text in [*texts(), "a <sep> b<sep>c", "<|im_start|>user 12 shards", "12<sep>12"]:
        ids = original.encode(text)
        assert tokenizer(text)["input_ids"] == ids, ascii(text)
        if original.unk_id() not in ids:
            assert tokenizer.decode(ids) == original.decode(ids), ascii(text)


def test_special_tokens_stay_whole_and_a_chat_template_is_kept(tmp_path: Path) -> None:
    (tmp_path / "tok.model").write_bytes(train(**llama("bpe"), pad_id=3, pad_piece="<pad>"))
    template = "{% for m in messages %}{{ bos_token }}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    for place in (tmp_path, tmp_path / "tok.model"):
        read = read_tokenizer(str(place))
        tokenizer = load(dict(read.files), tmp_path / "out")
        assert tokenizer.convert_ids_to_tokens(tokenizer("<s>a</s>")["input_ids"])[0] == "<s>"
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
        assert (tokenizer.pad_token, tokenizer.unk_token) == ("<pad>", "<unk>")
        assert (
            tokenizer.apply_chat_template([{"role": "user", "content": "shard"}], tokenize=False)
            == "<s>shard</s>"
        )


def test_llama_2_of_megatron_begins_texts(tmp_path: Path) -> None:
    (tmp_path / "tok.model").write_bytes(train(**llama("bpe")))
    read = read_tokenizer(str(tmp_path / "tok.model"), {"tokenizer_type": "Llama2Tokenizer"})
    tokenizer = load(dict(read.files), tmp_path / "out")
    original = sentencepiece.SentencePieceProcessor(str(tmp_path / "tok.model"))
    for text in LANGUAGES:
        assert tokenizer(text)["input_ids"] == [original.bos_id(), *original.encode(text)]


def test_megatron_adds_tokens_to_sentencepiece(tmp_path: Path) -> None:
    """Those of its SentencePieceTokenizer, whose texts end with <EOD>."""
    data = train(model_type="unigram")
    (tmp_path / "tok.model").write_bytes(data)
    size = sentencepiece.SentencePieceProcessor(model_proto=data).vocab_size()
    args = {"tokenizer_type": "SentencePieceTokenizer", "vocab_extra_ids": 2}
    read = read_tokenizer(str(tmp_path / "tok.model"), args)
    names = ["<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>", "<extra_id_0>", "<extra_id_1>"]
    assert (read.vocab_size, read.eos_token_id) == (size + len(names), size + 2)
    tokenizer = load(dict(read.files), tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids(names) == list(range(size, size + len(names)))
    assert tokenizer.eos_token == "<EOD>"


# ---- tiktoken


def token_bytes(text: str) -> bytes:
    """The bytes of a token in GPT-2's letters."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    values = {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}
    return bytes(values[letter] for letter in text)


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """A small vocabulary: all bytes, then what was merged, in that order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS["cl100k_base"]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    vocab = tokenizer.get_vocab()
    merged = sorted((text for text in vocab if len(text) > 1), key=vocab.__getitem__)
    tokens = [bytes([byte]) for byte in range(256)] + [token_bytes(text) for text in merged]
    return {token: rank for rank, token in enumerate(tokens)}


def tiktoken_file(ranks: dict[bytes, int]) -> bytes:
    lines = (b"%s %d" % (base64.b64encode(token), rank) for token, rank in ranks.items())
    return b"\n".join(lines) + b"\n"


OPENAI = {
    "r50k_base": openai_public.r50k_base,
    "p50k_base": openai_public.p50k_base,
    "cl100k_base": openai_public.cl100k_base,
    "o200k_base": openai_public.o200k_base,
}


@pytest.fixture
def _no_downloads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **options: {})
    yield


@pytest.mark.usefixtures("_no_downloads")
@pytest.mark.parametrize("name", OPENAI)
def test_ids_are_those_of_tiktoken(name: str, ranks: dict[bytes, int], tmp_path: Path) -> None:
    """With the patterns and special tokens of OpenAI's encodings, on a vocabulary of our own."""
    encoding = OPENAI[name]()
    special = {text: len(ranks) + n for n, text in enumerate(encoding["special_tokens"])}
    original = tiktoken.Encoding(
        name, pat_str=encoding["pat_str"], mergeable_ranks=ranks, special_tokens=special
    )
    path = tmp_path / f"{name}.tiktoken"
    path.write_bytes(tiktoken_file(ranks))
    (tmp_path / f"{name}.tiktoken.json").write_text(json.dumps({"special_tokens": special}))
    read = read_tokenizer(str(path))
    assert read.vocab_size == original.n_vocab
    assert read.eos_token_id == original.eot_token
    tokenizer = load(dict(read.files), tmp_path / "out")
    for text in texts():
        ids = original.encode(text, disallowed_special=())
        assert tokenizer(text)["input_ids"] == ids, ascii(text)
        assert tokenizer.decode(ids) == text
    end = "a<|endoftext|>b"
    assert tokenizer(end)["input_ids"] == original.encode(end, allowed_special="all")


@pytest.mark.usefixtures("_no_downloads")
@pytest.mark.parametrize("name", OPENAI)
def test_openai_names_say_their_special_tokens(
    name: str, ranks: dict[bytes, int], tmp_path: Path
) -> None:
    path = tmp_path / f"{name}.tiktoken"
    path.write_bytes(tiktoken_file(ranks))
    read = json.loads(read_tokenizer(str(path)).files["tokenizer.json"])
    found = {token["content"]: token["id"] for token in read["added_tokens"]}
    assert found == OPENAI[name]()["special_tokens"]


@pytest.mark.filterwarnings("ignore")  # of what Megatron-Core misses when it is imported
@pytest.mark.parametrize("pattern", ["v1", "v2"])
def test_ids_are_those_of_megatrons_tiktoken(
    pattern: str, ranks: dict[bytes, int], tmp_path: Path
) -> None:
    pytest.importorskip("megatron.core")
    from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import TikTokenTokenizer

    entries = [
        {"rank": r, "token_bytes": base64.b64encode(t).decode(), "token_str": ""}
        for t, r in ranks.items()
    ]
    path = tmp_path / "tokenizer.vocab.json"
    path.write_text(json.dumps(entries))
    size = len(ranks) + 10  # ten special tokens, and all ranks but ten
    args = {
        "tokenizer_type": "TikTokenizer",
        "tiktoken_pattern": pattern,
        "tiktoken_num_special_tokens": 20,
        "vocab_size": size,
    }
    original = TikTokenTokenizer(str(path), num_special_tokens=20, pattern=pattern, vocab_size=size)
    read = read_tokenizer(str(path), args)
    assert read.vocab_size == original.vocab_size == size
    ids = (read.bos_token_id, read.eos_token_id, read.pad_token_id)
    assert ids == (original.bos_id, original.eos_id, original.pad_id)
    tokenizer = load(dict(read.files), tmp_path / "out")
    for text in [*texts(), "<s>a</s><SPECIAL_9>"]:
        assert tokenizer(text)["input_ids"] == original.text_to_ids(text), ascii(text)


# ---- byte-level BPE, as BigScience and GPT-2 have it


def test_a_tokenizer_json_with_bigsciences_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[^(\s|[.,!?…。，、।۔،])]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    read = read_tokenizer(str(tmp_path / "tokenizer.json"))
    assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (1, 2, 3)
    loaded = load(dict(read.files), tmp_path / "out")
    for text in texts():
        ids = tokenizer.encode(text).ids
        assert loaded(text)["input_ids"] == ids, ascii(text)
        assert loaded.decode(ids) == text


def test_gpt2_files_give_the_ids_of_the_library(tmp_path: Path) -> None:
    vocab, merges = (str(SAMPLE / name) for name in ("vocab.json", "merges.txt"))
    original = Tokenizer(models.BPE.from_file(vocab, merges))
    original.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    loaded = load(dict(read_tokenizer(str(SAMPLE)).files), tmp_path / "out")
    for text in texts():
        assert loaded(text)["input_ids"] == original.encode(text).ids, ascii(text)


# ---- in a conversion, and what cannot be


def test_a_converted_folder_has_the_tokenizer(tmp_path: Path) -> None:
    english = iter([line for line in CORPUS if line.isascii()])
    data = train(sentence_iterator=english, vocab_size=400, model_type="bpe")
    (tmp_path / "tok.model").write_bytes(data)
    original = sentencepiece.SentencePieceProcessor(model_proto=data)
    convert(SAMPLE, tmp_path / "out", tokenizer=str(tmp_path / "tok.model"), vocab_padding="keep")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "A Megatron checkpoint is a family of shards."
    assert tokenizer(text)["input_ids"] == original.encode(text)
    # The folder as a source has it again.
    again = read_tokenizer(str(tmp_path / "out"))
    assert again.vocab_size == original.vocab_size()


def test_a_folder_of_transformers_with_pieces_alone(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train(model_type="bpe"))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    read = read_tokenizer(str(tmp_path))
    size = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model")).vocab_size()
    assert (read.vocab_size, read.bos_token_id, read.eos_token_id) == (size, 1, 2)


Edit = Callable[[bytes], bytes]
DAMAGES: dict[str, Edit] = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"\x0a\x00",
    "twice": lambda data: data[: data.index(b"\x0a", 1)] * 2 + data,
    "endless": lambda data: b"\x0a" + b"\xff" * 40,
    "kind": lambda data: b"\x0b" + data,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_refused(damage: str, tmp_path: Path) -> None:
    data = DAMAGES[damage](train(model_type="char"))
    (tmp_path / "tok.model").write_bytes(data)
    with pytest.raises((SourceError, UnsupportedError)):
        read_tokenizer(str(tmp_path / "tok.model"))


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"model_type": "word"}, "model_type word"),
        ({"model_type": "bpe", "treat_whitespace_as_suffix": True}, "at the end of words"),
    ],
)
def test_models_without_a_counterpart_are_refused(
    options: dict[str, Any], found: str, tmp_path: Path
) -> None:
    (tmp_path / "tok.model").write_bytes(train(**options))
    with pytest.raises(UnsupportedError) as error:
        read_tokenizer(str(tmp_path / "tok.model"))
    assert found in str(error.value.found)


def test_ranks_without_a_pattern_ask_for_it(ranks: dict[bytes, int], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"  # as Llama 3's is called
    path.write_bytes(tiktoken_file(ranks))
    with pytest.raises(UsageError, match="how texts are cut") as error:
        read_tokenizer(str(path))
    assert "tokenizer.model.json" in str(error.value.fix)
    said = {"pattern": r"\s+|\S+", "special_tokens": {"<|end_of_text|>": len(ranks)}}
    (tmp_path / "tokenizer.model.json").write_text(json.dumps(said))
    assert read_tokenizer(str(path)).eos_token_id == len(ranks)


@pytest.mark.parametrize(
    "edit",
    [
        lambda data: data.replace(b" 300\n", b" 301\n"),
        lambda data: data.replace(b" 300\n", b" x\n"),
        lambda data: data[data.index(b"\n") + 1 :],
        lambda data: data + b"=== 5000\n",
    ],
    ids=["twice", "no-rank", "no-byte", "no-base64"],
)
def test_damaged_ranks_are_refused(edit: Edit, ranks: dict[bytes, int], tmp_path: Path) -> None:
    path = tmp_path / "cl100k_base.tiktoken"
    path.write_bytes(edit(tiktoken_file(ranks)))
    with pytest.raises(SourceError, match="is no tokenizer"):
        read_tokenizer(str(path))


def test_megatrons_list_shorter_than_the_vocabulary(
    ranks: dict[bytes, int], tmp_path: Path
) -> None:
    entries = [
        {"rank": r, "token_bytes": base64.b64encode(t).decode(), "token_str": ""}
        for t, r in ranks.items()
    ]
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps(entries))
    with pytest.raises(UsageError, match="too few tokens"):
        read_tokenizer(str(path), {"tiktoken_pattern": "v2"})
    with pytest.raises(UsageError, match="cannot be used"):
        read_tokenizer(str(path), {"tiktoken_pattern": "v3"})
