"""Every folder of `hub_configs/` is what the table says, and builds the model it names."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from modeling_mtt import MTTConfig, MTTForCausalLM
from mtt_convert.architecture import Architecture
from mtt_convert.arguments import architecture_from_args
from mtt_convert.errors import UsageError
from mtt_convert.families import FAMILIES
from mtt_convert.layouts import plan_stages
from mtt_convert.megatron_args import model_arguments
from mtt_convert.preset_files import num_parameters, preset_config, preset_files
from mtt_convert.presets import BLOOM_ROWS, PRESETS, find_preset

UNITS = {"M": 10**6, "B": 10**9}
ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "hub_configs"
# What the cards of the BLOOM models on the Hub say.
EXACT = {
    "bloom-560m": 559_214_592,
    "bloom-1b1": 1_065_314_304,
    "bloom-1b7": 1_722_408_960,
    "bloom-3b": 3_002_557_440,
    "bloom-7b1": 7_069_016_064,
    "bloom": 176_247_271_424,
}
HEADS = {
    "megatron-gpt2-345m": 16,
    "megatron-gpt2-8.3b": 24,
    "turing-nlg-17b": 28,
    "mt-nlg-530b": 128,
    "bloom": 112,
}


def rounds_to(count: int, published: str) -> bool:
    """Whether a number of parameters, rounded like a published one (`8.3B`), equals it."""
    digits, unit = published[:-1], UNITS[published[-1]]
    decimals = len(digits.partition(".")[2])
    return round(count / unit, decimals) == float(digits)


@pytest.mark.parametrize("name", PRESETS)
def test_the_model_has_as_many_parameters_as_were_published(name: str) -> None:
    config = MTTConfig.from_pretrained(FOLDER / name)
    with torch.device("meta"):
        model = MTTForCausalLM(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    preset = PRESETS[name]
    assert count == num_parameters(preset) == EXACT.get(name, count)
    if not rounds_to(count, preset.published):
        assert preset.difference
        assert preset.difference in (FOLDER / name / "README.md").read_text()
    assert f"| Parameters | {count:,} |" in (FOLDER / name / "README.md").read_text()


def test_heads_are_those_of_the_papers() -> None:
    """Parameters do not depend on them. A few of the tables, typed again."""
    heads = {name: PRESETS[name].num_attention_heads for name in HEADS}
    assert heads == HEADS


def test_published_figures_are_rounded_as_they_were() -> None:
    assert rounds_to(8_314_143_744, "8.3B")
    assert rounds_to(20_256_221_184, "20B")
    assert not rounds_to(8_350_000_001, "8.3B")
    assert not rounds_to(354_823_168, "345M")


def test_committed_files_are_those_of_the_table() -> None:
    done = subprocess.run(
        [sys.executable, FOLDER / "generate.py", "--check"], capture_output=True, text=True
    )
    assert done.stdout + done.stderr == ""
    assert done.returncode == 0
    assert {path.parent.name for path in FOLDER.glob("*/config.json")} == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_megatron_arguments_build_the_same_model(name: str) -> None:
    """What the flags say, parsed, is the architecture and the layout of the table."""
    preset, script = PRESETS[name], (FOLDER / name / "megatron_args.sh").read_text()
    words = bash_array(FOLDER / name / "megatron_args.sh")
    values = dict(itertools.pairwise(words))
    assert int(values["--num-layers"]) == preset.num_layers
    assert int(values["--hidden-size"]) == preset.hidden_size
    assert int(values["--num-attention-heads"]) == preset.num_attention_heads
    assert int(values["--tensor-model-parallel-size"]) == preset.tp
    assert int(values["--pipeline-model-parallel-size"]) == preset.pp
    assert "--bf16" in words if preset.dtype == "bfloat16" else "--fp16" in words
    if preset.bloom:
        assert values["--position-embedding-type"] == "alibi"
        assert "--embed-layernorm" in words
        assert values["--pad-vocab-size-to"] == str(BLOOM_ROWS)
    else:
        assert int(values["--padded-vocab-size"]) % (128 * preset.tp) == 0
        assert architecture_from_args(model_arguments(preset.architecture)).forward_pass() == (
            preset.architecture.forward_pass()
        )
        plan_stages(preset.architecture, layout(name))
    assert f"{preset.tp * preset.pp} GPUs for one replica" in script


def layout(name: str):
    from mtt_convert.checkpoint import Layout

    preset = PRESETS[name]
    return Layout(preset.tp, preset.pp, preset.vpp)


def bash_array(path: Path) -> list[str]:
    """The words of MEGATRON_ARGS as bash has them."""
    command = f'source "{path}" && printf "%s\\n" "${{MEGATRON_ARGS[@]}}"'
    output = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    return output.stdout.splitlines()


@pytest.mark.parametrize("name", PRESETS)
def test_cards_say_where_facts_come_from_and_whether_there_are_weights(name: str) -> None:
    card = (FOLDER / name / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["library_name"] == "transformers"
    assert metadata.get("license") == PRESETS[name].license
    assert PRESETS[name].weights in card
    assert "https://" in card.split("## Sources")[1]
    unverified = [source for source in PRESETS[name].sources if not source.seen]
    assert card.count("*Not verified.*") == len(unverified)


def test_the_configuration_is_read_back_as_the_architecture() -> None:
    for preset in PRESETS.values():
        if preset.bloom:
            continue
        read = FAMILIES["mtt"].architecture(preset_config(preset))
        assert isinstance(read, Architecture)
        assert read.forward_pass() == preset.architecture.forward_pass()


def test_generation_knows_the_end_of_a_text() -> None:
    assert json.loads(preset_files("bloom")["generation_config.json"]) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    assert (
        json.loads(preset_files("mt-nlg-530b")["generation_config.json"])["eos_token_id"] == 50256
    )


def test_an_unknown_preset_names_those_there_are() -> None:
    with pytest.raises(UsageError, match="neither a path nor a preset") as error:
        find_preset("mt-nlg-540b")
    assert "mt-nlg-530b" in str(error.value.expected)
