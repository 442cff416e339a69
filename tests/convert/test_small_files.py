"""Small files: written, and replaced by exchanging names where the system can."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from mtt_convert.small_files import replace, write


def refuses(*_: object) -> int:
    return -1


@pytest.fixture(params=["as it is", "no such call", "no such file system", "no C library"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the system's call, and where it is missing or does not work."""

    def library(name: object, use_errno: bool = False) -> SimpleNamespace:
        if request.param == "no C library":
            raise OSError("none")
        known = {"renameat2": refuses} if request.param == "no such file system" else {}
        return SimpleNamespace(**known)

    if request.param != "as it is":
        monkeypatch.setattr(ctypes, "CDLL", library)
    return str(request.param)


def test_the_new_file_takes_the_place_of_the_old(tmp_path: Path, way: str) -> None:
    new, old = tmp_path / "a name with ünusual letters", tmp_path / "old"
    new.write_bytes(b"new")
    old.write_bytes(b"old")
    inode = new.stat().st_ino
    replace(str(new), str(old))
    assert old.read_bytes() == b"new"
    assert old.stat().st_ino == inode
    assert os.listdir(tmp_path) == ["old"]


def test_there_need_be_no_old_file(tmp_path: Path, way: str) -> None:
    (tmp_path / "new").write_bytes(b"new")
    replace(str(tmp_path / "new"), str(tmp_path / "old"))
    assert (tmp_path / "old").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["old"]


def test_the_old_file_stays_where_there_is_no_new_one(tmp_path: Path, way: str) -> None:
    (tmp_path / "old").write_bytes(b"old")
    with pytest.raises(FileNotFoundError):
        replace(str(tmp_path / "new"), str(tmp_path / "old"))
    assert (tmp_path / "old").read_bytes() == b"old"


@pytest.mark.parametrize("keeps", [False, True])
def test_a_file_is_written_and_replaced(tmp_path: Path, way: str, keeps: bool) -> None:
    path = tmp_path / "file"
    for data in (b"first", b"second"):
        write(str(path), data, ".unfinished", keeps=keeps)
        assert path.read_bytes() == data
        assert os.listdir(tmp_path) == ["file"]


def test_nothing_unfinished_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        write(str(tmp_path / "file"), b"new", keeps=True)
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
