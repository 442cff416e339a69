"""What an upload has done so far, so that another run can go on.

    $HF_HOME/mtt/uploads/owner%2Frepo@branch/
        .mtt.lock      held while a run uploads there
        state.json     {"schema": 1, "work": hash, "files": {name: {sha256, size, sample, ...}}}
        model-....     at most two files: one that is written, one that is uploaded

`work` says what is uploaded: a state is good for exactly the same work. The folder is removed
when all is committed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from . import small_files
from .errors import TargetError, UsageError
from .hub import Blob, HubPlace
from .writing import LOCK, FolderLock, target_error

_STATE = "state.json"
_SCHEMA = 1


class UploadState:
    """The folder of one upload; use it as a context manager.

    Attributes:
        folder: where files may wait.
        files: facts of what was uploaded, by name.
    """

    def __init__(self, place: HubPlace, work: str, resume: bool) -> None:
        from huggingface_hub import constants

        name = quote(f"{place.repo_id}@{place.revision}", safe="@")
        self.folder = os.path.join(constants.HF_HOME, "mtt", "uploads", name)
        self.files: dict[str, dict[str, Any]] = {}
        self._work, self._resume = work, resume
        self._lock = FolderLock(self.folder)

    def take(self) -> None:
        """Take the folder, and what an earlier run noted in it if this one resumes it.

        Raises:
            TargetError: another run has it, or it cannot be written.
            UsageError: the earlier run uploaded something else.
        """
        try:
            os.makedirs(self.folder, exist_ok=True)
            self._lock.take()
            state = self._read() if self._resume else None
            if state is not None and state["work"] != self._work:
                self._lock.release()
                raise UsageError(
                    "the upload to resume is not this one; nothing was uploaded",
                    found="another source, other options, or source files that changed since",
                    expected="the command that was interrupted, on the same files",
                    fix="leave out --resume to begin again",
                )
            self.files = dict(state["files"]) if state else {}
            self._clear(notes=state is None)
        except OSError as error:
            failure = target_error(self.folder, error)
            failure.fix = "set HF_HOME to a folder that you may write to and that has room"
            raise failure from error

    def check_space(self, sizes: Iterable[int]) -> None:
        """See that two files of these sizes find room.

        Raises:
            TargetError: they do not.
        """
        needed = sum(sorted(sizes)[-2:])
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise TargetError(
                f"the disk of {self.folder} is too small; nothing was uploaded",
                found=f"{free:,} bytes free",
                expected=f"{needed:,} bytes, for two files on their way",
                fix="set HF_HOME to a folder on a larger disk, or a smaller --max-shard-size",
            )

    def blobs(self) -> list[Blob]:
        """What was uploaded."""
        return [Blob.from_facts(name, facts) for name, facts in self.files.items()]

    def note(self, blob: Blob, **more: object) -> None:
        """Note an uploaded file; what goes inside the commit is not uploaded yet.

        Raises:
            TargetError: the disk is full or the folder not writable.
        """
        if blob.content is None:
            self.files[blob.name] = {**blob.facts(), **more}
            self._write()

    def keep(self, names: Iterable[str]) -> None:
        """Forget all other files."""
        kept = set(names)
        self.files = {name: facts for name, facts in self.files.items() if name in kept}

    def release(self, committed: bool) -> None:
        """Give the folder back; of what is not committed, keep the notes."""
        if not self._lock.held:
            return
        self._clear(notes=committed)
        self._lock.release()
        with contextlib.suppress(OSError):  # it still has notes
            os.rmdir(self.folder)

    def _clear(self, *, notes: bool) -> None:
        """Remove the files that wait, and the notes too if they are of no use."""
        kept = {LOCK} if notes else {LOCK, _STATE}
        for name in set(os.listdir(self.folder)) - kept:
            path = os.path.join(self.folder, name)
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)

    def _read(self) -> dict[str, Any] | None:
        """The notes of an earlier run; None if there are none that can be used."""
        try:
            with open(os.path.join(self.folder, _STATE), "rb") as file:
                state = json.load(file)
            if state["schema"] != _SCHEMA or not isinstance(state["work"], str):
                return None
            for name, facts in state["files"].items():
                Blob.from_facts(name, facts)
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return dict(state)

    def _write(self) -> None:
        state = {"schema": _SCHEMA, "work": self._work, "files": self.files}
        path = os.path.join(self.folder, _STATE)
        try:
            small_files.write(path, json.dumps(state).encode())
        except OSError as error:
            raise target_error(self.folder, error) from error
