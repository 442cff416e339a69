"""The output folder: whole or as it was, whatever goes wrong, and `verify` knows which.

Failures of the system are simulated at the call that would fail; where the machine allows it the
real thing is done as well: a full file system, a limit on file size, a killed process.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mtt_convert
from mtt_convert import (
    CorruptError,
    IncompleteError,
    InconsistentError,
    MTTError,
    NotACheckpointError,
    TargetError,
    UsageError,
    verify,
)
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
    run_apart,
    shard,
    snapshot,
)

NORM = "decoder.layers.0.input_layernorm.weight"
MANIFEST = "mtt_manifest.json"
WEIGHTS = "model.safetensors"
NUM_BYTES = 918_256
"""About what the converted model takes; the tests use parts of it."""


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
    _fail_rename(monkeypatch, "config.json")
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
    _full_after(monkeypatch, NUM_BYTES // 2)
    with pytest.raises(TargetError):
        mtt_convert.convert(source, converted, overwrite=True)
    assert snapshot(converted) == before


def test_overwrite_that_fails_at_the_end(
    source: Path, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last rename fails: by then most new files have their names."""
    before = snapshot(converted)
    _fail_rename(monkeypatch, "config.json")
    with pytest.raises(TargetError):
        mtt_convert.convert(source, converted, overwrite=True)
    assert snapshot(converted) == before


def test_a_failed_run_leaves_an_empty_folder_empty(
    golden: Golden, out: Path, tmp_path: Path
) -> None:
    out.mkdir()
    refused(_inconsistent(golden, tmp_path), out, InconsistentError)
    assert list(out.iterdir()) == []


# A disk that is full


def _full_after(monkeypatch: pytest.MonkeyPatch, limit: int, code: int = errno.ENOSPC) -> None:
    """os.pwrite that has room for `limit` bytes in all."""
    real, written, lock = os.pwrite, [0], threading.Lock()

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        with lock:
            room = limit - written[0]
            if room <= 0:
                raise OSError(code, os.strerror(code))
            count = real(descriptor, memoryview(data)[:room], offset)
            written[0] += count
            return count

    monkeypatch.setattr(os, "pwrite", pwrite)


def _fail_rename(monkeypatch: pytest.MonkeyPatch, name: str, code: int = errno.ENOSPC) -> None:
    real = os.replace

    def replace(old: Any, new: Any) -> None:
        if os.path.basename(new) == name and str(old).endswith(".part"):
            raise OSError(code, os.strerror(code))
        real(old, new)

    monkeypatch.setattr(os, "replace", replace)


def test_too_little_room_is_known_before(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=100_000))

    def pwrite(*args: object) -> int:
        raise AssertionError("something was written")

    monkeypatch.setattr(os, "pwrite", pwrite)
    error = refused(source, out, TargetError, says="too small; nothing was written")
    assert error.found == "100,000 bytes free"
    assert error.expected and error.expected.endswith(" bytes")
    assert error.fix


