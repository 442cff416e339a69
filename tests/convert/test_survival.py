"""Conversions that are killed, starved, contradicted or lied to: what is left, and what goes on.

Runs die at random calls of the system (`dying.py`), and by real signals; then `--resume` must give
the same bytes and write nothing twice. The rest is what else may happen to a long run.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mtt_convert
from mtt_convert import (
    CorruptError,
    MTTError,
    SourceError,
    TargetError,
    UsageError,
    small_files,
    verify,
)
from mtt_convert.claims import boot_id
from tests.convert.dying import contents, weights
from tests.convert.sample_targets import HF, MANIFEST, ROOT, SAMPLE, TARGETS, TRACKER, WORDS
from tests.convert.surgery import run, snapshot

TORCH, TORCH_DIST = TARGETS["torch"], TARGETS["torch_dist"]
PARTS = [{"part": f"{number}/3"} for number in (1, 2, 3)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint to be changed."""
    ignored = shutil.ignore_patterns("*.py", "*.md")
    return Path(shutil.copytree(SAMPLE, tmp_path / "checkpoint", ignore=ignored))


# Killed


@pytest.mark.parametrize(
    ("points", "case"),
    [
        (52, {"options": HF, "runs": [{}]}),
        (10, {"options": {**HF, "num_workers": 2}, "runs": [{}]}),
        (14, {"options": TORCH, "runs": [{}]}),
        (14, {"options": TORCH_DIST, "runs": [{}]}),
        (16, {"options": HF, "runs": PARTS}),
        (4, {"options": TORCH, "runs": PARTS}),
        (6, {"options": TORCH_DIST, "runs": PARTS}),
        (
            12,
            {"options": HF, "runs": [{"overwrite": True}], "before": {"max_shard_size": "200KB"}},
        ),
    ],
    ids=["hf", "hf-2", "torch", "torch_dist", "parts", "parts-torch", "parts-dist", "overwrite"],
)
def test_death_at_any_call_of_the_system(points: int, case: dict[str, Any], place: Path) -> None:
    """What is left is not whole, or is; `--resume` ends it; what was finished is not written."""
    last = "config.json" if case["options"].get("to", "hf") == "hf" else TRACKER
    arguments = {"source": str(SAMPLE), "place": str(place), "points": points, "last": last}
    seed = 10 if os.environ.get("CI") else time.time_ns()
    command = [sys.executable, "-m", "tests.convert.dying"]
    command.append(json.dumps(arguments | case | {"seed": seed}))
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["problems"] == [], f"seed {seed}"
    assert result["dead"] > points // 2, "hardly anything died"
    if "before" not in case:
        assert result["kept"] > points, "hardly anything was finished"


