"""Memory is the workers' windows, whatever the model's size; opening reads metadata alone.

The checkpoints here have gigabytes of weights and take no room: their storages are holes in sparse
files, on the RAM disk where there is one, because there the kernel reads holes without filling its
cache. They are converted by a process that the kernel gives 256 MB per worker beyond what the
interpreter and its imports have, into a sink that counts. Every worker reads ahead, as where there
are many cores.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from tests.convert import sparse

HIDDEN, FFN, VOCAB, TP = 3072, 32768, 524288, 2
LAYERS = 2
RAM_DISK = "/dev/shm"
EMBEDDING_BYTES = 2 * VOCAB * HIDDEN  # 3.2 GB
BYTES_PER_WORKER = 256_000_000
NUM_BYTES = 2 * EMBEDDING_BYTES + 2 * HIDDEN * (LAYERS * (3 * HIDDEN + 3 * FFN + 2) + 1)

CONVERT = """
import json, resource, sys, threading
import numpy
from mtt_convert import execute, open_checkpoint, plan_conversion, reading
from mtt_convert.commands import convert

path, workers, bound = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
options = json.loads(sys.argv[4])
execute.num_cores = lambda: 8
exec(sys.argv[5])


class Sink:
    def __init__(self):
        self.num_bytes, self.num_tensors, self.num_files = 0, 0, 0
        self.lock, self.next = threading.Lock(), {}

    def write(self, file, tensor, position, data):
        with self.lock:
            assert position == self.next.get((file.name, tensor.name), 0)
            self.next[file.name, tensor.name] = position + len(data)
            self.num_bytes += len(data)

    def tensor_done(self, file, tensor, sums):
        assert sums.digest and self.next[file.name, tensor.name] == tensor.num_bytes
        self.num_tensors += 1

    def file_done(self, file):
        self.num_files += 1


def counter(path, name):
    with open(path) as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name + ":"))


limit = 1024 * counter("/proc/self/status", "VmData") + bound
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
before = counter("/proc/self/io", "rchar")
options |= {"tokenizer": "none", "max_shard_size": "2GB"}
plan = plan_conversion(open_checkpoint(path), **options).plan
opening = counter("/proc/self/io", "rchar") - before
sink = Sink()
execute.run(plan, sink, num_workers=workers)
try:
    bytearray(2 * bound)
    enforced = False
except MemoryError:
    enforced = True
