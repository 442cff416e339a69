"""Changed files of old and foreign checkpoints: a typed error, or nothing is different.

Every example takes a real checkpoint, changes one thing about it that has no weight in it, and
opens it. What comes back must be an error of mtt's own, or the same plan. An uncaught exception is
a failure, and so is another plan where a file was cut or is missing; a changed byte may be another
number in the arguments, or another name of state that is left out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mtt_convert
from mtt_convert import MTTError
from mtt_convert.plan import render
from tests.convert.surgery import Golden

SOURCES = {
    "legacy/v1.0-ckptver0-RELEASE-oldserial-fp16-gpt2-tp1pp1": 20_275,
    "legacy/git-d763f54a21-ckptver1-gpt2-tp2pp1": None,
    "legacy/megatron-deepspeed-6acc370a-gpt2-tp2pp2": None,
    "legacy/megatron-deepspeed-6acc370a-NOPIPE-gpt2-tp2pp1": None,
    "legacy/universal-6acc370a-gpt2-from-ZERO1bf16-tp2dp2": None,
    "legacy/gpt-neox-DERIVED-tp1": None,
}


class _Copy:
    """A checkpoint that is whole again after every example."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.root = Path(shutil.copytree(source, folder))
        self.files = sorted(path for path in self.root.rglob("*") if path.is_file())
        self.files = [path for path in self.files if path.suffix != ".json"]
        self.plan = _plan(self.root)

    def changed(self, path: Path, data: bytes | None, *, is_other: bool = False) -> None:
        """Open it with other bytes in one file, or without that file.

        `is_other`: another plan is no surprise.
        """
        before = path.read_bytes()
        try:
            path.unlink()
            if data is not None:
                path.write_bytes(data)
            try:
                plan = _plan(self.root)
            except MTTError as error:
                assert error.message
                return
            is_other = is_other or (data is not None and len(data) == len(before))
            assert plan == self.plan or is_other
        finally:
            path.write_bytes(before)


def _plan(root: Path) -> str:
    checkpoint = mtt_convert.open_checkpoint(root, overrides={"vocab_size": 497})
    conversion = mtt_convert.plan_conversion(checkpoint, tokenizer="none")
    return render(conversion.plan, str(root)) + json.dumps(conversion.config, sort_keys=True)


@pytest.fixture(scope="module")
def copies(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, _Copy]]:
    yield {name: _Copy(golden(name), tmp_path_factory.mktemp("copy") / "root") for name in SOURCES}


@pytest.mark.parametrize("name", SOURCES)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_cut_and_missing_files(name: str, copies: dict[str, _Copy], data: st.DataObject) -> None:
    """A file that ends early, or is not there, is never taken for the whole."""
    copy = copies[name]
    path = data.draw(st.sampled_from(copy.files))
    content = path.read_bytes()
    end = data.draw(st.one_of(st.none(), st.integers(0, max(0, len(content) - 1))))
    copy.changed(path, None if end is None else content[:end])


@pytest.mark.parametrize("name", SOURCES)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_files_in_each_other_s_place(
    name: str, copies: dict[str, _Copy], data: st.DataObject
) -> None:
    """What makes another model, or none, must not end in an exception."""
    copy = copies[name]
    path, other = (data.draw(st.sampled_from(copy.files)) for _ in range(2))
    copy.changed(path, other.read_bytes(), is_other=True)


@pytest.mark.parametrize("name", SOURCES)
@settings(max_examples=110, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_bytes(name: str, copies: dict[str, _Copy], data: st.DataObject) -> None:
    """Bytes of the pickle, or of the zip's directory, are others."""
    copy = copies[name]
    path = data.draw(st.sampled_from(copy.files))
    content = bytearray(path.read_bytes())
    head = min(SOURCES[name] or 4096, len(content) - 1)
    for _ in range(data.draw(st.integers(1, 3))):
        near_end = data.draw(st.booleans())
        place = data.draw(st.integers(0, max(0, head)))
        content[-1 - place if near_end else place] = data.draw(st.integers(0, 255))
    copy.changed(path, bytes(content))
