"""Whether a target holds what would be written: read by all workers, with progress."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

import mtt_convert
from mtt_convert import execute
from tests.convert.dying import contents
from tests.convert.surgery import run

SAMPLE = Path(__file__).resolve().parents[2] / "convert" / "sample"


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    """The sample's iterations, converted."""
    mtt_convert.convert_iterations(SAMPLE, tmp_path / "steps", max_shard_size="100KB")
    return tmp_path / "steps"


def test_a_second_run_reads_with_all_workers(steps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in steps.rglob("*.*")}
    calls: list[tuple[int, int]] = []
    threads: set[int] = set()
    both = threading.Barrier(2, timeout=30)
    real = execute._Job._steps

    def counting(job: Any, reader: Any) -> Any:
        if len(threads) < 2:
            threads.add(threading.get_ident())
            both.wait()
        return real(job, reader)

    monkeypatch.setattr(execute._Job, "_steps", counting)
    (result,) = mtt_convert.convert_iterations(
        SAMPLE,
        steps,
        max_shard_size="100KB",
        num_workers=2,
        progress=lambda done, total: calls.append((done, total)),
    ).values()
    assert result.unchanged and len(threads) == 2
    done, total = calls[-1]
    assert done == total > 900_000 and calls == sorted(calls)
    assert {path: path.stat().st_mtime_ns for path in steps.rglob("*.*")} == before


@pytest.mark.parametrize("num_workers", [1, 3])
def test_another_tensor_is_noticed(num_workers: int, steps: Path) -> None:
    """By its hash in the manifest: the folder is refused, or replaced if that is allowed."""
    (folder,) = steps.iterdir()
    expected = contents(folder)
    manifest = folder / "mtt_manifest.json"
    text = manifest.read_text()
    place = text.index('"model.norm.weight": "') + len('"model.norm.weight": "')
    manifest.write_text(text[:place] + "0" * 8 + text[place + 8 :])
    options: dict[str, Any] = {"max_shard_size": "100KB", "num_workers": num_workers}
    with pytest.raises(mtt_convert.TargetError, match="is not empty"):
        mtt_convert.convert_iterations(SAMPLE, steps, **options)
    mtt_convert.convert_iterations(SAMPLE, steps, overwrite=True, **options)
    assert contents(folder) == expected


def test_all_iterations_go_on(steps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--all-iterations --resume`: whole folders stay, half ones go on."""
    (folder,) = steps.iterdir()
    expected = contents(folder)
    for path in folder.iterdir():
        path.unlink()
    real, calls = os.pwrite, []

    def pwrite(*args: Any) -> int:
        calls.append(args)
        if len(calls) > 40:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, "pwrite", pwrite)
    words = ("convert", SAMPLE, steps, "--all-iterations", "--max-shard-size", "100KB", "--resume")
    code, _, err = run(*words)
    assert code == 4 and "finished files stay" in err
    assert list(folder.glob("*.safetensors"))
    monkeypatch.undo()
    assert run(*words)[0] == 0
    assert contents(folder) == expected
    code, out, _ = run(*words)
    assert code == 0 and "there already" in out
