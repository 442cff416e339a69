"""Checkpoints as large as real ones that take no room: files whose weights are holes.

A file of torch.save begins with its pickle and ends with its directory. Both are written here, and
what lies between, the tensors, is left out: the file system shows zeros.

    write_torch(folder, shape, tp, pp)        Megatron's `torch` format, one file per rank
    write_experts(folder, layers, ep)         the same of a model shaped like DeepSeek-V3
"""

from __future__ import annotations

import argparse
import io
import pickle
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Names = Callable[[str], str]


@dataclass(frozen=True)
class Shape:
    """A GPT: Megatron's arguments, and the parameters of a layer by name.

    Attributes:
        args: what the files say under `args`.
        layer: name within a layer -> whole shape, and the axis that tensor parallelism splits.
        first, last: the same for the ends of the model.
    """

    args: dict[str, Any]
    layer: dict[str, tuple[tuple[int, ...], int | None]]
    first: dict[str, tuple[tuple[int, ...], int | None]]
    last: dict[str, tuple[tuple[int, ...], int | None]]


def gpt(
    num_layers: int, hidden_size: int, num_heads: int, vocab_size: int, seq_length: int
) -> Shape:
    """A GPT-3: learned positions, biases, LayerNorm, tied."""
    h, f = hidden_size, 4 * hidden_size
    args = {
        **_common(num_layers, hidden_size, num_heads, vocab_size, seq_length),
        "ffn_hidden_size": f,
        "position_embedding_type": "learned_absolute",
        "normalization": "LayerNorm",
        "swiglu": False,
        "add_bias_linear": True,
        "untie_embeddings_and_output_weights": False,
        "bias_gelu_fusion": True,
    }
    layer = {
        "input_layernorm.weight": ((h,), None),
        "input_layernorm.bias": ((h,), None),
        "self_attention.linear_qkv.weight": ((3 * h, h), 0),
        "self_attention.linear_qkv.bias": ((3 * h,), 0),
        "self_attention.linear_proj.weight": ((h, h), 1),
        "self_attention.linear_proj.bias": ((h,), None),
        "pre_mlp_layernorm.weight": ((h,), None),
        "pre_mlp_layernorm.bias": ((h,), None),
        "mlp.linear_fc1.weight": ((f, h), 0),
        "mlp.linear_fc1.bias": ((f,), 0),
        "mlp.linear_fc2.weight": ((h, f), 1),
        "mlp.linear_fc2.bias": ((h,), None),
    }
    first = {
        "embedding.word_embeddings.weight": ((vocab_size, h), 0),
        "embedding.position_embeddings.weight": ((seq_length, h), None),
    }
    last = {
        "decoder.final_layernorm.weight": ((h,), None),
        "decoder.final_layernorm.bias": ((h,), None),
        "output_layer.weight": ((vocab_size, h), 0),
    }
    return Shape(args, layer, first, last)


