"""An output folder that never looks whole before it is.

    OUT/.mtt.lock                    held while a conversion runs
        mtt_manifest.json            from the beginning
        model-....safetensors.part   renamed when the file is complete; in subfolders too
        config.json, index, ...      last: without them nothing loads the folder

A failed run removes what it wrote. Files that `--overwrite` replaces wait in `.mtt.replaced`
until the new ones are whole, and come back if the run fails.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import fcntl
import os
import shutil
import threading
import zlib
from operator import itemgetter
from types import TracebackType
from typing import Any

from . import manifest
from .errors import TargetError
from .plan import ConversionPlan, PlannedFile, PlannedTensor

_LOCK = ".mtt.lock"
_REPLACED = ".mtt.replaced"


class FolderSink:
    """Writes a plan into a folder; use it as a context manager around `execute.run`."""

    def __init__(
        self,
        folder: str,
        plan: ConversionPlan,
        source: dict[str, Any],
        algorithm: str,
        overwrite: bool = False,
    ) -> None:
        self.folder = os.path.abspath(folder)
        self._plan, self._algorithm, self._overwrite = plan, algorithm, overwrite
        self._mutex = threading.Lock()
        self._open: dict[str, int] = {}
        self._fixed: dict[str, list[bytearray]] = {}
        self._checksums: dict[tuple[str, str], int] = {}
        self._written: list[str] = []
        self._made_folders: list[str] = []
        self._lock_file = -1
        self._closed = False
        self.manifest: dict[str, Any] = {
            "schema": manifest.SCHEMA,
            "status": "running",
            "hash": algorithm,
            "source": source,
            "files": {file.name: manifest.planned_file(file) for file in plan.files},
            "documents": {},
        }

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
            raise _target_error(self.folder, error) from error
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
        self._take_lock()
        if present := sorted(set(os.listdir(self.folder)) - {_LOCK}):
            self._replace(present)
        free = shutil.disk_usage(self.folder).free
        if free < self._plan.num_bytes:
            raise TargetError(
                f"the disk of {self.folder} is too small; nothing was written",
                found=f"{free:,} bytes free",
                expected=f"{self._plan.num_bytes:,} bytes",
                fix="free some space, or choose another folder",
            )
        manifest.write(self.folder, self.manifest)
        self._written.append(manifest.NAME)

    def _take_lock(self) -> None:
        path = os.path.join(self.folder, _LOCK)
        self._lock_file = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock_file)
            self._lock_file = -1
            raise TargetError(
                f"{self.folder} is being written by another run of mtt",
                fix="wait for it, or choose another folder",
            ) from error
        held, here = os.fstat(self._lock_file), os.stat(path) if os.path.exists(path) else None
        if here is None or (held.st_dev, held.st_ino) != (here.st_dev, here.st_ino):
            os.close(self._lock_file)  # its owner ended and removed it before we had it
            self._take_lock()

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
            present = sorted(set(os.listdir(self.folder)) - {_LOCK})
        if manifest.NAME not in present:
            raise TargetError(
                f"{self.folder} was not written by mtt; nothing was replaced",
                found=", ".join(present[:5]) + (", ..." if len(present) > 5 else ""),
                expected=manifest.NAME,
                fix="choose another folder, or empty this one yourself",
            )
        ours = self._present(self._names(manifest.read(self.folder)))
        new = {*self._plan.documents, *(file.name for file in self._plan.files)}
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
        descriptor = self._descriptor(file)
        try:
            _write_all(descriptor, data, tensor.offset + position)
        except OSError as error:
            raise _target_error(self.folder, error) from error
        if tensor.checksum_at:
            key = file.name, tensor.name
            self._checksums[key] = zlib.crc32(data, self._checksums.get(key, 0))

    def _descriptor(self, file: PlannedFile) -> int:
        with self._mutex:
            assert not self._closed, file.name
            if file.name not in self._open:
                path = os.path.join(self.folder, file.name + ".part")
                flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC
                try:
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                    self._open[file.name] = os.open(path, flags, 0o666)
                except OSError as error:
                    raise _target_error(self.folder, error) from error
                self._written.append(file.name + ".part")
                self._fixed[file.name] = [bytearray(data) for _, data in file.fixed]
            return self._open[file.name]

    def tensor_done(self, file: PlannedFile, tensor: PlannedTensor, digest: str) -> None:
        """Note a tensor's hash, and its checksum where the file asks for it."""
        self._descriptor(file)
        with self._mutex:
            self.manifest["files"][file.name]["tensors"][tensor.name] = digest
            checksum = self._checksums.pop((file.name, tensor.name), 0)
            for position in tensor.checksum_at:
                number = bisect.bisect_right(file.fixed, position, key=itemgetter(0)) - 1
                start, _ = file.fixed[number]
                place = slice(position - start, position - start + 4)
                self._fixed[file.name][number][place] = checksum.to_bytes(4, "little")

    def file_done(self, file: PlannedFile) -> None:
        """Write what stands between the tensors, and give the complete file its name.

        Raises:
            TargetError: the disk is full or the folder not writable.
        """
        descriptor = self._descriptor(file)
        with self._mutex:
            try:
                fixed = self._fixed.pop(file.name)
                for (position, _), data in zip(file.fixed, fixed, strict=True):
                    _write_all(descriptor, memoryview(data), position)
                del self._open[file.name]
                os.close(descriptor)
                path = os.path.join(self.folder, file.name)
                os.replace(path + ".part", path)
                self._written.append(file.name)
                entry = self.manifest["files"][file.name]
                entry["header"] = manifest.digest(b"".join(fixed), self._algorithm)
                entry["status"] = "complete"
                manifest.write(self.folder, self.manifest)
            except OSError as error:
                raise _target_error(self.folder, error) from error

    def finish(self) -> None:
        """Write the documents; from here on the folder is whole.

        Raises:
            TargetError: the disk is full or the folder not writable.
        """
        try:
            for name, data in self._plan.documents.items():
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
            raise _target_error(self.folder, error) from error

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
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()
        if self._lock_file >= 0:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self.folder, _LOCK))
            os.close(self._lock_file)
            self._lock_file = -1

    def _clean_up(self) -> None:
        """Leave the folder as it was found."""
        with self._mutex:
            self._closed = True
        for name in self._written:
            _remove(name, self.folder)
            _remove(name + ".part", self.folder)
        aside = os.path.join(self.folder, _REPLACED)
        if self._lock_file >= 0 and os.path.isdir(aside):
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


def _write_all(descriptor: int, data: memoryview, position: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], position + done)


def _target_error(folder: str, error: OSError) -> TargetError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return TargetError(
            f"the disk of {folder} is full; what was written was removed again",
            found=str(error),
            fix="free some space, or choose another folder",
        )
    return TargetError(
        f"{folder} cannot be written",
        found=str(error),
        fix="choose a folder you may write to",
    )
