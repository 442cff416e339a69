"""Weights in 8 bits become their values times their scales; what has no scales is refused."""

from __future__ import annotations

import copyreg
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mtt_convert
from mtt_convert import open_checkpoint
from mtt_convert.dtypes import DTYPES
from mtt_convert.errors import CorruptError, UnsafePickleError, UnsupportedError
from mtt_convert.logits import compare_logits
from mtt_convert.reading import FileReader, stream
from mtt_convert.tensors import LazyTensor, concat, scaled
from tests.convert.families.natives import case
from tests.convert.surgery import (
    PLACEHOLDER,
    TORCH,
    TORCH_DIST,
    Golden,
    build,
    copy_of,
    edited,
    edited_metadata,
    megatron_modules,
    named,
    plant_in,
    reduce,
    refused,
    set_arguments,
    shards,
    text,
)

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


# ---- what Transformer Engine pickles, by classes of the same names


class _Code:
    """`tex.DType` of pybind11: its number is its state; since 2.16 its argument."""

    def __init__(self, number: int = 0, as_state: bool = True) -> None:
        self.number, self.as_state = number, as_state

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        if self.as_state:
            return copyreg.__newobj__, (type(self),), self.number  # type: ignore[attr-defined]
        return type(self), (self.number,)

    def __setstate__(self, state: int) -> None:
        self.number = state


class _Stored:
    """A tensor that pickles as a call of `rebuild`."""

    def __init__(self, rebuild: Any, *args: object) -> None:
        self.rebuild, self.args = rebuild, args

    def __reduce_ex__(self, protocol: int) -> tuple[Any, tuple[object, ...]]:
        return self.rebuild, self.args


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    module.__path__ = []  # type: ignore[attr-defined]
    for key, value in content.items():
        value.__module__ = name
        value.__qualname__ = key
        setattr(module, key, value)
    return module


def _tensor_class() -> type:
    def _make_in_reduce_ex(cls: type, *args: object) -> object:
        return args

    made = type("Made", (), {})
    _make_in_reduce_ex.__qualname__ = "_make_in_reduce_ex"
    made._make_in_reduce_ex = classmethod(_make_in_reduce_ex)  # type: ignore[attr-defined]
    return made


def _function() -> Callable[..., object]:
    def made(*args: object) -> object:
        return args

    return made


_TE = "transformer_engine.pytorch"
CODE = type("DType", (_Code,), {})
MODULES = {
    "transformer_engine": _module("transformer_engine"),
    _TE: _module(_TE),
    f"{_TE}.tensor": _module(f"{_TE}.tensor"),
    f"{_TE}.float8_tensor": _module(f"{_TE}.float8_tensor", Float8Tensor=_tensor_class()),
    f"{_TE}.tensor.float8_tensor": _module(
        f"{_TE}.tensor.float8_tensor",
        Float8Tensor=_tensor_class(),
        _make_float8_tensor_in_reduce_ex=_function(),
    ),
    f"{_TE}.tensor.float8_blockwise_tensor": _module(
        f"{_TE}.tensor.float8_blockwise_tensor",
        Float8BlockwiseQTensor=_tensor_class(),
        _make_float8_blockwise_tensor_in_reduce_ex=_function(),
    ),
    f"{_TE}.tensor.mxfp8_tensor": _module(
        f"{_TE}.tensor.mxfp8_tensor",
        MXFP8Tensor=_tensor_class(),
        _make_mxfp8_tensor_in_reduce_ex=_function(),
    ),
    f"{_TE}.tensor.nvfp4_tensor": _module(
        f"{_TE}.tensor.nvfp4_tensor", _make_nvfp4_tensor_in_reduce_ex=_function()
    ),
    "transformer_engine_torch": _module("transformer_engine_torch", DType=CODE),
}


@pytest.fixture(autouse=True)
def transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in MODULES.items():
        monkeypatch.setitem(sys.modules, name, module)


def method(module: str, name: str) -> Any:
    return getattr(MODULES[f"{_TE}.{module}"], name)._make_in_reduce_ex


def function(module: str, name: str) -> Any:
    return getattr(MODULES[f"{_TE}.{module}"], name)


Pair = tuple[_Stored | torch.Tensor, torch.Tensor]


def quantised(weight: torch.Tensor, scale: torch.Tensor, kind: torch.dtype = E4M3) -> torch.Tensor:
    return (weight / scale).to(kind)


