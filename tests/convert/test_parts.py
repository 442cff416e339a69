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
import tempfile
from collections.abc import Iterator
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
from mtt_convert.claims import Claim
from mtt_convert.parts import Part, parse_part, share, shares
from tests.convert.dying import contents, weights
from tests.convert.surgery import edited, run, run_apart, snapshot

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "convert" / "sample"
MANIFEST, NOTES, TRACKER = "mtt_manifest.json", ".mtt.parts", "latest_checkpointed_iteration.txt"
TARGETS: dict[str, dict[str, Any]] = {
    "hf": {"max_shard_size": "100KB"},
    "torch": {"to": "torch", "tp": 2, "pp": 2},
    "torch_dist": {"to": "torch_dist", "tp": 2, "pp": 2, "max_shard_size": "100KB"},
}
HF = TARGETS["hf"]
WORDS = ("--max-shard-size", "100KB")
SHARED = {
    "hf": {"config.json", "model.safetensors.index.json", "README.md"},
    "torch": {TRACKER, "megatron_args.sh"},
    "torch_dist": {TRACKER, "iter_0001000/.metadata", "iter_0001000/common.pt"},
}
RAM_DISK = "/dev/shm"


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder where bringing files to the disk costs nothing."""
    parent = RAM_DISK if os.access(RAM_DISK, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="mtt-tests-", dir=parent) as folder:
        yield Path(folder)


@pytest.fixture
def out(place: Path) -> Path:
    """The output folder, not there yet."""
    return place / "out"


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What one machine writes, in every target format."""
    folder = tmp_path_factory.mktemp("expected")
    for name, options in TARGETS.items():
        mtt_convert.convert(SAMPLE, folder / name, **options)
    return {name: contents(folder / name) for name in TARGETS}


def convert(out: Path, part: str, **options: Any) -> mtt_convert.Result:
    return mtt_convert.convert(SAMPLE, out, part=part, **{**HF, **options})


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


# Two runs of one part, and dead ones


@pytest.mark.parametrize("resume", [False, True])
def test_two_runs_of_one_part(
    resume: bool, out: Path, expected: dict[str, dict[str, bytes]]
) -> None:
    """On one machine a run is seen to be alive, and the second one is refused."""
    refusals: list[MTTError] = []

    def again(done: int, total: int) -> None:
        if len(refusals) < 2:
            with pytest.raises(TargetError) as caught:
                convert(out, "1/2", resume=bool(refusals))
            refusals.append(caught.value)

    mtt_convert.convert(SAMPLE, out, part="1/2", resume=resume, progress=again, **HF)
    assert all("part 1/2" in e.message and "another run of mtt" in e.message for e in refusals)
    assert f"process {os.getpid()} on " in str(refusals[0].found)
    assert "--resume" not in str(refusals[0].fix)
    convert(out, "2/2")
    assert contents(out) == expected["hf"]


def _claim_of(out: Path, name: str = "00001.claim", **facts: object) -> Path:
    """The claim of a run that died, or that is on another machine."""
    path = out / NOTES / name
    there = json.loads(path.read_text()) if path.exists() else {}
    facts = {"host": "elsewhere", "boot": "x", "process": 1, "token": "0" * 16, **facts}
    path.write_text(json.dumps(there | facts))
    return path


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"host": os.uname().nodename, "boot": "before"},
        {"host": os.uname().nodename, "process": 2**22 + 1},
        {"process": "x"},
    ],
    ids=["elsewhere", "before a restart", "ended", "damaged"],
)
def test_a_claim_of_a_dead_run(
    facts: dict[str, object], out: Path, expected: dict[str, dict[str, bytes]]
) -> None:
    """Nobody sees from here whether it is dead: `--resume` says so."""
    convert(out, "2/2")
    path = _claim_of(out, **facts)
    with pytest.raises(TargetError, match="or was by one that died") as caught:
        convert(out, "1/2")
    assert "if it died, add --resume" in str(caught.value.fix)
    assert path.exists()
    convert(out, "1/2", resume=True)
    assert contents(out) == expected["hf"]


def test_an_empty_claim(out: Path, expected: dict[str, dict[str, bytes]]) -> None:
    """Of a run that died between making and writing it."""
    convert(out, "2/2")
    (out / NOTES / "00001.claim").touch()
    with pytest.raises(TargetError, match="says nothing"):
        convert(out, "1/2")
    convert(out, "1/2", resume=True)
    assert contents(out) == expected["hf"]


