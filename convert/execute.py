"""Runs a plan: bytes move from sources to a sink in windows of about 2 MB.

    1  every worker takes a file, streams its tensors in order, and sums up what it writes
    2  tensors that are columns of the same rows, of several files, are read once and written
       together: what tensor parallelism makes of a row-parallel weight
    3  idle workers take tensors from the files that are left; as far as there are others, no two
       write to one file, where one would wait for the other
    4  where there are more cores than workers, each reads and hashes ahead in a thread of its own
    5  the sink completes each file when its last tensor is there

Memory is the workers' windows, whatever the model's size.
"""

from __future__ import annotations

import os
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

from .ahead import ahead
from .casting import cast_window
from .page_cache import is_filled_by
from .plan import ConversionPlan, PlannedFile, PlannedTensor
from .reading import (
    WINDOW_BYTES,
    FileReader,
    columns,
    neighbours,
    stream,
    stream_together,
    window_size,
)
from .sums import Sums

_AHEAD = 2
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

    def tensor_done(self, file: PlannedFile, tensor: PlannedTensor, sums: Sums) -> None:
        """All bytes of a tensor were written; `sums` are of them."""

    def file_done(self, file: PlannedFile) -> None:
        """All tensors of a file were written."""


def run(
    plan: ConversionPlan,
    sink: Sink,
    *,
    num_workers: int = 1,
    algorithm: str = "xxh3_128",
    progress: Progress | None = None,
    file_by_file: bool = False,
) -> None:
    """Stream every tensor of the plan into the sink.

    Args:
        plan: what to write; its replicas are the caller's to check.
        sink: where to.
        num_workers: threads that write; each holds a window, or a few if it reads ahead.
        algorithm: hash reported per tensor.
        progress: called with (bytes done, bytes in all), from one thread at a time.
        file_by_file: complete each file before the next is begun, as far as workers allow, even
            where that reads rows again.

    Raises:
        MTTError: whatever a source or the sink raises; other workers stop at their next window.
    """
    for file in plan.files:
        if not file.tensors:
            sink.file_done(file)
    num_workers = min(num_workers, plan.num_tensors)
    job = _Job(_queue(plan, file_by_file), sink, algorithm, progress)
    job.gives_back = is_filled_by(plan.num_bytes)
    job.depth = _depth(plan, num_workers)
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


def memory(plan: ConversionPlan, num_workers: int) -> int:
    """About how many bytes the workers of a run hold: their windows, and what is read for them."""
    sources = [tensor.source for file in plan.files for tensor in file.tensors]
    largest = max((min(window_size(s), s.num_bytes) for s in sources), default=0)
    return num_workers * (2 + _depth(plan, num_workers)) * largest


def _depth(plan: ConversionPlan, num_workers: int) -> int:
    """Windows that each worker reads ahead."""
    if num_workers >= num_cores():
        return 0
    sizes = (window_size(tensor.source) for file in plan.files for tensor in file.tensors)
    return _AHEAD if max(sizes, default=0) <= WINDOW_BYTES else 1


def num_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


Unit = tuple[tuple[PlannedFile, PlannedTensor], ...]


@dataclass(slots=True)
class _Entry:
    """A file whose tensors wait; each with those of other files that are written with it.

    Attributes:
        bundle: the same number for files that are written together.
    """

    units: deque[Unit]
    bundle: int


def _queue(plan: ConversionPlan, file_by_file: bool) -> deque[_Entry]:
    """What is to be done, file by file: in the order of the plan, or the longest work first."""
    together = {} if file_by_file else _together(plan)
    bundle = {file.name: number for number, file in enumerate(plan.files)}
    for unit in together.values():
        joined = {bundle[file.name] for file, _ in unit}
        if len(joined) > 1:
            for name, number in bundle.items():
                bundle[name] = min(joined) if number in joined else number
    entries: deque[_Entry] = deque()
    for file in plan.files:
        units: deque[Unit] = deque()
        for tensor in file.tensors:
            unit = together.get((file.name, tensor.name), ((file, tensor),))
            if unit[0][1] is tensor:
                units.append(unit)
        entries.append(_Entry(units, bundle[file.name]))
    if file_by_file:
        return entries
    # The largest tensors early: one that is left to the end keeps one worker alone.
    return deque(sorted(entries, key=lambda entry: -max(map(_size, entry.units), default=0)))


def _size(unit: Unit) -> int:
    return sum(tensor.num_bytes for _, tensor in unit)


