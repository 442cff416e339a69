"""Architecture: derived sizes, and impossible numbers."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest

from mtt_convert.architecture import Architecture
from mtt_convert.errors import UnsupportedError

GPT = Architecture(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=256,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=16,
    padded_vocab_size=512,
    max_position_embeddings=32,
    layernorm_epsilon=1e-5,
)


def test_derived_sizes() -> None:
    assert GPT.heads_per_group == 4
    assert GPT.attention_size == 128
    assert GPT.qkv_size == (8 + 2 * 2) * 16
    assert GPT.fc1_size() == 256
    assert GPT.fc1_size(96) == 96
    gated = replace(GPT, gated_linear_unit=True)
    assert (gated.fc1_size(), gated.fc1_size(96)) == (512, 192)


MOE = replace(
    GPT,
    num_experts=8,
    moe_ffn_hidden_size=96,
    moe_layer_pattern=(0, 1),
    moe_router_topk=4,
    moe_router_num_groups=4,
    moe_router_group_topk=2,
)
MLA = replace(
    GPT,
    multi_latent_attention=True,
    num_query_groups=8,
    kv_channels=24,
    position_embedding_type="rope",
    rotary_interleaved=True,
    q_lora_rank=32,
    kv_lora_rank=24,
    qk_head_dim=16,
    qk_pos_emb_head_dim=8,
    v_head_dim=12,
)


def test_groups_need_not_divide_the_chosen_experts() -> None:
    """Megatron judges a group by its best `topk // group_topk`, and rounds down."""
    assert replace(MOE, moe_router_topk=3).moe_router_group_topk == 2


def test_layers_with_experts() -> None:
    assert MOE.moe_layers == (False, True)
    assert GPT.moe_layers == (False, False)


def test_sizes_of_latent_attention() -> None:
    assert MLA.attention_size == 8 * 12
    assert MLA.rotary_dim == 8


def test_only_what_is_computed_counts() -> None:
    dense = replace(GPT, moe_router_topk=3, kv_lora_rank=5, moe_router_score_function="sigmoid")
    assert dense.forward_pass() == GPT.forward_pass()
    assert replace(MLA, mscale=0.5).forward_pass() == MLA.forward_pass()
    yarn = replace(MLA, rope_type="yarn", rotary_scaling_factor=40.0)
    assert replace(yarn, mscale=0.5).forward_pass() != yarn.forward_pass()
    assert replace(MOE, moe_router_topk=2).forward_pass() != MOE.forward_pass()


@pytest.mark.parametrize(
    ("add_bias_linear", "add_qkv_bias", "has"),
    [(True, False, True), (False, True, True), (False, False, False), (True, True, True)],
)
def test_qkv_bias(add_bias_linear: bool, add_qkv_bias: bool, has: bool) -> None:
    architecture = replace(GPT, add_bias_linear=add_bias_linear, add_qkv_bias=add_qkv_bias)
    assert architecture.has_qkv_bias is has


def test_norm_bias_and_position_table() -> None:
    assert GPT.has_norm_bias
    assert GPT.has_position_table
    llama = replace(GPT, normalization="RMSNorm", position_embedding_type="rope")
    assert not llama.has_norm_bias
    assert not llama.has_position_table


@pytest.mark.parametrize(("percent", "dim"), [(1.0, 16), (0.5, 8), (0.25, 4)])
def test_rotary_dim(percent: float, dim: int) -> None:
    rope = replace(GPT, position_embedding_type="rope", rotary_percent=percent)
    assert rope.rotary_dim == dim
    assert replace(GPT, rotary_percent=percent).rotary_dim == 0


@pytest.mark.parametrize(
    ("model", "change", "found"),
    [
        (GPT, {"moe_layer_pattern": (0, 1)}, "moe_layer_pattern = (0, 1)"),
        (GPT, {"kind": "rnn"}, "kind = rnn"),
        (MOE, {"num_experts": 0}, "num_experts = 0"),
        (MOE, {"moe_ffn_hidden_size": 0}, "moe_ffn_hidden_size = 0"),
        (MOE, {"moe_layer_pattern": (1,)}, "moe_layer_pattern = (1,), num_layers = 2"),
        (MOE, {"moe_layer_pattern": (0, 0)}, "moe_layer_pattern = (0, 0), num_layers = 2"),
        (MOE, {"moe_router_topk": 9}, "moe_router_topk = 9, num_experts = 8"),
        (MOE, {"moe_router_score_function": "hash"}, "moe_router_score_function = hash"),
        (
            MOE,
            {"moe_router_num_groups": 3},
            "moe_router_num_groups = 3, moe_router_group_topk = 2, moe_router_topk = 4, "
            "num_experts = 8",
        ),
        (
            MOE,
            {"moe_router_group_topk": None},
            "moe_router_num_groups = 4, moe_router_group_topk = None, moe_router_topk = 4, "
            "num_experts = 8",
        ),
        (
            MOE,
            {"moe_router_topk": 5},
            "moe_router_num_groups = 4, moe_router_group_topk = 2, moe_router_topk = 5, "
            "num_experts = 8",
        ),
        (
            MOE,
            {"moe_router_topk": 1},
            "moe_router_num_groups = 4, moe_router_group_topk = 2, moe_router_topk = 1, "
            "num_experts = 8",
        ),
        (MLA, {"v_head_dim": 0}, "v_head_dim = 0"),
        (MLA, {"q_lora_rank": 0}, "q_lora_rank = 0"),
        (
            MLA,
            {"kv_channels": 16},
            "kv_channels = 16, qk_head_dim = 16, qk_pos_emb_head_dim = 8, num_query_groups = 8",
        ),
    ],
)
def test_refuses_experts_and_latents_that_cannot_be(
    model: Architecture, change: dict[str, object], found: str
) -> None:
    with pytest.raises(UnsupportedError) as caught:
        replace(model, **change)  # type: ignore[arg-type]
    assert caught.value.found == found


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"num_layers": 0}, "num_layers = 0"),
        ({"kv_channels": -1}, "kv_channels = -1"),
        ({"num_query_groups": 3}, "num_attention_heads = 8, num_query_groups = 3"),
        ({"num_query_groups": 16}, "num_attention_heads = 8, num_query_groups = 16"),
        ({"vocab_size": 513}, "vocab_size = 513, padded_vocab_size = 512"),
        ({"vocab_size": 0}, "vocab_size = 0, padded_vocab_size = 512"),
        ({"layernorm_epsilon": 0.0}, "layernorm_epsilon = 0.0"),
        ({"layernorm_epsilon": float("nan")}, "layernorm_epsilon = nan"),
        ({"attention_dropout": 1.5}, "attention_dropout = 1.5"),
        ({"init_method_std": -1.0}, "init_method_std = -1.0"),
        ({"rotary_base": 0.0}, "rotary_base = 0.0"),
        ({"rotary_percent": 1.5}, "rotary_percent = 1.5"),
        ({"rope_scaling_factor": 0.0}, "rope_scaling_factor = 0.0"),
        ({"activation": "relu"}, "activation = relu"),
        ({"normalization": "L2Norm"}, "normalization = L2Norm"),
        ({"position_embedding_type": "yarn"}, "position_embedding_type = yarn"),
        ({"params_dtype": "uint8"}, "params_dtype = uint8"),
        (
            {"position_embedding_type": "rope", "rotary_percent": 0.2},
            "kv_channels = 16, rotary_percent = 0.2",
        ),
    ],
)
def test_refuses_what_cannot_be(change: dict[str, object], found: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        replace(GPT, **change)  # type: ignore[arg-type]
    assert caught.value.found == found
    assert caught.value.expected


def test_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        GPT.num_layers = 3  # type: ignore[misc]
