"""Megatron's arguments about experts, further tokens and latent attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mtt_convert.architecture import Architecture
from mtt_convert.arguments import architecture_from_args, notes
from mtt_convert.errors import MTTError, UnsupportedError, UsageError
from mtt_convert.expert_arguments import NEUTRAL
from mtt_convert.megatron_args import ignored_by_training, launch_flags, model_arguments

BASE: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 160,
    "num_attention_heads": 8,
    "group_query_attention": False,
    "padded_vocab_size": 512,
    "max_position_embeddings": 256,
    "layernorm_epsilon": 1e-5,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "use_legacy_models": False,
}
MOE = {**BASE, "num_experts": 8, "moe_router_topk": 2, "moe_layer_freq": 1}
MLA = {
    **BASE,
    "multi_latent_attention": True,
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 16,
    "qk_layernorm": True,
    "rope_type": "rope",
}
YARN = {
    **MLA,
    "rope_type": "yarn",
    "rotary_scaling_factor": 40.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def read(args: dict[str, Any], **changes: Any) -> Architecture:
    return architecture_from_args({**args, **changes})


# ---- experts


def test_what_experts_are_unless_said() -> None:
    a = read(MOE)
    assert (a.num_experts, a.moe_ffn_hidden_size, a.moe_router_topk) == (8, 160, 2)
    assert a.moe_layer_pattern == (1, 1, 1, 1)
    assert (a.moe_router_score_function, a.moe_router_pre_softmax) == ("softmax", False)
    assert a.moe_router_topk_scaling_factor is None
    assert a.moe_shared_expert_intermediate_size is None


@pytest.mark.parametrize("none", [None, 0, False, [1], ()])
def test_no_experts(none: object) -> None:
    assert read(MOE, num_experts=none) == read(BASE)


@pytest.mark.parametrize(
    ("freq", "pattern"),
    [
        (1, (1, 1, 1, 1)),
        (2, (1, 0, 1, 0)),
        (3, (1, 0, 0, 1)),
        ([0, 1, 1, 1], (0, 1, 1, 1)),
        ((0, 0, 0, 1), (0, 0, 0, 1)),
        ("2", (1, 0, 1, 0)),
        ("[0]+[1]*3", (0, 1, 1, 1)),
        ("([0]*1+[1]*1)*2", (0, 1, 0, 1)),
        ("2*[1,0]", (1, 0, 1, 0)),
    ],
)
def test_layers_with_experts(freq: object, pattern: tuple[int, ...]) -> None:
    assert read(MOE, moe_layer_freq=freq).moe_layer_pattern == pattern


@pytest.mark.parametrize(
    "freq",
    [0, -1, 1.5, True, [1], [0, 1, 2, 1], "__import__('os')", "[1]*10**9", "x", "[[1]]*4", [0] * 4],
)
def test_layers_that_cannot_be_told(freq: object) -> None:
    with pytest.raises(UnsupportedError, match="moe_layer_freq"):
        read(MOE, moe_layer_freq=freq)


@pytest.mark.parametrize(
    ("said", "fields"),
    [
        ({"moe_router_pre_softmax": True}, {"moe_router_pre_softmax": True}),
        (
            {"moe_router_score_function": "sigmoid", "moe_router_pre_softmax": True},
            {"moe_router_score_function": "sigmoid", "moe_router_pre_softmax": False},
        ),
        ({"moe_router_topk_scaling_factor": 2.5}, {"moe_router_topk_scaling_factor": 2.5}),
        ({"moe_router_topk_scaling_factor": 1.0}, {"moe_router_topk_scaling_factor": None}),
        ({"moe_router_topk_scaling_factor": 0.0}, {"moe_router_topk_scaling_factor": None}),
        (
            {"moe_router_num_groups": 4, "moe_router_group_topk": 2},
            {"moe_router_num_groups": 4, "moe_router_group_topk": 2},
        ),
        (
            {"moe_router_num_groups": 4, "moe_router_group_topk": 4},
            {"moe_router_num_groups": None, "moe_router_group_topk": None},
        ),
        (
            {"moe_router_topk_limited_devices": 2, "expert_model_parallel_size": 4},
            {"moe_router_num_groups": 4, "moe_router_group_topk": 2},
        ),
        (
            {"moe_shared_expert_intermediate_size": 64, "moe_shared_expert_gate": True},
            {"moe_shared_expert_intermediate_size": 64, "moe_shared_expert_gate": True},
        ),
        ({"moe_shared_expert_gate": True}, {"moe_shared_expert_gate": False}),
        ({"moe_expert_capacity_factor": -1.0}, {"num_experts": 8}),
        ({"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"]}, {"num_experts": 8}),
        ({"moe_router_dtype": "fp32", "moe_input_jitter_eps": 0.1}, {"num_experts": 8}),
    ],
    ids=str,
)
def test_how_experts_are_chosen(said: dict[str, Any], fields: dict[str, Any]) -> None:
    a = read(MOE, **said)
    assert {name: getattr(a, name) for name in fields} == fields


REFUSED: dict[str, object] = {
    "moe_expert_capacity_factor": 1.25,
    "moe_expert_rank_capacity_factor": 1.0,
    "moe_token_dropping": True,
    "moe_apply_probs_on_input": True,
    "moe_extended_tp": True,
    "moe_latent_size": 512,
    "moe_mlp_glu_interleave_size": 32,
    "moe_router_force_biased": 1.0,
    "moe_router_force_load_balancing": True,
    "moe_shared_expert_glu_interleave_size": 32,
    "moe_router_load_balancing_type": "sinkhorn",
    "moe_router_score_function": "sqrtsoftplus",
    "moe_router_enable_expert_bias": True,
    "num_experts": [8, 8],
}


@pytest.mark.parametrize("name", REFUSED)
def test_experts_that_are_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        read(MOE, **{name: REFUSED[name]})
    assert str(caught.value.found).startswith(f"{name} = ")
    assert str(caught.value.expected).startswith(f"{name} = ")
    assert f"--set {name}=" in str(caught.value.fix)


def test_all_that_could_refuse_is_tried() -> None:
    assert set(NEUTRAL) <= set(REFUSED)


@pytest.mark.parametrize(
    "name", sorted(set(REFUSED) - {"num_experts", "moe_router_score_function"})
)
def test_they_mean_nothing_in_a_dense_model(name: str) -> None:
    assert read(BASE, **{name: REFUSED[name]}) == read(BASE)


def test_several_are_named_at_once() -> None:
    with pytest.raises(UnsupportedError) as caught:
        read(MOE, moe_latent_size=512, moe_apply_probs_on_input=True)
    assert "moe_latent_size" in str(caught.value.found)
    assert "moe_apply_probs_on_input" in str(caught.value.found)


def test_what_is_said_counts() -> None:
    args = {**MOE, "moe_expert_capacity_factor": 1.25}
    a = architecture_from_args(args, overrides={"moe_expert_capacity_factor": None})
    assert a == read(MOE)
    for name, suggestion in (("num_experts_per_tok", "moe_router_topk"), ("n_group", "num_groups")):
        with pytest.raises(UsageError, match=suggestion):
            architecture_from_args(MOE, overrides={name: 2})


def test_experts_of_megatron_lms_own_model() -> None:
    with pytest.raises(UnsupportedError, match="legacy GPT"):
        architecture_from_args(MOE, legacy=True)


# ---- further tokens


def test_further_tokens() -> None:
    assert read(BASE, mtp_num_layers=2).mtp_num_layers == 2
    assert read(BASE, mtp_num_layers=1, mtp_use_repeated_layer=True).mtp_num_layers == 1
    assert read(BASE, mtp_num_layers=0) == read(BASE, mtp_num_layers=None) == read(BASE)


@pytest.mark.parametrize(
    "odd", [{"mtp_use_repeated_layer": True}, {"mtp_hybrid_override_pattern": "M*"}], ids=str
)
def test_further_tokens_that_are_refused(odd: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=next(iter(odd))):
        read(BASE, mtp_num_layers=2, **odd)


# ---- latent attention


def test_latent_attention() -> None:
    a = read(MLA, kv_channels=16, num_query_groups=1, add_qkv_bias=True)
    assert (a.kv_channels, a.num_query_groups, a.v_head_dim) == (24, 8, 16)
    assert (a.position_embedding_type, a.rotary_interleaved, a.rope_type) == ("rope", True, "rope")
    assert not a.add_qkv_bias
    assert read(MLA, q_lora_rank=None).q_lora_rank is None
    assert read(MLA, position_embedding_type="none") == read(MLA)


def test_yarn() -> None:
    a = read(YARN)
    assert (a.rope_type, a.rotary_scaling_factor, a.mscale_all_dim) == ("yarn", 40.0, 1.0)
    assert (a.original_max_position_embeddings, a.beta_fast, a.beta_slow) == (4096, 32, 1)
    assert read(YARN, rope_type=None) == a  # MLATransformerConfig's own
    assert read(YARN, rotary_scaling_factor=1.0) == read(MLA)


def test_what_yarn_takes_for_granted_is_said() -> None:
    (note,) = notes(YARN)
    assert "original_max_position_embeddings (4096), beta_fast (32), beta_slow (1)" in note
    assert "--set original_max_position_embeddings=VALUE" in note
    (note,) = notes(YARN, {"original_max_position_embeddings": 8192, "beta_slow": 2.0})
    assert "say beta_fast (32) of YaRN" in note
    said = {"original_max_position_embeddings": 8192, "beta_slow": 2.0, "beta_fast": 16.0}
    assert notes(YARN, said) == ()
    a = architecture_from_args(YARN, overrides=said)
    assert (a.original_max_position_embeddings, a.beta_fast, a.beta_slow) == (8192, 16, 2)
    assert notes(MLA) == notes(BASE) == ()


def test_yarn_of_before_rope_type_was_an_argument() -> None:
    """Up to core_v0.13: the length is that of the model, and scores are scaled by mscale."""
    old = {name: value for name, value in YARN.items() if name != "rope_type"}
    assert read(old).original_max_position_embeddings == 256
    with pytest.raises(UnsupportedError, match="scales scores by mscale"):
        read(old, mscale_all_dim=0.5)
    newer = architecture_from_args({**old, "mscale_all_dim": 0.5}, overrides={"rope_type": "yarn"})
    assert newer.original_max_position_embeddings == 4096


@pytest.mark.parametrize(
    "odd",
    [
        {"position_embedding_type": "learned_absolute"},
        {"rope_type": "mrope"},
        {"rotary_interleaved": True},
        {"use_rope_scaling": True},
        {"rotary_percent": 0.5},
        {"rotary_seq_len_interpolation_factor": 2},
        {"mscale_all_dim": 1.0, "rotary_scaling_factor": 40.0},
        {"group_query_attention": True, "num_query_groups": 2},
        {"mla_down_proj_fusion": True},
    ],
    ids=str,
)
def test_latent_attention_that_is_refused_by_name(odd: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=next(iter(odd))) as caught:
        read(MLA, **odd)
    assert f"--set {next(iter(odd))}=" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("args", "name"),
    [(MLA, "kv_lora_rank"), (MLA, "v_head_dim"), (YARN, "mscale"), (YARN, "rotary_scaling_factor")],
    ids=str,
)
def test_what_is_missing_is_asked_for(args: dict[str, Any], name: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(args, **{name: None})
    assert f"--set {name}=" in str(caught.value.fix)


def test_yarn_without_latent_attention() -> None:
    with pytest.raises(UnsupportedError, match="rope_type = 'yarn'"):
        read(BASE, rope_type="yarn")


# ---- back


@pytest.mark.parametrize(
    "args",
    [
        MOE,
        {**MOE, "moe_layer_freq": [0, 1, 1, 1], "moe_shared_expert_intermediate_size": 32},
        {
            **MOE,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_topk_scaling_factor": 2.5,
            "moe_router_num_groups": 4,
            "moe_router_group_topk": 2,
        },
        MLA,
        {**YARN, "original_max_position_embeddings": 8192},
        {**MOE, **YARN, "mtp_num_layers": 1},
    ],
    ids=str,
)
def test_arguments_are_read_back(args: dict[str, Any]) -> None:
    architecture = replace(read(args), params_dtype=None)
    stored = model_arguments(architecture)
    back = architecture_from_args({**stored, "fp16": None})
    assert back.forward_pass() == architecture.forward_pass()


def test_what_megatron_has_no_argument_for() -> None:
    (warning,) = ignored_by_training(read(YARN, original_max_position_embeddings=8192))
    assert "original_max_position_embeddings (8192, its default is 4096)" in warning
    assert ignored_by_training(read(YARN)) == []


def test_rotations_that_megatrons_latent_attention_has_not() -> None:
    with pytest.raises(MTTError) as error:
        model_arguments(replace(read(MLA), rotary_interleaved=False))
    assert error.value.found == "rotary_interleaved = False"


def test_routers_that_megatron_has_not() -> None:
    single = replace(read(MOE), moe_router_topk=1, moe_router_pre_softmax=False)
    with pytest.raises(MTTError) as error:
        model_arguments(single)
    assert "moe_router_topk = 1" in str(error.value.found)
    model_arguments(replace(single, moe_router_pre_softmax=True))
    model_arguments(replace(single, moe_router_score_function="sigmoid"))


def test_flags_that_build_the_model() -> None:
    a = read({**MOE, **YARN, "mtp_num_layers": 1, "moe_layer_freq": [0, 1, 1, 1]})
    args = {
        **model_arguments(a),
        "seq_length": 256,
        "fp16": False,
        "bf16": True,
        "make_vocab_size_divisible_by": 128,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 1,
        "transformer_impl": "local",
        "expert_model_parallel_size": 4,
        "expert_tensor_parallel_size": 1,
        "moe_grouped_gemm": True,
        "moe_use_legacy_grouped_gemm": False,
        "num_layers_per_virtual_pipeline_stage": None,
        "pipeline_model_parallel_layout": None,
    }
    flags = {flag: value[0] if value else None for flag, *value in launch_flags(args)}
    assert flags["--num-experts"] == "8"
    assert flags["--moe-layer-freq"] == "[0,1,1,1]"
    assert flags["--expert-model-parallel-size"] == "4"
    assert flags["--kv-lora-rank"] == "24"
    assert flags["--rope-type"] == "yarn"
    assert flags["--mtp-num-layers"] == "1"
    assert {"--multi-latent-attention", "--moe-grouped-gemm", "--sequence-parallel"} <= set(flags)
    assert "--rotary-interleaved" not in flags
