"""`mtt verify`: which folders are what was written, and which are not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mtt_convert
from mtt_convert import (
    CorruptError,
    NotACheckpointError,
    verify,
)
from tests.convert.surgery import (
    TORCH,
    Golden,
    copy_of,
    edited,
    model_of,
    run,
    shard,
)

NORM = "decoder.layers.0.input_layernorm.weight"
MANIFEST = "mtt_manifest.json"
WEIGHTS = "model.safetensors"


def _verify(folder: Path, code: int) -> dict[str, Any]:
    """`mtt verify --json`, in agreement with the library and the text."""
    got, out, err = run("verify", folder, "--json")
    assert got == code, err
    body = json.loads(out)
    assert body["schema"] == 1 and body["command"] == "verify"
    assert body["status"] == ("different" if code else "ok")
    result = verify(folder)
    assert body["problems"] == list(result.problems)
    assert body["warnings"] == list(result.warnings)
    got, out, err = run("verify", folder)
    assert got == code
    for problem in result.problems:
        assert problem in out
    for warning in result.warnings:
        assert f"warning: {warning}" in err
    return body


def test_verify_a_whole_folder(untouched: Path) -> None:
    body = _verify(untouched, 0)
    assert body["tensors"] == 39 and body["problems"] == [] and body["warnings"] == []


@pytest.mark.parametrize("hash_name", ["xxh3", "sha256"])
def test_verify_finds_any_flipped_byte(hash_name: str, source: Path, out: Path) -> None:
    """The first byte, the header, the first, a middle and the last element."""
    mtt_convert.convert(source, out, hash_name=hash_name)
    path = out / WEIGHTS
    original = path.read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")
    for position in (0, 9, header - 1, header, header + 5000, len(original) // 2, -1):
        data = bytearray(original)
        data[position] ^= 1
        path.write_bytes(data)
        assert len(verify(out).problems) == 1, position
    body = _verify(out, 1)
    assert body["problems"] == ["model.norm.weight in model.safetensors is not what was written"]


@pytest.mark.parametrize("end", [0, 7, 8, 100, 5000, 500_000, -1])
def test_verify_finds_cut_files(end: int, converted: Path) -> None:
    path = converted / WEIGHTS
    os.truncate(path, end if end >= 0 else path.stat().st_size - 1)
    body = _verify(converted, 1)
    assert len(body["problems"]) == 1 and WEIGHTS in body["problems"][0]


def test_verify_finds_longer_files(converted: Path) -> None:
    with open(converted / WEIGHTS, "ab") as file:
        file.write(b"x")
    _verify(converted, 1)


def test_verify_finds_missing_files(source: Path, out: Path) -> None:
    mtt_convert.convert(source, out, max_shard_size="300KB")
    (out / "model-00002-of-00004.safetensors").unlink()
    (out / "config.json").unlink()
    body = _verify(out, 1)
    assert sorted(body["problems"]) == [
        "config.json is missing",
        "model-00002-of-00004.safetensors is missing",
    ]


def test_verify_finds_files_in_each_other_s_place(source: Path, out: Path) -> None:
    mtt_convert.convert(source, out, max_shard_size="300KB")
    first, second = (out / f"model-0000{k}-of-00004.safetensors" for k in (1, 2))
    first.rename(out / "x")
    second.rename(first)
    (out / "x").rename(second)
    assert len(_verify(out, 1)["problems"]) == 2


@pytest.mark.parametrize("name", ["config.json", "README.md", "modeling_mtt.py"])
def test_verify_finds_changed_documents(name: str, converted: Path) -> None:
    with open(converted / name, "ab") as file:
        file.write(b" ")
    assert _verify(converted, 1)["problems"] == [f"{name} was changed since it was written"]


def test_verify_lets_other_files_be(converted: Path) -> None:
    (converted / "notes.txt").write_text("mine")
    _verify(converted, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_that_are_not_finite_are_a_warning(
    value: float, dtype: str, golden: Golden, tmp_path: Path
) -> None:
    """They were so before: the conversion is right, and the user should know."""
    source = copy_of(golden, TORCH, tmp_path)
    for tp in (0, 1):
        with edited(shard(source, tp, 0)) as content:
            model_of(content, NORM)[NORM][3] = value
    mtt_convert.convert(source, tmp_path / "out", dtype=dtype)
    body = _verify(tmp_path / "out", 0)
    assert body["warnings"] == [
        "model.layers.0.input_layernorm.weight has values that are not finite"
    ]


def test_verify_without_hashes(source: Path, out: Path) -> None:
    """`--hash none` can find cut files, and must not call a changed one written."""
    mtt_convert.convert(source, out, hash_name="none")
    assert _verify(out, 0)["warnings"] != []


def test_verify_what_mtt_did_not_write(tmp_path: Path, source: Path) -> None:
    for folder in (tmp_path, source, tmp_path / "nothing"):
        with pytest.raises(NotACheckpointError):
            verify(folder)
        code, _, err = run("verify", folder)
        assert code == 3 and MANIFEST in err and "fix:" in err


def _edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads((folder / MANIFEST).read_text())
    change(record)
    (folder / MANIFEST).write_text(json.dumps(record))


MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no status": lambda record: record.pop("status"),
    "no documents": lambda record: record.pop("documents"),
    "documents of another kind": lambda record: record.update(documents=[1]),
    "no hash": lambda record: record.pop("hash"),
    "unknown hash": lambda record: record.update(hash="md5"),
    "hash of another kind": lambda record: record.update(hash=["xxh3_128"]),
    "file of another kind": lambda record: record["files"].update({WEIGHTS: 3}),
    "no tensors": lambda record: record["files"][WEIGHTS].pop("tensors"),
    "no header": lambda record: record["files"][WEIGHTS].pop("header"),
    "no bytes": lambda record: record["files"][WEIGHTS].pop("bytes"),
    "bytes of text": lambda record: record["files"][WEIGHTS].update(bytes="many"),
    "too few bytes": lambda record: record["files"][WEIGHTS].update(bytes=5),
    "another tensor": lambda record: record["files"][WEIGHTS]["tensors"].update(x="0"),
    "no files": lambda record: record.update(files={}),
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS)
def test_verify_with_an_odd_manifest(
    change: Callable[[dict[str, Any]], object], converted: Path
) -> None:
    """Problems, or an error in words; a manifest that says nothing proves nothing."""
    _edit_manifest(converted, change)
    code, _, err = run("verify", converted)
    assert code in (1, 2, 3), err


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, '{"schema": 2, "files": {}}'])
def test_verify_with_a_damaged_manifest(text: str, converted: Path) -> None:
    (converted / MANIFEST).write_text(text)
    with pytest.raises(CorruptError):
        verify(converted)
    assert run("verify", converted)[0] == 3


@pytest.mark.parametrize(
    "header",
    [
        b"{}",
        b"[]",
        b"null",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}',
        b'{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 99999]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": {"0": 0}}}',
    ],
    ids=lambda header: header[:60].decode("latin1"),
)
def test_odd_safetensors_headers(header: bytes, converted: Path) -> None:
    path = converted / WEIGHTS
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    _verify(converted, 1)
    code, _, err = run("diff", converted, converted)
    assert code in (0, 3), err


@pytest.mark.parametrize("length", [2**63, 2**40, 2**64 - 1])
def test_safetensors_header_lengths_are_not_believed(length: int, converted: Path) -> None:
    (converted / WEIGHTS).write_bytes(length.to_bytes(8, "little") + b"{}")
    _verify(converted, 1)
