"""Folders that several tests of conversions use."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import mtt_convert
from tests.convert.dying import contents
from tests.convert.sample_targets import SAMPLE, TARGETS
from tests.convert.surgery import TORCH, Golden

_RAM_DISK = "/dev/shm"


@pytest.fixture
def source(golden: Golden) -> Path:
    """A checkpoint, not to be changed."""
    return golden(TORCH)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The output folder, not there yet."""
    return tmp_path / "out"


@pytest.fixture(scope="module")
def untouched(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted folder, not to be changed."""
    folder = tmp_path_factory.mktemp("converted") / "out"
    mtt_convert.convert(golden(TORCH), folder)
    return folder


@pytest.fixture
def converted(untouched: Path, tmp_path: Path) -> Path:
    """A converted folder, to be changed."""
    return Path(shutil.copytree(untouched, tmp_path / "converted"))


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder where bringing files to the disk costs nothing."""
    parent = _RAM_DISK if os.access(_RAM_DISK, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="mtt-tests-", dir=parent) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def expected_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sample in every target format, as one machine writes it; not to be changed."""
    folder = tmp_path_factory.mktemp("expected")
    for name, options in TARGETS.items():
        mtt_convert.convert(SAMPLE, folder / name, **options)
    return {name: folder / name for name in TARGETS}


@pytest.fixture(scope="session")
def expected(expected_folders: dict[str, Path]) -> dict[str, dict[str, bytes]]:
    """Their files."""
    return {name: contents(folder) for name, folder in expected_folders.items()}