def llama(num_layers: int, hidden_size: int) -> Shape:
    """A Llama: rotary positions, RMSNorm, gated, untied."""
    h, f, vocab_size = hidden_size, 4 * hidden_size, 32000
    args = {
        **_common(num_layers, hidden_size, hidden_size // 128, vocab_size, 4096),
        "ffn_hidden_size": f,
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
    }
    layer = {
        "input_layernorm.weight": ((h,), None),
        "self_attention.linear_qkv.weight": ((3 * h, h), 0),
        "self_attention.linear_proj.weight": ((h, h), 1),
        "pre_mlp_layernorm.weight": ((h,), None),
        "mlp.linear_fc1.weight": ((2 * f, h), 0),
        "mlp.linear_fc2.weight": ((h, f), 1),
    }
    first = {"embedding.word_embeddings.weight": ((vocab_size, h), 0)}
    last = {
        "decoder.final_layernorm.weight": ((h,), None),
        "output_layer.weight": ((vocab_size, h), 0),
    }
    return Shape(args, layer, first, last)


_EXPERTS, _EXPERT, _Q, _KV = 256, 2048, 1536, 512


def write_experts(root: Path, num_layers: int, ep: int, itemsize: int = 2) -> int:
    """Write DeepSeek-V3 with so many layers over so many ranks; the bytes its files seem to have.

    Latent attention, three dense layers, then 256 experts and a shared one, one layer that predicts
    further tokens; modules of Transformer Engine.
    """
    root.mkdir(parents=True, exist_ok=True)
    (root / "latest_checkpointed_iteration.txt").write_text("10")
    h, heads, vocab_size, pattern = 7168, 128, 129280, [0] * 3 + [1] * (num_layers - 3)
    args = {
        **_common(num_layers, h, heads, vocab_size, 4096),
        "kv_channels": 128,
        "ffn_hidden_size": 18432,
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
        "qk_layernorm": True,
        "multi_latent_attention": True,
        "q_lora_rank": _Q,
        "kv_lora_rank": _KV,
        "qk_head_dim": 128,
        "qk_pos_emb_head_dim": 64,
        "v_head_dim": 128,
        "rope_type": "yarn",
        "rotary_scaling_factor": 40.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "num_experts": _EXPERTS,
        "moe_ffn_hidden_size": _EXPERT,
        "moe_layer_freq": pattern,
        "moe_router_topk": 8,
        "moe_router_num_groups": 8,
        "moe_router_group_topk": 4,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_shared_expert_intermediate_size": _EXPERT,
        "moe_grouped_gemm": True,
        "mtp_num_layers": 1,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": 1,
        "transformer_impl": "transformer_engine",
    }
    norm = {"weight": (h,)}
    tensors = {"embedding.word_embeddings.weight": (vocab_size, h)}
    for layer, flag in enumerate(pattern):
        parts = _expert_layer(h, heads, ep) if flag else _dense_layer(h, heads)
        tensors |= {f"decoder.layers.{layer}.{name}": size for name, size in parts.items()}
    tensors |= {f"decoder.final_layernorm.{name}": size for name, size in norm.items()}
    for name in ("enorm", "hnorm", "final_layernorm"):
        tensors[f"mtp.layers.0.{name}.weight"] = (h,)
    tensors["mtp.layers.0.eh_proj.weight"] = (h, 2 * h)
    inner = "mtp.layers.0.transformer_layer."
    tensors |= {inner + name: size for name, size in _expert_layer(h, heads, ep).items()}
    tensors["output_layer.weight"] = (vocab_size, h)
    num_bytes = 0
    for rank in range(ep):
        folder = root / "iter_0000010" / f"mp_rank_00_{rank:03d}"
        folder.mkdir(parents=True)
        content = {
            "args": argparse.Namespace(**args, rank=rank),
            "checkpoint_version": 3.0,
            "iteration": 10,
        }
        num_bytes += write_file(folder / "model_optim_rng.pt", content, tensors, itemsize)
    return num_bytes


def _latent_attention(h: int, heads: int) -> dict[str, tuple[int, ...]]:
    parts: dict[str, tuple[int, ...]] = {
        "linear_proj.weight": (h, heads * 128),
        "linear_q_down_proj.weight": (_Q, h),
        "linear_q_up_proj.layer_norm_weight": (_Q,),
        "linear_q_up_proj.weight": (heads * 192, _Q),
        "linear_kv_down_proj.weight": (_KV + 64, h),
        "linear_kv_up_proj.layer_norm_weight": (_KV,),
        "linear_kv_up_proj.weight": (heads * 256, _KV),
    }
    named = {f"self_attention.{name}": size for name, size in parts.items()}
    return {"input_layernorm.weight": (h,), **named}


def _dense_layer(h: int, heads: int) -> dict[str, tuple[int, ...]]:
    return {
        **_latent_attention(h, heads),
        "mlp.linear_fc1.layer_norm_weight": (h,),
        "mlp.linear_fc1.weight": (2 * 18432, h),
        "mlp.linear_fc2.weight": (h, 18432),
    }


def _expert_layer(h: int, heads: int, ep: int) -> dict[str, tuple[int, ...]]:
    local = range(_EXPERTS // ep)
    return {
        **_latent_attention(h, heads),
        "pre_mlp_layernorm.weight": (h,),
        "mlp.router.weight": (_EXPERTS, h),
        "mlp.router.expert_bias": (_EXPERTS,),
        **{f"mlp.experts.linear_fc1.weight{k}": (2 * _EXPERT, h) for k in local},
        **{f"mlp.experts.linear_fc2.weight{k}": (h, _EXPERT) for k in local},
        "mlp.shared_experts.linear_fc1.weight": (2 * _EXPERT, h),
        "mlp.shared_experts.linear_fc2.weight": (h, _EXPERT),
    }


def _common(
    num_layers: int, hidden_size: int, num_heads: int, vocab_size: int, seq_length: int
) -> dict[str, Any]:
    return {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": num_heads,
        "kv_channels": hidden_size // num_heads,
        "group_query_attention": False,
        "num_query_groups": 1,
        "seq_length": seq_length,
        "max_position_embeddings": seq_length,
        "padded_vocab_size": vocab_size,
        "layernorm_epsilon": 1e-5,
        "bf16": True,
        "fp16": False,
    }


# Canonical names as Megatron-LM before Megatron-Core spells them, within `language_model`.
_LEGACY = {
    "decoder.layers": "encoder.layers",
    "decoder.final_layernorm": "encoder.final_layernorm",
    "self_attention.linear_qkv": "self_attention.query_key_value",
    "self_attention.linear_proj": "self_attention.dense",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "linear_fc1": "dense_h_to_4h",
    "linear_fc2": "dense_4h_to_h",
}


def core(name: str) -> str:
    """Names of Megatron-Core's local layers."""
    return name


def legacy(name: str) -> str:
    """Names of Megatron-LM v2.1 to 23.08, as in the years of MT-NLG."""
    if name == "output_layer.weight":
        return "word_embeddings_for_head.weight"
    for new, old in _LEGACY.items():
        name = name.replace(new, old)
    return f"language_model.{name}"


def write_torch(root: Path, shape: Shape, tp: int, pp: int, names: Names = core) -> int:
    """Write one iteration of the `torch` format; the bytes its files seem to have."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "latest_checkpointed_iteration.txt").write_text("10")
    num_bytes = 0
    for p in range(pp):
        for t in range(tp):
            args = {
                **shape.args,
                "tensor_model_parallel_size": tp,
                "pipeline_model_parallel_size": pp,
                "rank": p * tp + t,
            }
            folder = root / "iter_0000010" / (f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else ""))
            folder.mkdir(parents=True)
            tensors = {names(name): size for name, size in _held(shape, tp, p, pp)}
            content = {
                "args": argparse.Namespace(**args),
                "checkpoint_version": 3.0,
                "iteration": 10,
            }
            num_bytes += write_file(folder / "model_optim_rng.pt", content, tensors)
    return num_bytes


def _held(shape: Shape, tp: int, p: int, pp: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of what each tensor-parallel rank of stage `p` holds."""
    parts = dict(shape.first) if p == 0 else {}
    for layer in range(shape.args["num_layers"] // pp):
        parts |= {f"decoder.layers.{layer}.{name}": size for name, size in shape.layer.items()}
    if p == pp - 1:
        parts |= shape.last
        tied = not shape.args["untie_embeddings_and_output_weights"]
        if tied and pp == 1:
            del parts["output_layer.weight"]
    for name, (whole, axis) in parts.items():
        size = list(whole)
        if axis is not None:
            size[axis] //= tp
        yield name, tuple(size)


def write_file(
    path: Path, content: dict[str, object], tensors: dict[str, tuple[int, ...]], itemsize: int = 2
) -> int:
    """A file of torch.save whose `model` has these tensors, in bfloat16, all of them holes."""
    data = _pickled({**content, "model": tensors})
    entries: list[tuple[str, int, int, int]] = []
    with path.open("wb") as file:

        def record(name: str, size: int, body: bytes = b"") -> None:
            start = file.tell()
            name = f"archive/{name}"
            padding = -(start + 30 + len(name) + 4) % 64
            extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
            short = min(size, 0xFFFFFFFF)
            header = (20, 0, 0, 0, 0x21, 0, short, short, len(name), len(extra))
            file.write(struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", *header))
            file.write(name.encode() + extra + body)
            entries.append((name, start, size, 0))
            file.seek(size - len(body), io.SEEK_CUR)

        record("data.pkl", len(data), data)
        record("byteorder", 6, b"little")
        for key, size in enumerate(tensors.values()):
            record(f"data/{key}", _count(size) * itemsize)
        record("version", 2, b"3\n")
        _write_directory(file, entries)
        return file.tell()


def _write_directory(file: io.BufferedWriter, entries: list[tuple[str, int, int, int]]) -> None:
    start = file.tell()
    for name, at, size, _ in entries:
        large = struct.pack("<HHQQQ", 1, 24, size, size, at)
        full = 0xFFFFFFFF
        fields = (45, 45, 0, 0, 0, 0x21, 0, full, full, len(name), len(large), 0, 0, 0, 0, full)
        file.write(struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", *fields))
        file.write(name.encode() + large)
    size, count = file.tell() - start, len(entries)
    end = file.tell()
    file.write(
        struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start)
    )
    file.write(struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1))
    full = 0xFFFFFFFF
    file.write(struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, full, full, 0))


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


class _Storage:
    def __init__(self, key: int, count: int) -> None:
        self.key, self.count = key, count


class _Tensor:
    """Pickles as a tensor of torch does, without one."""

    def __init__(self, key: int, shape: tuple[int, ...]) -> None:
        self.key, self.shape = key, shape

    def __reduce__(self) -> tuple[Any, ...]:
        import torch

        strides = [1]
        for size in reversed(self.shape[1:]):
            strides.insert(0, strides[0] * size)
        storage = _Storage(self.key, _count(self.shape))
        return torch._utils._rebuild_tensor_v2, (storage, 0, self.shape, tuple(strides), False, {})


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        import torch

        if isinstance(value, _Storage):
            return "storage", torch.BFloat16Storage, str(value.key), "cpu", value.count
        return None


def _pickled(content: dict[str, Any]) -> bytes:
    tensors = {name: _Tensor(key, s) for key, (name, s) in enumerate(content["model"].items())}
    out = io.BytesIO()
    _Pickler(out, protocol=2).dump({**content, "model": tensors})
    return out.getvalue()
