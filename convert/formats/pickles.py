"""Reads pickles as data: nothing a pickle names is ever imported or run.

The standard unpickler only follows the stream; every name in it is answered from here:

    name in the stream                        what it becomes
    ----------------------------------------  ------------------------------------------------
    collections.OrderedDict, torch.Size, ...  plain Python values
    torch.float32, torch.BFloat16Storage      a DType
    torch._utils._rebuild_tensor_v2           a LazyTensor: file, offset, strides, all checked
    argparse.Namespace, DCP metadata classes  a Record: field names and values
    enum.*, pathlib.*, numpy arrays, ...      a Stub: an inert note of name and arguments
    any other standard-library, torch or
    numpy name (os.system, torch.load, ...)   refused: UnsafePickleError
    any other name (megatron.*, apex.*, ...)  a Stub

Values made here refuse attribute assignment, so the stream cannot change this process either.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from ..boxes import row_major
from ..dtypes import DTYPES, DType, refuse_state
from ..errors import CorruptError, MTTError, UnsafePickleError, UnsupportedError
from ..tensors import LazyTensor
from .opcodes import check

_DCP = "torch.distributed.checkpoint"
_GETATTR = ("__builtin__.getattr", "builtins.getattr")
_REBUILD = "_make_in_reduce_ex"  # of Transformer Engine's tensors, see float8.py


class _Sealed(type):
    """Classes that a pickle can name but not change."""

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise TypeError(f"a pickle tried to set {cls.__name__}.{name}")


class Stub(metaclass=_Sealed):
    """An inert stand-in for an object whose class is not loaded."""

    qualified = "something too large for metadata"
    args: tuple[object, ...]

    def __new__(cls, *args: object, **kwargs: object) -> Stub:
        """Remember the arguments; run nothing."""
        self = super().__new__(cls)
        self.__dict__["args"] = args
        return self

    def __setstate__(self, state: object) -> None:
        self.__dict__["state"] = state

    def __setitem__(self, key: object, value: object) -> None:
        """Items of stubs are of no use to anyone: drop them."""

    def append(self, value: object) -> None:
        """Items of stubs are of no use to anyone: drop them."""

    extend = add = append

    def __repr__(self) -> str:
        args = ", ".join(repr(arg) if _is_short(arg) else "..." for arg in self.args[:3])
        return f"<{type(self).qualified}({args})>"


def _is_short(value: object) -> bool:
    if isinstance(value, str):
        return len(value) < 80
    return isinstance(value, int) and abs(value) < 2**63


class Record(metaclass=_Sealed):
    """A known class of plain fields, e.g. an `argparse.Namespace`."""

    qualified = ""

    def __new__(cls, *args: object) -> Record:
        """A record without fields; positional arguments are kept for enum-like classes."""
        self = super().__new__(cls)
        self.__dict__["args"] = args
        self.__dict__["fields"] = {}
        return self

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
            state = {**(state[0] or {}), **state[1]}
        self.__dict__["fields"] = state

    @property
    def fields(self) -> dict[str, Any]:
        """All fields by name.

        Raises:
            CorruptError: the state is not a dict of fields.
        """
        fields = self.__dict__["fields"]
        if not isinstance(fields, dict):
            raise CorruptError(f"a {type(self).qualified} of an unknown kind")
        return fields

    def field(self, name: str) -> Any:
        """The value of one field.

        Raises:
            CorruptError: the record has no such field.
        """
        fields = self.fields
        if name not in fields:
            raise CorruptError(
                f"a {type(self).qualified} without {name!r}", found=str(fields)[:200]
            )
        return fields[name]


class PlainDict(dict[Any, Any], metaclass=_Sealed):
    """An `OrderedDict`; attributes (torch's `_metadata`) are ignored."""

    def __setstate__(self, state: object) -> None:
        pass


class _Known:
    """A callable of the table, closed to change."""

    __slots__ = ("function",)
    __setstate__ = refuse_state
    function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "function", function)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise TypeError("a pickle tried to change a known function")

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


class StorageRef:
    """A flat storage of a tensor file: where it begins and how many elements it has."""

    __slots__ = ("dtype", "num_elements", "offset", "path")
    __setstate__ = refuse_state

    def __init__(self, dtype: DType, path: str, offset: int, num_elements: int) -> None:
        self.dtype, self.path, self.offset, self.num_elements = dtype, path, offset, num_elements


def damaged(path: str, found: str, expected: str) -> CorruptError:
    """The error for a file that is not as its writer left it."""
    return CorruptError(
        f"{path} is truncated or damaged",
        found=found,
        expected=expected,
        fix="copy the file again from where it was written",
    )


def is_opaque(value: object) -> bool:
    """Whether a value stands for an object of a class that was not loaded."""
    return isinstance(value, (Stub, _Sealed, _Known))