SLOW = """
    import os, sys, time
    from mtt_convert.cli import main
    real = os.pwrite
    def pwrite(descriptor, data, offset):
        time.sleep(0.004)
        return real(descriptor, data, offset)
    os.pwrite = pwrite
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("more", [(), ("--resume",), ("--part", "1/1")], ids=" ".join)
def test_a_real_kill_9(
    more: tuple[str, ...], place: Path, expected_folders: dict[str, Path]
) -> None:
    """At a random moment after the first file, two times after each other."""
    out, script = place / "out", "\n".join(line[4:] for line in SLOW.splitlines())
    command = [sys.executable, "-c", script, "convert", str(SAMPLE), str(out), *WORDS, *more]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, cwd=ROOT)
    deadline = time.monotonic() + 60
    while not list(out.glob("*.safetensors")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.001)
    time.sleep(random.random() * 0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "config.json").exists()
    record = json.loads((expected_folders["hf"] / MANIFEST).read_bytes())
    kept = weights(out, record)
    again = [word for word in more if word != "--resume"]
    code, _, err = run("convert", SAMPLE, out, *WORDS, *again, "--resume")
    assert code == 0, err
    assert kept and all(weights(out, record)[name] == kept[name] for name in kept)
    assert contents(out) == contents(expected_folders["hf"])
    assert verify(out).problems == ()


def _stopped(source: Path, out: Path, after: float, **options: Any) -> None:
    """A run with `--resume` that ends with an error of its own after a part of the bytes."""

    def stop(done: int, total: int) -> None:
        if done > after * total:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        mtt_convert.convert(source, out, resume=True, progress=stop, **options)


@pytest.mark.parametrize("target", TARGETS)
def test_a_run_of_resume_that_fails_keeps_what_it_finished(
    target: str, source: Path, place: Path, expected_folders: dict[str, Path]
) -> None:
    out, options = place / "out", TARGETS[target]
    record = json.loads((expected_folders[target] / MANIFEST).read_bytes())
    _stopped(source, out, 0.6, **options)
    kept = weights(out, record)
    assert 0 < len(kept) < len(record["files"])
    assert not any(path.name.endswith(".part") for path in out.rglob("*"))
    assert not {"config.json", TRACKER, ".mtt.lock"} & set(contents(out))
    result = mtt_convert.convert(source, out, resume=True, **options)
    assert 0 < result.num_bytes < sum(file["bytes"] for file in record["files"].values())
    assert contents(out) == contents(expected_folders[target])
    assert all(weights(out, record)[name] == facts for name, facts in kept.items())


def test_nothing_to_resume_is_a_beginning(place: Path, expected_folders: dict[str, Path]) -> None:
    for out in (place / "new", place / "empty"):
        (place / "empty").mkdir(exist_ok=True)
        mtt_convert.convert(SAMPLE, out, resume=True, **HF)
        assert contents(out) == contents(expected_folders["hf"])


def test_a_first_run_that_fails_leaves_nothing(place: Path) -> None:
    """Also with `--resume`, when no file was finished."""
    _stopped(SAMPLE, place / "a" / "out", 0.0, **HF)
    assert list(place.iterdir()) == []


def test_a_finished_conversion_is_not_read_again(place: Path) -> None:
    out = place / "out"
    mtt_convert.convert(SAMPLE, out, **HF)
    before = {path: path.stat() for path in out.rglob("*")}
    calls: list[int] = []
    result = mtt_convert.convert(
        SAMPLE, out, resume=True, progress=lambda done, total: calls.append(done), **HF
    )
    assert result.unchanged and calls == []
    assert {path: path.stat() for path in out.rglob("*")} == before


def test_a_finished_folder_that_may_only_be_read(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing to write no lock is needed; with anything, it says what is in the way."""
    mtt_convert.convert(SAMPLE, place / "out", **HF)

    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    real = os.open
    monkeypatch.setattr(
        os,
        "open",
        lambda path, flags, *a, **o: (refuse if flags & 3 else real)(path, flags, *a, **o),
    )
    for name in ("replace", "rename", "unlink", "rmdir", "mkdir"):
        monkeypatch.setattr(os, name, refuse)
    for again in ({"resume": True}, {"keep_same": True}):
        assert mtt_convert.convert(SAMPLE, place / "out", **HF, **again).unchanged
    for other in ({}, {"overwrite": True}, {"resume": True, "dtype": "float16"}):
        with pytest.raises(TargetError, match="cannot be written"):
            mtt_convert.convert(SAMPLE, place / "out", **HF, **other)
    monkeypatch.undo()
    assert verify(place / "out").problems == ()


@pytest.mark.parametrize(
    "change",
    [
        lambda source: {"dtype": "float16"},
        lambda source: {"max_shard_size": "200KB"},
        lambda source: {"tokenizer": "none"},
        lambda source: {"overrides": {"attention_dropout": 0.25}},
        lambda source: {"hash_name": "sha256"},
        lambda source: {"to": "torch"},
        lambda source: os.utime(next(source.rglob("model_optim_rng.pt")), (1, 1)) or {},
    ],
    ids=["dtype", "files", "tokenizer", "documents", "hash", "format", "time"],
)
def test_another_conversion_is_not_resumed(
    change: Callable[[Path], dict[str, Any]], source: Path, place: Path
) -> None:
    _stopped(source, place / "out", 0.6, **HF)
    before = snapshot(place / "out")
    options = HF | change(source)
    with pytest.raises(UsageError, match="the conversion to resume is not this one"):
        mtt_convert.convert(source, place / "out", resume=True, **options)
    assert snapshot(place / "out") == before
    mtt_convert.convert(source, place / "out", resume=True, overwrite=True, **options)
    assert verify(place / "out").problems == ()
    assert not any(path.name.startswith(".mtt") for path in (place / "out").iterdir())


