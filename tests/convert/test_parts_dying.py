"""`--part` where two runs have one part, or a part died: the others end, and it goes on."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

import mtt_convert
from mtt_convert import (
    MTTError,
    TargetError,
    UsageError,
)
from mtt_convert.claims import Claim
from tests.convert.dying import contents, weights
from tests.convert.sample_targets import (
    HF,
    MANIFEST,
    NOTES,
    SAMPLE,
    SHARED,
    WORDS,
    convert,
)
from tests.convert.surgery import run, run_apart


@pytest.fixture
def out(place: Path) -> Path:
    """The output folder, not there yet."""
    return place / "out"


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
