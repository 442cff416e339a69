"""`--config`: checkpoints that say nothing about themselves, and what speaks for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mtt_convert import convert, open_checkpoint
from mtt_convert.arguments import architecture_from_shapes
from mtt_convert.cli import main
from mtt_convert.config_file import read_config_file
from mtt_convert.errors import InconsistentError, UsageError
from mtt_convert.parameters import expected
from mtt_convert.presets import PRESETS
from tests.convert.surgery import TORCH, copy_of, edited

Golden = Callable[[str], Path]
LEGACY = "legacy/v2.6-ckptver3-gpt2-tp2pp2"


def without_arguments(golden: Golden, name: str, folder: Path) -> Path:
    """A copy of a checkpoint that has lost its arguments, as the published 345M has none."""
    root = copy_of(golden, name, folder)
    for path in root.glob("*/mp_rank_*/model_optim_rng.pt"):
        with edited(path) as content:
            del content["args"]
    return root


@pytest.mark.parametrize(("name", "vocab_size"), [(TORCH, None), (LEGACY, 497)])
def test_a_checkpoint_without_arguments_becomes_the_same_model(
    name: str, vocab_size: int | None, golden: Golden, tmp_path: Path
) -> None:
    given = {} if vocab_size is None else {"vocab_size": vocab_size}
    convert(golden(name), tmp_path / "known", overrides=given)
    mute = without_arguments(golden, name, tmp_path)
    with pytest.raises(UsageError, match="no arguments"):
        open_checkpoint(mute)

    out = tmp_path / "out"
    assert main(["convert", str(mute), str(out), "--config", str(tmp_path / "known")]) == 0
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        assert (out / file).read_bytes() == (tmp_path / "known" / file).read_bytes(), file


def test_lines_and_json_say_the_same(golden: Golden, tmp_path: Path) -> None:
    text = """\
        # what v2.6 does not say
        num-attention-heads: 4
        layernorm_epsilon = 1e-5   # the default
        layernorm_zero_centered_gamma: false
        bias_gelu_fusion: False
        position_embedding_type: learned_absolute
        untie_embeddings_and_output_weights: False
        vocab_size: 497
    """
    lines = tmp_path / "args.yaml"
    lines.write_text("\n".join(line.strip() for line in text.splitlines()))
    values = read_config_file(str(lines))
    assert values == {
        "num-attention-heads": 4,
        "layernorm_epsilon": 1e-5,
        "layernorm_zero_centered_gamma": False,
        "bias_gelu_fusion": False,
        "position_embedding_type": "learned_absolute",
        "untie_embeddings_and_output_weights": False,
        "vocab_size": 497,
    }
    (tmp_path / "args.json").write_text(json.dumps(values))
    assert read_config_file(str(tmp_path / "args.json")) == values
    mute = without_arguments(golden, LEGACY, tmp_path)
    out = tmp_path / "out"
    assert main(["convert", str(mute), str(out), "--config", str(lines)]) == 0
    convert(golden(LEGACY), tmp_path / "known", overrides={"vocab_size": 497})
    weights = "model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "known" / weights).read_bytes()


def test_a_dump_of_all_arguments(golden: Golden, tmp_path: Path) -> None:
    """Its `model_type` is an enum of Megatron's, and most of it does not describe the model."""
    dump = golden("mcore/llama/args.json")
    assert json.loads(dump.read_text())["model_type"].startswith("ModelType.")
    mute = without_arguments(golden, "mcore/llama/tp1pp2/torch", tmp_path)
    out = tmp_path / "out"
    given = ["--config", str(dump), "--set", "vocab_size=500"]
    assert main(["convert", str(mute), str(out), *given]) == 0
    convert(golden("mcore/llama/tp1pp2/torch"), tmp_path / "known", tokenizer="none")
    weights = "model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "known" / weights).read_bytes()
    assert "vocab_size" not in read_config_file(str(dump))


def test_set_wins_over_config(golden: Golden, tmp_path: Path) -> None:
    convert(golden(TORCH), tmp_path / "known")
    mute = without_arguments(golden, TORCH, tmp_path)
    options = ["--config", str(tmp_path / "known"), "--set", "layernorm_epsilon=1e-6"]
    assert main(["convert", str(mute), str(tmp_path / "out"), *options]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["norm_eps"] == 1e-6


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_all_that_shapes_do_not(name: str) -> None:
    architecture = PRESETS[name].architecture
    padded = -(-architecture.padded_vocab_size // 1024) * 1024
    shapes = {
        parameter: (padded, *shape[1:]) if parameter.endswith("word_embeddings.weight") else shape
        for parameter, shape in expected(architecture).items()
    }
    read = architecture_from_shapes(shapes, read_config_file(name))
    assert read.forward_pass() == architecture.forward_pass()
    assert (read.vocab_size, read.padded_vocab_size) == (architecture.vocab_size, padded)


def test_an_output_layer_that_is_no_copy_is_not_taken_for_one(
    golden: Golden, tmp_path: Path
) -> None:
    """The llama has a head of its own: nothing is dropped because somebody calls it tied."""
    mute = without_arguments(golden, TORCH, tmp_path)
    convert(golden(TORCH), tmp_path / "known")
    config = json.loads((tmp_path / "known" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    said = read_config_file(str(tmp_path / "config.json"))
    with pytest.raises(InconsistentError, match="no copy of the embedding"):
        convert(mute, tmp_path / "out", overrides=said)
    assert not (tmp_path / "out").exists()


def test_a_preset_of_another_size_is_refused(golden: Golden, tmp_path: Path) -> None:
    mute = without_arguments(golden, LEGACY, tmp_path)
    with pytest.raises(UsageError, match="contradicts the tensors"):
        open_checkpoint(mute, overrides=read_config_file("megatron-gpt2-345m"))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("model:\n  num_layers: 2\n", "model has no value"),
        ("num_layers\n", "line 1: num_layers"),
        ("  num_layers: 2\n", "line 1: num_layers: 2"),
        ("# nothing\n", "no arguments"),
        ('{"model_type": "llama"}', "model_type = 'llama'"),
        ('{"model_type": "mtt"}', "config.json has no vocab_size"),
        ('{"model_type": "mtt", "vocab_size": 9, "hidden_size": "big"}', "hidden_size = 'big'"),
    ],
)
def test_what_cannot_be_used_says_what_could(text: str, found: str, tmp_path: Path) -> None:
    path = tmp_path / "given"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        read_config_file(str(path))
    assert str(path) in error.value.message
    assert found in f"{error.value.message} {error.value.found}"


def test_a_path_that_is_not_there_is_no_preset(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be used") as error:
        read_config_file(str(tmp_path / "mt-nlg-530b"))
    assert "the name of a preset" in str(error.value.expected)
    assert error.value.fix is None


def test_a_misspelt_preset_is_recognised() -> None:
    with pytest.raises(UsageError, match="cannot be used") as error:
        read_config_file("Megatron-gpt2-345")
    assert error.value.fix == "--config megatron-gpt2-345m"
