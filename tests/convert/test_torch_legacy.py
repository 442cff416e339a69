"""Files of `torch.save` from before zips: read as torch reads them, lazily, and never trusted."""

from __future__ import annotations

import contextlib
import os
import random
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mtt_convert import SourceError
from mtt_convert.errors import CorruptError, UnsafePickleError, UnsupportedError
from mtt_convert.formats.torch_zip import load
from mtt_convert.reading import FileReader, stream
from mtt_convert.tensors import LazyTensor
from tests.convert.surgery import (
    Golden,
    items,
    listed,
    mapping,
    named,
    number,
    program,
    reduce,
    refused,
    storage,
    tensor,
    text,
)

MAGIC = program(number(0x1950A86A20F9469CFC6C), 2)
PROTOCOL = program(b"M\xe9\x03", 2)
LITTLE = program(mapping({"protocol_version": b"M\xe9\x03", "little_endian": b"\x88"}), 2)
BIG = program(mapping({"protocol_version": b"M\xe9\x03", "little_endian": b"\x89"}), 2)
OLD = "legacy/v1.0-ckptver0-RELEASE-oldserial-fp16-gpt2-tp1pp1"


def legacy_file(
    body: bytes,
    storages: Mapping[str, tuple[int, bytes]] | None = None,
    *,
    keys: bytes | None = None,
    system: bytes = LITTLE,
) -> bytes:
    """A file as torch before 1.6 writes it; each storage is its count and its bytes."""
    data = {"0": (4, bytes(16))} if storages is None else storages
    order = listed(*map(text, data)) if keys is None else keys
    head = MAGIC + PROTOCOL + system + program(body, 2) + program(order, 2)
    return head + b"".join(struct.pack("<q", count) + raw for count, raw in data.values())


def loaded(path: Path, data: bytes) -> Any:
    path.write_bytes(data)
    return load(str(path))


def contents(lazy: LazyTensor) -> bytes:
    with FileReader() as reader:
        return b"".join(bytes(window) for window in stream(lazy, reader))


def bytes_of(value: torch.Tensor) -> bytes:
    return value.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def test_torch_and_mtt_read_the_same(tmp_path: Path) -> None:
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool)
    values: dict[str, torch.Tensor] = {
        str(kind): torch.randint(0, 2, (3, 5)).to(kind) for kind in kinds
    }
    table = torch.randn(6, 8)
    values |= {"rows": table[2:4], "turned": table.t(), "part": table[1:, ::2], "empty": table[:0]}
    values |= {"scalar": torch.tensor(3.0), "bias": torch.nn.Parameter(torch.randn(7))}
    path = tmp_path / "old.pt"
    content = {"model": values, "iteration": 7, "name": "x"}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    found = load(str(path))
    assert (found["iteration"], found["name"]) == (7, "x")
    for name, value in values.items():
        assert found["model"][name].shape == tuple(value.shape)
        assert contents(found["model"][name]) == bytes_of(value.detach()), name


