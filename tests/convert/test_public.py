"""What the package offers, and what using it costs."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import mtt_convert
from tests.convert.surgery import TORCH

HEAVY = ("torch", "transformers", "safetensors", "huggingface_hub", "accelerate", "tqdm")


def test_all_is_sorted_and_complete() -> None:
    assert sorted(mtt_convert.__all__) == mtt_convert.__all__
    assert all(getattr(mtt_convert, name) is not None for name in mtt_convert.__all__)


def modules_after(code: str, *arguments: str) -> set[str]:
    """Top-level modules a fresh interpreter has imported once it ran the code."""
    code += "\nimport sys; print('MODULES', *{name.partition('.')[0] for name in sys.modules})"
    output = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    ).stdout
    return set(output.rpartition("MODULES")[2].split())


def test_importing_the_package_costs_nothing() -> None:
    assert not modules_after("import mtt_convert") & {*HEAVY, "numpy", "xxhash"}


def test_help_imports_only_the_standard_library() -> None:
    code = "from mtt_convert.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    assert not modules_after(code) & {*HEAVY, "numpy", "xxhash"}


def test_converting_needs_neither_torch_nor_transformers(golden, tmp_path) -> None:
    code = (
        "import sys; from mtt_convert import convert, diff, verify\n"
        "convert(sys.argv[1], sys.argv[2], num_workers=2)\n"
        "assert not diff(sys.argv[1], sys.argv[2]).differences\n"
        "assert not verify(sys.argv[2]).problems"
    )
    source = golden("mcore/llama/tp2pp2vpp2/torch")
    assert not modules_after(code, str(source), str(tmp_path / "out")) & set(HEAVY)


def test_looking_at_a_checkpoint_needs_no_numpy(golden) -> None:
    code = "import sys; from mtt_convert.cli import main; main(['inspect', sys.argv[1]])"
    assert not modules_after(code, str(golden(TORCH))) & {*HEAVY, "numpy"}


@pytest.mark.parametrize(
    ("command", "seconds"),
    [("--help", 0.1), ("inspect CKPT", 0.5), ("convert CKPT OUT --tokenizer none", 1.0)],
)
def test_commands_start_at_once(command: str, seconds: float, golden, tmp_path: Path) -> None:
    """CPU time of the whole process, the shortest of a few: others may be at work here."""
    found = []
    environ = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path / "compiled")}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    for turn in range(4):
        places = {"CKPT": str(golden(TORCH)), "OUT": str(tmp_path / str(turn))}
        words = [places.get(word, word) for word in command.split()]
        process = subprocess.Popen(
            [sys.executable, "-m", "mtt_convert", *words],
            env=environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        found.append(usage.ru_utime + usage.ru_stime)
    assert min(found) < seconds


_INTERRUPTED_AT_THE_START = """
import sys, types
import mtt_convert

class Module(types.ModuleType):
    def __getattr__(self, name):
        raise KeyboardInterrupt

sys.modules["mtt_convert.cli"] = Module("mtt_convert.cli")
from mtt_convert.__main__ import run
run()
"""


def test_ctrl_c_during_the_imports_ends_quietly() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED_AT_THE_START], capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_the_command_is_the_module(tmp_path: Path) -> None:
    """Exit codes and messages pass, whichever way it is called."""
    command = os.path.join(sysconfig.get_path("scripts"), "mtt")
    for start in ([command], [sys.executable, "-m", "mtt_convert"]):
        done = subprocess.run(
            [*start, "inspect", tmp_path / "nothing"], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 3
        assert "nothing" in done.stderr