def _together(plan: ConversionPlan) -> dict[tuple[str, str], Unit]:
    """For tensors that share their rows with others: all of them, by increasing column."""
    alike: defaultdict[object, list[tuple[PlannedFile, PlannedTensor]]] = defaultdict(list)
    for file in plan.files:
        for tensor in file.tensors:
            if place := columns(tensor.source):
                alike[place, tensor.dtype].append((file, tensor))
    found: dict[tuple[str, str], Unit] = {}
    for group in alike.values():
        group.sort(key=lambda item: item[1].source.pieces[0].offset)
        while group:
            first = group[0][1].source
            count = 1
            while count < len(group) and neighbours(first, group[count][1].source):
                count += 1
            unit = tuple(group[:count])
            del group[:count]
            if count > 1:
                found |= {(file.name, tensor.name): unit for file, tensor in unit}
    return found


@dataclass(slots=True)
class _Step:
    """A window of each tensor of a unit; or, behind the last, their sums."""

    unit: Unit
    position: int = 0
    data: Sequence[memoryview] = ()
    sums: Sequence[Sums] = ()


class _Job:
    """State that the workers of one run share.

    Attributes:
        depth: windows that each worker reads ahead.
        gives_back: whether what was read is not to stay in the system's cache.
    """

    depth = 0
    gives_back = False

    def __init__(
        self, waiting: deque[_Entry], sink: Sink, algorithm: str, progress: Progress | None
    ) -> None:
        self._sink, self._algorithm, self._progress = sink, algorithm, progress
        self._lock = threading.Lock()
        self._waiting = waiting
        self._busy: Counter[int] = Counter()
        tensors = [item for entry in waiting for unit in entry.units for item in unit]
        self._left = Counter(file.name for file, _ in tensors)
        self._done, self._total = 0, sum(tensor.num_bytes for _, tensor in tensors)
        self._stopped = False

    def stop(self) -> None:
        """Let all workers end at their next window."""
        self._stopped = True

    def work(self) -> None:
        """Copy tensors until there are none left."""
        with FileReader(1 + self.depth, gives_back=self.gives_back) as reader:
            steps = self._steps(reader)
            with closing(ahead(steps, self.depth) if self.depth else steps) as steps:
                try:
                    for step in steps:
                        self._write(step)
                except BaseException:
                    self.stop()
                    raise

    def _units(self) -> Iterator[Unit]:
        """Tensors for one worker: files of its own first, then what others have not begun."""
        own: _Entry | None = None
        while not self._stopped:
            with self._lock:
                if own is None or not own.units:
                    if own is not None:
                        self._busy[own.bundle] -= 1
                    own = self._next_file()
                    if own is None:
                        return
                unit = own.units.popleft()
            yield unit

    def _next_file(self) -> _Entry | None:
        """The first file that no other worker writes to, or that the fewest have taken last."""
        entries = [entry for entry in self._waiting if entry.units]
        if not entries:
            return None
        entry = min(entries, key=lambda entry: self._busy[entry.bundle])
        self._busy[entry.bundle] += 1
        self._waiting.remove(entry)
        self._waiting.append(entry)
        return entry

    def _steps(self, reader: FileReader) -> Generator[_Step, None, None]:
        """What one worker reads: windows, and the sums of a unit after its last."""
        for unit in self._units():
            sums = [Sums(self._algorithm, checksum=bool(t.checksum_at)) for _, t in unit]
            position = 0
            for windows in _windows(unit, reader):
                if self._stopped:
                    return
                pairs = zip(unit, windows, strict=True)
                data = [cast_window(w, t.source.dtype, t.dtype) for (_, t), w in pairs]
                for of_tensor, part in zip(sums, data, strict=True):
                    of_tensor.update(part)
                yield _Step(unit, position, data)
                position += len(data[0])
            yield _Step(unit, sums=sums)

    def _write(self, step: _Step) -> None:
        if not step.sums:
            for (file, tensor), data in zip(step.unit, step.data, strict=True):
                self._sink.write(file, tensor, step.position, data)
                self._advance(len(data))
            return
        for (file, tensor), sums in zip(step.unit, step.sums, strict=True):
            self._sink.tensor_done(file, tensor, sums)
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


def _windows(unit: Unit, reader: FileReader) -> Iterator[Sequence[memoryview]]:
    sources = [tensor.source for _, tensor in unit]
    if len(sources) > 1:
        return stream_together(sources, reader)
    return ((window,) for window in stream(sources[0], reader))
