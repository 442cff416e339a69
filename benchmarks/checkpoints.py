"""Checkpoints to measure conversions of: random bytes in a Llama-like model, TP4 x PP2.

    torch        8 files, Megatron-Core with TransformerEngine's names
    torch_dist   16 files, the same tensors, layers stacked
    hf           safetensors of 1 GB, converted from `torch` by mtt

Makes one and exits, so that whoever measures stays small:

    python benchmarks/checkpoints.py MODEL FORMAT FOLDER
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

TP, PP, WRITERS = 4, 2, 2


@dataclass(frozen=True)
class Model:
    """A Llama-like model; the default has 4.07 GB of bf16 weights."""

    layers: int = 10
    hidden: int = 4096
    ffn: int = 11008
    heads: int = 32
    groups: int = 8
    vocab: int = 31999
    padded_vocab: int = 32256
    gated: bool = True

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def num_bytes(self) -> int:
        """Bytes of weights of a Hugging Face folder: the vocabulary's padding is not there."""
        qkv = (self.heads + 2 * self.groups) * self.head_size
        matrices = qkv + self.hidden + (3 if self.gated else 2) * self.ffn
        layer = matrices * self.hidden + 2 * self.hidden
        return 2 * (self.layers * layer + (2 * self.vocab + 1) * self.hidden)

    @property
    def narrow(self) -> Model:
        """The same tensors, an eighth as wide: what takes time at any size."""
        return replace(self, hidden=self.hidden // 8, ffn=self.ffn // 8)


LARGE = Model()
ROWS = Model(layers=12, ffn=16384, vocab=7999, padded_vocab=8192, gated=False)
DISK = replace(LARGE, layers=6)
MODELS = {
    "large": LARGE,
    "rows": ROWS,  # nearly every second byte is in a row-parallel weight
    "disk": DISK,
    "large-s": Model(layers=8, hidden=2048, ffn=5632, vocab=7999, padded_vocab=8192),
    "rows-s": replace(ROWS, layers=8, hidden=2048, ffn=8192),
    "disk-s": Model(layers=4, hidden=2048, ffn=5632, vocab=7999, padded_vocab=8192),
}


def arguments(model: Model) -> argparse.Namespace:
    """The arguments Megatron-LM stores that describe the model."""
    import torch

    return argparse.Namespace(
        tensor_model_parallel_size=TP,
        pipeline_model_parallel_size=PP,
        virtual_pipeline_model_parallel_size=None,
        expert_model_parallel_size=1,
        use_legacy_models=False,
        transformer_impl="transformer_engine",
        num_layers=model.layers,
        hidden_size=model.hidden,
        ffn_hidden_size=model.ffn,
        num_attention_heads=model.heads,
        group_query_attention=True,
        num_query_groups=model.groups,
        kv_channels=model.head_size,
        max_position_embeddings=2048,
        position_embedding_type="rope",
        rotary_base=10000,
        rotary_percent=1.0,
        use_rope_scaling=False,
        normalization="RMSNorm",
        layernorm_epsilon=1e-5,
        layernorm_zero_centered_gamma=False,
        swiglu=model.gated,
        bias_gelu_fusion=False,
        add_bias_linear=False,
        add_qkv_bias=False,
        qk_layernorm=False,
        untie_embeddings_and_output_weights=True,
        tokenizer_type="NullTokenizer",
        vocab_size=model.vocab - 1,  # Megatron's NullTokenizer adds one
        padded_vocab_size=model.padded_vocab,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=0.02,
        params_dtype=torch.bfloat16,
        bf16=True,
        fp16=False,
    )


@dataclass(frozen=True)
class Parameter:
    """A parameter of one layer, or of the model, and how tensor parallelism splits it."""

    shape: tuple[int, ...]
    split: int | None
    stage: int | None = None
    gated: bool = False

    def parts(self, whole, rank: int):
        """What a tensor-parallel rank holds of it: (place in the whole, tensor) for each block."""
        blocks = whole.chunk(2) if self.gated else (whole,)
        for number, block in enumerate(blocks):
            start = [number * block.shape[0]] + [0] * (whole.dim() - 1)
            part = block
            if self.split is not None:
                part = block.chunk(TP, self.split)[rank]
                start[self.split] += rank * part.shape[self.split]
            yield tuple(start), part.clone()  # torch.save writes whole storages


def parameters(model: Model) -> tuple[dict[str, Parameter], dict[str, Parameter]]:
    """Parameters of every layer, and those outside layers."""
    hidden, ffn = model.hidden, model.ffn
    qkv = (model.heads + 2 * model.groups) * model.head_size
    rows = 2 * ffn if model.gated else ffn
    layer = {
        "self_attention.linear_proj.weight": Parameter((hidden, hidden), 1),
        "self_attention.linear_qkv.layer_norm_weight": Parameter((hidden,), None),
        "self_attention.linear_qkv.weight": Parameter((qkv, hidden), 0),
        "mlp.linear_fc1.layer_norm_weight": Parameter((hidden,), None),
        "mlp.linear_fc1.weight": Parameter((rows, hidden), 0, gated=model.gated),
        "mlp.linear_fc2.weight": Parameter((hidden, ffn), 1),
    }
    outside = {
        "embedding.word_embeddings.weight": Parameter((model.padded_vocab, hidden), 0, 0),
        "decoder.final_layernorm.weight": Parameter((hidden,), None, PP - 1),
        "output_layer.weight": Parameter((model.padded_vocab, hidden), 0, PP - 1),
    }
    return layer, outside


def whole_tensor(shape: tuple[int, ...], key: str):
    """Random bytes that depend on the name alone, so that both formats hold the same model."""
    import numpy as np
    import torch

    count = 1
    for size in shape:
        count *= size
    data = np.random.default_rng(list(key.encode())).integers(0, 2**16, count, dtype=np.uint16)
    return torch.from_numpy(data.view(np.int16)).view(torch.bfloat16).view(shape)


def rank_parts(model: Model, pp: int) -> Iterator[tuple[str, int | None, Parameter]]:
    """(name, global layer, parameter) of everything one pipeline stage holds."""
    layer, outside = parameters(model)
    per_stage = model.layers // PP
    for name, parameter in outside.items():
        if parameter.stage == pp == 0:
            yield name, None, parameter
    for number in range(pp * per_stage, (pp + 1) * per_stage):
        for name, parameter in layer.items():
            yield name, number, parameter
    for name, parameter in outside.items():
        if parameter.stage == pp > 0:
            yield name, None, parameter


def write_torch(folder: Path, model: Model) -> None:
    """`mp_rank_TT_PPP/model_optim_rng.pt`."""
    import torch

    args = arguments(model)
    for pp in range(PP):
        shards: list[dict] = [{} for _ in range(TP)]
        for name, layer, parameter in rank_parts(model, pp):
            whole = whole_tensor(parameter.shape, f"{layer} {name}")
            local = (
                name if layer is None else f"decoder.layers.{layer % (model.layers // PP)}.{name}"
            )
            for tp in range(TP):
                blocks = [part for _, part in parameter.parts(whole, tp)]
                shards[tp][local] = torch.cat(blocks) if len(blocks) > 1 else blocks[0]
        for tp, shard in enumerate(shards):
            place = folder / "iter_0000010" / f"mp_rank_{tp:02d}_{pp:03d}"
            place.mkdir(parents=True)
            content = {"args": args, "checkpoint_version": 3.0, "iteration": 10, "model": shard}
            torch.save(content, place / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("10")


def write_torch_dist(folder: Path, model: Model) -> None:
    """`.metadata` and `__R_W.distcp`: one small torch.save after another, layers stacked."""
    import pickle

    import torch
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    place = folder / "iter_0000010"
    place.mkdir(parents=True)
    tensors: dict[str, dcp.TensorStorageMetadata] = {}
    storage: dict[dcp.MetadataIndex, _StorageInfo] = {}
    for name, start, shape, rank, part in global_chunks(model):
        properties = dcp.TensorProperties(dtype=part.dtype)
        empty = dcp.TensorStorageMetadata(properties, torch.Size(shape), [])
        chunk = dcp.ChunkStorageMetadata(torch.Size(start), part.shape)
        tensors.setdefault(name, empty).chunks.append(chunk)
        paths = [place / f"__{rank}_{writer}.distcp" for writer in range(WRITERS)]
        path = min(paths, key=lambda path: path.stat().st_size if path.exists() else 0)
        with open(path, "ab") as file:
            offset = file.tell()
            torch.save(part, file)
            length = file.tell() - offset
        storage[dcp.MetadataIndex(name, torch.Size(start))] = _StorageInfo(
            path.name, offset, length
        )
    metadata = dcp.Metadata(state_dict_metadata=tensors, storage_data=storage)
    (place / ".metadata").write_bytes(pickle.dumps(metadata))
    common = {"args": arguments(model), "checkpoint_version": 3.0, "iteration": 10}
    torch.save(common, place / "common.pt")
    facts = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    facts |= {"common_backend": "torch", "common_backend_version": 1}
    (place / "metadata.json").write_text(json.dumps(facts))
    (folder / "latest_checkpointed_iteration.txt").write_text("10")


def global_chunks(model: Model):
    """(global name, place in the global tensor, its shape, rank, tensor) of every chunk.

    Tensors that all tensor-parallel ranks hold are written by the first of them.
    """
    for pp in range(PP):
        for name, layer, parameter in rank_parts(model, pp):
            whole = whole_tensor(parameter.shape, f"{layer} {name}")
            for tp in range(TP if parameter.split is not None else 1):
                for start, part in parameter.parts(whole, tp):
                    rank, shape = pp * TP + tp, parameter.shape
                    if layer is None:
                        yield name, start, shape, rank, part
                    else:
                        stacked = (model.layers, *shape)
                        yield f"decoder.layers.{name}", (layer, *start), stacked, rank, part[None]


WRITE = {"torch": write_torch, "torch_dist": write_torch_dist}


if __name__ == "__main__":
    name, format, folder = sys.argv[1:]
    chosen = MODELS[name.removesuffix(".narrow")]
    WRITE[format](Path(folder), chosen.narrow if name.endswith(".narrow") else chosen)
