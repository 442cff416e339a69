"""Running a plan: the same bytes whoever works on what, each read once, and calls of the system
that are not everywhere.

A plan here joins and cuts a matrix in numbered elements, as tensor parallelism does.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mtt_convert
from mtt_convert import execute, page_cache, reading, sources, sums, writing
from mtt_convert.ahead import ahead
from mtt_convert.dtypes import DTYPES
from mtt_convert.plan import ConversionPlan, PlannedFile, PlannedTensor
from mtt_convert.reading import FileReader
from mtt_convert.sums import Sums
from mtt_convert.tensors import LazyTensor, concat
from tests.convert.surgery import TORCH, Golden, snapshot

INT32 = DTYPES["int32"]
ROWS, COLUMNS, PARTS = 600, 480, 4
LAYERS = 3


class Sink:
    """Keeps what it is given, and by which thread."""

    def __init__(self) -> None:
        self.data: dict[tuple[str, str], bytearray] = {}
        self.threads: dict[str, set[int]] = {}
        self.order: list[str] = []
        self.opened: list[str] = []
        self.lock = threading.Lock()

    def write(
        self, file: PlannedFile, tensor: PlannedTensor, position: int, data: memoryview
    ) -> None:
        with self.lock:
            if file.name not in self.opened:
                self.opened.append(file.name)
            kept = self.data.setdefault((file.name, tensor.name), bytearray())
            assert len(kept) == position
            kept += data
            self.threads.setdefault(file.name, set()).add(threading.get_ident())

    def tensor_done(self, file: PlannedFile, tensor: PlannedTensor, sums: Sums) -> None:
        assert sums.digest

    def file_done(self, file: PlannedFile) -> None:
        self.order.append(file.name)


@pytest.fixture(scope="module")
def matrices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`LAYERS` matrices of different numbers, one after another."""
    path = tmp_path_factory.mktemp("execute") / "matrices.bin"
    np.arange(LAYERS * ROWS * COLUMNS, dtype=np.int32).tofile(path)
    return path


def matrix(path: Path, layer: int) -> LazyTensor:
    offset = 4 * layer * ROWS * COLUMNS
    return LazyTensor.in_file(INT32, (ROWS, COLUMNS), str(path), offset)


def numbers(layer: int) -> np.ndarray:
    first = layer * ROWS * COLUMNS
    return np.arange(first, first + ROWS * COLUMNS, dtype=np.int32).reshape(ROWS, COLUMNS)


def cut(path: Path) -> ConversionPlan:
    """Every matrix by columns and by rows, to a file per part, as ranks have them."""
    files = []
    for part in range(PARTS):
        tensors = []
        for layer in range(LAYERS):
            whole = matrix(path, layer)
            for name, source in (
                ("columns", whole.chunk(PARTS, 1)[part]),
                ("rows", whole.chunk(PARTS, 0)[part]),
            ):
                offset = sum(tensor.num_bytes for tensor in tensors)
                tensors.append(PlannedTensor(f"{layer}.{name}", source, INT32, offset))
        files.append(PlannedFile(f"part{part}", (), tuple(tensors)))
    return ConversionPlan(tuple(files), {}, ())


def wanted(layer: int, kind: str, part: int) -> np.ndarray:
    return np.split(numbers(layer), PARTS, axis=1 if kind == "columns" else 0)[part]


