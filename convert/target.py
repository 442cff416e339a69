"""An output folder that never looks whole before it is.

    OUT/.mtt.lock                    held while a conversion runs
        mtt_manifest.json            from the beginning
        model-....safetensors.part   renamed when the file is complete; in subfolders too
        config.json, index, ...      last: without them nothing loads the folder

A failed run removes what it wrote. Files that `--overwrite` replaces wait in `.mtt.replaced`
until the new ones are whole, and come back if the run fails.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from types import TracebackType
from typing import Any

from . import manifest
from .errors import TargetError
from .plan import ConversionPlan, PlannedFile, PlannedTensor
from .unchanged import is_same
from .writing import LOCK, FileWriter, FolderLock, target_error

_REPLACED = ".mtt.replaced"


class FolderSink:
    """Writes a plan into a folder; use it as a context manager around `execute.run`.

    Attributes:
        pending: what is to be written.
        manifest: what was written.
        unchanged: whether the folder held just that already.
    """

    def __init__(
        self,
        folder: str,
        plan: ConversionPlan,
        source: dict[str, Any],
        algorithm: str,
        overwrite: bool = False,
        keep_same: bool = False,
    ) -> None:
        self.folder = os.path.abspath(folder)
        self.pending = plan
        self.unchanged = False
        self._algorithm, self._overwrite, self._keep_same = algorithm, overwrite, keep_same
        self.manifest = manifest.planned(plan, source, algorithm)
        self._writer = FileWriter(self.folder, self.manifest)
        self._lock = FolderLock(self.folder)
        self._written: list[str] = []
        self._made_folders: list[str] = []

    @property
    def place(self) -> str:
        """Where the result is."""
        return self.folder

    def __enter__(self) -> FolderSink:
        """Take the folder.

        Raises:
            TargetError: it is not empty, locked, not writable, or the disk is too small.
        """
        try:
            self._take()
            return self
        except OSError as error:
            self._clean_up()
            raise target_error(self.folder, error) from error
        except BaseException:
            self._clean_up()
            raise

    def _take(self) -> None:
        if os.path.lexists(self.folder) and not os.path.isdir(self.folder):
            raise TargetError(f"{self.folder} is a file", expected="a folder, or a new name")
        parent = self.folder
        while not os.path.isdir(parent):
            self._made_folders.append(parent)
            parent = os.path.dirname(parent)
        os.makedirs(self.folder, exist_ok=True)
        self._lock.take()
        if present := sorted(set(os.listdir(self.folder)) - {LOCK}):
            if self._keep_same and self._is_same(present):
                self.pending = replace(self.pending, files=(), documents={}, replicas=())
                return
            self._replace(present)
        free = shutil.disk_usage(self.folder).free
        if free < self.pending.num_bytes:
            raise TargetError(
                f"the disk of {self.folder} is too small; nothing was written",
                found=f"{free:,} bytes free",
                expected=f"{self.pending.num_bytes:,} bytes",
                fix="free some space, or choose another folder",
            )
        manifest.write(self.folder, self.manifest)
        self._written.append(manifest.NAME)

    def _is_same(self, present: list[str]) -> bool:
        """Whether the folder holds what would be written; `manifest` is its own then."""
        if manifest.NAME not in present:
            return False
        there = manifest.read(self.folder)
        files = {name: entry["bytes"] for name, entry in there["files"].items()}
        names = self._present({*files, *there["documents"]})
        sizes = {n: os.path.getsize(os.path.join(self.folder, n)) for n in names if n in files}
        whole = sizes == files and set(there["documents"]) <= names
        if whole and is_same(there, self.pending, self.manifest["source"], self._algorithm):
            self.manifest, self.unchanged = there, True
        return self.unchanged

    def _replace(self, present: list[str]) -> None:
        """Make room in a folder that is not empty: only for files an earlier run wrote."""
        if not self._overwrite:
            raise TargetError(
                f"{self.folder} is not empty; nothing was written",
                found=", ".join(present[:5]) + (", ..." if len(present) > 5 else ""),
                expected="an empty or new folder",
                fix="choose another folder, or add --overwrite to replace an earlier conversion",
            )
        aside = os.path.join(self.folder, _REPLACED)
        if os.path.isdir(aside) and os.listdir(aside):
            self._recover(present, aside)
            present = sorted(set(os.listdir(self.folder)) - {LOCK})
        if manifest.NAME not in present:
            raise TargetError(
                f"{self.folder} was not written by mtt; nothing was replaced",
                found=", ".join(present[:5]) + (", ..." if len(present) > 5 else ""),
                expected=manifest.NAME,
                fix="choose another folder, or empty this one yourself",
            )
        ours = self._present(self._names(manifest.read(self.folder)))
        new = {*self.pending.documents, *(file.name for file in self.pending.files)}
        new |= {f"{name}.part" for name in new}
        if taken := sorted(self._present(new) - ours):
            raise TargetError(
                f"{self.folder} has files that mtt did not write; nothing was replaced",
                found=", ".join(taken[:5]),
                expected="only files of the earlier conversion in their places",
                fix="move them away, or choose another folder",
            )
        os.makedirs(aside, exist_ok=True)
        for name in sorted(ours, key=lambda name: name == manifest.NAME):
            _move(name, self.folder, aside)

    def _present(self, names: set[str]) -> set[str]:
        """Those of these names that are in the folder."""
        return {name for name in names if os.path.lexists(os.path.join(self.folder, name))}

    def _names(self, old: dict[str, Any]) -> set[str]:
        """Files that belong to the conversion of a manifest."""
        parts = [f"{name}.part" for name in (*old["files"], *old["documents"], manifest.NAME)]
        return {*old["documents"], *old["files"], *parts, manifest.NAME}

    def _recover(self, present: list[str], aside: str) -> None:
        """Undo what a killed run of --overwrite did: its files go, those it replaced return."""
        if manifest.NAME in present and manifest.NAME in os.listdir(aside):
            for name in self._present(self._names(manifest.read(self.folder))):
                _remove(name, self.folder)
        self._put_back(aside)

    def _put_back(self, aside: str) -> None:
        """Return what `--overwrite` set aside."""
        names = [
            os.path.relpath(os.path.join(folder, file), aside)
            for folder, _, files in os.walk(aside)
            for file in files
        ]
        for name in names:
            _move(name, aside, self.folder)
        os.rmdir(aside)

    def write(
        self, file: PlannedFile, tensor: PlannedTensor, position: int, data: memoryview
    ) -> None:
        """Bytes of a tensor from `position` bytes after its beginning.

        Raises:
            TargetError: the disk is full or the folder not writable.
        """
        self._writer.write(file, tensor, position, data)

    def tensor_done(self, file: PlannedFile, tensor: PlannedTensor, digest: str) -> None:
        """Note a tensor's hash, and its checksum where the file asks for it."""
        self._writer.tensor_done(file, tensor, digest)

    def file_done(self, file: PlannedFile) -> None:
        """Write what stands between the tensors, and give the complete file its name.

        Raises:
            TargetError: the disk is full or the folder not writable.
        """
        self._writer.complete(file)
        with self._writer.mutex:
            try:
                manifest.write(self.folder, self.manifest)
            except OSError as error:
                raise target_error(self.folder, error) from error

    def finish(self) -> None:
        """Write the documents; from here on the folder is whole.

        Raises:
            TargetError: the disk is full or the folder not writable.
        """
        if self.unchanged:
            return
        try:
            for name, data in self.pending.documents.items():
                path = os.path.join(self.folder, name)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                self._written.append(name)
                with open(path + ".part", "wb") as file:
                    file.write(data)
                os.replace(path + ".part", path)
                self.manifest["documents"][name] = manifest.digest(data, self._algorithm)
            self.manifest["status"] = "complete"
            manifest.write(self.folder, self.manifest)
            shutil.rmtree(os.path.join(self.folder, _REPLACED), ignore_errors=True)
        except OSError as error:
            raise target_error(self.folder, error) from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._release()
        else:
            self._clean_up()

    def _release(self) -> None:
        self._writer.close()
        self._lock.release()

    def _clean_up(self) -> None:
        """Leave the folder as it was found."""
        self._writer.close()
        for name in (*self._writer.begun, *self._written):
            _remove(name, self.folder)
            _remove(name + ".part", self.folder)
        aside = os.path.join(self.folder, _REPLACED)
        if self._lock.held and os.path.isdir(aside):
            self._put_back(aside)
        self._release()
        for folder in self._made_folders:
            if os.path.isdir(folder) and not os.listdir(folder):
                os.rmdir(folder)


def _move(name: str, source: str, target: str) -> None:
    """Move a file between folders under one name; subfolders come and go with it."""
    os.makedirs(os.path.dirname(os.path.join(target, name)), exist_ok=True)
    os.replace(os.path.join(source, name), os.path.join(target, name))
    _remove_empty(os.path.dirname(name), source)


def _remove(name: str, folder: str) -> None:
    """Remove a file if it is there, and the subfolders that it leaves empty."""
    path = os.path.join(folder, name)
    if os.path.lexists(path):
        os.unlink(path)
    _remove_empty(os.path.dirname(name), folder)


def _remove_empty(subfolder: str, folder: str) -> None:
    while subfolder:
        path = os.path.join(folder, subfolder)
        if os.path.isdir(path):
            if os.listdir(path):
                return
            os.rmdir(path)
        subfolder = os.path.dirname(subfolder)
