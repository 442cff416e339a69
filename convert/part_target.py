"""An output folder that several machines write together, each its own files.

    OUT/.mtt.parts/plan.json              how many parts, of which work: the same for all of them
                   00003.claim            part 3 is being written, and by whom
                   00003.json             what part 3 has finished: a manifest of its files
                   finish.claim           somebody writes the shared files
        model-....safetensors.TOKEN.part  renamed when the file is complete
        config.json, index, ...           last, by the part that sees all others complete

The machines share nothing but the file system, and need of it only exclusive creation and renames.
Files that a part finished are on the disk before they get their names, and stay if it dies.
Unfinished files have the run's own token in their names, so that even two runs of one part do no
harm to each other.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any

from . import manifest
from .claims import Claim
from .errors import CorruptError, TargetError, UsageError
from .manifest import PARTS
from .parts import Part, share
from .plan import ConversionPlan, PlannedFile, PlannedTensor, document
from .sums import Sums
from .target import check_space, finished, is_whole
from .unchanged import is_same_plan
from .work import SourceWatch
from .writing import LOCK, FileWriter, target_error, write_document

_PLAN, _SCHEMA, _TRIES = "plan.json", 1, 5
_UNFINISHED = re.compile(r"(.+)\.[0-9a-f]{16}\.part")


class PartSink:
    """Writes one part of a plan into a folder; a context manager around `execute.run`.

    Attributes:
        pending: what this part has to write.
        manifest: what this part wrote.
        unchanged: whether the whole folder was finished before.
        whole: whether it is finished now.
        num_complete: parts that are written, this one included.
    """

    def __init__(
        self,
        folder: str,
        plan: ConversionPlan,
        source: dict[str, Any],
        algorithm: str,
        *,
        part: Part,
        work: str,
        resume: bool = False,
    ) -> None:
        """Nothing happens yet.

        Args:
            folder: where to, the same for all parts.
            plan: of all parts.
            source: facts of the source, for the manifest.
            algorithm: of the hashes.
            part: which one.
            work: what this conversion is; see `work.py`.
            resume: whether to go on where an earlier run of this part ended.
        """
        self.folder = os.path.abspath(folder)
        self._own = self.pending = share(plan, part)
        self.unchanged, self.whole, self.num_complete = False, False, 0
        self._plan, self._algorithm, self._part = plan, algorithm, part
        self._work, self._resume = work, resume
        self.manifest = manifest.planned(self._own, source, algorithm)
        self._watch = SourceWatch(self._own)
        self._state = os.path.join(self.folder, PARTS)
        self._claim = Claim(
            os.path.join(self._state, f"{part.number:05d}.claim"), f"part {part} of {self.folder}"
        )
        suffix = f".{self._claim.token}.part"
        self._writer = FileWriter(self.folder, self.manifest, suffix, keeps=True)
        self._was_complete = False

    @property
    def place(self) -> str:
        """Where the result is."""
        return self.folder

    def __enter__(self) -> PartSink:
        """Join the other parts.

        Raises:
            TargetError: the folder holds something else, this part is being written or was begun
                before, or the disk is too small.
            UsageError: the other parts are of another conversion.
        """
        try:
            self._take()
        except (OSError, TargetError) as error:
            self._clean_up()
            if self._is_done():  # others made the folder whole and dropped their notes meanwhile
                self._take_over()
            elif isinstance(error, OSError):
                raise target_error(self.folder, error, keeps=True) from error
            else:
                raise
        except BaseException:
            self._clean_up()
            raise
        return self

    def _take(self) -> None:
        if os.path.lexists(self.folder) and not os.path.isdir(self.folder):
            raise TargetError(f"{self.folder} is a file", expected="a folder, or a new name")
        if self._is_done():
            self._take_over()
            return
        self._join()
        self._claim.take(take_over=self._resume)
        there = self._read_state(self._part.number)
        if there is not None and not self._resume:
            raise TargetError(
                f"part {self._part} of {self.folder} was begun before",
                found=f"{self._state_name(self._part.number)} in {PARTS}",
                expected="a part that no run has begun",
                fix="add --resume to go on with it",
            )
        self._keep_finished(there or {"files": {}})
        check_space(self.folder, self.pending)
        self._was_complete = there is not None and there["status"] == "complete"
        if self._was_complete and not self.pending.files:
            self.pending = replace(self.pending, replicas=())
        self._note()

    def _is_done(self) -> bool:
        """Whether all parts were finished before."""
        return self._resume and not os.path.isdir(self._state) and self._is_whole()

    def _take_over(self) -> None:
        """Take what is in the folder for the result."""
        self._drop_notes()
        self.unchanged, self.whole, self.num_complete = True, True, self._part.count
        self.pending = replace(self.pending, files=(), replicas=())

    def _is_whole(self) -> bool:
        """Whether the folder holds what all parts make, and what they share."""
        if not os.path.isfile(os.path.join(self.folder, manifest.NAME)):
            return False
        there = manifest.read(self.folder)
        source = self.manifest["source"]
        same = is_same_plan(there, self._plan, source, self._algorithm)
        return same and is_whole(self.folder, there)

    def _join(self) -> None:
        """Begin what the first part begins, and see that it is the same for all."""
        present = set(os.listdir(self.folder)) if os.path.isdir(self.folder) else set()
        others = sorted(name for name in present if not name.startswith(PARTS))
        if others and not os.path.isdir(self._state):
            if LOCK in others:
                raise self._locked("end it with --resume and no --part, or remove the folder")
            again = "" if self._resume else ", or add --resume if it holds these parts already"
            raise TargetError(
                f"{self.folder} is not empty; nothing was written",
                found=", ".join(others[:5]) + (", ..." if len(others) > 5 else ""),
                expected="an empty or new folder, or one that other parts have begun",
                fix=f"choose another folder{again}",
            )
        plan = {"schema": _SCHEMA, "parts": self._part.count, "work": self._work}
        if not os.path.isdir(self._state):
            self._begin(plan)
        there: Any = None
        with open(os.path.join(self._state, _PLAN), "rb") as file, contextlib.suppress(ValueError):
            there = json.load(file)
        if there != plan:
            known = there if isinstance(there, dict) else {}
            raise UsageError(
                f"part {self._part} does not belong to the parts that are in {self.folder}",
                found=f"{self._part.count} parts"
                + ("" if known.get("work") == self._work else " of another source or options"),
                expected=f"{known.get('parts', 'other')} parts, as those before",
                fix="give all parts the same command; to begin again, remove the folder first",
            )
        if os.path.lexists(os.path.join(self.folder, LOCK)):
            raise self._locked("remove this file")

    def _locked(self, if_dead: str) -> TargetError:
        """Another machine's lock cannot be tried, so the file alone counts."""
        return TargetError(
            f"{self.folder} is being written by another run of mtt, or was by one that died",
            found=LOCK,
            fix=f"wait for it; if it died, {if_dead}",
        )

    def _begin(self, plan: Mapping[str, object]) -> None:
        """Make the folder of the parts' notes: it appears with its plan, and once."""
        beginning = f"{self._state}.{self._claim.token}"
        os.makedirs(beginning)
        try:
            write_document(beginning, _PLAN, document(plan), keeps=True)
            try:
                os.rename(beginning, self._state)
            except OSError:
                if not os.path.isdir(self._state):  # else another part was faster
                    raise
        finally:
            shutil.rmtree(beginning, ignore_errors=True)

    def _state_name(self, number: int) -> str:
        return f"{number:05d}.json"

    def _read_state(self, number: int) -> dict[str, Any] | None:
        """What a part has finished; None if it was not begun."""
        path = os.path.join(self._state, self._state_name(number))
        for _ in range(_TRIES):
            try:
                with open(path, "rb") as file:
                    state = json.load(file)
                if state["status"] in ("running", "complete"):
                    return {**state, "files": dict(state["files"])}
            except FileNotFoundError:
                return None
            except OSError as error:  # a file system of the network may know only the one before
                if error.errno != errno.ESTALE:
                    raise
            except (ValueError, KeyError, TypeError, AttributeError):
                break
        return {"status": "running", "files": {}}  # damaged: written again with the part

    def _note(self) -> None:
        name = self._state_name(self._part.number)
        manifest.write(self._state, self.manifest, name, suffix=self._writer.suffix, keeps=True)

    def _note_as_holder(self) -> None:
        """The same, unless another run has the part by now.

        Raises:
            TargetError: it has.
        """
        self._claim.check()
        self._note()

    def _keep_finished(self, there: dict[str, Any]) -> None:
        """Keep what an earlier run of this part finished, and remove the rest of it."""
        kept = finished(self.folder, there, self._own)
        for name in kept:
            self.manifest["files"][name] = there["files"][name]
        rest = tuple(file for file in self._own.files if file.name not in kept)
        self._sweep(file.name for file in self._own.files)
        self.pending = replace(self._own, files=rest)

    def _sweep(self, finished_names: Iterable[str]) -> None:
        """Remove unfinished files of runs that are gone."""
        names = set(finished_names)
        for folder in {os.path.dirname(name) for name in names}:
            with contextlib.suppress(FileNotFoundError):
                for name in os.listdir(os.path.join(self.folder, folder)):
                    hit = _UNFINISHED.fullmatch(name)
                    if hit and os.path.join(folder, hit[1]) in names:
                        os.unlink(os.path.join(self.folder, folder, name))

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
            TargetError: the disk is full or the folder not writable, or another run took over.
            CorruptError: a file that it came from was changed meanwhile.
        """
        self._watch.check(file)
        self._writer.complete(file, self._note_as_holder)

    def finish(self) -> None:
        """Note that this part is complete; if all are, write what they share.

        Raises:
            TargetError: the disk is full or the folder not writable, or another run took over.
            CorruptError: a file of the source was changed meanwhile.
        """
        if self.unchanged:
            return
        self._watch.check()
        try:
            self.manifest["status"] = "complete"
            self._note_as_holder()
            # After a change of its own a client of a network file system looks anew.
            states = [self._read_state(number) for number in range(1, self._part.count + 1)]
            complete = [state for state in states if state and state["status"] == "complete"]
            self.num_complete = len(complete)
            if self.num_complete == self._part.count:
                self._finish_all(complete)
            elif self._is_whole():  # the notes are gone
                self.whole, self.num_complete = True, self._part.count
        except (OSError, TargetError) as error:
            if self._is_whole():
                self.whole, self.num_complete = True, self._part.count
            elif isinstance(error, OSError):
                raise target_error(self.folder, error, keeps=True) from error
            else:
                raise

    def _finish_all(self, states: list[dict[str, Any]]) -> None:
        """Write the shared files, unless another part does.

        Of two that are complete at once one is faster; if that one dies, any part that is run
        again does it.
        """
        claim = Claim(os.path.join(self._state, "finish.claim"), f"the index of {self.folder}")
        if not claim.try_take():
            if not self._was_complete:
                return
            try:
                claim.take(take_over=True)
            except TargetError:
                return
        try:
            self._write_shared(states)
        except BaseException:
            claim.release()
            raise
        gone = f"{self._state}.{self._claim.token}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._state, gone)
        self._drop_notes()

    def _drop_notes(self) -> None:
        """Remove the notes of all parts, which have another name by now."""
        for name in os.listdir(self.folder):
            if name.startswith(f"{PARTS}."):
                shutil.rmtree(os.path.join(self.folder, name), ignore_errors=True)

    def _write_shared(self, states: list[dict[str, Any]]) -> None:
        written = {name: entry for state in states for name, entry in state["files"].items()}
        record = manifest.planned(self._plan, self.manifest["source"], self._algorithm)
        record["files"] = {file.name: written[file.name] for file in self._plan.files}
        if lost := set(written) - finished(self.folder, record, self._plan):
            raise CorruptError(
                f"a finished file of {self.folder} is not there any more",
                found=", ".join(sorted(lost)[:5]),
                expected="all files of all parts, in their sizes",
                fix="run the parts again with --resume: they write what is missing",
            )
        for name, data in self._plan.documents.items():
            write_document(self.folder, name, data, self._writer.suffix, keeps=True)
        record["documents"] = manifest.digests(self._plan.documents, self._algorithm)
        record["status"] = "complete"
        manifest.write(self.folder, record, suffix=self._writer.suffix, keeps=True)
        self.whole = True
        # Not before: a run that writes them too finds the folder whole when it misses its own.
        self._sweep({*written, *self._plan.documents, manifest.NAME})

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._clean_up()

    def _clean_up(self) -> None:
        """Remove what is unfinished; what is finished stays for the others."""
        self._writer.close()
        for name in self._writer.begun:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self.folder, name + self._writer.suffix))
        self._claim.release()