def load_pickle(data: bytes, path: str, persistent_load: Callable[[Any], Any] | None = None) -> Any:
    """Decode one pickle to plain values, records, stubs and lazy tensors.

    Args:
        data: the whole pickle stream.
        path: the file it came from, for messages.
        persistent_load: resolves torch's storage references.

    Raises:
        UnsafePickleError: it names something that is not data.
        CorruptError: it is not a complete, consistent pickle.
    """
    check(data, path)
    try:
        return _Unpickler(data, path, persistent_load).load()
    except MTTError:
        raise
    except Exception as error:
        raise CorruptError(
            f"{path}: its pickle cannot be read",
            found=f"{type(error).__name__}: {error}",
            expected="a complete pickle of tensors and plain values",
            fix="copy the file again from where it was written",
        ) from error


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, data: bytes, path: str, persistent_load: Callable[[Any], Any] | None
    ) -> None:
        super().__init__(io.BytesIO(data))
        self._path = path
        self._persistent_load = persistent_load

    def persistent_load(self, reference: Any) -> Any:
        if self._persistent_load is None:
            raise CorruptError(f"{self._path}: a storage reference outside a tensor file")
        return self._persistent_load(reference)

    def find_class(self, module: str, name: str) -> Any:
        qualified = f"{module}.{name}"
        if qualified in _TABLE:
            return _TABLE[qualified]
        if qualified in _GETATTR:
            return _Known(partial(_bound_method, self._path, qualified))
        root = module.partition(".")[0]
        if root in ("torch", "numpy", "builtins") or root in sys.stdlib_module_names:
            raise _unsafe(self._path, qualified)
        return _inert(Stub, qualified)


def _unsafe(path: str, qualified: str) -> UnsafePickleError:
    return UnsafePickleError(
        f"{path} was refused: its pickle asks for {qualified}; nothing of it was run",
        found=qualified,
        expected="tensors, numbers, text and containers",
        fix="do not load this file with torch.load either, unless you trust its author",
    )


def _bound_method(path: str, qualified: str, owner: object, name: object, *more: object) -> Any:
    """How a class method is pickled, `getattr(owner, name)`; one of them is needed, as a stub.

    Raises:
        UnsafePickleError: any other use; of Python 2's name, it is a stub like other names of old.
    """
    if name == _REBUILD and isinstance(owner, _Sealed) and issubclass(owner, Stub):
        return _inert(Stub, f"{owner.qualified}.{name}")
    if qualified == _GETATTR[0]:
        return _inert(Stub, qualified)(owner, name, *more)
    raise _unsafe(path, qualified)


def _inert(base: type, qualified: str) -> Any:
    return _Sealed(qualified.rpartition(".")[2], (base,), {"qualified": qualified})


def _rebuild_tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: object = False,
    hooks: object = None,
    bits: object = None,
) -> LazyTensor:
    """torch/_utils.py `_rebuild_tensor_v2`: a strided view of a storage.

    Raises:
        CorruptError: the view does not fit into its storage.
        UnsupportedError: torch would change the elements on reading (negative, conjugate bits).
    """
    if isinstance(bits, dict) and any(bits.values()):
        raise UnsupportedError("a tensor is stored with its sign turned", found=str(sorted(bits)))
    sizes = (offset, *shape, *strides)
    if not isinstance(storage, StorageRef) or len(shape) != len(strides):
        raise CorruptError("a tensor without a storage")
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise CorruptError(f"{storage.path}: a tensor of impossible sizes", found=str(sizes))
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.num_elements:
        raise CorruptError(
            f"{storage.path}: a tensor reaches beyond its storage",
            found=f"element {last}",
            expected=f"at most {storage.num_elements - 1}",
        )
    shape = tuple(shape)
    position = storage.offset + offset * storage.dtype.itemsize
    steps = tuple(
        dense if size <= 1 else step
        for size, step, dense in zip(shape, strides, row_major(shape), strict=True)
    )
    return LazyTensor.in_file(storage.dtype, shape, storage.path, position, steps)


def _rebuild_untyped(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    _grad: Any,
    _hooks: Any,
    dtype: Any,
    *_: Any,
) -> LazyTensor:
    """torch/_utils.py `_rebuild_tensor_v3`: a view of bytes as another dtype.

    Raises:
        CorruptError: the view does not fit into its storage.
    """
    if not isinstance(storage, StorageRef) or not isinstance(dtype, DType):
        raise CorruptError("a tensor without a storage or a dtype")
    count = storage.num_elements * storage.dtype.itemsize // dtype.itemsize
    typed = StorageRef(dtype, storage.path, storage.offset, count)
    return _rebuild_tensor(typed, offset, shape, strides)