def test_a_claim_that_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its run is alive, and has made the file but not filled it yet."""
    path = tmp_path / "claim"
    Claim(str(path), "it").take(take_over=False)
    content = path.read_text()
    path.write_text("")
    monkeypatch.setattr("time.sleep", lambda seconds: path.write_text(content))
    with pytest.raises(TargetError, match="is being written by another run of mtt"):
        Claim(str(path), "it").take(take_over=True)


def test_a_number_that_another_process_has_by_now(tmp_path: Path) -> None:
    claim = Claim(str(tmp_path / "claim"), "it")
    claim.take(take_over=False)
    content = json.loads((tmp_path / "claim").read_text())
    (tmp_path / "claim").write_text(json.dumps(content | {"started": "1"}))
    if content["started"]:  # where the system tells
        Claim(str(tmp_path / "claim"), "it").take(take_over=True)


def test_a_run_that_was_taken_over_stops(out: Path, expected: dict[str, dict[str, bytes]]) -> None:
    """It was believed to be dead, and was only slow: it shows no further file."""
    taken: list[set[str]] = []

    def take(done: int, total: int) -> None:
        if done > total // 2 and not taken:
            _claim_of(out, token="f" * 16)
            taken.append({path.name for path in out.glob("*.safetensors")})

    with pytest.raises(TargetError, match="was taken over by another run of mtt"):
        mtt_convert.convert(SAMPLE, out, part="1/2", progress=take, **HF)
    assert {path.name for path in out.glob("*.safetensors")} == taken[0]
    assert (out / NOTES / "00001.claim").exists(), "it removed a claim that is not its own"
    assert not any(path.name.endswith(".part") for path in out.iterdir())
    for part in ("1/2", "2/2"):
        convert(out, part, resume=True)
    assert contents(out) == expected["hf"]


def test_two_living_runs_of_one_part_do_no_harm(
    out: Path, expected: dict[str, dict[str, bytes]]
) -> None:
    """The worst case: a machine that was given up writes on while another has its part."""
    second: list[mtt_convert.Result] = []

    def begin_another(done: int, total: int) -> None:
        if done > total // 3 and not second:
            _claim_of(out)
            second.append(convert(out, "1/2", resume=True))

    convert(out, "2/2")
    with pytest.raises(TargetError, match="was taken over"):
        mtt_convert.convert(SAMPLE, out, part="1/2", progress=begin_another, **HF)
    assert second[0].whole
    assert contents(out) == expected["hf"]


DIE = """
    import os, sys
    import mtt_convert
    part, name, number = sys.argv[3], sys.argv[4], int(sys.argv[5])
    real, calls = getattr(os, name), [0]
    def die(*args, **options):
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), 9)
        return real(*args, **options)
    setattr(os, name, die)
    mtt_convert.convert(sys.argv[1], sys.argv[2], part=part, max_shard_size="100KB")
"""


@pytest.mark.parametrize(("call", "number"), [("pwrite", 1), ("pwrite", 20), ("fsync", 5)])
def test_a_dead_part(
    call: str, number: int, out: Path, expected: dict[str, dict[str, bytes]]
) -> None:
    """The others end without it, the folder stays without an index, and the part goes on."""
    convert(out, "1/3")
    assert run_apart(DIE, SAMPLE, out, "2/3", call, number).returncode == -9
    assert convert(out, "3/3").num_complete == 2
    assert not SHARED["hf"] & set(contents(out))
    record = json.loads(expected["hf"][MANIFEST])
    kept = weights(out, record)
    with pytest.raises(TargetError, match="part 2/3"):
        convert(out, "2/3")
    assert convert(out, "2/3", resume=True).whole
    assert contents(out) == expected["hf"]
    assert all(weights(out, record)[name] == facts for name, facts in kept.items())


DIE_LATE = """
    import os, sys
    import mtt_convert
    def die(real):
        def call(old, new, *args):
            ends = os.path.exists(f"{sys.argv[2]}/.mtt.parts/finish.claim")
            if ends and new.endswith(sys.argv[4]):
                os.kill(os.getpid(), 9)
            return real(old, new, *args)
        return call
    os.replace, os.rename = die(os.replace), die(os.rename)
    mtt_convert.convert(sys.argv[1], sys.argv[2], part=sys.argv[3], max_shard_size="100KB")
"""


@pytest.mark.parametrize("name", ["README.md", "config.json", MANIFEST, ""])
@pytest.mark.parametrize("part", ["1/2", "2/2"])
def test_the_last_part_dies_while_it_writes_what_they_share(
    part: str, name: str, out: Path, expected: dict[str, dict[str, bytes]]
) -> None:
    """Any part that is run again, the dead one or another, finishes the folder."""
    convert(out, "1/2")
    result = run_apart(DIE_LATE, SAMPLE, out, "2/2", name)
    assert result.returncode == -9, result.stderr
    assert (out / NOTES).exists() and (name != "config.json" or not (out / name).exists())
    assert convert(out, part, resume=True).whole
    assert contents(out) == expected["hf"]


def test_somebody_else_finishes(out: Path, expected: dict[str, dict[str, bytes]]) -> None:
    """Of two that are complete at once the slower one leaves the rest to the faster."""
    convert(out, "1/2")
    _claim_of(out, "finish.claim")
    result = convert(out, "2/2", resume=True)
    assert (result.num_complete, result.whole) == (2, False)
    assert not SHARED["hf"] & set(contents(out))
    assert convert(out, "2/2", resume=True).whole  # the other one died
    assert contents(out) == expected["hf"]


def _all_but_the_shared_files(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part is complete, and the one that was to write the rest died."""
    from mtt_convert.part_target import PartSink

    with monkeypatch.context() as patch:
        patch.setattr(PartSink, "_finish_all", lambda *args: None)
        for part in ("1/2", "2/2"):
            convert(out, part)


