"""The model card of a converted folder: facts, metadata the Hub accepts, and code that runs."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from mtt_convert import convert, open_checkpoint
from mtt_convert.hf_folder import plan_conversion
from tests.convert.families.natives import case

from .surgery import TORCH, copy_of, set_arguments

SAMPLE = Path(__file__).parents[2] / "convert" / "sample"
Golden = Callable[[str], Path]


def card_of(source: Path, **options: str) -> str:
    """The card of a conversion that is not run."""
    conversion = plan_conversion(open_checkpoint(source), **options)
    return conversion.plan.documents["README.md"].decode()


def rows(card: str) -> dict[str, str]:
    """Label and value of every line of its tables."""
    return dict(re.findall(r"^\| (\S[^|]*) \| (.+) \|$", card, re.MULTILINE))


def test_what_the_model_is_and_where_it_came_from() -> None:
    found = rows(card_of(SAMPLE))
    assert found == {
        "Parameters": "240,576",
        "Layers": "4",
        "Hidden size": "64",
        "MLP size": "256",
        "Attention heads": "4 of 16",
        "Key/value heads": "4",
        "Activation": "gelu_tanh",
        "Norm": "LayerNorm, epsilon 1e-05",
        "Biases": "all linear layers",
        "Positions": "learned, 128",
        "Vocabulary": "505",
        "Head": "tied to the embedding",
        "Element type": "float32",
        "Source": "a Megatron checkpoint, format torch",
        "Parameter names": "core_local",
        "Layout": "TP2 x PP2, 4 files",
        "Iteration": "1,000",
        "Tokens seen": "1,536,000 (12,000 sequences of 128)",
        "Trained in": "float32",
        "Converted by": found["Converted by"],
    }


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("mcore/llama/tp2pp2vpp2/torch", {"Layout": "TP2 x PP2 x VPP2, 4 files", "Biases": "none"}),
        ("mcore/qwen/tp2pp2/torch_dist", {"Norm of queries and keys": "yes"}),
        ("mcore/nemotron/tp2pp1/torch", {"Activation": "squared_relu"}),
    ],
)
def test_options_of_models(path: str, expected: dict[str, str], golden: Golden) -> None:
    found = rows(card_of(golden(path)))
    assert {name: found.get(name) for name in expected} == expected
    if "llama" in path:
        assert found["Positions"].startswith("rotary, ")
        assert found["MLP size"].endswith(", gated")
        assert found["Head"] == "its own"
    if "nemotron" in path:
        assert found["Norm"].endswith(", weights stored minus one")


def test_tokens_are_left_out_where_the_arguments_do_not_say_them(
    golden: Golden, tmp_path: Path
) -> None:
    root = copy_of(golden, TORCH, tmp_path)
    set_arguments(root, consumed_train_samples=7, seq_length=1000)
    assert rows(card_of(root))["Tokens seen"] == "7,000 (7 sequences of 1,000)"
    for samples in (0, None, "many", True):
        set_arguments(root, consumed_train_samples=samples)
        assert "Tokens seen" not in rows(card_of(root)), samples


@pytest.mark.parametrize("model_type", ["mtt", "llama"])
def test_metadata_is_what_the_hub_accepts(model_type: str, golden: Golden) -> None:
    text = card_of(golden(TORCH), model_type=model_type)
    card = ModelCard(text)
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == [model_type, "megatron"]
    # The publisher's to fill in: the line is there, and no license is claimed.
    assert card.data.license is None
    assert "\n# license: " in text
    assert "## License\n\nTo be filled in" in text
    filled = text.replace("# license: fill in", "license: mit #", 1)
    assert ModelCard(filled).data.license == "mit"


def test_a_folder_of_transformers_is_named_as_the_source(tmp_path: Path) -> None:
    case("llama", num_key_value_heads=2, sliding_window=None).save(tmp_path / "llama")
    text = card_of(tmp_path / "llama", model_type="mtt")
    found = rows(text)
    assert found["Source"] == "a llama folder of Hugging Face"
    assert ModelCard(text).data.tags == ["mtt"]
    assert not {"Iteration", "Layout", "Tokens seen"} & set(found)


def blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)


def test_the_code_for_one_gpu_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import modeling_mtt  # noqa: F401  # as the card says: then no code of the folder is run

    convert(SAMPLE, tmp_path / "FOLDER")
    card = (tmp_path / "FOLDER" / "README.md").read_text()
    one, several = blocks(card, "python")
    monkeypatch.chdir(tmp_path)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(one, "README.md", "exec"), {})
    assert output.getvalue().startswith("Once upon a time")
    compile(several, "README.md", "exec")
    assert "tp_size=4" in several
    (commands,) = blocks(card, "console")
    assert "$ vllm serve FOLDER --tensor-parallel-size 4\n" in commands
    assert "$ mtt generate FOLDER --tp 4 " in commands
    assert "--tokenizer" not in commands
    assert "tokenizer" in one
    assert sys.modules["modeling_mtt"]


def test_the_code_runs_where_mtt_is_not_installed(tmp_path: Path) -> None:
    """Nothing is asked: model and tokenizer are both told to trust the folder's code."""
    convert(SAMPLE, tmp_path / "FOLDER")
    one, _ = blocks((tmp_path / "FOLDER" / "README.md").read_text(), "python")
    hidden = "import sys; sys.modules['modeling_mtt'] = None\n"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", hidden + one],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Once upon a time")


def test_positions_and_norm_of_bloom(golden: Golden) -> None:
    found = rows(card_of(golden("legacy/bigscience-8387ae17-bloom-tp2pp1"), tokenizer="none"))
    assert found["Positions"].startswith("ALiBi, ")
    assert found["Norm after the embedding"] == "yes"


def test_no_tokenizer_is_loaded_where_there_is_none() -> None:
    card = card_of(SAMPLE, tokenizer="none")
    assert "tokenizer" not in blocks(card, "python")[0]


def test_a_model_that_cannot_be_divided_has_no_such_example(tmp_path: Path) -> None:
    options = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    case("llama", **options).save(tmp_path / "llama")
    assert "tp_size" not in card_of(tmp_path / "llama", model_type="llama")
