"""Runs a plan: bytes move from sources to a sink in windows of about 1 MB.

    1  every worker takes a file, streams its tensors in order, and hashes what it writes
    2  idle workers take tensors from the files that are left
    3  the sink completes each file when its last tensor is there

Memory is the workers' windows, whatever the model's size.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Protocol

from .casting import cast_window
from .manifest import new_hasher
from .plan import ConversionPlan, PlannedFile, PlannedTensor
from .reading import FileReader, stream

Progress = Callable[[int, int], None]


class Sink(Protocol):
    """Where tensors go; calls come from several threads, but one tensor from one thread.

    For every file: `write` at rising positions of each tensor, then `tensor_done` for each
    tensor, and `file_done` once all its tensors are.
    """

    def write(
        self, file: PlannedFile, tensor: PlannedTensor, position: int, data: memoryview
    ) -> None:
        """Bytes of a tensor from `position` bytes after its beginning."""

    def tensor_done(self, file: PlannedFile, tensor: PlannedTensor, digest: str) -> None:
        """All bytes of a tensor were written."""

    def file_done(self, file: PlannedFile) -> None:
        """All tensors of a file were written."""


def run(
    plan: ConversionPlan,
    sink: Sink,
    *,
    num_workers: int = 1,
    algorithm: str = "xxh3_128",
    progress: Progress | None = None,
) -> None:
    """Stream every tensor of the plan into the sink.

    Args:
        plan: what to write; its replicas are the caller's to check.
        sink: where to.
        num_workers: threads; each holds one window.
        algorithm: hash reported per tensor.
        progress: called with (bytes done, bytes in all), from one thread at a time.

    Raises:
        MTTError: whatever a source or the sink raises; other workers stop at their next window.
    """
    for file in plan.files:
        if not file.tensors:
            sink.file_done(file)
    job = _Job(plan, sink, algorithm, progress)
    num_workers = min(num_workers, plan.num_tensors)
    if num_workers <= 1:
        job.work()
        return
    with ThreadPoolExecutor(num_workers, thread_name_prefix="mtt") as pool:
        try:
            for worker in as_completed([pool.submit(job.work) for _ in range(num_workers)]):
                worker.result()
        except BaseException:
            job.stop()
            raise


class _Job:
    """State that the workers of one run share."""

    def __init__(
        self, plan: ConversionPlan, sink: Sink, algorithm: str, progress: Progress | None
    ) -> None:
        self._sink, self._algorithm, self._progress = sink, algorithm, progress
        self._lock = threading.Lock()
        self._waiting = deque((file, deque(file.tensors)) for file in plan.files)
        self._left = {file.name: len(file.tensors) for file in plan.files}
        self._done, self._total = 0, sum(t.num_bytes for f in plan.files for t in f.tensors)
        self._stopped = False

    def stop(self) -> None:
        """Let all workers end at their next window."""
        self._stopped = True

    def work(self) -> None:
        """Copy tensors until there are none left."""
        with FileReader() as reader:
            try:
                for file, tensor in self._units():
                    self._copy(reader, file, tensor)
            except BaseException:
                self.stop()
                raise

    def _units(self) -> Iterator[tuple[PlannedFile, PlannedTensor]]:
        """Tensors for one worker: files of its own first, then what others have not begun."""
        own: tuple[PlannedFile, deque[PlannedTensor]] | None = None
        while not self._stopped:
            with self._lock:
                if own is None or not own[1]:
                    own = next((entry for entry in self._waiting if entry[1]), None)
                    if own is None:
                        return
                    self._waiting.remove(own)
                    self._waiting.append(own)
                tensor = own[1].popleft()
            yield own[0], tensor

    def _copy(self, reader: FileReader, file: PlannedFile, tensor: PlannedTensor) -> None:
        hasher = new_hasher(self._algorithm)
        position = 0
        for window in stream(tensor.source, reader):
            if self._stopped:
                return
            data = cast_window(window, tensor.source.dtype, tensor.dtype)
            hasher.update(data)
            self._sink.write(file, tensor, position, data)
            position += len(data)
            self._advance(len(data))
        self._sink.tensor_done(file, tensor, hasher.hexdigest())
        with self._lock:
            self._left[file.name] -= 1
            complete = self._left[file.name] == 0
        if complete:
            self._sink.file_done(file)

    def _advance(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            if self._progress:
                self._progress(self._done, self._total)
