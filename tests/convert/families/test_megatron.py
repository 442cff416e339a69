"""Native classes of transformers through Megatron and back: the same files, the same logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import modeling_mtt
import mtt_convert
from mtt_convert import UnsupportedError
from tests.convert.families.natives import CASES, WITH_EXPERTS, Case

LLAMA, LLAMA_3 = CASES[0], CASES[2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """Each case saved by transformers once."""
    folders: dict[str, Path] = {}

    def save(case: Case) -> Path:
        if str(case) not in folders:
            folders[str(case)] = tmp_path_factory.mktemp("native") / "source"
            case.save(folders[str(case)])
        return folders[str(case)]

    return save


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    input_ids = torch.arange(20).unsqueeze(0) * 5 % 97
    with torch.no_grad():
        return model(input_ids).logits


@pytest.mark.parametrize("case", [case for case in CASES if not case.beyond_megatron], ids=str)
@pytest.mark.parametrize("to", ["torch", "torch_dist"])
def test_megatron_and_back_gives_the_same_file(
    saved: Callable, tmp_path: Path, case: Case, to: str
):
    """TP2 PP2, and EP2 of experts, in between; the file is transformers' own, to the byte."""
    theirs, ours = saved(case), tmp_path / "back"
    experts = {"ep": 2} if case.family in WITH_EXPERTS else {}
    mtt_convert.convert(theirs, tmp_path / "megatron", to=to, tp=2, pp=2, **experts)
    mtt_convert.convert(tmp_path / "megatron", ours, model_type=case.family)
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    # GELU by tanh has two names, whose code differs by a rounding.
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    before, after = (AutoConfig.from_pretrained(folder) for folder in (theirs, ours))
    assert (after.eos_token_id, after.bos_token_id) == (2, 1)
    assert type(after) is type(before)


@pytest.mark.parametrize("case", [case for case in CASES if case.beyond_megatron], ids=str)
def test_what_megatron_does_not_compute_is_refused(saved: Callable, tmp_path: Path, case: Case):
    with pytest.raises(UnsupportedError) as caught:
        mtt_convert.convert(saved(case), tmp_path / "out", to="torch")
    assert str(case.beyond_megatron) in str(caught.value.found)
    assert not (tmp_path / "out").exists()


def test_the_options_of_an_mtt_model_that_megatron_lacks(tmp_path: Path):
    config = modeling_mtt.MTTConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=20,
        intermediate_size=8, position_embedding_type="alibi", embedding_norm=True,
    )  # fmt: skip
    modeling_mtt.MTTForCausalLM(config).save_pretrained(tmp_path / "source")
    with pytest.raises(UnsupportedError) as caught:
        mtt_convert.convert(tmp_path / "source", tmp_path / "out", to="torch")
    assert "embedding_norm" in str(caught.value.found)


def test_diff_across_formats_and_families(saved: Callable, tmp_path: Path):
    mtt_convert.convert(saved(LLAMA), tmp_path / "mtt")
    mtt_convert.convert(saved(LLAMA), tmp_path / "megatron", to="torch", tp=2)
    sides = [saved(LLAMA), tmp_path / "mtt", tmp_path / "megatron"]
    for first in sides:
        for second in sides:
            comparison = mtt_convert.diff(first, second)
            assert comparison.num_equal > 20
            assert not comparison.differences, (first, second)
    assert mtt_convert.diff(saved(LLAMA_3), tmp_path / "megatron").differences
