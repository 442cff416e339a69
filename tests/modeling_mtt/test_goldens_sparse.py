"""Megatron-Core's own weights and logits, renamed here and now, without the converter."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_mtt import MTTConfig, MTTForCausalLM
from tests.modeling_mtt.oracle import LLAMA, Tensors, split_gated, split_groups

NAMES = {
    "decoder.layers": "model.layers",
    "decoder.final_layernorm": "model.norm",
    "embedding.word_embeddings": "model.embed_tokens",
    "output_layer": "lm_head",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "self_attention.": "self_attn.",
    "linear_proj": "o_proj",
    "linear_fc2": "down_proj",
    "linear_q_down_proj": "q_a_proj",
    "linear_q_up_proj": "q_b_proj",
    "linear_kv_down_proj": "kv_a_proj_with_mqa",
    "linear_kv_up_proj": "kv_b_proj",
    ".q_layernorm": ".q_a_layernorm",
    ".kv_layernorm": ".kv_a_layernorm",
    "local_experts.": "",
    "router.expert_bias": "gate.e_score_correction_bias",
    "mlp.router": "mlp.gate",
}


def rename(tensors: Tensors, num_groups: int, head_dim: int) -> Tensors:
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        name = re.sub(r"^mtp\.", "model.mtp.", name)
        pieces = {"": tensor}
        if "linear_qkv" in name:
            pieces = split_groups(tensor, num_groups, head_dim)
        elif "linear_fc1" in name:
            pieces = split_gated(tensor)
        for piece, values in pieces.items():
            target = name.replace("linear_qkv", piece).replace("linear_fc1", piece)
            renamed[target] = values.contiguous()
    return renamed


def fields(config: dict[str, Any], args: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of `MTTConfig` for a transformer_config.json of Megatron-Core."""
    found: dict[str, Any] = {
        **LLAMA,
        "vocab_size": 512,
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["ffn_hidden_size"],
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "norm_eps": config["layernorm_epsilon"],
        "max_position_embeddings": args["max_position_embeddings"],
        "rope_parameters": {"rope_theta": float(args["rotary_base"])},
        "num_nextn_predict_layers": config["mtp_num_layers"] or 0,
    }
    if config["multi_latent_attention"]:
        found |= {
            "kv_lora_rank": config["kv_lora_rank"],
            "q_lora_rank": config["q_lora_rank"],
            "qk_nope_head_dim": config["qk_head_dim"],
            "qk_rope_head_dim": config["qk_pos_emb_head_dim"],
            "v_head_dim": config["v_head_dim"],
            "rope_interleave": True,
            "use_qk_norm": config["qk_layernorm"],
        }
    else:
        found |= {
            "num_key_value_heads": config["num_query_groups"],
            "head_dim": config["kv_channels"],
        }
    if config["num_moe_experts"]:
        pattern = config["moe_layer_freq"]
        if isinstance(pattern, list):
            found["mlp_layer_types"] = ["sparse" if each else "dense" for each in pattern]
        found |= {
            "num_experts": config["num_moe_experts"],
            "num_experts_per_tok": config["moe_router_topk"],
            "moe_intermediate_size": config["moe_ffn_hidden_size"],
            "scoring_func": config["moe_router_score_function"],
            "norm_topk_prob": not config["moe_router_pre_softmax"],
            "routed_scaling_factor": config["moe_router_topk_scaling_factor"] or 1.0,
            "use_expert_bias": config["moe_router_enable_expert_bias"],
            "n_group": config["moe_router_num_groups"],
            "topk_group": config["moe_router_group_topk"],
            "shared_expert_intermediate_size": config["moe_shared_expert_intermediate_size"],
        }
    return found


@pytest.fixture(params=["mixtral", "moe_mixed", "mla", "mtp"])
def saved(request, golden, tmp_path) -> tuple[Path, Path]:
    """The folder of a golden checkpoint, and one of the same weights in our names."""
    source = golden(f"mcore/{request.param}")
    config = json.loads((source / "transformer_config.json").read_text())
    args = json.loads((source / "args.json").read_text())
    MTTConfig(**fields(config, args)).save_pretrained(tmp_path)
    tensors = load_file(source / "reference_megatron.safetensors")
    renamed = rename(tensors, config["num_query_groups"], config["kv_channels"])
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return source, tmp_path


@torch.no_grad()
def test_logits_are_megatrons(saved):
    source, folder = saved
    model, info = MTTForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    expected = np.load(source / "logits.npz")
    ids = torch.from_numpy(expected["input_ids"])
    with_heads = "mtp0_logits" in expected
    for implementation in ("grouped_mm", "batched_mm", "eager"):
        model.set_experts_implementation(implementation)
        outputs = model(ids, output_mtp_logits=with_heads)
        pairs = [(outputs.logits, expected["logits"])]
        if with_heads:
            pairs.append((outputs.mtp_logits[0], expected["mtp0_logits"]))
        for found, correct in pairs:
            difference = (found - torch.from_numpy(correct)).abs().max()
            assert difference <= 1e-4, (implementation, float(difference))


def test_what_is_saved_is_what_was_loaded(saved, tmp_path):
    _, folder = saved
    MTTForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    expected = load_file(folder / "model.safetensors")
    found = load_file(tmp_path / "again" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].equal(tensor), name