def check(sink: Sink) -> None:
    for part in range(PARTS):
        for layer in range(LAYERS):
            for kind in ("columns", "rows"):
                data = bytes(sink.data[f"part{part}", f"{layer}.{kind}"])
                assert data == wanted(layer, kind, part).tobytes(), (part, layer, kind)
    assert sorted(sink.order) == [f"part{part}" for part in range(PARTS)]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes every call to the system reads."""
    calls: list[int] = []
    real = sources.LocalFile.read_into

    def read_into(self: sources.LocalFile, out: memoryview, offset: int) -> int:
        calls.append(len(out))
        return real(self, out, offset)

    monkeypatch.setattr(sources.LocalFile, "read_into", read_into)
    return calls


@pytest.mark.parametrize("num_cores", [1, 8], ids=["", "ahead"])
@pytest.mark.parametrize("num_workers", [1, 2, 5])
@pytest.mark.parametrize("file_by_file", [False, True])
def test_the_same_bytes_whoever_works(
    matrices: Path,
    num_cores: int,
    num_workers: int,
    file_by_file: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(execute, "num_cores", lambda: num_cores)
    seen: list[tuple[int, int]] = []
    sink = Sink()
    execute.run(
        cut(matrices),
        sink,
        num_workers=num_workers,
        progress=lambda done, total: seen.append((done, total)),
        file_by_file=file_by_file,
    )
    check(sink)
    total = 2 * 4 * LAYERS * ROWS * COLUMNS
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_rows_are_read_once_for_all_who_take_columns(
    matrices: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    execute.run(cut(matrices), Sink())
    assert sum(calls) == 2 * 4 * LAYERS * ROWS * COLUMNS
    assert len(calls) < 2 * LAYERS * (PARTS + 2)  # not one for each row


def test_file_by_file_has_one_file_open(matrices: Path) -> None:
    open_files: list[int] = []

    class Watching(Sink):
        def file_done(self, file: PlannedFile) -> None:
            open_files.append(len(self.opened) - len(self.order))
            super().file_done(file)

    execute.run(cut(matrices), Watching(), file_by_file=True)
    assert open_files == [1] * PARTS
    open_files.clear()
    execute.run(cut(matrices), Watching())
    assert open_files == [PARTS, *range(PARTS - 1, 0, -1)]


def test_columns_of_joined_matrices_are_read_once_too(
    matrices: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two shards joined by rows and cut by columns: tensors of two pieces each."""
    joined = concat([matrix(matrices, 0), matrix(matrices, 2)])
    files = tuple(
        PlannedFile(f"part{n}", (), (PlannedTensor("weight", part, INT32, 0),))
        for n, part in enumerate(joined.chunk(2, 1))
    )
    calls, sink = counted(monkeypatch), Sink()
    execute.run(ConversionPlan(files, {}, ()), sink)
    assert sum(calls) == joined.num_bytes
    whole = np.concatenate([numbers(0), numbers(2)])
    for n, half in enumerate(np.split(whole, 2, axis=1)):
        assert bytes(sink.data[f"part{n}", "weight"]) == half.tobytes()


def test_columns_that_are_not_side_by_side_are_read_apart(matrices: Path) -> None:
    """Equal shapes and strides alone do not make neighbours: other layers, other rows."""
    columns = matrix(matrices, 0).narrow(1, 0, 100), matrix(matrices, 1).narrow(1, 0, 100)
    columns += (matrix(matrices, 0).narrow(1, 50, 100),)  # these overlap
    tensors = tuple(
        PlannedTensor(str(n), tensor, INT32, n * tensor.num_bytes)
        for n, tensor in enumerate(columns)
    )
    sink = Sink()
    execute.run(ConversionPlan((PlannedFile("f", (), tensors),), {}, ()), sink)
    found = [bytes(sink.data["f", str(n)]) for n in range(3)]
    assert found[0] == numbers(0)[:, :100].tobytes()
    assert found[1] == numbers(1)[:, :100].tobytes()
    assert found[2] == numbers(0)[:, 50:150].tobytes()


def test_two_workers_begin_with_files_that_are_not_written_together(matrices: Path) -> None:
    """Two stages of two ranks each: one worker for each stage."""
    files = []
    for stage in range(2):
        for part, tensor in enumerate(matrix(matrices, stage).chunk(2, 1)):
            own = matrix(matrices, stage).narrow(0, part, 1)
            columns = PlannedTensor("columns", tensor, INT32, 0)
            row = PlannedTensor("row", own, INT32, tensor.num_bytes)
            files.append(PlannedFile(f"{stage}.{part}", (), (columns, row)))
    first: dict[int, str] = {}
    both = threading.Barrier(2)

    class Waiting(Sink):
        def write(self, file: PlannedFile, *args: Any) -> None:
            with self.lock:
                is_first = threading.get_ident() not in first
                first.setdefault(threading.get_ident(), file.name)
            if is_first:
                both.wait(10)
            super().write(file, *args)

    execute.run(ConversionPlan(tuple(files), {}, ()), Waiting(), num_workers=2)
    assert sorted(first.values()) == ["0.0", "1.0"]