def whole(weight: torch.Tensor, style: str) -> Pair:
    """One scale: Transformer Engine 1.5, 2.0, 2.8, 2.16, and 2.16 with nothing but a transpose.

    Before 2.4 the number 7, which is E4M3 today, was E5M2.
    """
    scale = weight.abs().max() / 448
    values = quantised(weight, scale, E5M2 if style == "1.5 E5M2" else E4M3)
    expected = (values.float() * scale).bfloat16()
    data, scale = values.view(torch.uint8), scale.reshape(1)
    kept = (scale, torch.bfloat16)
    if style.startswith("1.5"):
        rebuild, number = method("float8_tensor", "Float8Tensor"), 6 + style.endswith("E5M2")
        return _Stored(rebuild, data, CODE(number), *kept), expected
    if style in ("2.0", "2.8"):
        rebuild, code = method("tensor.float8_tensor", "Float8Tensor"), CODE(6 + (style > "2.4"))
        return _Stored(rebuild, data, code, *kept, data.shape), expected
    rebuild = function("tensor.float8_tensor", "_make_float8_tensor_in_reduce_ex")
    code = CODE(7, as_state=False)
    if style == "transposed":
        other = data.movedim(-1, 0).contiguous()
        return _Stored(rebuild, None, code, *kept, data.shape, other), expected
    return _Stored(rebuild, data, code, *kept, data.shape, None), expected