def test_the_same_source_by_another_path_is_resumed(
    source: Path, place: Path, expected_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machines may have it in different places."""
    _stopped(source, place / "out", 0.6, **HF)
    source.rename(source.parent / "moved")
    monkeypatch.chdir(source.parent)
    mtt_convert.convert(Path("moved"), place / "out", resume=True, **HF)
    assert contents(place / "out") == contents(expected_folders["hf"])


def test_a_machine_that_went_down_is_trusted_with_what_it_brought_to_the_disk(
    source: Path, place: Path, expected_folders: dict[str, Path]
) -> None:
    """A run without `--resume` leaves files to the system's cache, and a machine may lose them."""
    record = json.loads((expected_folders["hf"] / MANIFEST).read_bytes())
    out, killed = place / "out", place / "killed"
    mtt_convert.convert(source, out, progress=lambda done, total: _copy(out, killed, done), **HF)
    (killed / ".mtt.lock").unlink()
    running = json.loads((killed / MANIFEST).read_bytes())
    assert running["status"] == "running" and running["boot"] == boot_id()
    for boot, is_kept in ((boot_id(), bool(boot_id())), ("another", False), (None, True)):
        shutil.rmtree(out)
        shutil.copytree(killed, out)
        (out / MANIFEST).write_text(json.dumps(running | {"boot": boot}))
        before = weights(out, record)
        mtt_convert.convert(source, out, resume=True, **HF)
        assert contents(out) == contents(expected_folders["hf"])
        after = weights(out, record)
        assert before and all((after[name] == before[name]) == is_kept for name in before), boot


def _copy(out: Path, killed: Path, done: int) -> None:
    """What a run would leave if it died after half a megabyte."""
    if done > 500_000 and not killed.exists():
        shutil.copytree(out, killed)


def test_a_file_that_was_lost_or_cut_is_written_again(
    source: Path, place: Path, expected_folders: dict[str, Path]
) -> None:
    out = place / "out"
    _stopped(source, out, 0.8, **HF)
    first, second, *_ = sorted(out.glob("*.safetensors"))
    first.unlink()
    os.truncate(second, 1000)
    mtt_convert.convert(source, out, resume=True, **HF)
    assert contents(out) == contents(expected_folders["hf"])


def test_resume_by_command(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C of a run of `--resume` names a command that goes on."""
    out, real, calls = place / "out", os.pwrite, []

    def pwrite(*args: Any) -> int:
        calls.append(args)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(os, "pwrite", pwrite)
    code, _, err = run("convert", source, out, *WORDS, "--resume")
    assert code == 130 and err.endswith("--resume\n")
    assert list(out.glob("*.safetensors")) and not (out / "config.json").exists()
    code, _, err = run("verify", out)
    assert code == 3 and "did not finish" in err
    code, text, _ = run("convert", source, out, *WORDS, "--resume", "--json")
    assert code == 0 and json.loads(text)["status"] == "ok"
    assert run("verify", out)[0] == 0
    code, text, _ = run("convert", source, out, *WORDS, "--resume")
    assert code == 0 and "nothing: it holds just this already" in text


def test_death_while_it_removes_what_it_replaced(
    place: Path, expected_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the old files are gone: they never come back among the new ones."""
    out, real = place / "out", shutil.rmtree
    mtt_convert.convert(SAMPLE, out, max_shard_size="200KB")

    def half(folder: Any, *args: Any, **options: Any) -> None:
        if os.path.basename(folder).startswith(".mtt.replaced") and os.path.isdir(folder):
            for name in (MANIFEST, "config.json"):
                os.unlink(os.path.join(folder, name))
            raise KeyboardInterrupt
        real(folder, *args, **options)

    monkeypatch.setattr(shutil, "rmtree", half)
    with pytest.raises(KeyboardInterrupt):
        mtt_convert.convert(SAMPLE, out, overwrite=True, **HF)
    monkeypatch.undo()
    assert verify(out).problems == ()
    mtt_convert.convert(SAMPLE, out, overwrite=True, **HF)
    assert contents(out) == contents(expected_folders["hf"])


# A disk that is full, or denies


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("room", [0.0, 0.3, 0.9, 1.0])
def test_a_disk_that_fills_up_and_is_cleared(
    room: float,
    target: str,
    place: Path,
    expected_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With `--resume`: the error says that finished files stay, and the same command goes on."""
    out, options = place / "out", TARGETS[target]
    total = sum(
        path.stat().st_size for path in expected_folders[target].rglob("*") if path.is_file()
    )
    real, written, lock = os.pwrite, [0], threading.Lock()

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        with lock:
            left = int(room * total) - written[0]
            if left <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            count = real(descriptor, memoryview(data)[:left], offset)
            written[0] += count
            return count

    def replace(old: Any, new: Any) -> None:
        if Path(new).name in ("config.json", TRACKER):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        real_replace(old, new)

    real_replace = os.replace
    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(TargetError, match="is full; finished files stay") as caught:
        mtt_convert.convert(SAMPLE, out, resume=True, num_workers=2, **options)
    assert "the same command goes on" in str(caught.value.fix)
    monkeypatch.undo()
    assert not any((out / name).exists() for name in ("config.json", TRACKER, ".mtt.lock"))
    assert not any(path.name.endswith(".part") for path in out.rglob("*"))
    mtt_convert.convert(SAMPLE, out, resume=True, **options)
    assert contents(out) == contents(expected_folders[target])


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    "options", [{"keep_same": True}, {"resume": True}, {"overwrite": True}], ids=str
)
def test_an_interruption_while_the_manifest_gets_its_last_form(
    options: dict[str, Any],
    after: bool,
    place: Path,
    expected_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it finds to be whole stays, and the same command goes on in any case."""
    if "overwrite" in options:
        mtt_convert.convert(SAMPLE, place, dtype="float32")

    def exchanged(new: str, old: str) -> bool:
        if Path(old).name != MANIFEST:
            return False
        is_last = json.loads(Path(new).read_text())["status"] == "complete"
        if is_last and not after:
            raise KeyboardInterrupt
        os.replace(new, old)
        if is_last:
            raise KeyboardInterrupt
        Path(new).touch()  # what is removed next
        return True

    monkeypatch.setattr(small_files, "_exchange", exchanged)
    with pytest.raises(KeyboardInterrupt):
        mtt_convert.convert(SAMPLE, place, **HF, **options)
    monkeypatch.undo()
    if after:
        assert contents(place) == contents(expected_folders["hf"])
        assert not verify(place).problems
    mtt_convert.convert(SAMPLE, place, **HF, **options)
    assert contents(place) == contents(expected_folders["hf"])


@pytest.mark.parametrize("call", ["open", "replace", "fsync", "mkdir"])
@pytest.mark.parametrize("options", [{}, {"part": "1/1"}], ids=["folder", "part"])
def test_permission_denied(
    call: str,
    options: dict[str, Any],
    place: Path,
    expected_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the third such call; simulated, since root may do anything."""
    out, real, count = place / "sub" / "out", getattr(os, call), [0]

    def denied(*args: Any, **more: Any) -> Any:
        if call != "open" or args[1] & os.O_CREAT:
            count[0] += 1
            if count[0] >= 3 or call == "mkdir":
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(args[0]))
        return real(*args, **more)

    monkeypatch.setattr(os, call, denied)
    with pytest.raises(TargetError, match="cannot be written") as caught:
        mtt_convert.convert(SAMPLE, out, resume=True, **options, **HF)
    assert "Permission denied" in str(caught.value.found) and caught.value.fix
    monkeypatch.undo()
    assert not (out / "config.json").exists()
    mtt_convert.convert(SAMPLE, out, resume=True, **options, **HF)
    assert contents(out) == contents(expected_folders["hf"])


# A source that changes


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def _touch(path: Path) -> None:
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


def _replaced(path: Path) -> None:
    """By another file of the same size and time: a copy that was moved there."""
    shutil.copy2(path, path.parent / "copy")
    os.replace(path.parent / "copy", path)


def _written_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"x")


CHANGES = [_append, _touch, _replaced, _written_in_place, Path.unlink]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@pytest.mark.parametrize("moment", ["planned", "middle", "end"])
def test_a_source_that_changes_during_the_run(
    moment: str,
    change: Callable[[Path], None],
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between the plan and the copy, in the middle, and after all of it was read."""
    out, path = tmp_path / "out", next(source.rglob("mp_rank_01_001/model_optim_rng.pt"))
    original = path.read_bytes()

    def meddle(done: int, total: int) -> None:
        share = {"planned": 0.0, "middle": 0.5, "end": 1.0}[moment]
        if done >= share * total and not changed:
            changed.append(done)
            change(path)

    for options in (HF, TORCH, TORCH_DIST, HF | {"part": "1/1"}):
        changed: list[int] = []
        with pytest.raises(SourceError) as caught:
            mtt_convert.convert(source, out, progress=meddle, **options)
        # What is not there any more may be noticed where it is missed, before the end.
        may_be_missed = change is Path.unlink and moment != "end"
        assert "was changed while it was read" in str(caught.value) or may_be_missed
        assert path.name in str(caught.value)
        if "part" in options:
            assert not (out / "config.json").exists()
            shutil.rmtree(out)
        assert not out.exists(), options
        path.unlink(missing_ok=True)
        path.write_bytes(original)


@pytest.mark.parametrize("change", [_touch, _replaced, _append])
def test_a_source_that_changes_while_it_is_planned(
    change: Callable[[Path], None], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its metadata was read, and before the plan was made."""
    from mtt_convert import pipeline

    real = pipeline.plan_conversion

    def plan(*args: Any, **options: Any) -> Any:
        change(next(source.rglob("mp_rank_00_001/model_optim_rng.pt")))
        return real(*args, **options)

    monkeypatch.setattr(pipeline, "plan_conversion", plan)
    with pytest.raises(CorruptError, match="was changed while it was read"):
        mtt_convert.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_changed_between_two_conversions_is_no_change(source: Path, tmp_path: Path) -> None:
    mtt_convert.convert(source, tmp_path / "first")
    for path in source.rglob("model_optim_rng.pt"):
        _touch(path)
    mtt_convert.convert(source, tmp_path / "second")
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


@pytest.mark.parametrize("target", TARGETS)
def test_a_source_that_is_cut_while_it_is_read(target: str, source: Path, tmp_path: Path) -> None:
    """All ranks' files lose their second half at once: reads end early."""

    def cut(done: int, total: int) -> None:
        for path in source.rglob("model_optim_rng.pt"):
            os.truncate(path, min(path.stat().st_size, 40_000))

    with pytest.raises(CorruptError) as caught:
        mtt_convert.convert(source, tmp_path / "out", progress=cut, **TARGETS[target])
    assert "model_optim_rng.pt" in str(caught.value)
    assert not (tmp_path / "out").exists()


# Two runs


@pytest.mark.parametrize("resume", [False, True])
def test_two_runs_into_one_target(
    resume: bool, place: Path, expected_folders: dict[str, Path]
) -> None:
    """The second is refused, with `--resume` or not, and the first does not notice."""
    out, refusals = place / "out", list[MTTError]()

    def again(done: int, total: int) -> None:
        if not refusals and done > total // 2:
            before = snapshot(out)
            for options in ({}, {"resume": True}, {"resume": True, "overwrite": True}):
                with pytest.raises(TargetError) as caught:
                    mtt_convert.convert(SAMPLE, out, **HF, **options)
                refusals.append(caught.value)
            assert snapshot(out) == before

    mtt_convert.convert(SAMPLE, out, resume=resume, progress=again, **HF)
    assert ["being written by another run of mtt" in error.message for error in refusals] == [
        True,
        True,
        True,
    ]
    assert contents(out) == contents(expected_folders["hf"])


# Flipped bytes


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("is_parts", [False, True], ids=["whole", "parts"])
def test_verify_finds_a_flipped_bit_in_every_file(
    is_parts: bool, target: str, place: Path, expected_folders: dict[str, Path]
) -> None:
    """Weights, headers, index, configuration, code, tokenizer, .metadata, common.pt, tracker."""
    out = place / "out"
    if is_parts:
        for part in PARTS:
            mtt_convert.convert(SAMPLE, out, **TARGETS[target], **part)
    else:
        shutil.copytree(expected_folders[target], out)
    assert verify(out).problems == ()
    files = [path for path in out.rglob("*") if path.is_file() and path.name != MANIFEST]
    assert len(files) > 8
    for path in files:
        data = path.read_bytes()
        positions = {0, 9, len(data) // 3, len(data) // 2, len(data) - 1}
        for position in positions & set(range(len(data))):
            flipped = bytearray(data)
            flipped[position] ^= 1 << random.randrange(8)
            path.write_bytes(flipped)
            problems = verify(out).problems
            assert problems, (path, position)
            assert any(path.name in problem for problem in problems), (path, problems)
        path.write_bytes(data)
    assert verify(out).problems == ()


def test_verify_finds_flipped_bits_in_the_manifest_but_for_its_notes(place: Path) -> None:
    """It covers all other files, and itself where it must: not what it says of the source."""
    out = place / "out"
    mtt_convert.convert(SAMPLE, out)
    data = (out / MANIFEST).read_bytes()
    notes = data.index(b'"source"'), data.index(b'"files"')
    unnoticed = []
    for position in random.Random(7).sample(range(len(data)), 150):
        flipped = bytearray(data)
        flipped[position] ^= 1
        (out / MANIFEST).write_bytes(flipped)
        try:
            found = bool(verify(out).problems)
        except MTTError:
            found = True
        if not found and not notes[0] <= position < notes[1]:
            unnoticed.append(data[position - 20 : position + 20])
    assert unnoticed == []
