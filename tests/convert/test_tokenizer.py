import json
from pathlib import Path

import pytest

from mtt_convert import MTTError, convert, open_checkpoint
from mtt_convert.errors import SourceError, UnsupportedError, UsageError
from mtt_convert.hf_folder import plan_conversion
from mtt_convert.tokenizer import read_tokenizer

SAMPLE = Path(__file__).parents[2] / "convert" / "sample"
END = 504


@pytest.fixture
def fast_file(tmp_path: Path) -> Path:
    from transformers import GPT2TokenizerFast

    GPT2TokenizerFast.from_pretrained(SAMPLE).save_pretrained(tmp_path / "fast")
    return tmp_path / "fast" / "tokenizer.json"


def test_gpt2_vocabulary_with_prefixed_names(tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / f"gpt2-{name}").write_bytes((SAMPLE / name).read_bytes())
    tokenizer = read_tokenizer(str(tmp_path / "gpt2-vocab.json"))
    assert set(tokenizer.files) == {"vocab.json", "merges.txt", "tokenizer_config.json"}
    assert (tokenizer.vocab_size, tokenizer.eos_token_id, tokenizer.bos_token_id) == (505, END, END)


def test_a_folder_is_copied_and_its_special_tokens_read(fast_file: Path) -> None:
    tokenizer = read_tokenizer(str(fast_file.parent))
    assert tokenizer.files["tokenizer.json"] == fast_file.read_bytes()
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (505, END)


def test_a_single_tokenizer_json(fast_file: Path) -> None:
    tokenizer = read_tokenizer(str(fast_file))
    assert set(tokenizer.files) == {"tokenizer.json", "tokenizer_config.json"}
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (505, END)


@pytest.mark.parametrize("kind", ["vocabulary", "folder", "tokenizer.json"])
def test_auto_tokenizer_gives_the_same_ids_from_every_kind(
    kind: str, fast_file: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, GPT2TokenizerFast

    path = {"vocabulary": SAMPLE, "folder": fast_file.parent, "tokenizer.json": fast_file}[kind]
    convert(SAMPLE, tmp_path / "out", tokenizer=str(path))
    text = "A Megatron checkpoint is a family of shards."
    expected = GPT2TokenizerFast.from_pretrained(SAMPLE)(text).input_ids
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(text).input_ids == expected
    assert tokenizer.decode(expected) == text
    assert tokenizer.eos_token_id == END


def test_special_tokens_reach_both_configurations(tmp_path: Path) -> None:
    convert(SAMPLE, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (END, END)
    assert generation == {"bos_token_id": END, "eos_token_id": END, "pad_token_id": END}


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("nothing-here", None, UsageError),
        ("tok.model", b"\x0a", SourceError),
        ("tok.model", b"PK", UnsupportedError),
        ("tokenizer.json", b"{", SourceError),
        ("tokenizer.json", b"[" * 100_000, SourceError),
        ("tokenizer.json", b'{"added_tokens": [{"id": 1}]}', SourceError),
        ("tokenizer.json", b'{"added_tokens": [{"content": "a"}]}', SourceError),
        ("tokenizer.json", b'{"added_tokens": [[]]}', SourceError),
        ("tokenizer.json", b'{"added_tokens": 3}', SourceError),
        ("tokenizer.json", b'{"model": {"vocab": 3}}', SourceError),
        ("tokenizer.json", b'{"model": {"vocab": [[]]}}', SourceError),
        ("tokenizer.json", b'{"model": {"vocab": [3]}}', SourceError),
        ("tokenizer.json", b'{"model": {"vocab": {"a": "x"}}}', SourceError),
        ("tokenizer.json", b'{"model": {"vocab": {"a": -1}}}', SourceError),
        ("vocab.json", b"{}", MTTError),
        ("vocab.json", b'{"<|endoftext|>": []}', SourceError),
    ],
)
def test_what_is_no_tokenizer_is_refused(
    name: str, content: bytes | None, error: type, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
        (tmp_path / "merges.txt").write_bytes(b"#version: 0.2\n")
    with pytest.raises(error):
        read_tokenizer(str(tmp_path / name))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    vocab = {f"token{number}": number for number in range(600)} | {"<|endoftext|>": 600}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UsageError, match="does not belong") as error:
        convert(SAMPLE, tmp_path / "out", tokenizer=str(tmp_path))
    assert (error.value.found, error.value.expected) == (
        "601 tokens",
        "at most 512, the rows of the embedding",
    )
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_path_that_is_not_here_is_a_warning() -> None:
    checkpoint = open_checkpoint(SAMPLE)
    checkpoint.args["vocab_file"] = "/nowhere/vocab.json"  # type: ignore[index]
    conversion = plan_conversion(checkpoint)
    assert any("/nowhere/vocab.json, is not here" in text for text in conversion.warnings)
    assert conversion.config["vocab_size"] == 512
    assert any("keeps its 512 rows" in text for text in conversion.warnings)


@pytest.mark.parametrize(("padding", "rows"), [(None, 505), ("trim", 505), ("keep", 512)])
def test_vocabulary_padding(padding: str | None, rows: int) -> None:
    conversion = plan_conversion(open_checkpoint(SAMPLE), vocab_padding=padding)
    assert conversion.config["vocab_size"] == rows
    (table,) = (
        t for t in conversion.plan.files[0].tensors if t.name == "model.embed_tokens.weight"
    )
    assert table.source.shape == (rows, 64)


def test_trimming_needs_the_true_size() -> None:
    with pytest.raises(UsageError, match="true vocabulary size"):
        plan_conversion(open_checkpoint(SAMPLE), vocab_padding="trim", tokenizer="none")


@pytest.mark.parametrize("token", [3, [], {"content": 3}, True])
def test_a_special_token_of_another_kind(token: object, fast_file: Path) -> None:
    (fast_file.parent / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    with pytest.raises(SourceError, match=r"tokenizer_config\.json is no tokenizer"):
        read_tokenizer(str(fast_file.parent))
