"""The `golden` fixture: found, visibly skipped, or a failure where CI is set."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = """
def test_committed(golden):
    assert golden("mcore/args.json").read_text() == "committed"

def test_elsewhere(golden):
    assert golden("legacy/args.json").read_text() == "named"
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with our conftest, one committed golden file and two tests."""
    tests = tmp_path / "clone" / "tests"
    (tests / "golden" / "mcore").mkdir(parents=True)
    (tests / "golden" / "mcore" / "args.json").write_text("committed")
    (tests / "test_two.py").write_text(TESTS)
    shutil.copy2(ROOT / "tests" / "conftest.py", tests)
    shutil.copy2(ROOT / "pyproject.toml", tests.parent)
    return tests.parent


def run_tests(clone: Path, **variables: str) -> tuple[int, str]:
    """The exit status and the output of pytest in the clone."""
    inherited = ("CI", "MTT_GOLDEN", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER")
    environment = {name: value for name, value in os.environ.items() if name not in inherited}
    done = subprocess.run(
        [sys.executable, "-m", "pytest"],
        cwd=clone,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


def test_missing_golden_is_skipped_and_named(clone: Path):
    status, output = run_tests(clone)
    assert status == 0
    assert "SKIPPED" in output
    assert "golden checkpoint legacy/args.json is not here" in output
    assert "1 passed, 1 skipped" in output


def test_missing_golden_fails_in_ci(clone: Path):
    status, output = run_tests(clone, CI="true")
    assert status == 1
    assert "golden checkpoint legacy/args.json is not here" in output
    assert "1 failed, 1 passed" in output


@pytest.mark.parametrize("by_variable", [True, False])
def test_golden_from_outside(clone: Path, tmp_path: Path, by_variable: bool):
    folder = tmp_path / ("named" if by_variable else "shared/golden")
    (folder / "legacy").mkdir(parents=True)
    (folder / "legacy" / "args.json").write_text("named")
    variables = {"MTT_GOLDEN": str(folder)} if by_variable else {}
    status, output = run_tests(clone, CI="true", **variables)
    assert (status, "2 passed" in output) == (0, True), output


def test_wrong_variable_is_an_error(clone: Path, tmp_path: Path):
    status, output = run_tests(clone, MTT_GOLDEN=str(tmp_path / "gone"))
    assert status != 0
    assert "MTT_GOLDEN is not a folder" in output
