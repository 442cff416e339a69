"""Commands on several processes: results, errors and interruptions come back once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.resources import as_file, files
from pathlib import Path

import pytest

from mtt_convert.commands.ranks import launch
from mtt_convert.errors import MTTError

from .surgery import run

PROMPT = "Large language models"


@pytest.fixture(autouse=True)
def _functions(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_the_first_process_returns_the_result():
    assert launch("commands_on_ranks:add_up", {"start": 5}, 2) == {"sum": 11}


@pytest.mark.parametrize(("rank", "prefix"), [(1, "[rank 1/2 "), ("all", "a file ended")])
def test_an_error_comes_back_once_with_its_exit_code(rank, prefix):
    with pytest.raises(MTTError) as error:
        launch("commands_on_ranks:fail_on", {"rank": rank}, 2)
    assert error.value.message.startswith(prefix)
    assert error.value.message.endswith("a file ended")
    assert (error.value.found, error.value.expected) == ("3 bytes", "4 bytes")
    assert (error.value.code, error.value.exit_code) == ("corrupt", 3)


def test_a_bug_is_called_one():
    with pytest.raises(MTTError, match="mtt failed: ZeroDivisionError: nothing to share") as error:
        launch("commands_on_ranks:crash", {}, 2)
    assert (error.value.code, error.value.exit_code) == ("bug", 70)
    assert "Traceback" in error.value.__notes__[0]


def test_a_killed_process_ends_the_others():
    with pytest.raises(MTTError, match=r"\[rank 1/2 .*\] was killed by signal 9"):
        launch("commands_on_ranks:be_killed", {}, 2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_all(tmp_path, number):
    pids = tmp_path / "pids"
    script = (
        "import sys, signal\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "from mtt_convert.commands.ranks import launch\n"
        "launch('commands_on_ranks:wait', {'file': sys.argv[1]}, 2)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(pids)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (pids.exists() and len(pids.read_text().split()) == 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    process.wait(30)
    for pid in pids.read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


@pytest.mark.slow
def test_generate_on_two_processes(tmp_path):
    with as_file(files("mtt_convert") / "sample") as sample:
        _, alone, _ = run("generate", sample, "--prompt", PROMPT)
        for layout in (["--tp", "2"], ["--pp", "2"]):
            status, out, err = run("generate", sample, "--prompt", PROMPT, *layout)
            assert (status, out, err) == (0, alone, "")

        folder = tmp_path / "out"
        assert run("convert", sample, folder)[0] == 0
        sampling = ["--prompt", PROMPT, "--temperature", "0.9", "--seed", "7", "--json"]
        _, alone, _ = run("generate", folder, *sampling)
        status, out, _ = run("generate", folder, *sampling, "--tp", "2")
        assert status == 0
        assert json.loads(out)["text"] == json.loads(alone)["text"]


@pytest.mark.slow
def test_generate_refuses_sizes_that_do_not_divide(tmp_path):
    with as_file(files("mtt_convert") / "sample") as sample:
        status, _, err = run("generate", sample, "--prompt", PROMPT, "--tp", "3")
    assert status == 2
    assert err == (
        "error: the model cannot be cut into 3 equal parts\n"
        "  found:    4 query heads, 4 key and value heads, an intermediate size of 256\n"
        "  expected: tp 1, 2, 4\n"
        "  fix:      --tp 2\n"
    )


def test_sizes_of_generate(tmp_path):
    for layout in (["--tp", "0"], ["--pp", "-1"]):
        status, _, err = run("generate", tmp_path, "--prompt", PROMPT, *layout)
        assert status == 2
        assert "expected: sizes of at least 1" in err


def test_torchrun_with_another_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    status, _, err = run("generate", tmp_path, "--prompt", PROMPT, "--tp", "2")
    assert status == 2
    assert "found:    4 processes" in err