def test_only_counts_of_storages_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two storages of 4 GB in a sparse file: the second one begins where it should."""
    count = 1 << 30
    first, second = (tensor((count,), of=storage(key, count)) for key in ("a", "b"))
    head = legacy_file(items(first, second), {"a": (count, b"")}, keys=listed(text("a"), text("b")))
    path = tmp_path / "large.pt"
    with open(path, "wb") as file:
        file.write(head)
        file.seek(len(head) + 4 * count)
        file.write(struct.pack("<q", count))
        file.truncate(len(head) + 8 + 8 * count)
    read = []
    pread = os.pread

    def counted(descriptor: int, size: int, offset: int) -> bytes:
        data = pread(descriptor, size, offset)
        read.append(len(data))
        return data

    monkeypatch.setattr(os, "pread", counted)
    a, b = load(str(path))
    assert sum(read) < 3 << 20
    assert a.pieces[0].offset == len(head)
    assert b.pieces[0].offset == len(head) + 4 * count + 8


def test_metadata_longer_than_a_first_look(tmp_path: Path) -> None:
    value = {"notes": "x" * (3 << 20), "weight": torch.randn(5)}
    path = tmp_path / "old.pt"
    torch.save(value, path, _use_new_zipfile_serialization=False)
    found = load(str(path))
    assert found["notes"] == value["notes"]
    assert contents(found["weight"]) == bytes_of(value["weight"])


@pytest.mark.parametrize("view", [None, items(text("v"), number(1), number(2))])
def test_views_of_storages(view: bytes | None, tmp_path: Path) -> None:
    """torch before 0.4 could name a part of a storage in the reference itself."""
    raw = struct.pack("<4f", 1, 2, 3, 4)
    of = items(
        text("storage"),
        named("torch", "FloatStorage"),
        text("0"),
        text("cuda:3"),
        number(4),
        view or b"N",
    )
    found = loaded(tmp_path / "x", legacy_file(tensor((2,), of=of + b"Q"), {"0": (4, raw)}))
    assert contents(found) == (raw[4:12] if view else raw[:8])


def _reference(*parts: bytes) -> bytes:
    return items(text("storage"), named("torch", "FloatStorage"), *parts) + b"Q"


BAD_VIEW = items(text("v"), number(3), number(2))
DAMAGED = {
    "a key that is not listed": legacy_file(tensor(), keys=listed()),
    "a key listed twice": legacy_file(tensor(), keys=listed(text("0"), text("0"))),
    "a key that nothing refers to": legacy_file(tensor(), keys=listed(text("0"), text("1"))),
    "keys that are no text": legacy_file(tensor(), keys=listed(number(0))),
    "keys that are no list": legacy_file(tensor(), keys=text("0")),
    "another count in the storage": legacy_file(tensor(), {"0": (5, bytes(16))}),
    "a negative count": legacy_file(tensor(of=storage(count=-1)), {"0": (-1, bytes(16))}),
    "a count beyond the file": legacy_file(tensor(of=storage(count=2**40)), {"0": (2**40, b"")}),
    "a count of many digits": legacy_file(tensor(of=storage(count=2**4000)), {"0": (4, bytes(16))}),
    "bytes too few": legacy_file(tensor(), {"0": (4, bytes(15))}),
    "bytes too many": legacy_file(tensor(), {"0": (4, bytes(17))}),
    "one storage of two sizes": legacy_file(items(tensor(), tensor(of=storage(count=3)))),
    "a view beyond its storage": legacy_file(
        tensor((2,), of=_reference(text("0"), text("cpu"), number(4), BAD_VIEW))
    ),
    "a view that is none": legacy_file(
        tensor(of=_reference(text("0"), text("cpu"), number(4), text("all")))
    ),
    "a reference that is none": legacy_file(tensor(of=text("0") + b"Q")),
    "a tensor beyond its storage": legacy_file(tensor((5,))),
    "another protocol": MAGIC + program(b"M\xe8\x03", 2) + LITTLE,
    "no machine": legacy_file(tensor(), system=program(b"N", 2)),
    "no end": MAGIC + PROTOCOL + LITTLE + b"\x80\x02" + b"N" * (3 << 20),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damage_is_refused(what: str, tmp_path: Path) -> None:
    with pytest.raises((CorruptError, UnsupportedError)) as caught:
        loaded(tmp_path / "x", DAMAGED[what])
    assert caught.value.found


def test_another_byte_order(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="byte order"):
        loaded(tmp_path / "x", legacy_file(tensor(), system=BIG))


@pytest.mark.parametrize("place", ["magic", "protocol", "system", "object", "keys"])
def test_nothing_is_run(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    attack = reduce(named("os", "system"), text("touch canary"))
    pickles = {
        "magic": MAGIC,
        "protocol": PROTOCOL,
        "system": LITTLE,
        "object": program(tensor(), 2),
        "keys": program(listed(text("0")), 2),
    }
    if place == "magic":  # the attack comes after what makes mtt look
        pickles[place] = MAGIC[:-1] + b"0" + attack + b"."
    else:
        pickles[place] = program(attack, 2)
    data = b"".join(pickles.values()) + struct.pack("<q", 4) + bytes(16)
    with pytest.raises((UnsafePickleError, CorruptError)):
        loaded(tmp_path / "x", data)
    assert not (tmp_path / "canary").exists()
    if place == "object":  # the bait is real
        with contextlib.suppress(Exception):
            torch.load(tmp_path / "x", weights_only=False)
        assert (tmp_path / "canary").exists()


def _old_file(golden: Golden) -> bytes:
    return (golden(OLD) / "release/mp_rank_00/model_optim_rng.pt").read_bytes()


def test_cut_anywhere(golden: Golden, tmp_path: Path) -> None:
    data = _old_file(golden)
    ends = [15, 21, 137, 19112, 20275, len(data)]
    cuts = {0, 1, *ends, *(end - 1 for end in ends), *(end + 4 for end in ends)}
    cuts |= set(random.Random(1).sample(range(len(data)), 40))
    for cut in sorted(cuts):
        if cut < len(data):
            with pytest.raises(SourceError):
                loaded(tmp_path / "x", data[:cut])


def test_flipped_bits(golden: Golden, tmp_path: Path) -> None:
    """Typed errors, or values; and never a tensor that is not in the file."""
    data = _old_file(golden)
    chance = random.Random(2)
    for _ in range(400):
        changed = bytearray(data)
        changed[chance.randrange(20300)] ^= 1 << chance.randrange(8)
        try:
            found = loaded(tmp_path / "x", bytes(changed))
        except SourceError:
            continue
        for lazy in _tensors(found):
            for piece in lazy.pieces:
                assert 20275 <= piece.offset <= len(data)


def _tensors(value: Any) -> list[LazyTensor]:
    if isinstance(value, LazyTensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if type(value) is list else ()
    return [lazy for part in parts for lazy in _tensors(part)]


def test_a_cut_checkpoint_is_refused_whole(golden: Golden, tmp_path: Path) -> None:
    source = tmp_path / "release/mp_rank_00/model_optim_rng.pt"
    source.parent.mkdir(parents=True)
    source.write_bytes(_old_file(golden)[:-1])
    refused(tmp_path / "release", tmp_path / "out", says="truncated")
