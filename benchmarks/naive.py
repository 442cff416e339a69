"""What one writes in an afternoon: torch.load of all ranks, merge, save_file.

    python benchmarks/naive.py CHECKPOINT OUT

Only for a `torch` checkpoint of a Llama-like model: Megatron-Core's names, TP and PP, no virtual
stages. Everything is in memory at once, and pickles are trusted. `convert.py` measures it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file


def main(checkpoint: Path, out: Path) -> None:
    folder = (
        checkpoint
        / f"iter_{int((checkpoint / 'latest_checkpointed_iteration.txt').read_text()):07d}"
    )
    files = sorted(folder.glob("mp_rank_*/model_optim_rng.pt"))
    ranks = [torch.load(file, map_location="cpu", weights_only=False) for file in files]
    args = ranks[0]["args"]
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    merged = {}
    for stage in range(pp):
        shards = [ranks[t * pp + stage]["model"] for t in range(tp)]
        for name in shards[0]:
            if not name.endswith("_extra_state"):
                merge(merged, name, [shard[name] for shard in shards], stage, args)
    out.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in merged.items()}, out / "model.safetensors"
    )


def merge(merged: dict, name: str, parts: list, stage: int, args) -> None:
    """One parameter of one stage, to its Hugging Face names."""
    if name.endswith("word_embeddings.weight"):
        merged["model.embed_tokens.weight"] = torch.cat(parts)
    elif name == "output_layer.weight":
        merged["lm_head.weight"] = torch.cat(parts)
    elif name == "decoder.final_layernorm.weight":
        merged["model.norm.weight"] = parts[0]
    else:
        number, _, rest = name.removeprefix("decoder.layers.").partition(".")
        layers = args.num_layers // args.pipeline_model_parallel_size
        layer = f"model.layers.{int(number) + stage * layers}."
        if rest == "self_attention.linear_proj.weight":
            merged[layer + "self_attn.o_proj.weight"] = torch.cat(parts, 1)
        elif rest == "mlp.linear_fc2.weight":
            merged[layer + "mlp.down_proj.weight"] = torch.cat(parts, 1)
        elif rest == "mlp.linear_fc1.weight":
            halves = [part.chunk(2) for part in parts]
            merged[layer + "mlp.gate_proj.weight"] = torch.cat([gate for gate, _ in halves])
            merged[layer + "mlp.up_proj.weight"] = torch.cat([up for _, up in halves])
        elif rest == "self_attention.linear_qkv.weight":
            size, groups = args.kv_channels, args.num_query_groups
            heads = args.num_attention_heads // groups
            rows = torch.cat(parts).view(groups, heads + 2, size, args.hidden_size)
            for kind, part in zip("qkv", rows.split([heads, 1, 1], dim=1), strict=True):
                merged[f"{layer}self_attn.{kind}_proj.weight"] = part.reshape(-1, args.hidden_size)
        elif rest == "self_attention.linear_qkv.layer_norm_weight":
            merged[layer + "input_layernorm.weight"] = parts[0]
        elif rest == "mlp.linear_fc1.layer_norm_weight":
            merged[layer + "post_attention_layernorm.weight"] = parts[0]
        else:
            raise SystemExit(f"unknown parameter {name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
