"""The table of `benchmarks/convert.py`: a process that failed has no speed."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks.measuring import Run

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
ARGS = argparse.Namespace(pairs=2, attempts=1)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with its neighbours to be found as when it is run."""
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("bench_convert", FOLDER / "convert.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def run_case(
    bench: ModuleType,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    cp: int,
    large: int,
    small: int,
) -> dict[str, Any]:
    """A line of the table, where the processes of every turn end with these."""

    def measure(command: list[str], out: Path, env: Any = None) -> Run:
        is_small = str(folder / "small" / "torch") in command
        status = cp if "-r" in command else small if is_small else large
        return Run(0.5 if is_small else 1.0, 1.0, 50.0, 0.0, status, 0.0)

    monkeypatch.setattr(bench, "measure", measure)
    case = bench.Case("disk-s", "torch", "hf")
    return dict(bench.run_case(case, bench.MODELS["disk-s"], folder, ARGS, 40.0))


@pytest.mark.parametrize(("large", "small"), [(0, 0), (4, 0), (0, 4), (-9, 4)])
def test_either_conversion_that_fails_counts(
    large: int, small: int, bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run_case(bench, tmp_path, monkeypatch, cp=0, large=large, small=small)
    failed = large or small
    assert result["status"] == failed
    assert (result["gb_s"] is None) == (result["marginal"] is None) == bool(failed)
    assert result["pairs"] == (1 if failed else 2)


def test_a_copy_that_fails_ends_the_run(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="cp -r ended with 1"):
        run_case(bench, tmp_path, monkeypatch, cp=1, large=0, small=0)
