"""A branch on the Hub as the target of a conversion: one file is written, one uploaded.

    main thread      file 2 is written       file 3 is written
    upload thread    file 1 is uploaded      file 2 is uploaded      ... then one commit
    on the disk      files 1 and 2           files 2 and 3

A file leaves the disk when it is uploaded, and its hashes go to the notes of `hub_state`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any

from . import manifest
from .execute import Progress
from .hub import CARD, Blob, Branch, HubPlace, earlier_manifest
from .hub_state import UploadState
from .plan import ConversionPlan, PlannedFile, PlannedTensor, document
from .sums import Sums
from .unchanged import is_same
from .work import work_of_upload
from .writing import FileWriter


class HubSink:
    """Writes a plan to a branch; use it as a context manager around `execute.run`.

    Attributes:
        pending: what is still to be converted, once the branch is open.
        manifest: what the branch will hold.
        place: where people look at the result.
        unchanged: whether the branch holds just that already.
    """

    max_workers = 1

    def __init__(
        self,
        place: HubPlace,
        plan: ConversionPlan,
        source: Mapping[str, Any],
        algorithm: str,
        *,
        overwrite: bool = False,
        resume: bool = False,
        private: bool = False,
        create_pr: bool = False,
        num_workers: int = 1,
        progress: Progress | None = None,
    ) -> None:
        self.pending = plan
        self.manifest = manifest.planned(plan, source, algorithm)
        self.place = str(place)
        self.unchanged = False
        self._plan, self._algorithm, self._overwrite = plan, algorithm, overwrite
        self._branch = Branch(place, private, create_pr)
        self._state = UploadState(place, work_of_upload(plan, algorithm), resume)
        self._writer = FileWriter(self._state.folder, self.manifest)
        self._num_workers, self._progress, self._done = num_workers, progress, 0
        self._blobs: list[Blob] = []
        self._outdated: set[str] = set()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._committed = False

    def __enter__(self) -> HubSink:
        """Open the branch, and see what is to be done.

        Raises:
            HubError: the Hub does not answer, or not to this user.
            TargetError: the branch holds something else, or the disk is too small.
            UsageError: the upload to resume is another one.
        """
        self._state.take()
        try:
            self._branch.open()
            self.place = self._branch.url
            self._look()
            if not self.unchanged:
                self._resume()
                self._state.check_space(file.num_bytes for file in self.pending.files)
        except BaseException:
            self._state.release(committed=False)
            raise
        return self

    def _look(self) -> None:
        """Compare with what the branch holds."""
        there = earlier_manifest(self._branch, self._state.folder)
        source = self.manifest["source"]
        names = {*self.manifest["files"], *self._plan.documents, manifest.NAME}
        taken = self._branch.outdated(names, there)
        if there is not None and is_same(
            there,
            self._plan,
            source,
            self._algorithm,
            num_workers=self._num_workers,
            progress=self._progress,
        ):
            self.unchanged, self.manifest = True, there
            self.pending = replace(self._plan, files=(), replicas=())
        elif taken and not self._overwrite:
            raise self._branch.refuse(taken)
        elif CARD in self._branch.names and there is None and not self._overwrite:
            documents = {n: data for n, data in self._plan.documents.items() if n != CARD}
            self._plan = self.pending = replace(self._plan, documents=documents)
        self._outdated = taken - names

    def _resume(self) -> None:
        """Take over what an earlier run uploaded and the Hub still has."""
        self._blobs = self._branch.held(self._state.blobs())
        self._state.keep(blob.name for blob in self._blobs)
        for name, facts in self._state.files.items():
            self.manifest["files"][name] = facts["manifest"]
        files = tuple(file for file in self._plan.files if file.name not in self._state.files)
        self.pending = replace(self._plan, files=files)
        self._done = sum(blob.size for blob in self._blobs)
        self._report(0)

    def write(
        self, file: PlannedFile, tensor: PlannedTensor, position: int, data: memoryview
    ) -> None:
        """Bytes of a tensor from `position` bytes after its beginning.

        Raises:
            TargetError: the disk is full or the folder not writable.
            HubError: the upload of the file before it failed.
        """
        self._check()
        self._writer.write(file, tensor, position, data)

    def tensor_done(self, file: PlannedFile, tensor: PlannedTensor, sums: Sums) -> None:
        """Note a tensor's hash, and its checksum where the file asks for it."""
        self._writer.tensor_done(file, tensor, sums)

    def file_done(self, file: PlannedFile) -> None:
        """Complete a file, wait until the one before it is uploaded, and begin its upload.

        Raises:
            TargetError: the disk is full or the folder not writable.
            HubError: the upload of the file before it failed.
        """
        self._writer.complete(file)
        self._wait()
        self._thread = threading.Thread(target=self._upload, args=(file,), daemon=True)
        self._thread.start()

    def _upload(self, file: PlannedFile) -> None:
        path = os.path.join(self._state.folder, file.name)
        try:
            blob = self._branch.upload(file.name, path, self._report)
            os.unlink(path)
            self._state.note(blob, manifest=self.manifest["files"][file.name])
            self._blobs.append(blob)
            self._done += file.num_bytes
        except BaseException as error:
            self._failure = error

    def _report(self, sent: int) -> None:
        total = self._plan.num_bytes
        if self._progress is not None:
            self._progress(min(self._done + sent, total), total)

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
        self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def finish(self) -> None:
        """Commit all files at once; from here on they are visible.

        Raises:
            HubError: an upload or the commit failed.
        """
        if self.unchanged:
            return
        self._wait()
        self.manifest["documents"] = manifest.digests(self._plan.documents, self._algorithm)
        self.manifest["status"] = "complete"
        documents = {**self._plan.documents, manifest.NAME: document(self.manifest)}
        source = self.manifest["source"]
        message = f"Upload {source['name']}, {source['converted_by']}"
        self.place = self._branch.commit(self._blobs, documents, self._outdated, message)
        self._committed = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.close()
        self._state.release(committed=self._committed or self.unchanged)
