"""The output folder when a conversion fails: whole or as it was.

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mtt_convert
from mtt_convert import (
    IncompleteError,
    MTTError,
    TargetError,
    verify,
)
from tests.convert.broken_disks import NUM_BYTES, fail_rename, full_after
from tests.convert.surgery import (
    refused,
    run,
    run_apart,
    snapshot,
)

NORM = "decoder.layers.0.input_layernorm.weight"
MANIFEST = "mtt_manifest.json"
WEIGHTS = "model.safetensors"


# A disk that is full


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
    full_after(monkeypatch, int(NUM_BYTES * part))
    with pytest.raises(TargetError, match="is full; what was written was removed again") as caught:
        mtt_convert.convert(source, out, num_workers=workers, max_shard_size="200KB")
    assert "No space left" in str(caught.value.found) and caught.value.fix
    assert not out.exists()


def test_a_disk_that_fills_up_by_command(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_after(monkeypatch, NUM_BYTES // 2)
    code, printed, err = run("convert", source, out)
    assert (code, printed) == (4, "")
    assert err.startswith(f"error: the disk of {out} is full")
    assert not out.exists()


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "README.md", MANIFEST])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_renames_that_fail(
    name: str, code: int, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_rename(monkeypatch, name, code)
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
    full_after(monkeypatch, NUM_BYTES // 3, errno.EIO)
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
    full_after(monkeypatch, NUM_BYTES // 2)
    with pytest.raises(TargetError):
        mtt_convert.convert(source, killed_overwrite, overwrite=True)
    monkeypatch.undo()
    assert snapshot(killed_overwrite) == snapshot(untouched)
