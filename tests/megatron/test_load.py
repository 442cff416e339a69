"""Megatron-Core, from PyPI, loads checkpoints strictly and computes the reference logits with them.

First those that Megatron wrote, whole and damaged: they show that the harness can tell. All cases
run in one launch of four processes on CPU, by `load_and_run.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import IN_CI
from tests.convert.surgery import Golden, copy_of, edited, edited_metadata, model_of

WORKER = Path(__file__).with_name("load_and_run.py")
TOLERANCE = 1e-4
Results = dict[str, dict[str, Any]]
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Layout:
    """Tensor, pipeline and virtual pipeline sizes."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1

    def __str__(self) -> str:
        return f"tp{self.tp}pp{self.pp}" + (f"vpp{self.vpp}" if self.vpp > 1 else "")


@dataclass(frozen=True)
class Case:
    """A golden checkpoint, loaded in a layout."""

    golden: str
    layout: Layout
    # The random state belongs to a layout; Megatron does not ask for it in another.
    left_over: tuple[str, ...] = ("rng_state",)

    def __str__(self) -> str:
        return f"{self.golden} in {self.layout}"


GOLDENS = [
    Case("mcore/gpt/ref/torch", Layout()),
    Case("mcore/gpt/tp2pp2/torch", Layout(2, 2)),
    Case("mcore/gpt/tp2pp2vpp2/torch", Layout(2, 2, 2)),
    Case("mcore/llama/tp1pp2/torch", Layout(1, 2)),
    Case("mcore/llama/tp2pp2vpp2/torch", Layout(2, 2, 2)),
    Case("mcore/llama_6l/pp2_uneven/torch", Layout(1, 2)),
    Case("mcore/llama_6l/pp2_layout/torch", Layout(1, 2, 2)),
    Case("mcore/nemotron/tp2pp1/torch", Layout(2)),
    Case("mcore/qwen/tp2pp2/torch", Layout(2, 2)),
    Case("mcore/gpt/tp2pp2/torch_dist", Layout()),
    Case("mcore/gpt_bf16/tp2pp2/torch_dist", Layout(4)),
    Case("mcore/llama/tp2pp1/torch_dist", Layout(2, 2)),
    Case("mcore/llama_6l/pp2_uneven/torch_dist", Layout(2)),
    Case("mcore/nemotron/tp2pp1/torch_dist", Layout(1, 2)),
    Case("mcore/qwen/tp2pp2/torch_dist", Layout(2, 2, 2)),
    Case(
        "mcore-te/llama/tp2pp2/torch_dist",
        Layout(1, 2),
        ("rng_state", "decoder.final_layernorm._extra_state"),  # of Transformer Engine's norm
    ),
]


@dataclass(frozen=True)
class Damage:
    """A copy of a golden with one change, and what Megatron says to it (None: other logits)."""

    name: str
    golden: str
    layout: Layout
    apply: Callable[[Path], None] = field(repr=False)
    says: str | None

    def __str__(self) -> str:
        return self.name


