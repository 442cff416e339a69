"""What a user gets: the built wheel and the editable install, each in an environment of its own.

Nothing is downloaded: the environments hold mtt alone and see the packages around these tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"convert": "mtt_convert", "modeling_mtt": "modeling_mtt"}
INSTALL = ("install", "--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed")

# Both print, as their last line, where mtt_convert is and every module Python has loaded.
AFTER_IMPORT = """
import json, sys
import mtt_convert
print(json.dumps({"file": mtt_convert.__file__, "loaded": sorted(sys.modules)}))
"""
AFTER_HELP = """
import json, sys
import mtt_convert.cli
sys.argv = ["mtt", "--help"]
try:
    mtt_convert.cli.main()
except SystemExit as end:
    assert not end.code, end.code
print()
print(json.dumps({"file": mtt_convert.__file__, "loaded": sorted(sys.modules)}))
"""


def call(*command: str | Path, cwd: Path) -> str:
    """The standard output of a command, which must succeed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Environment:
    """An environment with mtt in it, and the folder it came from."""

    scripts: Path
    cwd: Path
    source: Path

    def python(self, *arguments: str) -> str:
        """Run the environment's Python away from the source tree."""
        return call(self.scripts / "python", *arguments, cwd=self.cwd)

    def last_line(self, code: str) -> dict:
        """Run code whose last line of output is JSON."""
        return json.loads(self.python("-c", code).splitlines()[-1])


def make_environment(folder: Path, source: Path, *what: str | Path) -> Environment:
    """A new environment that sees the packages around these tests, with mtt installed."""
    venv.create(folder / "env", with_pip=False, symlinks=os.name != "nt")
    python = folder / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    purelib = call(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
    )
    # Folders named in a .pth file are searched for modules, but their own .pth files are not read:
    # an editable mtt among the packages around these tests stays invisible.
    around = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    (Path(purelib.strip()) / "packages_around.pth").write_text("\n".join(around))
    call(sys.executable, "-m", "pip", "--python", python, *INSTALL, *what, cwd=folder)
    return Environment(python.parent, folder, source)


def copy_source(folder: Path) -> Path:
    """What the build reads, without earlier build products, which a build would reuse."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*_cache")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder / name)
    return folder


def files_to_ship() -> set[str]:
    """Every file of the two packages, under the name it has once installed."""
    return {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_source(tmp_path_factory.mktemp("source"))
    options = ("--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    call(sys.executable, "-m", "pip", "wheel", *options, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def from_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return make_environment(tmp_path_factory.mktemp("from_wheel"), wheel, wheel)


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    source = copy_source(tmp_path_factory.mktemp("source"))
    return make_environment(tmp_path_factory.mktemp("editable"), source, "--editable", source)


@pytest.fixture(scope="module", params=["from_wheel", "editable"])
def installed(request: pytest.FixtureRequest) -> Environment:
    return request.getfixturevalue(request.param)


def test_wheel_holds_every_file_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if ".dist-info/" not in name} == files_to_ship()
    assert {"mtt_convert/py.typed", "modeling_mtt/py.typed"} <= names
    assert any(name.startswith("mtt_convert/sample/") and name.endswith(".pt") for name in names)


def test_wheel_metadata(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(name))
        licence = archive.read(name.replace("METADATA", "licenses/LICENSE")).decode()
    assert wheel.name == "modeling_mtt-0.1.0-py3-none-any.whl"
    assert metadata["Name"] == "modeling-mtt"
    assert metadata["Summary"].startswith("Megatron-Turing Transformers: ")
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in licence
    assert metadata.get_payload().strip(), "the README is the page of the project on an index"


def test_each_install_runs_its_own_code(from_wheel: Environment, editable: Environment):
    """Guards the tests below: the packages around them may well include an mtt."""
    assert Path(from_wheel.last_line(AFTER_IMPORT)["file"]).is_relative_to(from_wheel.cwd)
    assert Path(editable.last_line(AFTER_IMPORT)["file"]).parent == editable.source / "convert"


def test_editable_install_follows_the_source(editable: Environment):
    (editable.source / "convert" / "written_later.py").write_text("ANSWER = 42\n")
    code = "from mtt_convert.written_later import ANSWER; print(ANSWER)"
    assert editable.python("-c", code) == "42\n"


def test_help(installed: Environment):
    text = call(installed.scripts / "mtt", "--help", cwd=installed.cwd)
    assert text.startswith("usage: mtt ")
    assert "convert" in text
    assert installed.python("-m", "mtt_convert", "--help") == text


def test_sample_is_found_beside_the_code(installed: Environment):
    code = (
        "from importlib.resources import files\n"
        "print(*sorted(p.name for p in files('mtt_convert').joinpath('sample').iterdir()))"
    )
    shipped = {name.split("/")[2] for name in files_to_ship() if "/sample/" in name}
    assert shipped
    assert set(installed.python("-c", code).split()) - {"__pycache__"} == shipped


def test_presets_are_found_by_name(installed: Environment):
    """The table is in the package: `hub_configs/` is not installed, and needs not be."""
    options = ("--gpus", "16", "--gpu-memory", "80GB")
    text = call(installed.scripts / "mtt", "estimate", "mt-nlg-530b", *options, cwd=installed.cwd)
    assert "mt-nlg-530b: 529,581,506,560 parameters" in text
    code = (
        "from mtt_convert.config_file import read_config_file as read\n"
        "print(read('megatron-gpt2-345m')['num_attention_heads'])"
    )
    assert installed.python("-c", code) == "16\n"


@pytest.mark.parametrize("module", ["torch", "transformers", "numpy", "huggingface_hub"])
def test_import_is_light(installed: Environment, module: str):
    assert module not in installed.last_line(AFTER_IMPORT)["loaded"]


@pytest.mark.parametrize("module", ["torch", "transformers", "numpy", "huggingface_hub"])
def test_help_is_light(installed: Environment, module: str):
    assert module not in installed.last_line(AFTER_HELP)["loaded"]


def test_hub_code_is_found(installed: Environment):
    """Found where it was installed, without importing it: its classes come with torch."""
    code = "import importlib.util as u; print(u.find_spec('modeling_mtt').origin)"
    base = installed.cwd if installed.source.suffix == ".whl" else installed.source
    assert Path(installed.python("-c", code).strip()).is_relative_to(base)
