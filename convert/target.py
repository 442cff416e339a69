"""An output folder that never looks whole before it is.

    OUT/.mtt.lock                    held while a conversion runs
        mtt_manifest.json            from the beginning
        model-....safetensors.part   renamed when the file is complete; in subfolders too
        config.json, index, ...      last: without them nothing loads the folder

A failed run removes what it wrote. Files that `--overwrite` replaces wait in `.mtt.replaced`
until the new ones are whole, and come back if the run fails.

With `--resume` the files that an interrupted run finished stay as they are, those of a killed run
too, and a run that fails leaves what it finished. A killed machine may have lost what it had not
brought to the disk; only runs of `--resume` do that, file by file, so others' files are trusted
until the machine is started again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import TracebackType
from typing import Any

from . import manifest
from .claims import boot_id
from .errors import MTTError, TargetError, UsageError
from .plan import ConversionPlan, PlannedFile, PlannedTensor
from .sums import Sums
from .unchanged import is_same_plan
from .work import SourceWatch, source_paths
from .writing import LOCK, FileWriter, FolderLock, target_error, write_document

_REPLACED, _GONE = ".mtt.replaced", ".mtt.replaced.gone"
_UNFINISHED = f"{manifest.NAME}.part"
_NOTES = ("work", "boot")  # of the manifest while it is running
IsSame = Callable[[dict[str, Any]], bool]


class FolderSink:
    """Writes a plan into a folder; use it as a context manager around `execute.run`.

    Attributes:
        pending: what is to be written.
        manifest: what was written.
        unchanged: whether the folder held just that already.
        whole: whether it does now.
    """

    def __init__(
        self,
        folder: str,
        plan: ConversionPlan,
        source: dict[str, Any],
        algorithm: str,
        *,
        work: str,
        overwrite: bool = False,
        resume: bool = False,
        is_same: IsSame | None = None,
    ) -> None:
        """Nothing happens yet.

        Args:
            folder: where to.
            plan: what to write.
            source: facts of the source, for the manifest.
            algorithm: of the hashes.
            work: what this conversion is; see `work.py`.
            overwrite: whether an earlier conversion may be replaced.
            resume: whether to go on with an interrupted one.
            is_same: whether a manifest says just what would be written; None replaces it anyway.
        """
        self.folder = os.path.abspath(folder)
        self.pending = plan
        self.unchanged, self.whole = False, False
        self._plan, self._algorithm, self._overwrite = plan, algorithm, overwrite
        self._resume, self._same = resume, is_same
        self.manifest = manifest.planned(plan, source, algorithm)
        self.manifest |= {"work": work, "boot": None if resume else boot_id()}
        self._watch = SourceWatch(plan)
        self._writer = FileWriter(self.folder, self.manifest, keeps=resume)
        self._lock = FolderLock(self.folder)
        self._written: list[str] = []
        self._made_folders: list[str] = []
        self._set_aside = False

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
        try:
            self._lock.take()
        except OSError:  # a folder that may only be read needs no lock if nothing is missing
            if not (self._was_finished() or self._is_same(self._listing())):
                raise
            self.whole = True
            return
        shutil.rmtree(os.path.join(self.folder, _GONE), ignore_errors=True)
        with contextlib.suppress(OSError):  # of a run that was killed while it replaced its own
            os.unlink(os.path.join(self.folder, _UNFINISHED))
        if present := self._listing():
            if self._goes_on(present) or self._is_same(present):
                self.whole = self.unchanged
            else:
                self._replace(present)
        check_space(self.folder, self.pending)
        if not self.unchanged:
            self._note()
            self._written.append(manifest.NAME)

    def _listing(self) -> list[str]:
        """What is in the folder, but for what a run of mtt leaves that is killed at its start.

        Raises:
            TargetError: others write parts of it.
        """
        present = set(os.listdir(self.folder))
        if manifest.PARTS in present:
            raise TargetError(
                f"{self.folder} is being written in parts",
                found=manifest.PARTS,
                expected="an empty or new folder",
                fix="go on with --resume --part, choose another folder, or remove this one",
            )
        return sorted(present - {LOCK, _UNFINISHED})

    def _goes_on(self, present: list[str]) -> bool:
        """Whether this run has been begun here before; what it finished is pending no more.

        Raises:
            UsageError: another one was.
        """
        if not self._resume or manifest.NAME not in present:
            return False
        if self._was_finished():
            self._drop_replaced()
            return True
        there = manifest.read(self.folder)
        if there["status"] == "running" and there.get("work") == self.manifest["work"]:
            self._keep_finished(there)
            return True
        if self._overwrite:
            return False
        raise UsageError(
            "the conversion to resume is not this one; nothing was written",
            found="another source, other options, or source files that changed since",
            expected="the command that was interrupted, on the same files",
            fix="choose another folder, or add --overwrite to begin again",
        )

    def _was_finished(self) -> bool:
        """Whether all of this run was done here before; `manifest` is the folder's own then."""
        if not self._resume or self._overwrite or not self._present({manifest.NAME}):
            return False
        there = manifest.read(self.folder)
        source = self.manifest["source"]
        same = is_same_plan(there, self._plan, source, self._algorithm)
        if same and is_whole(self.folder, there):
            self._take_over(there)
        return self.unchanged

    def _keep_finished(self, there: dict[str, Any]) -> None:
        """Keep what a run finished that ended too early, and remove the rest of it."""
        self._set_aside = os.path.isdir(os.path.join(self.folder, _REPLACED))
        boot = there.get("boot", "")
        kept = set()
        if boot is None or (boot and boot == boot_id()):
            kept = finished(self.folder, there, self._plan)
        for name in kept:
            self.manifest["files"][name] = there["files"][name]
            if boot is not None:
                sync(os.path.join(self.folder, name))
        rest = tuple(file for file in self._plan.files if file.name not in kept)
        names = {file.name for file in self._plan.files}
        for name in (*(file.name for file in rest), *(f"{name}.part" for name in names)):
            _remove(name, self.folder)
        for name in self._plan.documents:
            _remove(f"{name}.part", self.folder)
            if rest:  # without them nothing looks whole
                _remove(name, self.folder)
        self.pending = replace(self._plan, files=rest)

    def _is_same(self, present: list[str]) -> bool:
        """Whether the folder holds what would be written; `manifest` is its own then."""
        if self._same is None or manifest.NAME not in present:
            return False
        there = manifest.read(self.folder)
        if is_whole(self.folder, there) and self._same(there):
            self._take_over(there)
        return self.unchanged

    def _take_over(self, there: dict[str, Any]) -> None:
        """Take what is in the folder for the result."""
        self.manifest, self.unchanged = there, True
        self.pending = replace(self.pending, files=(), documents={}, replicas=())

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
            present = self._listing()
        if manifest.NAME not in present:
            raise TargetError(
                f"{self.folder} was not written by mtt; nothing was replaced",
                found=", ".join(present[:5]) + (", ..." if len(present) > 5 else ""),
                expected=manifest.NAME,
                fix="choose another folder, or empty this one yourself",
            )
        ours = self._present(self._names(manifest.read(self.folder)))
        place = os.path.realpath(self.folder)
        read = {os.path.realpath(path) for path in source_paths(self._plan)}
        if own := sorted(name for name in ours if os.path.join(place, name) in read):
            raise TargetError(
                f"the checkpoint to convert is in {self.folder}; nothing was replaced",
                found=", ".join(own[:5]) + (", ..." if len(own) > 5 else ""),
                expected="a folder that holds none of its files",
                fix="choose another folder",
            )
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
        self._set_aside = True
        for name in sorted(ours, key=lambda name: name == manifest.NAME):
            _move(name, self.folder, aside)

    def _drop_replaced(self) -> None:
        """Remove what was set aside: first its name, so that half of it never comes back."""
        gone = os.path.join(self.folder, _GONE)
        with contextlib.suppress(FileNotFoundError):
            os.rename(os.path.join(self.folder, _REPLACED), gone)
        shutil.rmtree(gone, ignore_errors=True)

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

    def tensor_done(self, file: PlannedFile, tensor: PlannedTensor, sums: Sums) -> None:
        """Note a tensor's hash, and its checksum where the file asks for it."""
        self._writer.tensor_done(file, tensor, sums)

    def file_done(self, file: PlannedFile) -> None:
        """Write what stands between the tensors, and give the complete file its name.

        Raises:
            TargetError: the disk is full or the folder not writable.
            CorruptError: a file that it came from was changed meanwhile.
        """
        self._watch.check(file)
        self._writer.complete(file, self._note)

    def _note(self) -> None:
        manifest.write(self.folder, self.manifest, keeps=self._resume)

    def finish(self) -> None:
        """Write the documents; from here on the folder is whole.

        Raises:
            TargetError: the disk is full or the folder not writable.
            CorruptError: a file of the source was changed meanwhile.
        """
        if self.unchanged:
            return
        self._watch.check()
        try:
            for name, data in self.pending.documents.items():
                self._written.append(name)
                write_document(self.folder, name, data, keeps=self._resume)
            self.manifest["documents"] = manifest.digests(self.pending.documents, self._algorithm)
            self.manifest["status"] = "complete"
            for note in _NOTES:
                del self.manifest[note]
            self._note()
            self.whole = True
            self._drop_replaced()
        except OSError as error:
            raise target_error(self.folder, error, keeps=self._resume) from error

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

    def _is_noted_as_whole(self) -> bool:
        """Whether what ends this run came just after the manifest had got its last form."""
        if self.manifest["status"] != "complete":
            return False
        with contextlib.suppress(MTTError):
            return bool(manifest.read(self.folder)["status"] == "complete")
        return False

    def _clean_up(self) -> None:
        """Leave the folder as it was found, but for finished files that may be of use."""
        self._writer.close()
        if not self.whole and self._is_noted_as_whole():
            self.whole = True
            self._drop_replaced()
        if self.whole:
            self._release()
            return
        complete = {n for n, f in self.manifest["files"].items() if f["status"] == "complete"}
        keeps = self._resume and self._lock.held and complete
        for name in (*self._writer.begun, *self._written):
            _remove(name + ".part", self.folder)
            if not keeps or name not in (*complete, manifest.NAME):
                _remove(name, self.folder)
        aside = os.path.join(self.folder, _REPLACED)
        if self._set_aside and not keeps and os.path.isdir(aside):
            self._put_back(aside)
        self._release()
        for folder in self._made_folders:
            if os.path.isdir(folder) and not os.listdir(folder):
                os.rmdir(folder)


