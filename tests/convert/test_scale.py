"""Sizes of real models: what opening reads, and how long a plan of 530 billion parameters takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from mtt_convert import IncompleteError, open_checkpoint, plan_conversion, verify
from mtt_convert.formats.hf_safetensors import read_file
from mtt_convert.parts import Part, share
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


_ONE_PART = """
import json, os, sys, time
import numpy
import mtt_convert

# Holes stay holes: a window of zeros only makes the file longer. Ways to copy that would fill them
# are taken away; the conversion falls back to this one.
real, written = os.pwrite, []

def pwrite(descriptor, data, offset):
    view = numpy.frombuffer(data, numpy.uint8)
    whole = view[: len(view) // 8 * 8].view(numpy.uint64)
    if whole.any() or view[len(whole) * 8 :].any():
        written.append(len(view))
        assert sum(written) < 1 << 28
        return real(descriptor, data, offset)
    if os.fstat(descriptor).st_size < offset + len(view):
        os.ftruncate(descriptor, offset + len(view))
    return len(view)

os.pwrite = pwrite
for name in ("copy_file_range", "sendfile", "splice", "pwritev", "writev"):
    if hasattr(os, name):
        delattr(os, name)

start = time.monotonic()
first = []
result = mtt_convert.convert(
    sys.argv[1],
    sys.argv[2],
    part=sys.argv[3],
    tokenizer="none",
    num_workers=2,
    progress=lambda done, total: first or first.append(time.monotonic() - start),
)
with open("/proc/self/status") as file:
    peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
print(json.dumps({
    "seconds": time.monotonic() - start,
    "until_the_first_byte": first[0],
    "bytes": result.num_bytes,
    "memory": peak,
    "files": {name: len(tensors) for name, tensors in result.hashes.items()},
    "hashed": all(digest for tensors in result.hashes.values() for digest in tensors.values()),
    "whole": result.whole,
}))
"""


@_LINUX
def test_one_of_64_parts_of_530_billion_parameters(
    tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    """All 64 parts have each file once and about the same bytes; one of them converts here.

    What is read and hashed is 16.8 GB of zeros; the disk keeps none of them.
    """
    shape = sparse.gpt(105, 20480, 128, 51200, 2048)
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(prefix="mtt-tests-", dir=place) as folder:
        source, out = Path(folder, "checkpoint"), Path(folder, "out")
        sparse.write_torch(source, shape, tp=8, pp=35, names=sparse.legacy)
        plan = plan_conversion(open_checkpoint(source), tokenizer="none").plan
        planned = [share(plan, Part(number, 64)) for number in range(1, 65)]
        names = [file.name for part in planned for file in part.files]
        assert len(names) == len(set(names)) == len(plan.files)
        assert set(names) == {file.name for file in plan.files}
        copies = [group.name for part in planned for group in part.replicas]
        assert sorted(copies) == sorted(group.name for group in plan.replicas)
        sizes = [part.num_bytes for part in planned]
        assert sum(sizes) == plan.num_bytes > 1_059_000_000_000
        assert max(sizes) < 1.02 * plan.num_bytes / 64

        command = [sys.executable, "-c", _ONE_PART, source, out, "17/64"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        facts = json.loads(done.stdout)
        record_property("summary", facts)
        mine = planned[16]
        assert facts["bytes"] == mine.num_bytes > 14_000_000_000
        assert facts["files"] == {file.name: len(file.tensors) for file in mine.files}
        assert facts["hashed"] and not facts["whole"]
        assert facts["memory"] < 1 << 28
        for file in mine.files:
            assert (out / file.name).stat().st_size == file.num_bytes
            assert (out / file.name).stat().st_blocks * 512 < 1 << 24
            tensors = read_file(str(out / file.name))
            assert {n: t.shape for n, t in tensors.items()} == {
                t.name: t.source.shape for t in file.tensors
            }
        assert {path.name for path in out.iterdir()} == {".mtt.parts", *facts["files"]}
        with pytest.raises(IncompleteError, match="written in parts"):
            verify(out)