def test_the_largest_tensor_is_not_left_to_the_end(matrices: Path) -> None:
    sizes = {"small": 5, "large": 100, "middle": 20}
    files = tuple(
        PlannedFile(name, (), (PlannedTensor("t", matrix(matrices, 0).narrow(0, 0, n), INT32, 0),))
        for name, n in sizes.items()
    )
    sink = Sink()
    execute.run(ConversionPlan(files, {}, ()), sink)
    assert sink.order == ["large", "middle", "small"]
    execute.run(ConversionPlan(files, {}, ()), sink := Sink(), file_by_file=True)
    assert sink.order == list(sizes)


@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("num_cores", [1, 8], ids=["", "ahead"])
def test_a_failing_sink_ends_all_workers(
    matrices: Path, num_workers: int, num_cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "num_cores", lambda: num_cores)

    class Full(Sink):
        def write(self, *args: Any) -> None:
            if len(self.data) == 2:
                raise OSError(errno.ENOSPC, "full")
            super().write(*args)

    sink = Full()
    before = threading.active_count()
    with pytest.raises(OSError, match="full"):
        execute.run(cut(matrices), sink, num_workers=num_workers)
    assert threading.active_count() == before
    assert sink.order == []


# Reading ahead


def test_items_come_in_order_and_no_more_are_made_than_there_is_room_for() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(10):
            made.append(number)
            yield number

    taken = []
    for item in ahead(items(), 2):
        time.sleep(0.01)
        assert len(made) <= len(taken) + 3
        taken.append(item)
    assert taken == list(range(10))


def test_an_error_comes_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyError("source")

    found = []
    with pytest.raises(KeyError, match="source"):
        for item in ahead(items(), 3):
            found.append(item)
    assert found == [1]


def test_closing_ends_the_thread() -> None:
    before = threading.active_count()
    items = ahead(iter(range(1000)), 2)
    assert next(items) == 0
    assert threading.active_count() == before + 1
    items.close()
    assert threading.active_count() == before


# Calls that are not everywhere


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)))
    return path


def read_all(path: Path) -> bytes:
    out = memoryview(bytearray(100))
    with FileReader() as reader:
        reader.read_into(str(path), 50, out)
    return bytes(out)