def check_space(folder: str, plan: ConversionPlan) -> None:
    """See that a plan finds room.

    Raises:
        TargetError: it does not.
    """
    free = shutil.disk_usage(folder).free
    if free < plan.num_bytes:
        raise TargetError(
            f"the disk of {folder} is too small; nothing was written",
            found=f"{free:,} bytes free",
            expected=f"{plan.num_bytes:,} bytes",
            fix="free some space, or choose another folder",
        )


def is_whole(folder: str, there: dict[str, Any]) -> bool:
    """Whether all files of a manifest are in a folder, in their sizes."""
    sizes = {name: entry["bytes"] for name, entry in there["files"].items()}
    documents = [os.path.join(folder, name) for name in there["documents"]]
    return sizes == _sizes(folder, sizes) and all(map(os.path.lexists, documents))


def finished(folder: str, there: dict[str, Any], plan: ConversionPlan) -> set[str]:
    """The files of a plan that a manifest calls complete, and that are there."""
    sizes = {file.name: file.num_bytes for file in plan.files}
    found = _sizes(folder, sizes)
    entries = there["files"]
    return {
        name
        for name, size in sizes.items()
        if found.get(name) == size and name in entries and entries[name]["status"] == "complete"
    }


def sync(path: str) -> None:
    """Bring a file to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sizes(folder: str, names: Iterable[str]) -> dict[str, int]:
    """The sizes of those of these files that are there."""
    found = {}
    for name in names:
        with contextlib.suppress(OSError):
            found[name] = os.path.getsize(os.path.join(folder, name))
    return found


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
