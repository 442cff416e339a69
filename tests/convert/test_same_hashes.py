"""A model is the same files whatever format and layout it comes from.

The table is made from golden_cases.py: model x format x layout -> hash of the safetensors file.
All rows of one model and vocabulary size must have one hash, and every row Megatron's logits.
pytest's summary prints it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from mtt_convert import convert, diff, open_checkpoint
from mtt_convert.logits import compare_logits
from tests.convert.golden_cases import CASES, OTHER_FORMATS, Case

Golden = Callable[[str], Path]
ALL = [*CASES, *OTHER_FORMATS]
MODELS = sorted({case.model for case in ALL})


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    model: str
    vocabulary: int
    format: str
    layout: str
    path: str
    hash: str

    def __str__(self) -> str:
        return f"{self.model} ({self.vocabulary})  {self.format}  {self.layout}  {self.hash[:12]}"


@pytest.fixture(scope="module")
def converted(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """Each case converted once."""

    @cache
    def run(case: Case) -> Path:
        target = tmp_path_factory.mktemp("out") / "hf"
        convert(golden(case.path), target, tokenizer="none", **case.options)
        return target

    return run


def _row(case: Case, golden: Golden, converted: Callable[[Case], Path]) -> Row:
    checkpoint = open_checkpoint(golden(case.path), **case.options)
    digest = hashlib.sha256((converted(case) / "model.safetensors").read_bytes()).hexdigest()
    rows = checkpoint.architecture.vocab_size or checkpoint.architecture.padded_vocab_size
    layout = str(checkpoint.layout)
    return Row(case.model, rows, checkpoint.format, layout, case.path, digest)


@pytest.mark.parametrize("model", MODELS)
def test_all_formats_and_layouts_give_the_same_bytes(
    model: str,
    golden: Golden,
    converted: Callable[[Case], Path],
    record_property: Callable[[str, object], None],
) -> None:
    rows = [_row(case, golden, converted) for case in ALL if case.model == model]
    record_property("summary", "\n".join(map(str, rows)))
    for vocabulary in {row.vocabulary for row in rows}:
        same = {row.hash for row in rows if row.vocabulary == vocabulary}
        assert len(same) == 1, rows


@pytest.mark.parametrize("case", OTHER_FORMATS, ids=str)
def test_logits_are_those_of_megatron(case: Case, golden: Golden, converted: Callable) -> None:
    assert compare_logits(converted(case), golden(case.logits)) < 1e-4


@pytest.mark.parametrize(
    "case", [case for case in OTHER_FORMATS if case.qkv_order == "auto"], ids=str
)
def test_source_and_result_hold_the_same_bits(
    case: Case, golden: Golden, converted: Callable
) -> None:
    assert diff(golden(case.path), converted(case)).differences == ()


@pytest.mark.parametrize(
    "case", [case for case in ALL if "RELABEL" in case.path or "CATQKV" in case.path], ids=str
)
def test_rows_in_the_order_that_the_stamp_says_give_other_logits(
    case: Case, golden: Golden, tmp_path: Path
) -> None:
    """What `mtt verify --logits` finds out about a stamp that is wrong."""
    target = tmp_path / "hf"
    options = {**case.options, "qkv_order": "head"}
    convert(golden(case.path), target, tokenizer="none", **options)
    assert compare_logits(target, golden(case.logits)) > 1e-2


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        (case, order)
        for case in OTHER_FORMATS
        if "ckptver" in case.path
        for order in ("head", "block", "element")
    ],
    ids=str,
)
def test_only_one_order_of_rows_gives_megatrons_logits(
    case: Case, wrong: str, golden: Golden, tmp_path: Path
) -> None:
    right = {"ckptver0": "block", "ckptver1": "element", "ckptver2": "head", "ckptver3": "head"}
    (stamp,) = (stamp for stamp in right if stamp in case.path)
    target = tmp_path / "hf"
    overrides = case.options["overrides"]
    convert(golden(case.path), target, tokenizer="none", overrides=overrides, qkv_order=wrong)
    difference = compare_logits(target, golden(case.logits))
    assert (difference < 1e-4) == (wrong == right[stamp]), difference
