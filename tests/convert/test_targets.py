"""The output folder: which one is accepted, and what `--overwrite` replaces."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import mtt_convert
from mtt_convert import (
    InconsistentError,
    TargetError,
    UsageError,
    verify,
)
from tests.convert.broken_disks import NUM_BYTES, fail_rename, full_after
from tests.convert.surgery import (
    ITERATION,
    TORCH,
    TORCH_DIST,
    Golden,
    copy_of,
    edited,
    model_of,
    refused,
    run,
    shard,
    snapshot,
)

NORM = "decoder.layers.0.input_layernorm.weight"
MANIFEST = "mtt_manifest.json"
WEIGHTS = "model.safetensors"


# Which folders are accepted


def test_a_new_folder_in_new_folders(source: Path, tmp_path: Path, untouched: Path) -> None:
    out = tmp_path / "a/b/out"
    mtt_convert.convert(source, out)
    assert snapshot(out) == snapshot(untouched)


def test_an_empty_folder(source: Path, out: Path, untouched: Path) -> None:
    out.mkdir()
    mtt_convert.convert(source, out)
    assert snapshot(out) == snapshot(untouched)


def test_a_link_to_an_empty_folder(source: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    out.symlink_to(tmp_path / "real")
    mtt_convert.convert(source, out)
    assert out.is_symlink() and (tmp_path / "real" / WEIGHTS).exists()


def test_output_follows_the_umask(source: Path, out: Path) -> None:
    old = os.umask(0o027)
    try:
        mtt_convert.convert(source, out)
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in out.iterdir()}
    assert set(modes.values()) == {0o640}, modes


def test_a_folder_that_is_not_empty(source: Path, out: Path) -> None:
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    error = refused(source, out, TargetError)
    assert error.found == "notes.txt"
    assert error.expected == "an empty or new folder"
    assert "--overwrite" in str(error.fix)


def test_a_long_list_of_files_is_cut(source: Path, out: Path) -> None:
    out.mkdir()
    for k in range(9):
        (out / f"{k}.txt").touch()
    assert refused(source, out, TargetError).found == "0.txt, 1.txt, 2.txt, 3.txt, 4.txt, ..."


def test_a_file(source: Path, out: Path) -> None:
    out.write_text("mine")
    refused(source, out, TargetError, says="is a file")
    refused(source, out, TargetError, says="is a file", overwrite=True)


def test_a_link_to_nowhere(source: Path, out: Path, tmp_path: Path) -> None:
    out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(TargetError):
        mtt_convert.convert(source, out)
    assert out.is_symlink() and not (tmp_path / "nowhere").exists()


def test_below_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(source, tmp_path / "file/out", TargetError)


@pytest.mark.parametrize("inside", ["", "out", "iter_0000010/out", "iter_0000010"])
def test_inside_the_checkpoint(inside: str, golden: Golden, tmp_path: Path) -> None:
    source = copy_of(golden, TORCH, tmp_path)
    refused(source, source / inside, UsageError, says="inside the checkpoint")


def test_inside_the_checkpoint_through_a_link(golden: Golden, tmp_path: Path) -> None:
    source = copy_of(golden, TORCH, tmp_path)
    (tmp_path / "link").symlink_to(source)
    refused(source, tmp_path / "link/out", UsageError, says="inside the checkpoint")


def test_a_neighbour_with_a_longer_name(golden: Golden, tmp_path: Path) -> None:
    """`checkpoint-hf` begins like `checkpoint` and is not inside it."""
    source = copy_of(golden, TORCH, tmp_path)
    mtt_convert.convert(source, tmp_path / "checkpoint-hf")


def test_the_folder_that_holds_the_checkpoint(golden: Golden, tmp_path: Path) -> None:
    source = copy_of(golden, TORCH, tmp_path)
    before = snapshot(tmp_path)
    refused(source, tmp_path, TargetError)
    refused(source, tmp_path, TargetError, overwrite=True)
    assert snapshot(tmp_path) == before


def test_parents_made_for_a_failed_run_go_too(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        mtt_convert.convert(source, tmp_path / "a/b/out", progress=lambda done, total: 1 // 0)
    assert not (tmp_path / "a").exists()


# Overwriting


def _inconsistent(golden: Golden, folder: Path) -> Path:
    """A checkpoint that fails only after the target was taken."""
    root = copy_of(golden, TORCH, folder)
    with edited(shard(root, 1, 0)) as content:
        model_of(content, NORM)[NORM] += 1
    return root


def test_overwrite_replaces_an_earlier_conversion(
    golden: Golden, source: Path, converted: Path, untouched: Path
) -> None:
    (converted / "config.json").write_text("{}")
    (converted / WEIGHTS).write_bytes(b"old")
    mtt_convert.convert(source, converted, overwrite=True)
    assert snapshot(converted) == snapshot(untouched)


def test_overwrite_leaves_no_file_of_another_sharding(
    source: Path, out: Path, untouched: Path
) -> None:
    mtt_convert.convert(source, out, max_shard_size="100KB")
    assert len(list(out.glob("*.safetensors"))) > 5
    mtt_convert.convert(source, out, overwrite=True)
    assert snapshot(out) == snapshot(untouched)


def test_overwrite_keeps_what_is_not_ours(source: Path, converted: Path) -> None:
    (converted / "notes.txt").write_text("mine")
    (converted / "runs").mkdir()
    (converted / "runs/log").write_text("mine too")
    mtt_convert.convert(source, converted, overwrite=True)
    assert (converted / "notes.txt").read_text() == "mine"
    assert (converted / "runs/log").read_text() == "mine too"
    assert verify(converted).problems == ()


def test_overwrite_does_not_replace_files_of_others(source: Path, out: Path) -> None:
    """A file the earlier run did not write stands where the new run would write one."""
    mtt_convert.convert(source, out, max_shard_size="300KB")
    (out / WEIGHTS).write_text("mine")
    refused(source, out, TargetError, says=WEIGHTS, overwrite=True)


def test_overwrite_that_fails_keeps_files_of_others(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mtt_convert.convert(source, out, max_shard_size="300KB")
    (out / WEIGHTS).write_text("mine")
    (out / f"{WEIGHTS}.part").write_text("mine too")
    before = snapshot(out)
    fail_rename(monkeypatch, "config.json")
    with pytest.raises(TargetError):
        mtt_convert.convert(source, out, overwrite=True)
    assert snapshot(out) == before


@pytest.mark.parametrize("link", [False, True])
def test_overwrite_does_not_replace_what_it_reads(link: bool, source: Path, out: Path) -> None:
    """The checkpoint is an iteration of an earlier conversion, which stays where it is read."""
    mtt_convert.convert(source, out, to="torch")
    here = next(out.glob("iter_*"))
    if link:
        (out.parent / "link").symlink_to(here)
        here = out.parent / "link"
    before = snapshot(out)
    with pytest.raises(TargetError, match="the checkpoint to convert is in") as caught:
        mtt_convert.convert(here, out, to="torch", overwrite=True)
    assert "model_optim_rng.pt" in str(caught.value.found)
    assert snapshot(out) == before


def test_overwrite_refuses_what_mtt_did_not_write(source: Path, out: Path) -> None:
    out.mkdir()
    (out / "config.json").write_text("{}")
    error = refused(source, out, TargetError, overwrite=True)
    assert "not written by mtt" in error.message and error.expected == MANIFEST


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"schema": 1}',
        '{"schema": 1, "files": {}}',
        '{"schema": 1, "files": {}, "documents": []}',
        '{"schema": 99, "files": {}, "documents": {}, "status": "complete"}',
        '{"schema": 1, "files": [], "documents": {}, "status": "complete"}',
    ],
)
def test_overwrite_with_a_damaged_manifest(text: str, source: Path, converted: Path) -> None:
    """What was ours is not known then, so nothing is touched."""
    (converted / MANIFEST).write_text(text)
    before = snapshot(converted)
    code, _, err = run("convert", source, converted, "--overwrite")
    assert code in (3, 4), err
    assert snapshot(converted) == before


@pytest.mark.parametrize("name", ["../mine.txt", "/etc/hostname", "sub/mine.txt"])
def test_overwrite_follows_no_path_of_a_manifest(name: str, source: Path, converted: Path) -> None:
    (converted.parent / "mine.txt").write_text("mine")
    (converted / "sub").mkdir()
    (converted / "sub/mine.txt").write_text("mine")
    record = json.loads((converted / MANIFEST).read_text())
    record["documents"][name] = "0"
    (converted / MANIFEST).write_text(json.dumps(record))
    run("convert", source, converted, "--overwrite")
    assert (converted.parent / "mine.txt").read_text() == "mine"
    assert (converted / "sub/mine.txt").read_text() == "mine"


def test_overwrite_that_fails_gives_the_old_folder_back(
    golden: Golden, converted: Path, tmp_path: Path
) -> None:
    (converted / "notes.txt").write_text("mine")
    source = _inconsistent(golden, tmp_path)
    refused(source, converted, InconsistentError, overwrite=True)
    assert verify(converted).problems == ()


def test_overwrite_that_fails_in_the_middle(
    source: Path, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (converted / "config.json").write_text('{"old": true}')
    before = snapshot(converted)
    full_after(monkeypatch, NUM_BYTES // 2)
    with pytest.raises(TargetError):
        mtt_convert.convert(source, converted, overwrite=True)
    assert snapshot(converted) == before


def test_overwrite_that_fails_at_the_end(
    source: Path, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last rename fails: by then most new files have their names."""
    before = snapshot(converted)
    fail_rename(monkeypatch, "config.json")
    with pytest.raises(TargetError):
        mtt_convert.convert(source, converted, overwrite=True)
    assert snapshot(converted) == before