def test_without_preadv(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv")
    assert read_all(file) == bytes(range(50, 150))


def test_a_system_that_has_no_preadv(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def preadv(*args: object) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "preadv", preadv)
    assert read_all(file) == bytes(range(50, 150))


def test_short_reads_without_preadv(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pread
    monkeypatch.delattr(os, "preadv")
    monkeypatch.setattr(os, "pread", lambda fd, count, offset: real(fd, min(count, 7), offset))
    assert read_all(file) == bytes(range(50, 150))


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_other_errors_of_preadv_are_errors(
    file: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def preadv(*args: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(mtt_convert.SourceError, match=str(file)) as caught:
        read_all(file)
    assert os.strerror(code) in str(caught.value)


def test_checksums_go_on_from_window_to_window(
    golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"to": "torch", "tp": 2}
    mtt_convert.convert(golden(TORCH), tmp_path / "usual", **options)
    monkeypatch.setattr(reading, "WINDOW_BYTES", 1024)
    mtt_convert.convert(golden(TORCH), tmp_path / "out", **options)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "usual")
    for path in (tmp_path / "out").rglob("*.pt"):
        assert zipfile.ZipFile(path).testzip() is None


def test_checksums_without_zlib_ng(
    golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("zlib_ng", reason="no wheel for this machine")
    options = {"to": "torch", "tp": 2}
    mtt_convert.convert(golden(TORCH), tmp_path / "with", **options)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "zlib_ng", None)
        without.setitem(sys.modules, "zlib_ng.zlib_ng", None)
        importlib.reload(sums)
        assert sums.crc32 is zlib.crc32
        without.setattr("mtt_convert.execute.Sums", sums.Sums)
        mtt_convert.convert(golden(TORCH), tmp_path / "without", **options)
    importlib.reload(sums)
    assert sums.crc32 is not zlib.crc32
    assert snapshot(tmp_path / "with") == snapshot(tmp_path / "without")
    for path in (tmp_path / "without").rglob("*.pt"):
        assert zipfile.ZipFile(path).testzip() is None


def test_writes_are_short_and_keep_to_their_places(
    golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However short they are, and where the system writes less than it is asked to."""
    mtt_convert.convert(golden(TORCH), tmp_path / "usual")
    real, written = os.pwrite, []

    def pwrite(descriptor: int, data: memoryview, position: int) -> int:
        written.append((position, position + len(data)))
        return real(descriptor, data[:1000], position)

    monkeypatch.setattr(writing, "_MOST_AT_ONCE", 4096)
    monkeypatch.setattr(os, "pwrite", pwrite)
    mtt_convert.convert(golden(TORCH), tmp_path / "out")
    assert all(start // 4096 == (end - 1) // 4096 for start, end in written)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "usual")


# The page cache


def conversion(
    golden: Golden, out: Path, monkeypatch: pytest.MonkeyPatch, memory: int, resume: bool = False
) -> list[tuple[str, int, int]]:
    """(file, offset, bytes) of every part that was given back on a machine of so much memory."""
    given: list[tuple[str, int, int]] = []

    def fadvise(descriptor: int, offset: int, count: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        given.append((os.readlink(f"/proc/self/fd/{descriptor}"), offset, count))

    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    monkeypatch.setattr(page_cache, "_memory", lambda: memory)
    monkeypatch.setattr(page_cache, "LEAST_BYTES", 1)
    monkeypatch.setattr(page_cache, "EVERY_BYTES", 1 << 13 if resume else 1 << 18)
    mtt_convert.convert(golden(TORCH), out, resume=resume)
    return given


linux = pytest.mark.skipif(sys.platform != "linux", reason="names of open files are Linux's")


@linux
def test_a_conversion_that_would_fill_the_cache_gives_it_back(
    golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    given = conversion(golden, out, monkeypatch, memory=1 << 20)
    written = [item for item in given if item[0].startswith(str(out))]
    read = [item for item in given if item not in written]
    weights = (out / "model.safetensors").stat().st_size
    assert sum(count for _, _, count in read) > 0.95 * weights
    assert len(set(read)) == len(read)
    assert len(written) > weights // (1 << 18)
    assert all(item[1:] == (0, 0) for item in written)


@linux
def test_a_small_one_leaves_it(
    golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert conversion(golden, tmp_path / "out", monkeypatch, memory=1 << 30) == []


@linux
def test_what_is_to_survive_goes_to_the_disk_while_more_is_written(
    golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte of every tensor, once, also of those that take several windows."""
    out = tmp_path / "out"
    monkeypatch.setattr(reading, "WINDOW_BYTES", 4096)
    begun = conversion(golden, out, monkeypatch, memory=1 << 30, resume=True)
    assert {name for name, _, _ in begun} == {str(out / "model.safetensors.part")}
    weights = out / "model.safetensors"
    assert max(count for _, _, count in begun) < (1 << 13) + 4096
    ranges = sorted((offset, offset + count) for _, offset, count in begun)
    assert all(end <= start for (_, end), (start, _) in pairwise(ranges))
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    assert ranges[0][0] == header
    assert sum(end - start for start, end in ranges) == weights.stat().st_size - header


@pytest.mark.parametrize("code", [None, errno.EINVAL, errno.ESPIPE, errno.ENOSYS])
def test_without_posix_fadvise(
    golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    mtt_convert.convert(golden(TORCH), tmp_path / "usual")

    def fadvise(*args: object) -> None:
        raise OSError(code, "no such advice")

    if code is None:
        monkeypatch.delattr(os, "posix_fadvise")
    else:
        monkeypatch.setattr(os, "posix_fadvise", fadvise)
    monkeypatch.setattr(page_cache, "_memory", lambda: 1)
    mtt_convert.convert(golden(TORCH), tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "usual")


def test_memory_is_what_a_container_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(page_cache, "_CGROUP_LIMIT", str(limit))
    assert not page_cache.is_filled_by(1000)
    limit.write_text("max\n")
    assert not page_cache.is_filled_by(1000)
    limit.write_text("1500\n")
    assert page_cache.is_filled_by(1000)
