"""What every test may use: golden checkpoints, fixed seeds, markers, and no network.

The `golden` fixture finds real Megatron checkpoints, in this order:

    $MTT_GOLDEN              a folder you name
    ../shared/golden         the whole set, beside the repository
    tests/golden             the few committed ones (README.md there)
"""

from __future__ import annotations

import atexit
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.hub_server import HubServer

ROOT = Path(__file__).resolve().parents[1]
IN_CI = os.environ.get("CI", "").lower() not in ("", "0", "false", "no")

settings.register_profile("mtt", deadline=None, derandomize=IN_CI, print_blob=True)
settings.load_profile("mtt")

# Before huggingface_hub is imported: a private cache, no account, and a Hub nobody answers for.
# A test that needs a Hub starts its own and passes the endpoint.
_cache = tempfile.mkdtemp(prefix="mtt-tests-")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ.update(
    HF_HOME=_cache,
    HF_ENDPOINT="http://127.0.0.1:9",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_IMPLICIT_TOKEN="1",
    TOKENIZERS_PARALLELISM="false",
)
for _name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_MODULES_CACHE"):
    os.environ.pop(_name, None)


def _golden_roots() -> list[Path]:
    named = os.environ.get("MTT_GOLDEN")
    if named and not Path(named).is_dir():
        raise pytest.UsageError(
            f"MTT_GOLDEN is not a folder\n  found:    {named}\n"
            "  expected: the folder that holds mcore/ and legacy/\n"
            "  fix:      correct the variable, or unset it"
        )
    roots = [Path(named)] if named else []
    return [*roots, ROOT.parent / "shared" / "golden", ROOT / "tests" / "golden"]


def pytest_report_header() -> str:
    """Name the places that golden checkpoints come from."""
    found = [os.path.relpath(root, ROOT) for root in _golden_roots() if root.is_dir()]
    return f"golden checkpoints: {', then '.join(found)}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch sees no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what tests recorded to be seen also when they pass."""
    for report in terminalreporter.getreports("passed"):
        if text := dict(report.user_properties).get("summary"):
            terminalreporter.section(report.nodeid)
            terminalreporter.write_line(str(text))


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Path]:
    """`golden("mcore/llama/args.json")`: the path of a golden file or folder.

    Where it is nowhere the test is skipped; with CI set it fails, so that CI never passes by
    skipping.
    """

    def find(relative: str) -> Path:
        roots = _golden_roots()
        for root in roots:
            if (root / relative).exists():
                return root / relative
        message = f"golden checkpoint {relative} is not here; name a folder that has it: MTT_GOLDEN"
        if IN_CI:
            pytest.fail(message, pytrace=False)
        pytest.skip(message)

    return find


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub that this process and those it starts talk to, with $HF_HOME in `tmp_path`."""
    from huggingface_hub import HfFileSystem, constants

    from mtt_convert import remote
    from tests.hub_server import TOKEN, HubServer

    def forget() -> None:
        HfFileSystem.clear_instance_cache()  # they keep the address of the Hub before
        remote._systems.pop("hf", None)

    forget()
    with HubServer() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
        monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
        for name, value in (
            ("HF_ENDPOINT", server.url),
            ("HF_HUB_DISABLE_XET", "1"),
            ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "0"),
            ("HF_HOME", str(tmp_path / "home")),
            ("HF_TOKEN", TOKEN),
        ):
            monkeypatch.setenv(name, value)
        server.token = TOKEN
        yield server
    forget()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Give every test the same random numbers, whichever ran before it."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