def _rebuild_subclass(rebuild: Any, kind: object, args: tuple[Any, ...], _state: object) -> Any:
    """torch/_tensor.py `_rebuild_from_type_v2`: plain tensors and parameters, else a stub."""
    if kind not in (_TABLE["torch.Tensor"], _TABLE["torch.nn.parameter.Parameter"]):
        return kind() if isinstance(kind, _Sealed) and issubclass(kind, Stub) else Stub()
    if not isinstance(rebuild, _Known) or rebuild.function is not _rebuild_tensor:
        raise UnsafePickleError("a tensor subclass that is not rebuilt from a storage")
    return rebuild(*args)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How pickle protocol 2 spells bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "utf-8", "ascii"):
        raise CorruptError("bytes spelled in an unknown way")
    return text.encode(encoding)


def _bytearray(value: Any = b"", *encoding: Any) -> bytes:
    return _encode(value, *encoding) if isinstance(value, str) else bytes(memoryview(value))


# Megatron-Core before 0.16 adds a field of its own to torch's metadata, under a class of its own.
_MCORE_DCP = "megatron.core.dist_checkpointing.strategies.torch"
_RECORDS = ["argparse.Namespace", f"{_DCP}.filesystem._StorageInfo", f"{_MCORE_DCP}.MCoreMetadata"]
_RECORDS += [
    f"{_DCP}.metadata.{name}"
    for name in (
        "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta "
        "TensorProperties TensorStorageMetadata"
    ).split()
]
_STUBS = """
    datetime.date datetime.datetime datetime.timedelta datetime.timezone decimal.Decimal
    enum.Enum fractions.Fraction io.BytesIO _io.BytesIO numpy.dtype numpy.ndarray
    numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct
    numpy.core.multiarray.scalar numpy._core.multiarray.scalar
    numpy.core.numeric._frombuffer numpy._core.numeric._frombuffer
    pathlib.Path pathlib.PosixPath pathlib.PurePath pathlib.PurePosixPath pathlib.WindowsPath
    signal.Signals signal.Handlers signal.SIG_DFL signal.SIG_IGN
    torch._utils._rebuild_meta_tensor_no_storage torch._utils._rebuild_qtensor
    torch._utils._rebuild_sparse_csr_tensor torch._utils._rebuild_sparse_tensor
    torch._utils._rebuild_wrapper_subclass torch.per_channel_affine torch.per_tensor_affine
    torch.qint32 torch.qint8 torch.quint8 torch.QInt8Storage torch.QInt32Storage
    torch.QUInt8Storage torch.complex64 torch.complex128
    torch.Tensor torch.device torch.memory_format torch.layout torch.nn.parameter.Parameter
    torch.serialization._get_layout uuid.UUID
""".split()
_STUBS += [f"{_DCP}.metadata._MEM_FORMAT_ENCODING"]
_STUBS += [
    f"{_DCP}.planner.{name}"
    for name in (
        "BytesIOWriteData LoadItemType LoadPlan ReadItem SavePlan TensorWriteData WriteItem "
        "WriteItemType"
    ).split()
]
STORAGES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Float8_e4m3fn": "float8_e4m3fn",
    "Float8_e5m2": "float8_e5m2",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "Untyped": "uint8",
}
_TABLE: dict[str, Any] = {
    "collections.OrderedDict": PlainDict,
    "collections.defaultdict": _Known(lambda *_: PlainDict()),
    "builtins.set": _Known(lambda items=(): set(items)),
    "builtins.frozenset": _Known(lambda items=(): frozenset(items)),
    "builtins.complex": _Known(lambda *parts: complex(*parts)),
    "builtins.bytearray": _Known(_bytearray),
    "builtins.bytes": _Known(_bytearray),
    "builtins.list": _Known(lambda items=(): list(items)),
    "builtins.dict": _Known(lambda items=(): dict(items)),
    "builtins.int": _Known(lambda value=0: int(value)),
    "_codecs.encode": _Known(_encode),
    "torch.Size": _Known(lambda sizes=(): tuple(sizes)),
    "torch._utils._rebuild_tensor": _Known(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v2": _Known(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v3": _Known(_rebuild_untyped),
    "torch._utils._rebuild_parameter": _Known(lambda tensor, *_: tensor),
    "torch._utils._rebuild_parameter_with_state": _Known(lambda tensor, *_: tensor),
    "torch._tensor._rebuild_from_type_v2": _Known(_rebuild_subclass),
    **{f"torch.{name}": dtype for name, dtype in DTYPES.items()},
    **{f"torch.{name}Storage": DTYPES[dtype] for name, dtype in STORAGES.items()},
    "torch.storage.UntypedStorage": DTYPES["uint8"],
    "torch.storage._LegacyStorage": DTYPES["uint8"],
    **{name: _inert(Record, name) for name in _RECORDS},
    **{name: _inert(Stub, name) for name in _STUBS},
}
