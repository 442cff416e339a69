"""Megatron's T5, from its own parameter names into MTT's: the three generations there are.

Independent of the converter, which is tested elsewhere: names are replaced one by one, and rows of
queries, keys and values taken apart head by head.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from modeling_mtt import MTTForConditionalGeneration, MTTSeq2SeqConfig

NAMES = [
    # legacy
    (r"^language_model\.", ""),
    (r"\.final_norm\.", ".final_layernorm."),
    (r"\.input_norm\.", ".input_layernorm."),
    (r"\.post_attention_norm\.", ".after_attention."),
    (r"\.post_inter_attention_norm\.", ".pre_mlp_layernorm."),
    (r"\.inter_attention\.query\.", ".cross_attention.linear_q."),
    (r"\.inter_attention\.key_value\.", ".cross_attention.linear_kv."),
    (r"\.inter_attention\.dense\.", ".cross_attention.linear_proj."),
    (r"\.query_key_value\.", ".linear_qkv."),
    (r"\.self_attention\.dense\.", ".self_attention.linear_proj."),
    (r"\.dense_h_to_4h\.", ".linear_fc1."),
    (r"\.dense_4h_to_h\.", ".linear_fc2."),
    # The norm after attention comes before the other attention, or before the MLP.
    (r"^encoder(.*)\.after_attention\.", r"encoder\1.pre_mlp_layernorm."),
    (r"^decoder(.*)\.after_attention\.", r"decoder\1.pre_cross_attn_layernorm."),
    # Megatron-Core with Transformer Engine
    (r"\.self_attention\.linear_qkv\.layer_norm_", ".input_layernorm."),
    (r"\.mlp\.linear_fc1\.layer_norm_", ".pre_mlp_layernorm."),
    # Megatron-Core to MTT
    (r"^embedding\.word_embeddings\.", "model.shared."),
    (r"^embedding\.position_embeddings\.", "model.embed_positions."),
    (r"^lm_head\.(output_layer\.)?", "lm_head."),
    (r"^(encoder|decoder)_relative_pos_emb\.", r"\1."),
    (r"^(encoder|decoder)\.", r"model.\1."),
    (r"\.final_layernorm\.", ".norm."),
    (r"\.pre_cross_attn_layernorm\.", ".cross_attn_layernorm."),
    (r"\.pre_mlp_layernorm\.", ".post_attention_layernorm."),
    (r"\.self_attention\.", ".self_attn."),
    (r"\.cross_attention\.", ".cross_attn."),
    (r"\.linear_q\.", ".q_proj."),
    (r"\.linear_proj\.", ".o_proj."),
    (r"\.linear_fc1\.", ".up_proj."),
    (r"\.linear_fc2\.", ".down_proj."),
]
# Second names of what is there already.
COPIES = ("position_embeddings.weight", "output_layer.bias")


def rename(weights: dict[str, torch.Tensor], num_heads: int) -> dict[str, torch.Tensor]:
    """Return MTT's weights of Megatron's, which are not cut into ranks."""
    renamed = {}
    for name, tensor in weights.items():
        if name in COPIES:
            continue
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        for fused, parts in ((".linear_qkv.", "qkv"), (".linear_kv.", "kv")):
            if fused in name:
                heads = tensor.view(num_heads, len(parts), -1, *tensor.shape[1:])
                for part, rows in zip(parts, heads.unbind(1), strict=True):
                    renamed[name.replace(fused, f".{part}_proj.")] = rows.flatten(0, 1)
                break
        else:
            renamed[name] = tensor
    return renamed


def load(path: Path, num_heads: int, **options: Any) -> MTTForConditionalGeneration:
    """Return the model of these weights; sizes are theirs, `options` what they do not say."""
    weights = rename(load_file(path), num_heads)
    vocab_size, hidden_size = weights["model.shared.weight"].shape
    sizes = {
        f"num_{side}_layers": 1
        + max(
            int(name.split(".")[3]) for name in weights if name.startswith(f"model.{side}.layers.")
        )
        for side in ("encoder", "decoder")
    }
    config = MTTSeq2SeqConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=len(weights["model.encoder.layers.0.mlp.up_proj.weight"]),
        num_attention_heads=num_heads,
        **sizes,
        **options,
    )
    model = MTTForConditionalGeneration(config).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) == set(model.all_tied_weights_keys)
    model.tie_weights()
    return model
