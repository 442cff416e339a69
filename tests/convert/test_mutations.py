"""Real checkpoints, changed a little at random: a typed error, or the result they had before.

Bytes of tensors are left alone: a weight that changed cannot be told. So are values in a
`config.json` or a YAML file, for the same reason; everything else has to be noticed or not to
matter.
"""

from __future__ import annotations

import random
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import xxhash

from mtt_convert import MTTError, convert, open_checkpoint
from mtt_convert.reading import FileReader, stream
from tests.convert.surgery import TORCH, copy_of
from tests.convert.test_nemo import CONFIG_1, archive

Golden = Callable[[str], Path]
NUM_MUTATIONS = 160
SOURCES = {
    "torch": TORCH,
    "torch_dist": "mcore/tiny/core_0.15/torch_dist",
    "singleton": "mcore/tiny/core_0.16/singleton",
    "zarr": "mcore/tiny/core_0.15/zarr",
    "torch_dcp": "mcore/llama/fsdp2_dp2/torch_dcp",
    "fsdp_dtensor": "mcore/llama_bf16/mfsdp_dp2/fsdp_dtensor",
    "experts": "mcore/moe_mixed/ep2/torch",
    "stacked-experts": "mcore-te/mixtral/grouped_ep2/torch_dist",
    "latents": "mcore/mla/tp2pp1/torch_dist",
    "further-tokens": "mcore/mtp/tp2pp2/torch",
    "hf": "mcore/tiny/core_0.15/zarr",
    "nemo": "mcore/tiny/core_0.15/zarr",
    "t5": "mcore/t5/tp2/torch",
    "t5_torch_dist": "mcore-te/t5_te/tp2/torch_dist",
}
KINDS = ("flip", "flip", "flip", "set", "zero", "truncate", "insert", "remove", "delete", "swap")


class Checkpoint(NamedTuple):
    """A checkpoint of our own, what it is, and the bytes of its files that are no tensor's."""

    root: Path
    result: object
    files: dict[Path, bytes]
    outside: dict[Path, np.ndarray]
    is_t5: bool = False


def result(root: Path) -> object:
    """Everything a checkpoint says: its model, and every tensor's type, shape and bytes."""
    checkpoint = open_checkpoint(root)
    tensors = {}
    with FileReader() as reader:
        for name, tensor in checkpoint.tensors.items():
            digest = xxhash.xxh3_128()
            for window in stream(tensor, reader):
                digest.update(window)
            tensors[name] = (tensor.dtype.name, tensor.shape, digest.hexdigest())
    return checkpoint.format, checkpoint.iteration, checkpoint.architecture, tensors


@pytest.fixture(params=SOURCES)
def checkpoint(request: pytest.FixtureRequest, golden: Golden, tmp_path: Path) -> Checkpoint:
    root = copy_of(golden, SOURCES[request.param], tmp_path)
    if request.param == "hf":
        convert(root, tmp_path / "hf", tokenizer="none", max_shard_size="16KB")
        root = tmp_path / "hf"
    if request.param == "nemo":
        (tmp_path / "nemo").mkdir()
        root = archive(golden, tmp_path / "nemo" / "llama.nemo", CONFIG_1).parent
    files = {p: p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
    inside = {path: np.zeros(len(data), bool) for path, data in files.items()}
    for tensor in open_checkpoint(root).tensors.values():
        for piece in tensor.pieces:
            spans = zip(piece.shape, piece.strides, strict=True)
            last = sum((size - 1) * step for size, step in spans)
            end = piece.offset + (last + 1) * tensor.dtype.itemsize
            inside[Path(piece.path)][piece.offset : end] = True
    if request.param == "nemo":
        with tarfile.open(root / "llama.nemo") as tar:
            for member in tar:
                if not member.name.endswith(".ckpt"):
                    last = member.offset_data + member.size
                    inside[root / "llama.nemo"][member.offset_data : last] = True
    for path in list(files):
        path.chmod(0o644)
        if request.param == "hf" and (path.suffix != ".safetensors" and "index" not in path.name):
            del files[path]
    outside = {path: np.flatnonzero(~inside[path]) for path in files}
    outside = {path: places for path, places in outside.items() if len(places)}
    return Checkpoint(root, result(root), files, outside, request.param.startswith("t5"))


@contextmanager
def mutated(checkpoint: Checkpoint, rng: random.Random) -> Iterator[str]:
    """The checkpoint with one change; what it was."""
    path = rng.choice(sorted(checkpoint.outside))
    data = bytearray(checkpoint.files[path])
    place = int(rng.choice(checkpoint.outside[path]))
    kind = rng.choice(KINDS)
    other: Path | None = None
    if kind == "flip":
        data[place] ^= 1 << rng.randrange(8)
    elif kind == "set":
        data[place] = rng.randrange(256)
    elif kind == "zero":
        places = checkpoint.outside[path]
        for index in places[(places >= place) & (places < place + rng.randint(2, 64))]:
            data[index] = 0
    elif kind == "truncate":
        del data[rng.randrange(len(data)) :]
    elif kind == "insert":
        data[place:place] = rng.randbytes(rng.choice([1, 4, 16, 64]))
    elif kind == "remove":
        del data[place : place + rng.choice([1, 4, 16, 64])]
    elif kind == "swap":
        # Which chunk a file holds is said by the file's name alone.
        chunks = path.suffix == ".distcp"
        other = rng.choice(
            [p for p in sorted(checkpoint.files) if not chunks or p.suffix != ".distcp"]
        )
    try:
        if kind == "delete":
            path.unlink()
        elif other is not None:
            path.write_bytes(checkpoint.files[other])
            other.write_bytes(checkpoint.files[path])
        else:
            path.write_bytes(data)
        yield f"{kind} of {path.relative_to(checkpoint.root)} at {place} {other or ''}"
    finally:
        for changed in {path, other or path}:
            changed.write_bytes(checkpoint.files[changed])


def test_a_change_is_refused_or_does_not_matter(
    checkpoint: Checkpoint, record_property: pytest.RecordProperty
) -> None:
    rng = random.Random(20)
    refused = 0
    # An archive is four large files in one, and slow to open; a T5 has many tensors.
    is_slow = checkpoint.root.name == "nemo" or checkpoint.is_t5
    num_mutations = NUM_MUTATIONS // (4 if is_slow else 1)
    for number in range(num_mutations):
        with mutated(checkpoint, rng) as change:
            try:
                found = result(checkpoint.root)
            except MTTError as error:
                assert error.exit_code in (2, 3), change
                refused += 1
                continue
            except Exception as error:
                raise AssertionError(f"{number}: {change}") from error
            assert found == checkpoint.result, f"{number}: {change}"
    record_property("summary", f"{refused} of {num_mutations} changes were refused")
    assert refused > num_mutations / 4
    assert result(checkpoint.root) == checkpoint.result