@pytest.mark.parametrize("name", ["_join", "_read_state", "_note", "_finish_all", "_write_shared"])
def test_finished_parts_go_on_at_once(
    name: str, out: Path, expected: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one makes the folder whole, and drops the notes of all, whatever this one is at."""
    from mtt_convert.part_target import PartSink

    _all_but_the_shared_files(out, monkeypatch)
    real = getattr(PartSink, name)

    def slow(self: PartSink, *args: Any) -> Any:
        monkeypatch.undo()
        if name == "_write_shared":
            _claim_of(out, "finish.claim")
        assert convert(out, "1/2", resume=True).whole
        return real(self, *args)

    monkeypatch.setattr(PartSink, name, slow)
    result = convert(out, "2/2", resume=True)
    assert (result.num_complete, result.whole) == (2, True)
    assert contents(out) == expected["hf"]


def test_two_write_what_all_share(
    out: Path, expected: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The faster one takes no file from the slower one before the folder is whole."""
    _all_but_the_shared_files(out, monkeypatch)
    real, slower, there = os.replace, [""], []

    def replace(old: str, new: str) -> None:
        if new.endswith("README.md") and not slower[0]:
            slower[0] = old
            _claim_of(out, "finish.claim")
            assert convert(out, "1/2", resume=True).whole
        if new.endswith(MANIFEST):
            there.append(os.path.exists(slower[0]))
        real(old, new)

    monkeypatch.setattr(os, "replace", replace)
    assert convert(out, "2/2", resume=True).whole
    assert there == [True]
    assert contents(out) == expected["hf"]


def test_somebody_else_was_faster(
    out: Path, expected: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is finished between this part's last note and its look at the others."""
    from mtt_convert.part_target import PartSink

    convert(out, "1/2")
    real = PartSink._note

    def note(self: PartSink) -> None:
        real(self)
        if self.manifest["status"] == "complete":
            monkeypatch.undo()
            _claim_of(out, "00002.claim")
            convert(out, "2/2", resume=True)

    monkeypatch.setattr(PartSink, "_note", note)
    assert convert(out, "2/2").whole
    assert contents(out) == expected["hf"]


def test_files_that_were_lost_meanwhile(out: Path, expected: dict[str, dict[str, bytes]]) -> None:
    convert(out, "1/2")
    lost = next(out.glob("*.safetensors"))
    lost.unlink()
    with pytest.raises(mtt_convert.CorruptError, match="is not there any more") as caught:
        convert(out, "2/2")
    assert caught.value.found == lost.name
    assert not SHARED["hf"] & set(contents(out))
    assert convert(out, "1/2", resume=True).whole
    assert contents(out) == expected["hf"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"status": "complete"}', '{"files": 3}', "3"])
def test_damaged_notes_of_a_part(
    text: str, out: Path, expected: dict[str, dict[str, bytes]]
) -> None:
    convert(out, "1/2")
    (out / NOTES / "00001.json").write_text(text)
    assert convert(out, "2/2").num_complete == 1
    assert convert(out, "1/2", resume=True).whole
    assert contents(out) == expected["hf"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3"])
def test_a_damaged_plan_of_the_parts(text: str, out: Path) -> None:
    convert(out, "1/2")
    (out / NOTES / "plan.json").write_text(text)
    with pytest.raises(UsageError, match="does not belong to the parts"):
        convert(out, "2/2")


def test_a_note_that_was_replaced_while_it_was_read(
    out: Path, expected: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS may answer that a file which was just replaced is stale."""
    import builtins

    convert(out, "1/2")
    real, failed = builtins.open, []

    def stale(path: Any, *args: Any, **options: Any) -> Any:
        if str(path).endswith("00001.json") and len(failed) < 2:
            failed.append(path)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(path, *args, **options)

    monkeypatch.setattr(builtins, "open", stale)
    assert convert(out, "2/2").whole
    assert contents(out) == expected["hf"]


def test_interruptions_name_the_command_that_goes_on(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "pwrite", interrupt)
    code, _, err = run("convert", SAMPLE, out, *WORDS, "--part", "1/2")
    assert code == 130 and err.endswith("--part 1/2 --resume\n")
    assert not list((out / NOTES).glob("*.claim"))
