"""Element types: one name (numpy's and torch's), with size and the safetensors spelling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn


def refuse_state(self: object, state: object) -> NoReturn:
    """A `__setstate__` for immutable values that a pickle can reach: no state is accepted."""
    raise TypeError(f"a pickle tried to overwrite a {type(self).__name__}")


@dataclass(frozen=True, slots=True)
class DType:
    """An element type.

    Attributes:
        name: the torch attribute name, e.g. ``bfloat16``.
        itemsize: bytes per element.
        safetensors: the spelling in a safetensors header, e.g. ``BF16``.
    """

    name: str
    itemsize: int
    safetensors: str

    __setstate__ = refuse_state

    @property
    def is_floating(self) -> bool:
        """True for real floating types, the only ones a model weight may have."""
        return self.safetensors in ("F64", "F32", "F16", "BF16")

    def __str__(self) -> str:
        return self.name


DTYPES = {
    dtype.name: dtype
    for dtype in (
        DType("float64", 8, "F64"),
        DType("float32", 4, "F32"),
        DType("float16", 2, "F16"),
        DType("bfloat16", 2, "BF16"),
        DType("float8_e4m3fn", 1, "F8_E4M3"),
        DType("float8_e5m2", 1, "F8_E5M2"),
        DType("int64", 8, "I64"),
        DType("int32", 4, "I32"),
        DType("int16", 2, "I16"),
        DType("int8", 1, "I8"),
        DType("uint64", 8, "U64"),
        DType("uint32", 4, "U32"),
        DType("uint16", 2, "U16"),
        DType("uint8", 1, "U8"),
        DType("bool", 1, "BOOL"),
    )
}
FROM_SAFETENSORS = {dtype.safetensors: dtype for dtype in DTYPES.values()}
