"""Writes pickles from plain values: classes are named, never imported.

    None, bool, int, float, str, list, tuple, dict    themselves
    Global("torch", "bfloat16")                       a name, for the reader to import
    Call(Global(...), arguments)                      what calling it returns
    Instance(Global(...), state)                      an object without __init__, then its state
    Pairs(((key, value), ...))                        a dict whose keys are such objects
    StorageKey(...)                                   a persistent reference, as torch.save has

Protocol 2, which every Python 3 reads; the same value gives the same bytes, always. (Opcodes:
CPython's pickletools.py.)
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..dtypes import DType


@dataclass(frozen=True, slots=True)
class Global:
    """A module-level name."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """The result of a call that the reader makes."""

    function: Global
    arguments: tuple[object, ...] = ()
    items: Mapping[str, object] | None = None
    """Set on the result one by one, as on an OrderedDict."""


@dataclass(frozen=True, slots=True)
class Instance:
    """An object of a class, made without arguments, and the state it is given."""

    kind: Global
    state: object


@dataclass(frozen=True, slots=True)
class Pairs:
    """A dict with keys that cannot be keys here."""

    items: tuple[tuple[object, object], ...]


@dataclass(frozen=True, slots=True)
class StorageKey:
    """torch.save's reference to a storage in the same zip (torch/serialization.py)."""

    storage: Global
    key: str
    num_elements: int


def dumps(value: object) -> bytes:
    """The pickle of a value made of the kinds above.

    Raises:
        TypeError: it holds something else.
    """
    return b"\x80\x02" + _Writer().encode(value) + b"."


class _Writer:
    """Encodes one value; names and texts that return are fetched from the memo."""

    def __init__(self) -> None:
        self._memo: dict[Global | str, int] = {}

    def encode(self, value: object) -> bytes:
        match value:
            case None:
                return b"N"
            case bool():
                return b"\x88" if value else b"\x89"
            case int():
                return _integer(value)
            case float():
                return b"G" + struct.pack(">d", value)
            case str():
                return self._remembered(value, _text(value))
            case DType():
                return self.encode(Global("torch", value.name))
            case Global():
                line = f"c{value.module}\n{value.name}\n"
                return self._remembered(value, line.encode("ascii"))
            case tuple():
                return self._tuple(value)
            case list():
                return b"](" + self._all(value) + b"e" if value else b"]"
            case Mapping():
                return b"}" + self._items(value.items())
            case Pairs():
                return b"}" + self._items(value.items)
            case Call():
                made = self.encode(value.function) + self._tuple(value.arguments) + b"R"
                return made + self._items((value.items or {}).items())
            case Instance():
                made = self.encode(value.kind) + b")\x81"
                return made + self.encode(value.state) + b"b"
            case StorageKey():
                reference = ("storage", value.storage, value.key, "cpu", value.num_elements)
                return self._tuple(reference) + b"Q"
        raise TypeError(f"a {type(value).__name__} is not written into pickles")

    def _remembered(self, value: Global | str, encoded: bytes) -> bytes:
        if (number := self._memo.get(value)) is not None:
            return b"h" + bytes([number]) if number < 256 else b"j" + struct.pack("<I", number)
        number = self._memo[value] = len(self._memo)
        put = b"q" + bytes([number]) if number < 256 else b"r" + struct.pack("<I", number)
        return encoded + put

    def _tuple(self, values: tuple[object, ...]) -> bytes:
        if len(values) > 3:
            return b"(" + self._all(values) + b"t"
        return self._all(values) + (b")", b"\x85", b"\x86", b"\x87")[len(values)]

    def _all(self, values: Sequence[object]) -> bytes:
        return b"".join(map(self.encode, values))

    def _items(self, items: Iterable[tuple[object, object]]) -> bytes:
        pairs = b"".join(self.encode(key) + self.encode(value) for key, value in items)
        return b"(" + pairs + b"u" if pairs else b""


def _integer(value: int) -> bytes:
    if 0 <= value < 1 << 8:
        return b"K" + bytes([value])
    if 0 <= value < 1 << 16:
        return b"M" + struct.pack("<H", value)
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    assert len(data) < 256, value
    return b"\x8a" + bytes([len(data)]) + data


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data
