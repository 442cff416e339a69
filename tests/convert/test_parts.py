"""`--part`: several machines write one target, and it is what one would have written.

Machines are threads, processes or turns here; what they share is a folder, as they would.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mtt_convert
from mtt_convert import (
    IncompleteError,
    InconsistentError,
    MTTError,
    TargetError,
    UsageError,
    open_checkpoint,
    plan_conversion,
    verify,
)
from mtt_convert.parts import Part, parse_part, share, shares
from tests.convert.dying import contents
from tests.convert.sample_targets import (
    HF,
    MANIFEST,
    NOTES,
    SAMPLE,
    SHARED,
    TARGETS,
    WORDS,
    convert,
)
from tests.convert.surgery import edited, run, snapshot


@pytest.fixture
def out(place: Path) -> Path:
    """The output folder, not there yet."""
    return place / "out"


# Which part


def test_parts_count_from_one() -> None:
    assert parse_part("1/1") == Part(1, 1)
    assert parse_part("64/64") == Part(64, 64)
    assert str(Part(3, 8)) == "3/8"


@pytest.mark.parametrize(
    "text", ["", "0/8", "9/8", "1", "1/0", "-1/8", "1/8/2", "a/b", "1/8 ", "٣/٨"]
)
def test_no_such_part(text: str, out: Path) -> None:
    with pytest.raises(UsageError, match="no such part"):
        parse_part(text)
    code, _, err = run("convert", SAMPLE, out, f"--part={text}")
    assert code == 2 and "expected: 1/8 to 8/8" in err and not out.exists()


LAUNCHERS = [
    ({"RANK": "2", "WORLD_SIZE": "8"}, "3/8"),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "64"}, "1/64"),
    ({"OMPI_COMM_WORLD_RANK": "7", "OMPI_COMM_WORLD_SIZE": "8"}, "8/8"),
    ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "2/2"),
    ({"RANK": "1", "WORLD_SIZE": "4", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "2/4"),
    ({"RANK": "1", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "2/2"),
]


@pytest.mark.parametrize(("environment", "part"), LAUNCHERS)
def test_auto_asks_the_launcher(environment: dict[str, str], part: str) -> None:
    assert str(parse_part("auto", environment)) == part


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0"},
        {"WORLD_SIZE": "8"},
        {"RANK": "8", "WORLD_SIZE": "8"},
        {"RANK": "x", "WORLD_SIZE": "8"},
        {"RANK": "-1", "WORLD_SIZE": "8"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": ""},
    ],
)
def test_auto_without_a_launcher(
    environment: dict[str, str], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for names, _ in LAUNCHERS:
        for name in names:
            monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as caught:
        parse_part("auto", environment)
    assert caught.value.found and caught.value.fix
    code, _, err = run("convert", SAMPLE, out, "--part", "auto")
    assert code == 2 and "launcher" in err and not out.exists()


@given(st.lists(st.integers(0, 50)), st.integers(1, 12))
def test_shares_are_a_partition_in_balance(sizes: list[int], count: int) -> None:
    dealt = shares(list(range(len(sizes))), sizes, count)
    assert len(dealt) == count
    assert sorted(index for own in dealt for index in own) == list(range(len(sizes)))
    assert all(list(own) == sorted(own) for own in dealt)
    loads = [sum(sizes[index] for index in own) for own in dealt]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_the_largest_files_are_dealt_first() -> None:
    """So that small ones even out what is left."""
    assert shares("abcde", [1, 1, 1, 1, 4], 2) == (("e",), ("a", "b", "c", "d"))
    assert shares("abc", [5, 5, 5], 3) == (("a",), ("b",), ("c",))


def test_the_share_is_the_same_in_every_process() -> None:
    """Whatever hashes Python's sets by: all see the same files for a part."""
    answers = []
    for seed in ("1", "2"):
        words = [sys.executable, "-m", "mtt_convert", "convert", str(SAMPLE), "out", *WORDS]
        done = subprocess.run(
            [*words, "--part", "2/3", "--dry-run", "--json"],
            capture_output=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        answers.append(json.loads(done.stdout)["files"])
    whole = plan_conversion(open_checkpoint(SAMPLE), **HF).plan
    assert answers[0] == answers[1]
    assert set(answers[0]) == {file.name for file in share(whole, Part(2, 3)).files}
    assert 0 < len(answers[0]) < len(whole.files)


# What they write together


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("order", ["1/1", "1/2 2/2", "3/3 1/3 2/3", "2/3 3/3 1/3"])
def test_parts_make_what_one_machine_makes(
    order: str, target: str, out: Path, expected: dict[str, dict[str, bytes]]
) -> None:
    """Byte by byte, the manifest included; nothing looks whole before the last part ends."""
    *others, last = order.split()
    for number, part in enumerate(others, 1):
        result = convert(out, part, **TARGETS[target])
        assert (result.num_complete, result.whole) == (number, False)
        assert set(result.hashes) <= set(contents(out))
        there = contents(out)
        weights_there = {name for name in there if not name.startswith(NOTES)}
        assert weights_there == {name for name in expected[target] if name in weights_there}
        assert not SHARED[target] & weights_there and MANIFEST not in weights_there
        with pytest.raises(IncompleteError, match="written in parts"):
            verify(out)
        with pytest.raises(MTTError):
            open_checkpoint(out)
    result = convert(out, last, **TARGETS[target])
    assert result.whole and result.part == parse_part(last)
    assert contents(out) == expected[target]
    assert [path for path in out.rglob("*") if path.name.startswith(".mtt")] == []
    assert verify(out).problems == ()


def test_more_parts_than_files(out: Path, expected: dict[str, dict[str, bytes]]) -> None:
    count = 15
    sizes = [len(convert(out, f"{part}/{count}").hashes) for part in range(1, count + 1)]
    assert sorted(sizes) == [0] * 4 + [1] * 11
    assert contents(out) == expected["hf"]


@pytest.mark.parametrize("hash_name", ["sha256", "none"])
def test_parts_with_other_hashes(hash_name: str, place: Path) -> None:
    mtt_convert.convert(SAMPLE, place / "one", hash_name=hash_name, **HF)
    for part in ("1/2", "2/2"):
        convert(place / "out", part, hash_name=hash_name)
    assert contents(place / "out") == contents(place / "one")


@pytest.mark.parametrize("target", TARGETS)
def test_parts_at_the_same_time(
    target: str, out: Path, expected: dict[str, dict[str, bytes]]
) -> None:
    """Exactly one of them finds all complete and writes what they share."""
    for _ in range(2):
        with ThreadPoolExecutor(6) as pool:
            parts = [f"{number}/6" for number in range(1, 7)]
            results = list(pool.map(lambda part: convert(out, part, **TARGETS[target]), parts))
        assert any(result.whole for result in results)
        assert contents(out) == expected[target]
        shutil.rmtree(out)


def test_parts_of_a_launcher(out: Path, expected: dict[str, dict[str, bytes]]) -> None:
    """Four processes that begin at once; the first shows the summary, the others errors."""
    words = [sys.executable, "-m", "mtt_convert", "convert", str(SAMPLE), str(out), *WORDS]
    processes = [
        subprocess.Popen(
            [*words, "--part", "auto"],
            env={**os.environ, "SLURM_PROCID": str(rank), "SLURM_NTASKS": "4"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs
    assert "  part         1/4" in outputs[0][0]
    assert sum(text.count("and what they share") for text, _ in outputs) == 1
    assert all(len(text.splitlines()) <= 1 and not err for text, err in outputs[1:]), outputs
    assert contents(out) == expected["hf"]


def test_errors_of_a_launcher_s_process_name_it(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    code, _, err = run("convert", SAMPLE / "nothing", out, "--part", "auto")
    assert code == 3 and err.startswith("[rank 2/4 ") and "] error: " in err


def test_parts_need_no_locks(
    out: Path, expected: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """File systems of the network may have none."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    for part in ("1/2", "2/2"):
        convert(out, part)
    assert contents(out) == expected["hf"]


def test_copies_of_ranks_are_compared_by_one_part_each(place: Path) -> None:
    """Together they compare all; one that finds a difference leaves the folder without an index."""
    plan = plan_conversion(open_checkpoint(SAMPLE)).plan
    dealt = [group for n in (1, 2, 3) for group in share(plan, Part(n, 3)).replicas]
    assert len(dealt) == len(plan.replicas) > 3
    assert {group.name for group in dealt} == {group.name for group in plan.replicas}

    source = place / "checkpoint"
    shutil.copytree(SAMPLE, source, ignore=shutil.ignore_patterns("*.py", "*.md"))
    with edited(source / "iter_0001000" / "mp_rank_01_000" / "model_optim_rng.pt") as content:
        content["model"]["decoder.layers.0.self_attention.linear_proj.bias"] += 1
    codes = [
        run("convert", source, place / "out", *WORDS, "--part", f"{number}/3")[0]
        for number in (1, 2, 3)
    ]
    assert sorted(codes) == [0, 0, InconsistentError.exit_code]
    assert not SHARED["hf"] & set(contents(place / "out"))


def test_by_command(out: Path, expected: dict[str, dict[str, bytes]]) -> None:
    code, text, _ = run("convert", SAMPLE, out, *WORDS, "--part", "2/2", "--json")
    body = json.loads(text)
    assert code == 0
    assert (body["part"], body["parts_complete"], body["whole"]) == ("2/2", 1, False)
    assert set(body["hashes"]) == {name for name in expected["hf"] if (out / name).exists()}
    code, text, _ = run("convert", SAMPLE, out, *WORDS, "--part", "1/2")
    assert code == 0 and "part         1/2; 2 of 2 parts are written, and what they share" in text
    assert contents(out) == expected["hf"]


# What is refused


def _begun(out: Path) -> dict[str, bytes] | None:
    convert(out, "1/3")
    return snapshot(out)


@pytest.mark.parametrize(
    "options",
    [
        {"part": "2/4"},
        {"part": "2/3", "dtype": "float16"},
        {"part": "2/3", "max_shard_size": "200KB"},
        {"part": "2/3", "tokenizer": "none"},
        {"part": "2/3", "overrides": {"attention_dropout": 0.25}},
        {"part": "2/3", "hash_name": "sha256"},
        {"part": "2/3", "replicated": "first"},
        {"part": "2/3", **TARGETS["torch"]},
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()),
)
@pytest.mark.parametrize("resume", [False, True])
def test_parts_of_another_conversion(resume: bool, options: dict[str, Any], out: Path) -> None:
    before = _begun(out)
    with pytest.raises(UsageError, match="does not belong to the parts") as caught:
        convert(out, resume=resume, **options)
    assert caught.value.found and "remove the folder" in str(caught.value.fix)
    assert snapshot(out) == before


def test_parts_of_a_source_that_changed(place: Path) -> None:
    source = place / "checkpoint"
    shutil.copytree(SAMPLE, source, ignore=shutil.ignore_patterns("*.py", "*.md"))
    mtt_convert.convert(source, place / "out", part="1/2", **HF)
    os.utime(next(source.rglob("model_optim_rng.pt")), (1, 1))
    with pytest.raises(UsageError, match="does not belong to the parts") as caught:
        mtt_convert.convert(source, place / "out", part="2/2", **HF)
    assert "of another source or options" in str(caught.value.found)


def test_a_part_that_was_begun_before(out: Path, expected: dict[str, dict[str, bytes]]) -> None:
    before = _begun(out)
    with pytest.raises(TargetError, match=r"part 1/3 of .* was begun before") as caught:
        convert(out, "1/3")
    assert "--resume" in str(caught.value.fix)
    assert snapshot(out) == before
    result = convert(out, "1/3", resume=True)
    assert (result.num_bytes, result.num_complete, result.whole) == (0, 1, False)
    for part in ("2/3", "3/3"):
        convert(out, part, resume=True)
    assert contents(out) == expected["hf"]


def test_a_folder_that_is_finished(out: Path, expected: dict[str, dict[str, bytes]]) -> None:
    """A part that is run once more finds that; without `--resume` it is a folder with files."""
    for part in ("1/2", "2/2"):
        convert(out, part)
    with pytest.raises(TargetError, match="is not empty"):
        convert(out, "1/2")
    with pytest.raises(TargetError, match="is not empty"):
        convert(out, "1/2", resume=True, dtype="float16")
    result = convert(out, "1/2", resume=True)
    assert result.unchanged and result.whole and result.num_complete == 2
    assert contents(out) == expected["hf"]


def test_other_folders(out: Path) -> None:
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(TargetError, match="is not empty") as caught:
            convert(out, "1/2", resume=resume)
        assert caught.value.found == "notes.txt"
        assert ("--resume" in str(caught.value.fix)) is not resume
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    shutil.rmtree(out)
    out.write_text("mine")
    with pytest.raises(TargetError, match="is a file"):
        convert(out, "1/2")


def test_runs_without_parts_keep_out(out: Path) -> None:
    before = _begun(out)
    for options in ({}, {"overwrite": True}, {"resume": True}, {"keep_same": True}):
        with pytest.raises(TargetError, match="being written in parts") as caught:
            mtt_convert.convert(SAMPLE, out, **HF, **options)
        assert "--part" in str(caught.value.fix)
    assert snapshot(out) == before


def test_parts_keep_out_of_other_runs(out: Path, expected: dict[str, dict[str, bytes]]) -> None:
    refusals: list[MTTError] = []

    def again(done: int, total: int) -> None:
        if not refusals:
            with pytest.raises(TargetError) as caught:
                convert(out, "1/2", resume=True)
            refusals.append(caught.value)

    mtt_convert.convert(SAMPLE, out, progress=again, **HF)
    assert "being written by another run of mtt" in refusals[0].message
    assert contents(out) == expected["hf"]


def test_a_lock_that_was_left_behind(out: Path, expected: dict[str, dict[str, bytes]]) -> None:
    """By a run without parts that was killed; whether it lives on another machine nobody knows."""
    lock = out / ".mtt.lock"
    for fix in ("if it died, end it with --resume and no --part", "if it died, remove this file"):
        out.mkdir(exist_ok=True)
        lock.touch()
        with pytest.raises(TargetError, match="or was by one that died") as caught:
            convert(out, "2/2", resume=True)
        assert fix in str(caught.value.fix)
        lock.unlink()
        convert(out, "1/2", resume=True)
    convert(out, "2/2", resume=True)
    assert contents(out) == expected["hf"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("out", "--overwrite"), "--overwrite: not for a part"),
        (("out", "--all-iterations"), "--all-iterations: not for a part"),
        (("hf://me/model",), "an upload has no parts"),
    ],
)
def test_what_does_not_go_with_parts(words: tuple[str, ...], says: str, place: Path) -> None:
    code, _, err = run("convert", SAMPLE, *words, "--part", "1/2")
    assert code == 2 and says in err and "fix:" in err
    assert not Path("out").exists()


def test_a_disk_that_is_too_small_for_the_share(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=500_000))
    with pytest.raises(TargetError, match="too small"):
        convert(out, "1/1")
    shutil.rmtree(out)
    convert(out, "1/2")