@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.99])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_disk_that_fills_up(
    part: float, workers: int, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _full_after(monkeypatch, int(NUM_BYTES * part))
    with pytest.raises(TargetError, match="is full; what was written was removed again") as caught:
        mtt_convert.convert(source, out, num_workers=workers, max_shard_size="200KB")
    assert "No space left" in str(caught.value.found) and caught.value.fix
    assert not out.exists()


def test_a_disk_that_fills_up_by_command(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _full_after(monkeypatch, NUM_BYTES // 2)
    code, printed, err = run("convert", source, out)
    assert (code, printed) == (4, "")
    assert err.startswith(f"error: the disk of {out} is full")
    assert not out.exists()


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "README.md", MANIFEST])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_renames_that_fail(
    name: str, code: int, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_rename(monkeypatch, name, code)
    refused(source, out, TargetError, says=os.strerror(code))


def test_short_writes_are_continued(
    source: Path, out: Path, untouched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pwrite may write less than it was given: headers and tensors alike."""
    real = os.pwrite

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        return real(descriptor, memoryview(data)[:1000], offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    mtt_convert.convert(source, out)
    assert snapshot(out) == snapshot(untouched)


def test_short_reads_are_continued(
    source: Path, out: Path, untouched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv

    def preadv(descriptor: int, buffers: Any, offset: int, *flags: int) -> int:
        return real(descriptor, [memoryview(buffers[0])[:700]], offset, *flags)

    monkeypatch.setattr(os, "preadv", preadv)
    mtt_convert.convert(source, out)
    assert snapshot(out) == snapshot(untouched)


def test_a_limit_on_file_size(source: Path, out: Path) -> None:
    """The same by the kernel: no file may grow beyond 200 000 bytes."""
    result = run_apart(
        """
        import resource, sys
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        from mtt_convert.cli import main
        sys.exit(main(["convert", sys.argv[1], sys.argv[2]]))
        """,
        source,
        out,
    )
    assert result.returncode == 4, result.stderr
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr
    assert "File too large" in result.stderr and "is full" not in result.stderr
    assert "--max-shard-size" in result.stderr
    assert not out.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_real_small_disk(source: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = small_disk / "out"
    refused(source, out, TargetError, says="too small; nothing was written")
    large = shutil.disk_usage("/")._replace(free=10**15)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: large)  # somebody else was faster
    refused(source, out, TargetError, says="No space left on device")
    assert list(small_disk.iterdir()) == []


# A folder that is not writable


def _deny(monkeypatch: pytest.MonkeyPatch, code: int, ending: str) -> None:
    """os.open for writing fails below a folder; simulated, since root may write anywhere."""
    real = os.open

    def denied(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR) and str(path).endswith(ending):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", denied)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
@pytest.mark.parametrize("ending", [".mtt.lock", ".safetensors.part"])
def test_not_writable(
    code: int, ending: str, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _deny(monkeypatch, code, ending)
    error = refused(source, out, TargetError, says="cannot be written")
    assert os.strerror(code) in str(error.found) and error.fix


def test_a_parent_that_is_not_writable(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdir(path: Any, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "mkdir", mkdir)
    refused(source, out, TargetError, says="Permission denied")


def test_write_errors_of_the_disk(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _full_after(monkeypatch, NUM_BYTES // 3, errno.EIO)
    with pytest.raises(TargetError, match="cannot be written"):
        mtt_convert.convert(source, out)
    assert not out.exists()


def test_a_file_system_without_locks(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems have none: an answer in words, or a conversion."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    code, _, err = run("convert", source, out)
    assert code in (0, 4), err
    assert out.exists() == (code == 0)


# Two runs


def test_two_runs_into_one_folder(source: Path, out: Path) -> None:
    """The second is refused while the first runs, and does it no harm."""
    refusals: list[MTTError] = []

    def again(done: int, total: int) -> None:
        if not refusals:
            before = snapshot(out)
            for overwrite in (False, True):
                with pytest.raises(TargetError) as caught:
                    mtt_convert.convert(source, out, overwrite=overwrite)
                refusals.append(caught.value)
            assert snapshot(out) == before

    mtt_convert.convert(source, out, progress=again)
    assert len(refusals) == 2
    assert "being written by another run of mtt" in refusals[0].message and refusals[0].fix
    assert verify(out).problems == ()
    assert not (out / ".mtt.lock").exists()


def test_a_lock_that_was_left_behind(source: Path, out: Path) -> None:
    """A lock file nobody holds is no reason to refuse."""
    out.mkdir()
    (out / ".mtt.lock").touch()
    mtt_convert.convert(source, out)
    assert verify(out).problems == ()


def test_a_lock_that_is_removed_while_it_is_taken(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run ends between our open and our lock: the lock we got is of a deleted file."""
    real, first = fcntl.flock, [True]

    def flock(descriptor: int, operation: int) -> None:
        if first[0]:
            first[0] = False
            os.unlink(out / ".mtt.lock")
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)

    def again(done: int, total: int) -> None:
        with pytest.raises(TargetError, match="another run"):
            mtt_convert.convert(source, out)

    mtt_convert.convert(source, out, progress=again)
    assert verify(out).problems == ()


# Interruptions


@pytest.mark.parametrize("workers", [1, 3])
def test_an_interruption_from_within(workers: int, source: Path, out: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mtt_convert.convert(
            source, out, num_workers=workers, max_shard_size="100KB", progress=interrupt
        )
    assert not out.exists()


@pytest.mark.parametrize("where", ["replicas", "documents"])
def test_an_interruption_before_and_after_the_weights(
    where: str, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    target = {
        "replicas": "mtt_convert.replicas.compare",
        "documents": "mtt_convert.target.FolderSink.finish",
    }[where]
    monkeypatch.setattr(target, interrupt)
    code, printed, _ = run("convert", source, out)
    assert (code, printed) == (130, "")
    assert not out.exists()


SLOW = """
    import os, signal, sys, threading, time
    from mtt_convert.cli import main
    real, calls, lock = os.pwrite, [0], threading.Lock()
    def pwrite(descriptor, data, offset):
        with lock:
            calls[0] += 1
            number = calls[0]
        if number == int(sys.argv[1]):
            {action}
        time.sleep({pause})
        return real(descriptor, data, offset)
    os.pwrite = pwrite
    code = main(sys.argv[2:])
    print("calls after:", calls[0], flush=True)
    sys.exit(code)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c(workers: int, source: Path, out: Path) -> None:
    """A real signal in the middle: exit code 130, the command to repeat, nothing left, and soon."""
    script = SLOW.format(action="os.kill(os.getpid(), signal.SIGINT)", pause=0.02)
    options = ["--workers", workers, "--max-shard-size", "100KB"]
    result = run_apart(script, 5, "convert", source, out, *options, timeout=30)
    assert result.returncode == 130, result.stderr
    assert "interrupted" in result.stderr and "Traceback" not in result.stderr
    words = " ".join(map(str, options))
    assert f"mtt convert {source} {out} {words}" in result.stderr
    assert not out.exists()
    assert int(result.stdout.split()[-1]) < 20, "it went on"


@pytest.fixture(params=[2, 8, 20])
def killed(request: pytest.FixtureRequest, source: Path, out: Path) -> Path:
    """What a run leaves that was killed at its n-th write."""
    script = SLOW.format(action="os.kill(os.getpid(), signal.SIGKILL)", pause=0)
    arguments = ["convert", source, out, "--workers", 1, "--max-shard-size", "300KB"]
    result = run_apart(script, request.param, *arguments)
    assert result.returncode == -signal.SIGKILL
    return out


def test_a_killed_run_leaves_nothing_whole(killed: Path) -> None:
    names = {path.name for path in killed.iterdir()}
    assert "config.json" not in names and "model.safetensors.index.json" not in names
    assert json.loads((killed / MANIFEST).read_text())["status"] == "running"
    with pytest.raises(IncompleteError, match="did not finish"):
        verify(killed)
    code, _, err = run("verify", killed)
    assert code == 3 and "convert again" in err


def test_a_folder_of_another_machine_is_to_be_downloaded() -> None:
    code, _, err = run("verify", "hf://owner/repo")
    assert code == 2 and "hf download" in err


def test_a_killed_run_cannot_be_loaded(killed: Path) -> None:
    from transformers import AutoConfig

    with pytest.raises((OSError, ValueError)):
        AutoConfig.from_pretrained(killed)
    code, _, err = run("generate", killed, "--prompt", "x")
    assert code in (2, 3) and err.startswith("error: ")


def test_after_a_killed_run(killed: Path, source: Path, untouched: Path) -> None:
    """The folder is not empty; `--overwrite` makes it whole and leaves nothing of the first run."""
    (killed / ".mtt.lock").unlink()  # held by nobody, and of no account
    before = snapshot(killed)
    with pytest.raises(TargetError, match="--overwrite"):
        mtt_convert.convert(source, killed)
    assert snapshot(killed) == before
    mtt_convert.convert(source, killed, overwrite=True)
    assert snapshot(killed) == snapshot(untouched)


@pytest.fixture
def killed_overwrite(source: Path, converted: Path) -> Path:
    """A converted folder, with a killed run of `--overwrite` in it."""
    script = SLOW.format(action="os.kill(os.getpid(), signal.SIGKILL)", pause=0)
    arguments = ["convert", source, converted, "--workers", 1, "--overwrite"]
    assert run_apart(script, 20, *arguments).returncode == -signal.SIGKILL
    return converted


def test_a_killed_overwrite_is_repeated(
    killed_overwrite: Path, source: Path, untouched: Path
) -> None:
    with pytest.raises(IncompleteError):
        verify(killed_overwrite)
    mtt_convert.convert(source, killed_overwrite, overwrite=True)
    assert snapshot(killed_overwrite) == snapshot(untouched)


def test_a_killed_overwrite_loses_nothing(
    killed_overwrite: Path, source: Path, untouched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old folder waits aside, and comes back when the next run fails in words."""
    _full_after(monkeypatch, NUM_BYTES // 2)
    with pytest.raises(TargetError):
        mtt_convert.convert(source, killed_overwrite, overwrite=True)
    monkeypatch.undo()
    assert snapshot(killed_overwrite) == snapshot(untouched)


# Verify


def _verify(folder: Path, code: int) -> dict[str, Any]:
    """`mtt verify --json`, in agreement with the library and the text."""
    got, out, err = run("verify", folder, "--json")
    assert got == code, err
    body = json.loads(out)
    assert body["schema"] == 1 and body["command"] == "verify"
    assert body["status"] == ("different" if code else "ok")
    result = verify(folder)
    assert body["problems"] == list(result.problems)
    assert body["warnings"] == list(result.warnings)
    got, out, err = run("verify", folder)
    assert got == code
    for problem in result.problems:
        assert problem in out
    for warning in result.warnings:
        assert f"warning: {warning}" in err
    return body


def test_verify_a_whole_folder(untouched: Path) -> None:
    body = _verify(untouched, 0)
    assert body["tensors"] == 39 and body["problems"] == [] and body["warnings"] == []


@pytest.mark.parametrize("hash_name", ["xxh3", "sha256"])
def test_verify_finds_any_flipped_byte(hash_name: str, source: Path, out: Path) -> None:
    """The first byte, the header, the first, a middle and the last element."""
    mtt_convert.convert(source, out, hash_name=hash_name)
    path = out / WEIGHTS
    original = path.read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")
    for position in (0, 9, header - 1, header, header + 5000, len(original) // 2, -1):
        data = bytearray(original)
        data[position] ^= 1
        path.write_bytes(data)
        assert len(verify(out).problems) == 1, position
    body = _verify(out, 1)
    assert body["problems"] == ["model.norm.weight in model.safetensors is not what was written"]


@pytest.mark.parametrize("end", [0, 7, 8, 100, 5000, 500_000, -1])
def test_verify_finds_cut_files(end: int, converted: Path) -> None:
    path = converted / WEIGHTS
    os.truncate(path, end if end >= 0 else path.stat().st_size - 1)
    body = _verify(converted, 1)
    assert len(body["problems"]) == 1 and WEIGHTS in body["problems"][0]


def test_verify_finds_longer_files(converted: Path) -> None:
    with open(converted / WEIGHTS, "ab") as file:
        file.write(b"x")
    _verify(converted, 1)


def test_verify_finds_missing_files(source: Path, out: Path) -> None:
    mtt_convert.convert(source, out, max_shard_size="300KB")
    (out / "model-00002-of-00004.safetensors").unlink()
    (out / "config.json").unlink()
    body = _verify(out, 1)
    assert sorted(body["problems"]) == [
        "config.json is missing",
        "model-00002-of-00004.safetensors is missing",
    ]


def test_verify_finds_files_in_each_other_s_place(source: Path, out: Path) -> None:
    mtt_convert.convert(source, out, max_shard_size="300KB")
    first, second = (out / f"model-0000{k}-of-00004.safetensors" for k in (1, 2))
    first.rename(out / "x")
    second.rename(first)
    (out / "x").rename(second)
    assert len(_verify(out, 1)["problems"]) == 2


@pytest.mark.parametrize("name", ["config.json", "README.md", "modeling_mtt.py"])
def test_verify_finds_changed_documents(name: str, converted: Path) -> None:
    with open(converted / name, "ab") as file:
        file.write(b" ")
    assert _verify(converted, 1)["problems"] == [f"{name} was changed since it was written"]


def test_verify_lets_other_files_be(converted: Path) -> None:
    (converted / "notes.txt").write_text("mine")
    _verify(converted, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_that_are_not_finite_are_a_warning(
    value: float, dtype: str, golden: Golden, tmp_path: Path
) -> None:
    """They were so before: the conversion is right, and the user should know."""
    source = copy_of(golden, TORCH, tmp_path)
    for tp in (0, 1):
        with edited(shard(source, tp, 0)) as content:
            model_of(content, NORM)[NORM][3] = value
    mtt_convert.convert(source, tmp_path / "out", dtype=dtype)
    body = _verify(tmp_path / "out", 0)
    assert body["warnings"] == [
        "model.layers.0.input_layernorm.weight has values that are not finite"
    ]


def test_verify_without_hashes(source: Path, out: Path) -> None:
    """`--hash none` can find cut files, and must not call a changed one written."""
    mtt_convert.convert(source, out, hash_name="none")
    assert _verify(out, 0)["warnings"] != []


def test_verify_what_mtt_did_not_write(tmp_path: Path, source: Path) -> None:
    for folder in (tmp_path, source, tmp_path / "nothing"):
        with pytest.raises(NotACheckpointError):
            verify(folder)
        code, _, err = run("verify", folder)
        assert code == 3 and MANIFEST in err and "fix:" in err


def _edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads((folder / MANIFEST).read_text())
    change(record)
    (folder / MANIFEST).write_text(json.dumps(record))


MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no status": lambda record: record.pop("status"),
    "no documents": lambda record: record.pop("documents"),
    "documents of another kind": lambda record: record.update(documents=[1]),
    "no hash": lambda record: record.pop("hash"),
    "unknown hash": lambda record: record.update(hash="md5"),
    "hash of another kind": lambda record: record.update(hash=["xxh3_128"]),
    "file of another kind": lambda record: record["files"].update({WEIGHTS: 3}),
    "no tensors": lambda record: record["files"][WEIGHTS].pop("tensors"),
    "no header": lambda record: record["files"][WEIGHTS].pop("header"),
    "no bytes": lambda record: record["files"][WEIGHTS].pop("bytes"),
    "bytes of text": lambda record: record["files"][WEIGHTS].update(bytes="many"),
    "too few bytes": lambda record: record["files"][WEIGHTS].update(bytes=5),
    "another tensor": lambda record: record["files"][WEIGHTS]["tensors"].update(x="0"),
    "no files": lambda record: record.update(files={}),
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS)
def test_verify_with_an_odd_manifest(
    change: Callable[[dict[str, Any]], object], converted: Path
) -> None:
    """Problems, or an error in words; a manifest that says nothing proves nothing."""
    _edit_manifest(converted, change)
    code, _, err = run("verify", converted)
    assert code in (1, 2, 3), err


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, '{"schema": 2, "files": {}}'])
def test_verify_with_a_damaged_manifest(text: str, converted: Path) -> None:
    (converted / MANIFEST).write_text(text)
    with pytest.raises(CorruptError):
        verify(converted)
    assert run("verify", converted)[0] == 3


@pytest.mark.parametrize(
    "header",
    [
        b"{}",
        b"[]",
        b"null",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}',
        b'{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 99999]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": {"0": 0}}}',
    ],
    ids=lambda header: header[:60].decode("latin1"),
)
def test_odd_safetensors_headers(header: bytes, converted: Path) -> None:
    path = converted / WEIGHTS
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    _verify(converted, 1)
    code, _, err = run("diff", converted, converted)
    assert code in (0, 3), err


@pytest.mark.parametrize("length", [2**63, 2**40, 2**64 - 1])
def test_safetensors_header_lengths_are_not_believed(length: int, converted: Path) -> None:
    (converted / WEIGHTS).write_bytes(length.to_bytes(8, "little") + b"{}")
    _verify(converted, 1)


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
