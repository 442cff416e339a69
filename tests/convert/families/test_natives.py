"""Models of transformers' own classes become MTT models that compute the same, and come back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modeling_mtt import MTTForCausalLM
from mtt_convert import convert, diff, from_megatron, open_checkpoint
from mtt_convert.families import FAMILIES
from tests.convert.families.natives import CASES, WITH_EXPERTS, Case, case, model_class


@dataclass(frozen=True)
class Trip:
    """A native folder, the MTT folder made of it, and the native folder made of that."""

    native: Any
    source: Path
    mtt: Path
    back: Path


@pytest.fixture(scope="module")
def trip(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Trip]:
    """Each case converted there and back once."""
    found: dict[str, Trip] = {}

    def run(case: Case) -> Trip:
        if str(case) not in found:
            folder = tmp_path_factory.mktemp("trip")
            native = case.save(folder / "source")
            convert(folder / "source", folder / "mtt", tokenizer="none")
            convert(folder / "mtt", folder / "back", model_type=case.family, tokenizer="none")
            found[str(case)] = Trip(native, folder / "source", folder / "mtt", folder / "back")
        return found[str(case)]

    return run


def tokens() -> torch.Tensor:
    """Longer than any window, and with room for what dynamic positions might do."""
    torch.manual_seed(1)
    return torch.randint(0, 97, (2, 24))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_mtt_computes_what_the_native_class_computes(case: Case, trip: Callable) -> None:
    there = trip(case)
    model = MTTForCausalLM.from_pretrained(there.mtt)
    with torch.no_grad():
        expected, logits = there.native(tokens()).logits, model(tokens()).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_and_back_byte_for_byte(case: Case, trip: Callable) -> None:
    there = trip(case)
    first, last = ((f / "model.safetensors").read_bytes() for f in (there.source, there.back))
    assert hashlib.sha256(first).digest() == hashlib.sha256(last).digest()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_configuration_comes_back(case: Case, trip: Callable) -> None:
    """Both as the class reads it, and as `Architecture` does."""
    there = trip(case)
    one, other = (model_class(case.family).from_pretrained(f) for f in (there.source, there.back))
    with torch.no_grad():  # one GELU by tanh may have become another, which is rounding
        expected, logits = one(tokens()).logits, other(tokens()).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    a, b, c = (open_checkpoint(f).architecture for f in (there.source, there.mtt, there.back))
    assert a.forward_pass() == b.forward_pass() == c.forward_pass()
    said = [json.loads((f / "config.json").read_text()) for f in (there.source, there.back)]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "vocab_size"):
        assert said[0][name] == said[1][name]
    assert "auto_map" not in said[1]
    assert not list(there.back.glob("*.py"))


SHARDED = [case for case in CASES if case.family not in ("gpt_neox", *WITH_EXPERTS)]


@pytest.mark.parametrize(
    "case",
    [next(c for c in SHARDED if c.family == f) for f in sorted({c.family for c in SHARDED})],
    ids=str,
)
def test_shards_are_those_of_save_pretrained(case: Case, tmp_path: Path) -> None:
    """All whose tensors transformers does not rename while saving: it then shards by name."""
    case.save(tmp_path / "source", max_shard_size="20KB")
    options = {"max_shard_size": "20KB", "tokenizer": "none", "model_type": case.family}
    convert(tmp_path / "source", tmp_path / "back", **options)
    names = sorted(path.name for path in (tmp_path / "source").glob("model*"))
    assert len(names) > 3 and names[-1] == "model.safetensors.index.json"
    assert names == sorted(path.name for path in (tmp_path / "back").glob("model*"))
    for name in names:
        assert (tmp_path / "source" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()


@pytest.mark.parametrize("case", CASES[:1] + CASES[16:17] + CASES[19:20], ids=str)
def test_diff_and_from_megatron_take_them(case: Case, trip: Callable) -> None:
    there = trip(case)
    for first, second, note in (
        (there.source, there.back, ()),
        (there.source, there.mtt, ("two families: compared under Megatron's names",)),
    ):
        result = diff(first, second)
        assert (result.differences, result.notes) == ((), note)
        assert result.num_equal
    model = from_megatron(there.source, tokenizer="none")
    with torch.no_grad():
        expected = there.native(tokens()).logits
        torch.testing.assert_close(model(tokens()).logits, expected, rtol=0, atol=1e-5)


def test_bfloat16_stays_bit_for_bit(tmp_path: Path) -> None:
    """Elements are never computed with, NaN and signs of zero included."""
    model = case("gpt2").model().bfloat16()
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[0, :3] = torch.tensor([float("nan"), -0.0, 1e-40])
    model.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "mtt", tokenizer="none")
    convert(tmp_path / "mtt", tmp_path / "back", model_type="gpt2", tokenizer="none")
    assert json.loads((tmp_path / "mtt" / "config.json").read_text())["dtype"] == "bfloat16"
    first, last = (load_file(tmp_path / n / "model.safetensors") for n in ("source", "back"))
    assert all(torch.equal(first[n].view(torch.int16), last[n].view(torch.int16)) for n in first)


def test_a_wrong_layout_of_c_attn_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2's matrix has all queries first; Megatron's order is another one."""
    from dataclasses import replace

    from mtt_convert.mapping import Rule, RuleTable
    from mtt_convert.ops import Chain, Transpose

    native = case("gpt2").save(tmp_path / "source")
    table = FAMILIES["gpt2"].rules(open_checkpoint(tmp_path / "source").architecture)
    wrong = RuleTable(
        *(
            Rule(r.source, r.target, Transpose())
            if isinstance(r.op, Chain) and r.target.endswith("weight")
            else r
            for r in table.rules
        )
    )
    monkeypatch.setitem(FAMILIES, "gpt2", replace(FAMILIES["gpt2"], rules=lambda a: wrong))
    convert(tmp_path / "source", tmp_path / "mtt", tokenizer="none")
    model = MTTForCausalLM.from_pretrained(tmp_path / "mtt")
    with torch.no_grad():
        assert (model(tokens()).logits - native(tokens()).logits).abs().max() > 1e-2