def test_a_failed_run_leaves_an_empty_folder_empty(
    golden: Golden, out: Path, tmp_path: Path
) -> None:
    out.mkdir()
    refused(_inconsistent(golden, tmp_path), out, InconsistentError)
    assert list(out.iterdir()) == []


# Where the parts of a conversion may fail and no one should notice later


def test_formats_agree(golden: Golden, tmp_path: Path, untouched: Path) -> None:
    """Whatever the source format and the number of workers, the same bytes."""
    mtt_convert.convert(golden(TORCH_DIST), tmp_path / "dist", num_workers=3)
    assert (tmp_path / "dist" / WEIGHTS).read_bytes() == (untouched / WEIGHTS).read_bytes()


def test_nothing_but_the_target_is_written(golden: Golden, tmp_path: Path) -> None:
    source = copy_of(golden, TORCH, tmp_path)
    before = snapshot(source)
    mtt_convert.convert(source, tmp_path / "out")
    mtt_convert.convert(source / ITERATION, tmp_path / "out2")
    run("inspect", source)
    run("convert", source, tmp_path / "out3", "--dry-run")
    assert snapshot(source) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "out", "out2"]


def test_errors_in_the_callback_are_the_caller_s(source: Path, out: Path) -> None:
    class Mine(Exception):
        pass

    def callback(done: int, total: int) -> None:
        raise Mine

    for workers in (1, 3):
        with pytest.raises(Mine):
            mtt_convert.convert(source, out, progress=callback, num_workers=workers)
        assert not out.exists()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors by /proc")
def test_open_files_are_closed(source: Path, tmp_path: Path) -> None:
    """Neither a conversion nor a failed one keeps descriptors."""

    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    for k in range(3):
        mtt_convert.convert(source, tmp_path / f"out{k}", num_workers=2)
        with pytest.raises(ZeroDivisionError):
            mtt_convert.convert(source, tmp_path / "x", progress=lambda done, total: 1 // 0)
        with pytest.raises(TargetError):
            mtt_convert.convert(source, tmp_path / f"out{k}")
    assert count() <= before
