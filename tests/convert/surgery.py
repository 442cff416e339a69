"""Checkpoints to take apart: copies of goldens, edits, hand-made pickles, and what must hold.

    edited(path)              a torch.save file as Python objects, saved again at the end
    plant(path, program)      the same file, with opcodes in place of a placeholder string
    torch_file(...)           a new file, from opcodes and raw storages
    refused(source, target)   converting it fails as it should, by library and command line

Nothing in here uses the code under test to make its input.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from unittest import mock

import torch

import mtt_convert
from mtt_convert import MTTError, SourceError
from mtt_convert.cli import main

Golden = Callable[[str], Path]

TORCH = "mcore/llama/tp2pp2vpp2/torch"
TORCH_DIST = "mcore-te/llama/tp2pp2/torch_dist"
ITERATION = "iter_0000010"
PLACEHOLDER = "mtt test placeholder"


# Checkpoints


def copy_of(golden: Golden, name: str, folder: Path) -> Path:
    """A checkpoint root of its own, to be changed at will."""
    return Path(shutil.copytree(golden(name), folder / "checkpoint"))


def shard(root: Path, tp: int = 0, pp: int = 0) -> Path:
    """One rank's file."""
    return root / ITERATION / f"mp_rank_{tp:02d}_{pp:03d}" / "model_optim_rng.pt"


def shards(root: Path) -> list[Path]:
    """All ranks' files."""
    return [shard(root, tp, pp) for tp in (0, 1) for pp in (0, 1)]


class _Member:
    """An object of a class of Megatron's."""

    def __new__(cls, *args: object) -> _Member:
        self = super().__new__(cls)
        self.args = args
        return self

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), self.args


def is_stand_in(value: object) -> bool:
    """Whether `megatron_modules` made up its class."""
    return isinstance(value, _Member)


class _Module(ModuleType):
    """A module that has every class."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (_Member,), {"__module__": self.__name__}))
        return self.__dict__[name]


@contextlib.contextmanager
def megatron_modules() -> Iterator[None]:
    """Enough of Megatron for torch.load to read a golden."""
    names = "megatron megatron.core megatron.core.enums megatron.core.transformer"
    names += " megatron.core.transformer.enums"
    with mock.patch.dict(sys.modules, {name: _Module(name) for name in names.split()}):
        yield


@contextlib.contextmanager
def edited(path: Path) -> Iterator[Any]:
    """The object in a file of torch.save; what is left of it at the end replaces the file."""
    with megatron_modules():
        content = torch.load(path, weights_only=False)
        yield content
        torch.save(content, path)


@contextlib.contextmanager
def edited_metadata(root: Path) -> Iterator[Any]:
    """The `.metadata` of a torch_dist checkpoint."""
    path = root / ITERATION / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    yield metadata
    path.write_bytes(pickle.dumps(metadata))


def set_arguments(root: Path, **values: object) -> None:
    """Change Megatron's arguments in every file that has them."""
    common = root / ITERATION / "common.pt"
    for path in [common] if common.exists() else shards(root):
        with edited(path) as content:
            vars(content["args"]).update(values)


def model_of(content: dict[str, Any], name: str) -> dict[str, Any]:
    """The chunk of a rank's model that has a parameter."""
    chunks = [chunk for key, chunk in content.items() if key.startswith("model")]
    return next(chunk for chunk in chunks if name in chunk)


# Pickles by opcode


