"""Sizes of real models: what opening reads, and how long a plan of 530 billion parameters takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mtt_convert import open_checkpoint
from tests.convert import sparse

_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="counts what Linux counts")
_MEASURE = """
import json, sys, time
import mtt_convert
from mtt_convert.pipeline import plan_conversion

def read():
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])

def peak():
    # Not getrusage: a child begins with what its parent had.
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

first = read()
start = time.monotonic()
checkpoint = mtt_convert.open_checkpoint(sys.argv[1])
opened = read() - first
plans = [plan_conversion(checkpoint, to=to, tokenizer="none") for to in sys.argv[2:]]
print(json.dumps({
    "seconds": time.monotonic() - start,
    "cpu_seconds": time.process_time(),
    "read": opened,
    "memory": peak(),
    "parameters": checkpoint.num_parameters,
    "bytes": checkpoint.num_bytes,
    "planned": [plan.plan.num_bytes for plan in plans],
    "layout": str(checkpoint.layout),
}))
"""


def measured(root: Path, *targets: str) -> dict:
    """Open and plan in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, root, *targets],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_torch_reads_what_is_written_here(tmp_path: Path) -> None:
    """The sparse files are such as torch.save writes."""
    shape = sparse.llama(num_layers=2, hidden_size=256)
    sparse.write_torch(tmp_path, shape, tp=1, pp=1)
    path = tmp_path / "iter_0000010" / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False, mmap=True)
    assert content["args"].num_layers == 2
    weight = content["model"]["decoder.layers.1.mlp.linear_fc2.weight"]
    assert (weight.dtype, tuple(weight.shape)) == (torch.bfloat16, (256, 1024))
    assert not weight.any()


@_LINUX
def test_opening_reads_metadata_only(tmp_path: Path) -> None:
    shape = sparse.llama(num_layers=8, hidden_size=2048)
    num_bytes = sparse.write_torch(tmp_path, shape, tp=2, pp=2)
    facts = measured(tmp_path)
    assert facts["bytes"] > 1 << 30
    assert facts["read"] < num_bytes / 100


@_LINUX
@pytest.mark.parametrize("names", [sparse.core, sparse.legacy], ids=["core", "legacy"])
def test_530_billion_parameters_are_planned_in_seconds(
    names: sparse.Names, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    """MT-NLG: 105 layers of 20480 on TP 8 x PP 35, 280 files of 1.06 TB."""
    shape = sparse.gpt(105, 20480, 128, 51200, 2048)
    num_bytes = sparse.write_torch(tmp_path, shape, tp=8, pp=35, names=names)
    facts = measured(tmp_path, "hf")
    record_property("summary", facts)
    layers = 105 * (12 * 20480**2 + 13 * 20480)
    assert facts["parameters"] == layers + 2 * 20480 + 20480 * (51200 + 2048) == 529_600_819_200
    assert facts["layout"] == "TP8 x PP35"
    assert 0 < facts["planned"][0] - facts["bytes"] < 1 << 20  # headers
    assert facts["seconds"] < 10
    assert facts["memory"] < 1 << 30
    assert facts["read"] < num_bytes / 10_000


@_LINUX
def test_the_size_of_deepseek_v3_is_planned_in_seconds(
    tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    """61 layers of which 58 have 256 experts, and one more, over 16 ranks: 43,000 tensors."""
    num_bytes = sparse.write_experts(tmp_path, num_layers=61, ep=16)
    facts = measured(tmp_path, "hf")
    record_property("summary", facts)
    assert facts["parameters"] == 682_636_487_424
    assert facts["layout"] == "TP1 x PP1 x EP16"
    assert facts["cpu_seconds"] < 30
    assert facts["memory"] < 1 << 30
    assert facts["read"] < num_bytes / 10_000


def test_inspecting_says_how_large_it_is(tmp_path: Path) -> None:
    sparse.write_torch(tmp_path, sparse.gpt(4, 1024, 16, 51200, 1024), tp=2, pp=2)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.num_parameters == 4 * (12 * 1024**2 + 13 * 1024) + 2 * 1024 + 1024 * (
        51200 + 1024
    )