print(json.dumps({
    "opening": opening,
    "num_bytes": sink.num_bytes,
    "whole": sink.num_tensors == plan.num_tensors and sink.num_files == len(plan.files),
    "num_files": sink.num_files,
    "largest": max(t.num_bytes for file in plan.files for t in file.tensors),
    "enforced": enforced,
    "imported": sorted({"torch", "transformers", "safetensors"} & set(sys.modules)),
}))
"""

ARGS = argparse.Namespace(
    tensor_model_parallel_size=TP,
    pipeline_model_parallel_size=1,
    use_legacy_models=False,
    num_layers=LAYERS,
    hidden_size=HIDDEN,
    ffn_hidden_size=FFN,
    num_attention_heads=24,
    group_query_attention=True,
    num_query_groups=12,
    max_position_embeddings=128,
    position_embedding_type="rope",
    use_rope_scaling=False,
    normalization="RMSNorm",
    layernorm_epsilon=1e-5,
    swiglu=True,
    add_bias_linear=False,
    untie_embeddings_and_output_weights=True,
    vocab_size=VOCAB,
    padded_vocab_size=VOCAB,
    params_dtype=torch.bfloat16,
)
COMMON = {"args": ARGS, "checkpoint_version": 3.0, "iteration": 1}
# Name -> shape and the axis that tensor parallelism splits.
LAYER = {
    "self_attention.linear_proj.weight": ((HIDDEN, HIDDEN), 1),
    "self_attention.linear_qkv.layer_norm_weight": ((HIDDEN,), None),
    "self_attention.linear_qkv.weight": ((2 * HIDDEN, HIDDEN), 0),
    "mlp.linear_fc1.layer_norm_weight": ((HIDDEN,), None),
    "mlp.linear_fc1.weight": ((2 * FFN, HIDDEN), 0),
    "mlp.linear_fc2.weight": ((HIDDEN, FFN), 1),
}
OUTSIDE = {
    "embedding.word_embeddings.weight": ((VOCAB, HIDDEN), 0),
    "decoder.final_layernorm.weight": ((HIDDEN,), None),
    "output_layer.weight": ((VOCAB, HIDDEN), 0),
}


def parts(shape: tuple[int, ...], axis: int | None) -> list[torch.Tensor]:
    """What each rank holds: memory that is reserved and never touched."""
    if axis is None:
        return [torch.empty(shape, dtype=torch.bfloat16) for _ in range(TP)]
    part = (*shape[:axis], shape[axis] // TP, *shape[axis + 1 :])
    return [torch.empty(part, dtype=torch.bfloat16) for _ in range(TP)]


def write_torch(folder: Path) -> None:
    tensors = {f"decoder.layers.{i}.{name}": p for i in range(LAYERS) for name, p in LAYER.items()}
    held = {name: parts(*place) for name, place in (tensors | OUTSIDE).items()}
    for rank in range(TP):
        path = folder / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        path.parent.mkdir()
        model = {name: shards[rank] for name, shards in held.items()}
        with torch.serialization.skip_data():
            torch.save({**COMMON, "model": model}, path)


def write_torch_dist(folder: Path) -> None:
    """Layers stacked, one `.distcp` file per chunk."""
    stacked = {f"decoder.layers.{name}": place for name, place in LAYER.items()}
    tensors, storage = {}, {}
    for name, (shape, axis) in (stacked | OUTSIDE).items():
        rows = [(layer,) for layer in range(LAYERS)] if name in stacked else [()]
        whole = torch.Size(((LAYERS,) if name in stacked else ()) + shape)
        chunks = []
        for row in rows:
            held = parts(shape, axis)
            for rank, part in enumerate(held if axis is not None else held[:1]):
                start = [rank * part.shape[k] if k == axis else 0 for k in range(len(shape))]
                at = torch.Size((*row, *start))
                part = part[(None,) * len(row)]
                path = folder / f"__{rank}_{len(storage)}.distcp"
                with torch.serialization.skip_data():
                    torch.save(part, path)
                chunks.append(dcp.ChunkStorageMetadata(at, part.shape))
                where = _StorageInfo(path.name, 0, path.stat().st_size)
                storage[dcp.MetadataIndex(name, at)] = where
        properties = dcp.TensorProperties(dtype=torch.bfloat16)
        tensors[name] = dcp.TensorStorageMetadata(properties, whole, chunks)
    metadata = dcp.Metadata(state_dict_metadata=tensors, storage_data=storage)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    torch.save(COMMON, folder / "common.pt")


WRITERS = {"torch": write_torch, "torch_dist": write_torch_dist}


@pytest.fixture(scope="module", params=WRITERS)
def checkpoint(request: pytest.FixtureRequest) -> Iterator[Path]:
    """7.7 GB of weights in files that are almost all hole."""
    place = RAM_DISK if os.access(RAM_DISK, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="mtt-tests-", dir=place) as root:
        folder = Path(root) / "iter_0000001"
        folder.mkdir()
        WRITERS[request.param](folder)
        files = [path.stat() for path in folder.rglob("*") if path.is_file()]
        assert sum(file.st_size for file in files) > NUM_BYTES
        if sum(file.st_blocks * 512 for file in files) > 2**24:
            pytest.skip("the file system of the temporary folder has no sparse files")
        yield folder


def convert(
    folder: Path, num_workers: int, options: dict[str, object], change: str = ""
) -> subprocess.CompletedProcess[str]:
    """Convert in a process of 256 MB per worker; `change` is run there before."""
    bound = BYTES_PER_WORKER * num_workers
    command = [sys.executable, "-c", CONVERT, str(folder), str(num_workers), str(bound)]
    return subprocess.run([*command, json.dumps(options), change], capture_output=True, text=True)


linux = pytest.mark.skipif(sys.platform != "linux", reason="the limit and the counters are Linux's")


@linux
@pytest.mark.parametrize(
    ("num_workers", "options"),
    [
        (1, {}),
        (2, {}),
        (2, {"to": "torch", "tp": 4, "pp": 2}),
        (2, {"to": "torch_dist", "tp": 4}),
    ],
    ids=["hf-1", "hf-2", "torch-2", "torch_dist-2"],
)
def test_memory_does_not_grow_with_the_model(
    checkpoint: Path, num_workers: int, options: dict[str, object]
) -> None:
    assert BYTES_PER_WORKER * num_workers < EMBEDDING_BYTES / 6
    process = convert(checkpoint, num_workers, options)
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert result["opening"] < NUM_BYTES / 100
    assert result["opening"] < 5_000_000  # names, shapes and arguments are no more than this
    # Ranks of a `torch` checkpoint hold copies of the norms.
    copies = 2 * HIDDEN * (2 * LAYERS + 1) * 3 if options.get("to") == "torch" else 0
    assert result["num_bytes"] == NUM_BYTES + copies
    assert result["whole"] and result["num_files"] > 2
    assert result["enforced"]
    assert result["imported"] == []


@contextmanager
def sparse_llama(num_layers: int, hidden_size: int) -> Iterator[Path]:
    """A checkpoint of TP4 x PP1, all hole."""
    place = RAM_DISK if os.access(RAM_DISK, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="mtt-tests-", dir=place) as root:
        sparse.write_torch(Path(root), sparse.llama(num_layers, hidden_size), tp=4, pp=1)
        yield Path(root)


@linux
@pytest.mark.parametrize(
    ("gigabytes", "num_layers", "hidden_size"),
    [
        (2, 1, 6144),
        pytest.param(8, 3, 8192, marks=pytest.mark.slow),
        pytest.param(32, 15, 8192, marks=pytest.mark.slow),
    ],
)
def test_a_worker_needs_256_mb_at_any_size(
    gigabytes: int, num_layers: int, hidden_size: int
) -> None:
    """All of it is read and hashed: 32 GB of zeros take about ten seconds."""
    with sparse_llama(num_layers, hidden_size) as folder:
        process = convert(folder, 1, {})
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert 0.9 * gigabytes < result["num_bytes"] / 1e9 < 1.1 * gigabytes
    assert result["largest"] > BYTES_PER_WORKER  # so that no tensor can be held whole
    assert result["whole"] and result["enforced"]


@linux
def test_the_limit_stops_an_engine_that_holds_a_tensor() -> None:
    with sparse_llama(1, 6144) as folder:
        process = convert(folder, 1, {}, "reading.WINDOW_BYTES = 1 << 40")
    assert process.returncode != 0
    assert "MemoryError" in process.stderr