def text(value: str) -> bytes:
    """BINUNICODE."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    """LONG1, or LONG4 for large ones."""
    size = value.bit_length() // 8 + 1
    head = b"\x8a" + bytes([size]) if size < 256 else b"\x8b" + struct.pack("<i", size)
    return head + value.to_bytes(size, "little", signed=True)


def binary(value: bytes) -> bytes:
    """BINBYTES."""
    return b"B" + struct.pack("<I", len(value)) + value


def named(module: str, attribute: str) -> bytes:
    """GLOBAL."""
    return b"c" + f"{module}\n{attribute}\n".encode()


def stack_named(module: str, attribute: str) -> bytes:
    """STACK_GLOBAL."""
    return text(module) + text(attribute) + b"\x93"


def items(*values: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(values) + b"t"


def listed(*values: bytes) -> bytes:
    """A list."""
    return b"](" + b"".join(values) + b"e"


def mapping(entries: Mapping[str, bytes]) -> bytes:
    """A dict."""
    return b"}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"


def reduce(function: bytes, *args: bytes) -> bytes:
    """REDUCE: function(*args)."""
    return function + items(*args) + b"R"


def build(value: bytes, state: bytes) -> bytes:
    """BUILD: value.__setstate__(state), or its `__dict__` and slots."""
    return value + state + b"b"


NONE, TRUE, FALSE = b"N", b"\x88", b"\x89"
SLOTS = b"N"  # the first half of a (dict, slots) state


def slots(entries: Mapping[str, bytes]) -> bytes:
    """A state that sets attributes one by one."""
    return items(SLOTS, mapping(entries))


def storage(
    key: str = "0",
    count: int = 4,
    kind: bytes = named("torch", "FloatStorage"),
    location: bytes = text("cpu"),
) -> bytes:
    """A storage reference: BINPERSID of the tuple torch writes."""
    return items(text("storage"), kind, text(key), location, number(count)) + b"Q"


def tensor(
    shape: tuple[int, ...] = (4,),
    strides: tuple[int, ...] = (1,),
    offset: int = 0,
    of: bytes | None = None,
) -> bytes:
    """A tensor as torch writes it."""
    arguments = (
        storage() if of is None else of,
        number(offset),
        items(*map(number, shape)),
        items(*map(number, strides)),
        FALSE,
        reduce(named("collections", "OrderedDict")),
    )
    return reduce(named("torch._utils", "_rebuild_tensor_v2"), *arguments)


def program(body: bytes, protocol: int = 4) -> bytes:
    """A whole pickle."""
    return b"\x80" + bytes([protocol]) + body + b"."


def planted(data: bytes, body: bytes) -> bytes:
    """A pickle with other opcodes in place of the placeholder."""
    raw = PLACEHOLDER.encode()
    for spelling in (text(PLACEHOLDER), b"\x8c" + bytes([len(raw)]) + raw):
        if spelling in data:
            assert data.count(spelling) == 1
            unframed = data[:2] + data[11:] if data[2:3] == b"\x95" else data
            return unframed.replace(spelling, body)
    raise AssertionError("no placeholder")


# Files of torch.save


def torch_file(
    pickled: bytes,
    storages: Mapping[str, bytes] | None = None,
    *,
    more: Mapping[str, bytes] | None = None,
) -> bytes:
    """A zip as torch.save writes it."""
    data = {"0": bytes(16)} if storages is None else storages
    records = {"archive/data.pkl": pickled, "archive/byteorder": b"little"}
    records |= {f"archive/data/{key}": raw for key, raw in data.items()} | dict(more or {})
    return zipped(records)


def zipped(records: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of these records, in this order."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for record, data in records.items():
            archive.writestr(zipfile.ZipInfo(record), data, compression)
    return file.getvalue()


def records_of(path: Path) -> dict[str, bytes]:
    """The records of a file, in order."""
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def plant(path: Path, body: bytes) -> None:
    """Opcodes in place of the placeholder string in a file of torch.save."""
    records = records_of(path)
    (pickled,) = (key for key in records if key.endswith("/data.pkl"))
    records[pickled] = planted(records[pickled], body)
    path.write_bytes(zipped(records))


def plant_in(path: Path, place: Callable[[Any], None], body: bytes) -> None:
    """The same, with `place` putting the placeholder there first."""
    with edited(path) as content:
        place(content)
    plant(path, body)


# What must hold


def snapshot(folder: Path) -> dict[str, bytes] | None:
    """All files below a folder, or None if it is not there."""
    if not os.path.lexists(folder):
        return None
    if not folder.is_dir():
        return {"": folder.read_bytes()}
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*"))}
    return {key: b"" if path.is_dir() else path.read_bytes() for key, path in found.items()}


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one `mtt` command, run here."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


_OPTIONS: dict[str, Callable[[Any], list[str]]] = {
    "iteration": lambda value: ["--iteration", str(value)],
    "skip_keys": lambda value: [word for key in value for word in ("--skip-key", key)],
    "overrides": lambda v: [w for key in v for w in ("--set", f"{key}={v[key]}")],
    "replicated": lambda value: ["--replicated", value],
    "qkv_order": lambda value: ["--qkv-order", value],
    "overwrite": lambda value: ["--overwrite"] if value else [],
    "tokenizer": lambda value: ["--tokenizer", str(value)],
}


def refused(
    source: Path,
    target: Path,
    error: type[MTTError] = SourceError,
    *,
    says: str = "",
    **options: Any,
) -> MTTError:
    """Converting `source` raises `error`, leaves `target` as it was, and the command agrees."""
    before = snapshot(target)
    try:
        mtt_convert.convert(source, target, **options)
    except MTTError as caught:
        raised = caught
    else:
        raise AssertionError("it was converted")
    assert isinstance(raised, error), f"{type(raised).__name__}: {raised}"
    assert says in str(raised), str(raised)
    assert snapshot(target) == before
    words = [word for key, value in options.items() for word in _OPTIONS[key](value)]
    code, out, err = run("convert", source, target, "--json", *words)
    assert code == error.exit_code, err
    assert_error_shape(err, raised)
    body = json.loads(out)
    assert body["status"] == "error" and body["code"] == raised.code
    assert {key: body[key] for key in ("message", "found", "expected", "fix")} == {
        "message": raised.message,
        "found": raised.found,
        "expected": raised.expected,
        "fix": raised.fix,
    }
    assert snapshot(target) == before
    return raised


def assert_error_shape(err: str, raised: MTTError) -> None:
    """What stands on stderr: the message and its labelled lines, and no traceback."""
    lines = [f"error: {raised.message}"]
    for label in ("found", "expected", "fix"):
        value = getattr(raised, label)
        if value is not None:
            lines.append(f"  {label + ':':<9} {value}")
    if all(line.isprintable() for line in lines):  # what is not is shown in another way
        assert err == "\n".join(lines) + "\n"
    assert err.startswith("error: ")
    assert "Traceback" not in err


def run_apart(script: str, *arguments: object, timeout: float = 60) -> subprocess.CompletedProcess:
    """A Python script in a process of its own; `mtt_convert` is importable there."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        errors="surrogateescape",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        timeout=timeout,
        cwd=Path(__file__).resolve().parents[2],
    )


_COMMANDS_APART = """
    import contextlib, io, json, os, resource, signal, sys
    import mtt_convert.commands.convert
    from mtt_convert.cli import main
    resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
    for line in sys.stdin:
        read, write = os.pipe()
        if os.fork() == 0:
            signal.alarm(5)
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main(json.loads(line))
            with open("/proc/self/status") as file:
                peak = next(int(row.split()[1]) for row in file if row.startswith("VmHWM"))
            answer = {"code": code, "err": err.getvalue(), "megabytes": peak // 1024}
            os.write(write, json.dumps(answer).encode()[:60_000])
            os._exit(0)
        os.close(write)
        status = os.wait()[1]
        answer = os.read(read, 65_536).decode() if status == 0 else json.dumps({"status": status})
        os.close(read)
        print(answer, flush=True)
"""


class CommandsApart:
    """Runs `mtt` commands that may hang, or take all memory, in limited processes of their own.

    One process that has imported everything forks for every command, so each takes milliseconds.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_COMMANDS_APART)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
        )

    def run(self, *arguments: object) -> dict[str, Any]:
        """`code`, `err` and `megabytes`; or the `status` of a process that died."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps([str(a) for a in arguments]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
