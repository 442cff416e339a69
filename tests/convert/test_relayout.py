"""A deliberately wrong re-layout must be caught by logits: shapes alone would let it pass."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mtt_convert import convert
from mtt_convert.architecture import Architecture
from mtt_convert.families import FAMILIES, names
from mtt_convert.logits import compare_logits
from mtt_convert.mapping import Rule, RuleTable
from mtt_convert.ops import SplitGated, SplitQKV, Tensors

CHECKPOINT = "mcore/llama/tp2pp2vpp2/torch"
LOGITS = "mcore/llama/logits.npz"


@dataclass(frozen=True)
class SwappedKeysAndValues(SplitQKV):
    def apply(self, tensors: Tensors, architecture: object) -> Tensors:
        q, k, v = super().apply(tensors, architecture)  # type: ignore[arg-type]
        return q, v, k


@dataclass(frozen=True)
class BlocksOfQKV(SplitQKV):
    """[all queries, all keys, all values], as Megatron before 2020-10 had it."""

    def apply(self, tensors: Tensors, architecture: object) -> Tensors:
        parts = super().apply(tensors, architecture)  # type: ignore[arg-type]
        sizes = [part.shape[0] for part in parts]
        starts = [0, sizes[0], sizes[0] + sizes[1]]
        return tuple(tensors[0].narrow(0, s, n) for s, n in zip(starts, sizes, strict=True))


@dataclass(frozen=True)
class SwappedGateAndUp(SplitGated):
    def apply(self, tensors: Tensors, architecture: object) -> Tensors:
        gate, up = super().apply(tensors, architecture)  # type: ignore[arg-type]
        return up, gate


def difference(golden: Callable, target: Path) -> float:
    convert(golden(CHECKPOINT), target, tokenizer="none")
    return compare_logits(target, golden(LOGITS))


def test_the_right_layout_passes(golden: Callable, tmp_path: Path) -> None:
    assert difference(golden, tmp_path / "right") < 1e-4


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (SplitQKV, SwappedKeysAndValues()),
        (SplitQKV, BlocksOfQKV()),
        (SplitGated, SwappedGateAndUp()),
    ],
    ids=["k and v swapped", "q, k, v in blocks", "gate and up swapped"],
)
def test_a_wrong_layout_fails(
    right: type,
    wrong: object,
    golden: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rules(architecture: Architecture) -> RuleTable:
        table = names.decoder_rules(architecture)
        return RuleTable(
            *(
                Rule(rule.source, rule.target, wrong) if type(rule.op) is right else rule  # type: ignore[arg-type]
                for rule in table.rules
            )
        )

    monkeypatch.setitem(FAMILIES, "mtt", replace(FAMILIES["mtt"], rules=rules))
    assert difference(golden, tmp_path / "wrong") > 1e-2