def _edit_rank(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        path = root / "iter_0000010" / "mp_rank_01" / "model_optim_rng.pt"
        with edited(path) as content:
            change(content)

    return apply


def _scale(content: dict[str, Any]) -> None:
    name = "decoder.layers.2.mlp.linear_fc2.weight"
    model_of(content, name)[name][0] *= 1.01


def _rename(content: dict[str, Any]) -> None:
    content["model"]["decoder.layers.2.mlp.fc2.weight"] = content["model"].pop(
        "decoder.layers.2.mlp.linear_fc2.weight"
    )


def _swap_ranks(root: Path) -> None:
    """Same names and shapes everywhere, but the halves are the other way round."""
    ranks = [root / "iter_0000010" / f"mp_rank_0{rank}" for rank in (0, 1)]
    ranks[0].rename(root / "mp_rank_00")
    ranks[1].rename(ranks[0])
    (root / "mp_rank_00").rename(ranks[1])


def _without(prefix: str) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        with edited_metadata(root) as metadata:
            for name in [name for name in metadata.state_dict_metadata if name.startswith(prefix)]:
                del metadata.state_dict_metadata[name]

    return apply


def _swap_chunks(root: Path) -> None:
    """Layers 0 and 1 of one tensor point to each other's bytes."""
    with edited_metadata(root) as metadata:
        places = [
            index
            for index in metadata.storage_data
            if index.fqn == "decoder.layers.mlp.linear_fc2.weight"
            and index.offset in (torch.Size([0, 0, 0]), torch.Size([1, 0, 0]))
        ]
        first, second = (metadata.storage_data[index] for index in places)
        metadata.storage_data.update(zip(places, (second, first), strict=True))


_TORCH, _TORCH_DIST = "mcore/nemotron/tp2pp1/torch", "mcore/nemotron/tp2pp1/torch_dist"
DAMAGES = [
    Damage("one row scaled by 1%", _TORCH, Layout(2), _edit_rank(_scale), None),
    Damage("ranks swapped", _TORCH, Layout(2), _swap_ranks, None),
    Damage("a tensor renamed", _TORCH, Layout(2), _edit_rank(_rename), "Missing key(s)"),
    Damage("layers swapped", _TORCH_DIST, Layout(), _swap_chunks, None),
    Damage(
        "a tensor gone",
        _TORCH_DIST,
        Layout(),
        _without("decoder.final_layernorm.bias"),
        "not in the checkpoint: ['decoder.final_layernorm.bias']",
    ),
    Damage(
        "an extra state gone",
        _TORCH_DIST,
        Layout(),
        _without("decoder.layers.mlp.linear_fc1._extra_state"),
        "not in the checkpoint: ['decoder.layers.mlp.linear_fc1._extra_state']",
    ),
]


def launch(cases: dict[str, dict[str, Any]], folder: Path) -> Results:
    """Run all cases with Megatron-Core on four processes."""
    (folder / "cases.json").write_text(json.dumps(cases))
    results = folder / "results.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "4", str(WORKER), str(folder / "cases.json"), str(results)]
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return json.loads(results.read_text())


@pytest.fixture(scope="module")
def results(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What Megatron-Core makes of every checkpoint of this module."""
    try:
        version("megatron-core")
    except PackageNotFoundError:
        message = "megatron-core is not installed; it is in the extra `megatron`"
        pytest.fail(message, pytrace=False) if IN_CI else pytest.skip(message)
    cases = {str(case): case_of(case, golden(case.golden), golden) for case in GOLDENS}
    for damage in DAMAGES:
        folder = copy_of(golden, damage.golden, tmp_path_factory.mktemp("damaged"))
        damage.apply(folder)
        cases[damage.name] = case_of(damage, folder, golden)
    return launch(cases, tmp_path_factory.mktemp("megatron"))


def case_of(case: Case | Damage, checkpoint: Path, golden: Golden) -> dict[str, Any]:
    """A case as `load_and_run.py` takes it."""
    return {
        "checkpoint": str(checkpoint),
        "tp": case.layout.tp,
        "pp": case.layout.pp,
        "vpp": case.layout.vpp,
        "logits": str(golden(f"mcore/{case.golden.split('/')[1]}/logits.npz")),
        "left_over": list(getattr(case, "left_over", ["rng_state"])),
    }


@pytest.mark.parametrize("case", GOLDENS, ids=str)
def test_megatron_loads_its_own(case: Case, results: Results) -> None:
    result = results[str(case)]
    assert "error" not in result, result["error"]
    assert result["difference"] < TOLERANCE


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
def test_damage_shows(damage: Damage, results: Results) -> None:
    result = results[damage.name]
    if damage.says is None:
        assert result["difference"] > 10 * TOLERANCE
    else:
        assert damage.says in result["error"]