def blocks(weight: torch.Tensor, style: str) -> Pair:
    """128 x 128 elements share a scale; a row of scales is padded to a multiple of four."""
    rows, columns = weight.shape
    grid = torch.rand(-(-rows // 128), -(-columns // 128)) * 0.01 + 0.001
    wide = grid.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    values = quantised(weight, wide)
    expected = (values.float() * wide).bfloat16()
    padded = torch.nn.functional.pad(grid, (0, -grid.shape[1] % 4), value=9.0)
    parts = (values.view(torch.uint8), padded, None, None)
    if style == "2.3":
        rebuild = method("tensor.float8_blockwise_tensor", "Float8BlockwiseQTensor")
        more = (CODE(6), torch.bfloat16, None, True)
    else:
        name = "_make_float8_blockwise_tensor_in_reduce_ex"
        rebuild = function("tensor.float8_blockwise_tensor", name)
        more = (CODE(7, as_state=False), torch.bfloat16, None, True, None)
    return _Stored(rebuild, weight.shape, *parts, *more), expected


def exponents(weight: torch.Tensor, style: str) -> Pair:
    """32 elements of a row share an exponent; scales are padded to 128 rows and 4 columns."""
    rows, columns = weight.shape
    if columns % 32:
        return weight, weight  # Transformer Engine leaves it as it is
    grid = torch.randint(110, 130, (rows, columns // 32), dtype=torch.int32)
    grid[0, 0] = 0
    powers = np.ldexp(np.float32(1), grid.numpy() - 127)
    wide = torch.from_numpy(powers).repeat_interleave(32, 1)
    values = quantised(weight, wide.clamp(min=1e-6))
    expected = (values.float() * wide).bfloat16()
    pad = (0, -grid.shape[1] % 4, 0, -rows % 128)
    padded = torch.nn.functional.pad(grid.to(torch.uint8), pad, value=200)
    parts = (values.view(torch.uint8), padded, None, None)
    number = 6 if style in ("2.0", "2.3") else 7
    rebuild = method("tensor.mxfp8_tensor", "MXFP8Tensor")
    more: tuple[object, ...] = {
        "2.0": (),
        "2.3": (weight.shape,),
        "2.8": (weight.shape, None),
        "2.16": (weight.shape, None, False),
    }[style]
    if style == "2.16":
        rebuild = function("tensor.mxfp8_tensor", "_make_mxfp8_tensor_in_reduce_ex")
    return _Stored(rebuild, *parts, CODE(number), torch.bfloat16, *more), expected


KINDS = [
    *((whole, style) for style in ("1.5", "1.5 E5M2", "2.0", "2.8", "2.16", "transposed")),
    *((blocks, style) for style in ("2.3", "2.16")),
    *((exponents, style) for style in ("2.0", "2.3", "2.8", "2.16")),
]


def weights(model: dict[str, Any]) -> list[str]:
    linear = [name for name in model if name.startswith("decoder.") and "linear_" in name]
    return [name for name in linear if name.endswith(".weight")]


def replace_weights(root: Path, twin: Path, make: Callable[[torch.Tensor], Pair]) -> int:
    """Weights of linear layers in 8 bits, and in another checkpoint what they stand for."""
    torch.manual_seed(5)
    count = 0
    for path, other in zip(shards(root), shards(twin), strict=True):
        with edited(path) as content, edited(other) as plain:
            for chunk in ("model0", "model1"):
                for name in weights(content[chunk]):
                    content[chunk][name], plain[chunk][name] = make(content[chunk][name])
                    count += 1
    return count


@pytest.mark.parametrize(
    ("make", "style"), KINDS, ids=lambda value: getattr(value, "__name__", value)
)
def test_as_if_they_had_been_saved_dequantised(
    make: Callable[[torch.Tensor, str], Pair], style: str, golden: Golden, tmp_path: Path
) -> None:
    root, twin = (copy_of(golden, TORCH, tmp_path / name) for name in ("fp8", "plain"))
    set_arguments(root, fp8_param_gather=True, fp8="hybrid")
    assert replace_weights(root, twin, lambda weight: make(weight, style)) == 32
    result = mtt_convert.convert(root, tmp_path / "a", tokenizer="none")
    mtt_convert.convert(twin, tmp_path / "b", tokenizer="none")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name
    count = 12 if make is exponents else 16
    assert any(f"{count} weights are kept in 8 bits" in x for x in result.conversion.warnings)
    assert mtt_convert.diff(root, tmp_path / "a").differences == ()
    assert mtt_convert.verify(tmp_path / "a").problems == ()


def test_the_model_is_the_same_but_for_its_rounding(golden: Golden, tmp_path: Path) -> None:
    root, twin = (copy_of(golden, TORCH, tmp_path / name) for name in ("fp8", "plain"))
    replace_weights(root, twin, lambda weight: whole(weight, "2.8"))
    difference = compare_logits(root, golden("mcore/llama/logits.npz"))
    assert 1e-3 < difference < 5
    mtt_convert.convert(root, tmp_path / "out", to="torch_dist", tp=2)
    assert mtt_convert.diff(root, tmp_path / "out").differences == ()


def chunks_replaced(root: Path, name: str, make: Callable[[torch.Tensor], object]) -> None:
    """Chunks of a tensor of a distributed checkpoint, saved anew at the end of their files."""
    with edited_metadata(root) as metadata:
        for index, place in metadata.storage_data.items():
            if index.fqn != name:
                continue
            path = root / "iter_0000010" / place.relative_path
            data = path.read_bytes()
            saved = io.BytesIO(data[place.offset : place.offset + place.length])
            file = io.BytesIO()
            torch.save(make(torch.load(saved)), file)
            place.offset, place.length = len(data), len(file.getvalue())
            path.write_bytes(data + file.getvalue())


def test_chunks_of_a_distributed_checkpoint(golden: Golden, tmp_path: Path) -> None:
    """As FSDP2 saves parameters that are in FP8 themselves."""
    name = "decoder.layers.self_attention.linear_proj.weight"
    for number, folder in enumerate(("fp8", "plain")):
        root = copy_of(golden, TORCH_DIST, tmp_path / folder)
        chunks_replaced(root, name, lambda weight, n=number: whole(weight, "2.8")[n])
        mtt_convert.convert(root, tmp_path / f"{folder}-hf", tokenizer="none")
    first, second = (tmp_path / f"{n}-hf" / "model.safetensors" for n in ("fp8", "plain"))
    assert first.read_bytes() == second.read_bytes()


# ---- what is refused


def stored(rebuild: Any, *args: object) -> Callable[[torch.Tensor], _Stored]:
    return lambda weight: _Stored(
        rebuild,
        *(weight if arg is ... else weight.shape if arg == "shape" else arg for arg in args),
    )


def data(weight: torch.Tensor) -> torch.Tensor:
    return weight.to(E4M3).view(torch.uint8)


ONE, CODE7 = torch.ones(1), CODE(7)
WHOLE = function("tensor.float8_tensor", "_make_float8_tensor_in_reduce_ex")
MX = function("tensor.mxfp8_tensor", "_make_mxfp8_tensor_in_reduce_ex")
BLOCKS = function("tensor.float8_blockwise_tensor", "_make_float8_blockwise_tensor_in_reduce_ex")
FP4 = function("tensor.nvfp4_tensor", "_make_nvfp4_tensor_in_reduce_ex")
BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (
            lambda w: _Stored(WHOLE, data(w), CODE7, None, BF16, w.shape),
            UnsupportedError,
            "no scale",
        ),
        (
            lambda w: _Stored(WHOLE, data(w), CODE7, torch.ones(2), BF16, w.shape),
            CorruptError,
            "several scales",
        ),
        (
            lambda w: _Stored(WHOLE, data(w), CODE(9), ONE, BF16, w.shape),
            UnsupportedError,
            "type 9",
        ),
        (
            lambda w: _Stored(WHOLE, data(w), None, ONE, BF16, w.shape),
            UnsupportedError,
            "type None",
        ),
        (lambda w: _Stored(WHOLE, None, CODE7, ONE, BF16, w.shape), UnsupportedError, "transpose"),
        (
            lambda w: _Stored(WHOLE, data(w), CODE7, ONE, BF16, (3, 3)),
            CorruptError,
            "another shape",
        ),
        (
            lambda w: _Stored(WHOLE, data(w), CODE7, ONE, None, w.shape),
            CorruptError,
            "stands for no",
        ),
        (lambda w: _Stored(WHOLE, data(w)), UnsupportedError, "1 parts"),
        (
            lambda w: _Stored(
                BLOCKS, w.shape, data(w), torch.ones(9, 64), None, None, CODE7, BF16, None, False
            ),
            UnsupportedError,
            "parts of its rows",
        ),
        (
            lambda w: _Stored(
                BLOCKS, w.shape, data(w), torch.ones(0, 1), None, None, CODE7, BF16, None, True
            ),
            CorruptError,
            "do not cover it",
        ),
        (
            lambda w: _Stored(
                MX, data(w), torch.ones(999, 9), None, None, CODE7, BF16, w.shape, None, False
            ),
            UnsupportedError,
            "no scale",
        ),
        (
            lambda w: _Stored(MX, data(w), data(w), None, None, CODE7, BF16, w.shape, None, True),
            UnsupportedError,
            "swizzled",
        ),
        (lambda w: _Stored(FP4, data(w), ONE), UnsupportedError, "no plain weight"),
    ],
)
def test_what_has_no_scales(
    make: Callable[[torch.Tensor], _Stored],
    error: type[Exception],
    says: str,
    golden: Golden,
    tmp_path: Path,
) -> None:
    root = copy_of(golden, TORCH, tmp_path)
    with edited(shards(root)[0]) as content:
        name = weights(content["model0"])[0]
        content["model0"][name] = make(content["model0"][name])
    raised = refused(root, tmp_path / "out", error)  # type: ignore[arg-type]
    assert says in f"{raised.message} {raised.found}"
    assert name in str(raised)


@pytest.mark.parametrize(
    "body",
    [
        reduce(named("builtins", "getattr"), named("os", "system"), text("x")),
        reduce(
            named("builtins", "getattr"),
            named("transformer_engine.pytorch.float8_tensor", "Float8Tensor"),
            text("__init__"),
        ),
        reduce(named("builtins", "getattr"), named("torch", "Size"), text("_make_in_reduce_ex")),
        reduce(named("builtins", "getattr"), text("a"), text("_make_in_reduce_ex")),
    ],
)
def test_getattr_is_for_nothing_else(body: bytes, golden: Golden, tmp_path: Path) -> None:
    root = copy_of(golden, TORCH, tmp_path)
    with megatron_modules():
        plant_in(shards(root)[0], lambda content: content.update(extra=PLACEHOLDER), body)
    refused(root, tmp_path / "out", UnsafePickleError, says="asks for")
    assert build


# ---- products, window by window


@pytest.mark.parametrize("window", [2, 14, 64, 1 << 20])
@pytest.mark.parametrize("block", [(4, 6), (1, 5), (100, 100), (3, 1)], ids=str)
@pytest.mark.parametrize("kind", [E4M3, E5M2], ids=str)
def test_products(kind: torch.dtype, block: tuple[int, int], window: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows, columns = 13, 17
    codes = torch.randint(0, 120, (rows, columns), dtype=torch.uint8)
    grid = torch.rand(-(-rows // block[0]), -(-columns // block[1])) + 0.1
    (tmp_path / "file").write_bytes(codes.numpy().tobytes() + grid.numpy().tobytes())
    path = str(tmp_path / "file")
    name = str(kind).removeprefix("torch.")
    values = LazyTensor.in_file(DTYPES[name], (rows, columns), path, 0)
    scales = LazyTensor.in_file(DTYPES["float32"], tuple(grid.shape), path, codes.numel())
    lazy = scaled(values, scales, block, DTYPES["bfloat16"])
    wide = grid.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    expected = (codes.view(kind).float() * wide).bfloat16()
    parts = {
        "whole": (lazy, expected),
        "rows": (lazy.narrow(0, 2, 9), expected[2:11]),
        "columns": (lazy.narrow(1, 3, 11), expected[:, 3:14]),
        "transposed": (lazy.permute(1, 0), expected.T),
        "joined": (concat([lazy.narrow(0, 5, 2), lazy]), torch.cat([expected[5:7], expected])),
    }
    for part, (tensor, wanted) in parts.items():
        with FileReader() as reader:
            found = b"".join(bytes(piece) for piece in stream(tensor, reader, window))
        assert found == wanted.contiguous().view(torch.uint8).numpy().tobytes(), part
    assert lazy.pieces[0].paths == (path, path)


# ---- folders of Hugging Face


def block_quantised(folder: Path, twin: Path, scale_dtype: torch.dtype = torch.float32) -> None:
    case("llama", num_key_value_heads=2).save(folder)
    case("llama", num_key_value_heads=2).save(twin)
    tensors = load_file(folder / "model.safetensors")
    plain = dict(tensors)
    for name, weight in list(tensors.items()):
        if "proj" in name:
            rows, columns = weight.shape
            grid = torch.rand(-(-rows // 16), -(-columns // 24)).to(scale_dtype) * 0.01 + 0.001
            wide = grid.float().repeat_interleave(16, 0)[:rows]
            wide = wide.repeat_interleave(24, 1)[:, :columns]
            tensors[name] = quantised(weight, wide)
            tensors[f"{name}_scale_inv"] = grid
            plain[name] = (tensors[name].float() * wide).bfloat16()
        else:
            tensors[name] = plain[name] = weight.bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    save_file(plain, twin / "model.safetensors", {"format": "pt"})
    details = {"quant_method": "fp8", "weight_block_size": [16, 24], "fmt": "e4m3"}
    for path, more in ((folder, {"quantization_config": details}), (twin, {})):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, **more, "dtype": "bfloat16"}))


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_folder_like_deepseek_s(scale_dtype: torch.dtype, tmp_path: Path) -> None:
    block_quantised(tmp_path / "fp8", tmp_path / "plain", scale_dtype)
    for name in ("fp8", "plain"):
        mtt_convert.convert(tmp_path / name, tmp_path / f"{name}-hf", tokenizer="none")
        mtt_convert.convert(tmp_path / name, tmp_path / f"{name}-m", to="torch", tp=2)
    first, second = (tmp_path / f"{name}-hf" / "model.safetensors" for name in ("fp8", "plain"))
    assert first.read_bytes() == second.read_bytes()
    assert mtt_convert.diff(tmp_path / "fp8-m", tmp_path / "plain-m").differences == ()
    config = json.loads((tmp_path / "fp8-hf" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    (warning,) = open_checkpoint(tmp_path / "fp8").warnings
    assert warning == (
        "28 weights are kept in 8 bits: their values times their scales, in bfloat16"
    )


@pytest.mark.parametrize("change", ["no scales", "no blocks", "small", "other"])
def test_folders_that_are_refused(change: str, tmp_path: Path) -> None:
    folder = tmp_path / "fp8"
    block_quantised(folder, tmp_path / "plain")
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    name = "model.layers.0.mlp.down_proj.weight"
    if change == "no scales":
        del tensors[f"{name}_scale_inv"]
    elif change == "small":
        tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
    elif change == "no blocks":
        del config["quantization_config"]["weight_block_size"]
    else:
        config["quantization_config"] = {"quant_method": "compressed-tensors"}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((UnsupportedError, CorruptError)) as caught:
        open_checkpoint(folder)
    says = {"no scales": name, "small": name, "no blocks": "weight_block_size = None"}
    assert says.get(change, "compressed-tensors") in f"{caught.value} {caught.value.found}"
    assert caught.value.fix == "give the folder this one was quantised from"
