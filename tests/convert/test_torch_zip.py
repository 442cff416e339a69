"""Zips that mtt lays out: torch, Python and mtt itself read them, at any size."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from mtt_convert.dtypes import DTYPES
from mtt_convert.errors import CorruptError
from mtt_convert.formats.torch_zip import PlannedZip, Weight, load, plan, tensor_value
from mtt_convert.tensors import LazyTensor, zeros

NAMES = ["float64", "float32", "float16", "bfloat16", "int64", "uint8", "bool"]


def write(path: Path, zipped: PlannedZip, tensors: dict[str, bytes]) -> None:
    """A planned zip with the bytes of its tensors, as a sink would leave it."""
    data = bytearray(zipped.end)
    for position, fixed in zipped.fixed:
        data[position : position + len(fixed)] = fixed
    for tensor in zipped.tensors:
        content = tensors[tensor.name]
        data[tensor.offset : tensor.offset + len(content)] = content
        for position in tensor.checksum_at:
            data[position : position + 4] = zlib.crc32(content).to_bytes(4, "little")
    path.write_bytes(data)


def weights(names: list[str], shape: tuple[int, ...]) -> dict[int, Weight]:
    return {
        key: Weight(name, zeros(DTYPES[name], shape), DTYPES[name])
        for key, name in enumerate(names)
    }


@pytest.mark.parametrize("shape", [(3, 5), (7,), (), (0, 4)])
def test_torch_reads_every_dtype_and_shape(tmp_path, shape):
    planned = weights(NAMES, shape)
    value = {weight.name: tensor_value(weight, key) for key, weight in planned.items()}
    expected = {name: torch.randint(0, 2, shape).to(getattr(torch, name)) for name in NAMES}
    contents = {
        name: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        if tensor.numel()
        else b""
        for name, tensor in expected.items()
    }
    path = tmp_path / "file.pt"
    zipped = plan(value, planned, "file")
    write(path, zipped, contents)
    assert all(tensor.offset % 64 == 0 for tensor in zipped.tensors)
    assert zipfile.ZipFile(path).testzip() is None
    for options in ({}, {"mmap": True}):
        found = torch.load(path, weights_only=True, **options)
        assert all(torch.equal(found[name], expected[name]) for name in NAMES)
    ours = load(str(path))
    assert {name: (t.dtype.name, t.shape) for name, t in ours.items()} == {
        name: (name, shape) for name in NAMES
    }


def test_several_zips_in_one_file(tmp_path):
    """As in a `.distcp`: each is complete, and read by its own byte range."""
    path = tmp_path / "__0_0.distcp"
    first = plan([None], {}, "archive")
    weight = Weight("w", zeros(DTYPES["float32"], (5, 3)), DTYPES["float32"])
    second = plan(tensor_value(weight, 0), {0: weight}, "archive", first.end)
    assert all(tensor.offset % 64 == first.end % 64 for tensor in second.tensors)
    joined = PlannedZip((*first.fixed, *second.fixed), second.tensors, second.end)
    values = np.arange(15, dtype=np.float32)
    write(path, joined, {"w": values.tobytes()})
    data = path.read_bytes()
    assert torch.load(io.BytesIO(data[: first.end])) == [None]
    found = torch.load(io.BytesIO(data[first.end :]), weights_only=True)
    assert torch.equal(found, torch.from_numpy(values).view(5, 3))
    ours = load(str(path), first.end, second.end - first.end)
    assert isinstance(ours, LazyTensor)
    assert ours.shape == (5, 3)


def test_sizes_beyond_four_gib(tmp_path):
    """Holes stand for the elements: only what stands between them is written."""
    large = Weight("large", zeros(DTYPES["bfloat16"], (2**31 + 5,)), DTYPES["bfloat16"])
    small = Weight("small", zeros(DTYPES["float32"], (3,)), DTYPES["float32"])
    value = {"large": tensor_value(large, 0), "small": tensor_value(small, 1)}
    zipped = plan(value, {0: large, 1: small}, "model_optim_rng")
    path = tmp_path / "model_optim_rng.pt"
    with open(path, "wb") as file:
        for position, fixed in zipped.fixed:
            file.seek(position)
            file.write(fixed)
    assert os.path.getsize(path) == zipped.end > 2**32
    entries = {info.filename: info for info in zipfile.ZipFile(path).infolist()}
    assert entries["model_optim_rng/data/0"].file_size == large.num_bytes
    assert entries["model_optim_rng/data/1"].header_offset > 2**32
    found = torch.load(path, weights_only=True, mmap=True)
    assert found["large"].shape == (2**31 + 5,)
    assert found["small"].tolist() == [0.0, 0.0, 0.0]
    ours = load(str(path))
    assert ours["large"].pieces[0].offset == zipped.tensors[0].offset
    assert ours["small"].pieces[0].offset == zipped.tensors[1].offset


def test_more_records_than_a_short_directory_counts(tmp_path):
    planned = {
        key: Weight(str(key), zeros(DTYPES["uint8"], (1,)), DTYPES["uint8"])
        for key in range(66_000)
    }
    value = {weight.name: tensor_value(weight, key) for key, weight in planned.items()}
    zipped = plan(value, planned, "many")
    path = tmp_path / "many.pt"
    write(path, zipped, dict.fromkeys((t.name for t in zipped.tensors), b"\x07"))
    assert len(zipfile.ZipFile(path).infolist()) == 66_005
    assert torch.load(path, weights_only=True)["65999"].item() == 7


def test_a_directory_that_points_beyond_the_file(tmp_path: Path) -> None:
    """A ZIP64 field can hold any position, also those no file has."""
    path = tmp_path / "file.pt"
    torch.save({"x": torch.ones(2)}, path)
    data = path.read_bytes()
    end = data.rindex(b"PK\x06\x06")
    place = end + 48  # of the directory, in the ZIP64 end record
    assert int.from_bytes(data[place : place + 8], "little") < len(data)
    for value in (2**63 - 1, 2**63, 2**64 - 1, len(data)):
        changed = data[:place] + value.to_bytes(8, "little") + data[place + 8 :]
        path.write_bytes(changed)
        with pytest.raises(CorruptError):
            load(str(path))


def test_a_pickle_that_changed_is_refused(tmp_path: Path) -> None:
    """A number that is as good as any other: only the checksum tells."""
    path = tmp_path / "file.pt"
    torch.save({"epsilon": "1e-05"}, path)
    assert load(str(path)) == {"epsilon": "1e-05"}
    path.write_bytes(path.read_bytes().replace(b"1e-05", b"1e-06"))
    with pytest.raises(CorruptError, match=r"file\.pt") as error:
        load(str(path))
    assert error.value.found == "a pickle with another checksum"


def test_a_record_whose_bytes_are_not_where_it_says_is_refused(tmp_path: Path) -> None:
    """A header that grew by what storages are aligned to: only the next record tells."""
    path = tmp_path / "file.pt"
    torch.save({"a": torch.randn(64), "b": torch.randn(64)}, path)
    data = bytearray(path.read_bytes())
    info = next(i for i in zipfile.ZipFile(path).infolist() if i.filename.endswith("data/0"))
    at = info.header_offset + 28
    extra_size = int.from_bytes(data[at : at + 2], "little")
    data[at : at + 2] = (extra_size + 64).to_bytes(2, "little")
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="records without gaps"):
        load(str(path))
