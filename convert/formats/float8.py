"""Weights kept in 8-bit floats with their scales, as one tensor in the type they stand for.

Transformer Engine's tensors in pickles (`--fp8-param-gather`), by what rebuilds them, with the
arguments that matter here:

    Float8Tensor             data [...], scale_inv [1]; since 2.16 maybe only the transpose of data
    Float8BlockwiseQTensor   rowwise data [m, k], scale_inv [m/128, k/128 and more]
    MXFP8Tensor              rowwise data [m, k], scale_inv [m and more, k/32 and more] as exponents

    Float8Tensor._make_in_reduce_ex, a bound method      1.2 to 2.15
    _make_float8_tensor_in_reduce_ex, a function         since 2.16; and so for the other two

Folders of Hugging Face (DeepSeek-V3, quant_method `fp8`):

    X.weight [m, k] in float8, X.weight_scale_inv [m/128, k/128], blocks of `weight_block_size`

A weight is its 8-bit float times its scale in float32, rounded once to the type it stands for: what
Transformer Engine's `dequantize` and DeepSeek's `weight_dequant` give. Distributed checkpoints have
that already (force_all_tensors_to_non_fp8, megatron/core/dist_checkpointing/utils.py).

The number of an element type changed: 6 is E4M3 before 2.4, 7 from there on. Before, 7 was E5M2, in
which Transformer Engine keeps no weights ("Pure E5M2 training is not supported").
(Sources: `__reduce_ex__` and `dequantize` in transformer_engine/pytorch/float8_tensor.py at v1.5,
pytorch/tensor/{float8_tensor,float8_blockwise_tensor,mxfp8_tensor}.py and storage/ at v2.0, v2.3,
v2.8, v2.13 and of August 2026; transformer_engine.h for the numbers.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import TypeGuard

from ..boxes import Ints
from ..dtypes import DTYPES, DType
from ..errors import CorruptError, UnsupportedError
from ..tensors import LazyTensor, Scaled, scaled
from .pickles import Stub

_BYTE, _E4M3, _E5M2 = DTYPES["uint8"], DTYPES["float8_e4m3fn"], DTYPES["float8_e5m2"]
_BLOCK, _MX_BLOCK = 128, 32
_OLD_CODES = {6: _E4M3, 7: _E5M2}
_CODES = {6: _E4M3, 7: _E4M3, 8: _E5M2}
_SCALE = "_scale_inv"
_AGAIN = "copy the files again from where they were written"
METHOD = "fp8"
"""`quant_method` of a `config.json`."""


def weight_of(value: Stub, name: str, where: str) -> LazyTensor | None:
    """A weight that Transformer Engine pickled, not read; None for an object of another class.

    Args:
        value: what the pickle became.
        name, where: the parameter and its file, for messages.

    Raises:
        UnsupportedError: scales that are not there, or in an order that is not known.
        CorruptError: parts that do not fit together.
    """
    qualified = type(value).qualified
    if not qualified.startswith("transformer_engine."):
        return None
    read = next((read for kind, read in _KINDS.items() if qualified.endswith(f".{kind}")), None)
    if read is None:
        return None
    try:
        return read(value.args)
    except (UnsupportedError, CorruptError) as error:
        error.message = f"{name} in {where}: {error.message}; nothing was written"
        error.found = f"{error.found} in {qualified}"
        raise


def _whole(args: Sequence[object]) -> LazyTensor:
    """`Float8Tensor`: one scale for all elements."""
    data, code, scale, dtype, shape, transposed = _arguments(args, 4, 6)
    codes = _OLD_CODES if len(args) == 4 else _CODES
    if data is None and transposed is not None:
        stored = _values(transposed, code, codes)
        stored = stored.permute(*range(1, len(stored.shape)), 0)
    else:
        stored = _values(data, code, codes)
    scale = _scales(scale, DTYPES["float32"])
    if scale.num_elements != 1:
        raise CorruptError(
            "a weight in 8 bits has several scales",
            found=str(list(scale.shape)),
            expected="one",
            fix=_AGAIN,
        )
    size = max(prod(stored.shape), 1)
    return _scaled(stored, _as_matrix(scale), (size, size), dtype, shape)


def _as_matrix(scale: LazyTensor) -> LazyTensor:
    """A tensor of one element with two axes."""
    (piece,) = scale.pieces
    return LazyTensor.in_file(scale.dtype, (1, 1), piece.path, piece.offset)


def _blocks(args: Sequence[object]) -> LazyTensor:
    """`Float8BlockwiseQTensor`: a scale for 128 x 128 elements."""
    shape, data, scale, _, _, code, dtype, _, square, _ = _arguments(args, 9, 10)
    if square is not True:
        raise UnsupportedError(
            "a weight in 8 bits has scales for parts of its rows",
            found="a Float8BlockwiseQTensor with 1 x 128 blocks",
            expected="128 x 128 blocks",
            fix="save the checkpoint with plain weights",
        )
    stored, scales = _values(data, code, _CODES), _scales(scale, DTYPES["float32"])
    return _scaled(stored, scales, (_BLOCK, _BLOCK), dtype, shape)


def _exponents(args: Sequence[object]) -> LazyTensor:
    """`MXFP8Tensor`: an exponent for 32 elements of a row."""
    data, scale, _, _, code, dtype, shape, _, swizzled = _arguments(args, 6, 9)
    if swizzled:
        raise UnsupportedError(
            "the scales of a weight in 8 bits are in the order of a matrix product",
            found="an MXFP8Tensor with swizzled scales",
            expected="scales by rows",
            fix="save the checkpoint with plain weights",
        )
    return _scaled(_values(data, code, _CODES), _scales(scale, _BYTE), (1, _MX_BLOCK), dtype, shape)


_KINDS: Mapping[str, Callable[[Sequence[object]], LazyTensor]] = {
    "Float8Tensor._make_in_reduce_ex": _whole,
    "_make_float8_tensor_in_reduce_ex": _whole,
    "Float8BlockwiseQTensor._make_in_reduce_ex": _blocks,
    "_make_float8_blockwise_tensor_in_reduce_ex": _blocks,
    "MXFP8Tensor._make_in_reduce_ex": _exponents,
    "_make_mxfp8_tensor_in_reduce_ex": _exponents,
}


def _arguments(args: Sequence[object], least: int, most: int) -> tuple[object, ...]:
    """The arguments, with None for those that older versions do not have."""
    if not least <= len(args) <= most:
        raise UnsupportedError(
            "a weight in 8 bits is stored in an unknown way",
            found=f"{len(args)} parts",
            expected=f"{least} to {most}, as Transformer Engine 1.2 to 2.18 writes",
            fix="save the checkpoint with plain weights",
        )
    return (*args, *(None,) * (most - len(args)))


def _values(data: object, code: object, codes: Mapping[int, DType]) -> LazyTensor:
    """The 8-bit floats."""
    if not isinstance(data, LazyTensor):
        raise UnsupportedError(
            "a weight in 8 bits has no data by rows",
            found="only its transpose" if data is None else type(data).__name__,
            expected="its rows",
            fix="save the checkpoint with plain weights",
        )
    number = code.args[0] if isinstance(code, Stub) and code.args else getattr(code, "state", None)
    dtype = codes.get(number) if type(number) is int else None
    if dtype is None or data.dtype != _BYTE:
        raise UnsupportedError(
            "a weight in 8 bits is of an unknown type",
            found=f"{data.dtype}, Transformer Engine's type {number}",
            expected="uint8, and E4M3 or E5M2",
            fix="save the checkpoint with plain weights",
        )
    return replace(data, dtype=dtype)


def _scales(scale: object, dtype: DType) -> LazyTensor:
    if not isinstance(scale, LazyTensor) or scale.dtype != dtype:
        found = scale.dtype if isinstance(scale, LazyTensor) else "none"
        raise UnsupportedError(
            "a weight in 8 bits has no scale",
            found=str(found),
            expected=f"a scale in {dtype}",
            fix="save the checkpoint with plain weights",
        )
    return scale


def _scaled(
    values: LazyTensor, scales: LazyTensor, block: tuple[int, int], dtype: object, shape: object
) -> LazyTensor:
    """Values times scales, once they fit together."""
    if not isinstance(dtype, DType) or not dtype.is_floating:
        raise CorruptError(
            "a weight in 8 bits stands for no element type", found=str(dtype), fix=_AGAIN
        )
    if shape is not None and shape != values.shape:
        raise CorruptError(
            "a weight in 8 bits has another shape than its values",
            found=f"{shape} and {list(values.shape)}",
            fix=_AGAIN,
        )
    if not values.num_elements or not values.shape:
        raise CorruptError(
            "a weight in 8 bits has no elements", found=str(list(values.shape)), fix=_AGAIN
        )
    rows, columns = _matrix(values.shape)
    needed = (-(-rows // block[0]), -(-columns // block[1]))
    if len(scales.shape) != 2 or any(a < b for a, b in zip(scales.shape, needed, strict=True)):
        raise CorruptError(
            "the scales of a weight in 8 bits do not cover it",
            found=f"{list(scales.shape)} scales for {list(values.shape)}",
            expected=f"at least {list(needed)}",
            fix=_AGAIN,
        )
    return scaled(values, scales.part(((0, 0), needed)), block, dtype)


def _matrix(shape: Ints) -> tuple[int, int]:
    """Rows and columns, all axes but the last one being rows."""
    return prod(shape[:-1]), shape[-1]


def without_scales(
    tensors: Mapping[str, LazyTensor], config: Mapping[str, object]
) -> dict[str, LazyTensor]:
    """The tensors of a Hugging Face folder, those in 8 bits multiplied by their scales.

    Args:
        tensors: of the files, by name.
        config: `config.json`, whose `quantization_config` is of `METHOD`.

    Raises:
        UnsupportedError: scales of another kind, or none.
        CorruptError: scales that do not cover their weight.
    """
    details = config["quantization_config"]
    size = details.get("weight_block_size") if isinstance(details, Mapping) else None
    dtype = DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")))
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(_SCALE) and name.removesuffix(_SCALE) in tensors:
            continue
        if tensor.dtype not in (_E4M3, _E5M2):
            found[name] = tensor
            continue
        scales = tensors.get(name + _SCALE)
        if not _is_block(size) or scales is None or not scales.dtype.is_floating:
            raise UnsupportedError(
                "a weight in 8 bits has no scales that mtt knows",
                found=f"{name} in {tensor.dtype}, weight_block_size = {size!r}, "
                + (f"{name}{_SCALE} in {scales.dtype}" if scales else f"no {name}{_SCALE}"),
                expected=f"{name}{_SCALE}, with a number for every block of weight_block_size",
                fix="give the folder this one was quantised from",
            )
        try:
            found[name] = _scaled(
                tensor, scales, (size[0], size[1]), dtype or DTYPES["bfloat16"], None
            )
        except CorruptError as error:
            error.message = f"{name}: {error.message}"
            error.fix = "give the folder this one was quantised from"
            raise
    return found


def note(tensors: Iterable[LazyTensor]) -> tuple[str, ...]:
    """What a user should know about weights in 8 bits; nothing if there are none."""
    count, types = 0, set[str]()
    for tensor in tensors:
        found = {p.path.dtype.name for p in tensor.pieces if isinstance(p.path, Scaled)}
        count, types = count + bool(found), types | found
    if not count:
        return ()
    text = ", ".join(sorted(types))
    return (f"{count} weights are kept in 8 bits: their values times their scales, in {text}",)


def _is_block(size: object) -> TypeGuard[list[int]]:
    return isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
