"""Both directions of every table: what is represented is exact, what is not is named."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from modeling_mtt import AUTO_MAP, MTTConfig, MTTSeq2SeqConfig
from mtt_convert.architecture import ACTIVATIONS, NORMALIZATIONS, TRAINING_ONLY, Architecture
from mtt_convert.errors import UnsupportedError
from mtt_convert.families import FAMILIES, exact_families
from mtt_convert.families.family import Family
from mtt_convert.parameters import expected
from tests.convert.families.natives import (
    CASES,
    CLASSES,
    LINEAR,
    LLAMA3,
    NO_DECODERS,
    WITH_EXPERTS,
    YARN,
    Case,
    case,
    experts,
    model_class,
)

NATIVE = sorted(CLASSES)
LLAMA = Architecture(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    padded_vocab_size=96,
    vocab_size=96,
    max_position_embeddings=64,
    position_embedding_type="rope",
    normalization="RMSNorm",
    layernorm_epsilon=1e-6,
    activation="silu",
    gated_linear_unit=True,
    add_bias_linear=False,
    untie_embeddings_and_output_weights=True,
)


# ---- any architecture


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads, channels, layers = groups * per_group, draw(st.sampled_from([8, 12, 16])), 4
    kind = draw(st.sampled_from(["rope", "rope", "rope", "learned_absolute", "none"]))
    rotary: dict[str, Any] = {}
    if kind == "rope":
        scaling = draw(
            st.sampled_from(
                [{}, {"rope_scaling_factor": 8.0}, {"rotary_seq_len_interpolation_factor": 2.0}]
            )
        )
        rotary = {
            "rotary_base": draw(st.sampled_from([10000.0, 5e5])),
            "rotary_percent": draw(st.sampled_from([1.0, 1.0, 0.5])),
            "rotary_interleaved": draw(st.sampled_from([False, False, True])),
            **scaling,
        }
    windows: dict[str, Any] = {}
    if draw(st.booleans()):
        skip = draw(st.sampled_from([None, 1, 2, 3, (0, 0, 1, 1), (1, 1, 1, 1)]))
        windows = {"window_size": (draw(st.integers(0, 9)), 0), "window_attn_skip_freq": skip}
    flag = st.booleans()
    hidden = heads * channels + draw(st.sampled_from([0, 0, 2]))
    return Architecture(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=draw(st.sampled_from([16, 4 * hidden])),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=channels,
        padded_vocab_size=128,
        vocab_size=draw(st.sampled_from([None, 100, 128])),
        max_position_embeddings=64,
        position_embedding_type=kind,
        **rotary,
        **windows,
        normalization=draw(st.sampled_from(NORMALIZATIONS)),
        layernorm_epsilon=draw(st.sampled_from([1e-5, 1e-6])),
        layernorm_zero_centered_gamma=draw(flag),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        gated_linear_unit=draw(flag),
        add_bias_linear=draw(flag),
        add_qkv_bias=draw(flag),
        qk_layernorm=draw(flag),
        parallel_residual=draw(flag),
        untie_embeddings_and_output_weights=draw(flag),
    )


CHANGES: dict[str, list[Any]] = {
    "normalization": list(NORMALIZATIONS),
    "activation": list(ACTIVATIONS),
    "rotary_base": [10000.0, 3.0],
    "rotary_percent": [1.0, 0.5],
    "rotary_interleaved": [False, True],
    "rope_scaling_factor": [None, 8.0],
    "rotary_seq_len_interpolation_factor": [None, 2.0],
    "window_size": [None, (4, 0)],
    "window_attn_skip_freq": [None, 2, (0, 0, 0, 1)],
    "vocab_size": [None, 90],
    "kv_channels": [8, 16],
    "num_query_groups": [1, 2, 4],
    "ffn_hidden_size": [40, 128],
    "layernorm_epsilon": [1e-5, 1e-6],
    **{
        name: [False, True]
        for name in (
            "layernorm_zero_centered_gamma",
            "gated_linear_unit",
            "add_bias_linear",
            "add_qkv_bias",
            "qk_layernorm",
            "parallel_residual",
            "shared_layernorm",
            "untie_embeddings_and_output_weights",
        )
    },
}


CHANGES_OF_EXPERTS: dict[str, list[Any]] = {
    "num_experts": [4, 8],
    "moe_ffn_hidden_size": [10, 12],
    "moe_layer_pattern": [(1, 1, 1, 1), (0, 1, 1, 1), (0, 1, 0, 1), (1, 1, 0, 1)],
    "moe_router_topk": [1, 2, 4],
    "moe_router_score_function": ["softmax", "sigmoid"],
    "moe_router_pre_softmax": [False, True],
    "moe_router_topk_scaling_factor": [None, 1.0, 2.5],
    "moe_router_enable_expert_bias": [False, True],
    "moe_router_num_groups": [None, 2, 4],
    "moe_router_group_topk": [None, 1, 2],
    "moe_shared_expert_intermediate_size": [None, 12, 20, 24],
    "moe_shared_expert_gate": [False, True],
    "mtp_num_layers": [0, 1],
}
CHANGES_OF_LATENT: dict[str, list[Any]] = {
    "q_lora_rank": [None, 20],
    "rope_type": ["rope", "yarn"],
    "rotary_scaling_factor": [1.0, 4.0],
    "mscale": [1.0, 0.7],
    "mscale_all_dim": [0.0, 0.7],
}


@st.composite
def neighbours(draw: st.DrawFn) -> Architecture:
    """What a model of a native class computes, with up to two things changed."""
    one = draw(st.sampled_from(CASES))
    a = FAMILIES[one.family].architecture(one.config().to_dict())
    changes = CHANGES if a.num_experts is None else CHANGES | CHANGES_OF_EXPERTS
    changes = changes | CHANGES_OF_LATENT if a.multi_latent_attention else changes
    names = draw(st.lists(st.sampled_from(sorted(changes)), max_size=2, unique=True))
    change = {name: draw(st.sampled_from(changes[name])) for name in names}
    if a.num_layers != 4 and isinstance(change.get("window_attn_skip_freq"), tuple):
        del change["window_attn_skip_freq"]
    if not change.get("parallel_residual", a.parallel_residual):
        change["shared_layernorm"] = False
    try:
        return replace(a, **change)
    except UnsupportedError:  # no such model
        return a


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
@given(architecture=architectures() | neighbours())
def test_what_is_exact_comes_back(family: Family, architecture: Architecture) -> None:
    misfits = family.misfits(architecture)
    if misfits:
        with pytest.raises(UnsupportedError) as caught:
            family.config(architecture)
        assert caught.value.found == "; ".join(misfits)
        return
    back = family.architecture(family.config(architecture))
    assert back.forward_pass() == architecture.forward_pass()
    assert family.config(back) == family.config(architecture)


@given(architecture=architectures())
def test_mtt_represents_everything(architecture: Architecture) -> None:
    assert FAMILIES["mtt"].misfits(architecture) == ()
    assert MTTConfig(**FAMILIES["mtt"].config(architecture)).vocab_size


# Sizes that may be null, a step that may be a list, and groups that make no difference.
SAID_OTHERWISE = ("head_dim", "decoder_sparse_step", "mlp_only_layers", "n_group", "topk_group")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_written_configuration_is_the_one_that_was_read(case: Case) -> None:
    """transformers fills in the same values whether it gets its own file or ours."""
    family = FAMILIES[case.family]
    theirs = case.config()
    ours = type(theirs)(**family.config(family.architecture(theirs.to_dict())))
    aliases = {"hidden_act", "activation_function", "n_inner", "reorder_and_upcast_attn"}
    aliases |= {"activation", "pretraining_tp", "slow_but_exact"}
    known = {name for line in family.fields for name in line.names} - aliases
    for name in known & set(theirs.to_dict()):
        one, other = getattr(theirs, name), getattr(ours, name)
        if name in SAID_OTHERWISE and one != other:
            assert case.family in WITH_EXPERTS
            continue
        if name == "max_window_layers" and theirs.layer_types is not None:
            continue  # means nothing beside layer_types
        if name == "partial_rotary_factor":
            # transformers 5.17 keeps a default here beside rope_parameters, which count.
            other = ours.rope_parameters[name]
        assert one == other, name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_only_the_family_and_its_equals_are_exact(case: Case) -> None:
    architecture = FAMILIES[case.family].architecture(case.config().to_dict())
    exact = exact_families(architecture)
    assert case.family in exact
    equals = {"llama": {"mistral"}, "mistral": {"llama"}, "qwen2": set(), "qwen3": set()}
    equals |= {"gpt_neox": {"falcon"}, "falcon": {"gpt_neox"}}
    assert set(exact) - {case.family} <= equals.get(case.family, set())
    for name, shape in expected(architecture).items():
        assert all(size >= 1 for size in shape), name


# ---- what is in the way


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("llama", {"qk_layernorm": True}, "qk_layernorm = True"),
        ("llama", {"add_qkv_bias": True}, "add_qkv_bias = True"),
        ("llama", {"window_size": (4, 0)}, "window_size = (4, 0)"),
        ("llama", {"layernorm_zero_centered_gamma": True}, "layernorm_zero_centered_gamma = True"),
        ("llama", {"gated_linear_unit": False}, "gated_linear_unit = False"),
        ("llama", {"normalization": "LayerNorm"}, "normalization = LayerNorm"),
        ("llama", {"rotary_interleaved": True}, "rotary_interleaved = True"),
        ("llama", {"rotary_percent": 0.5}, "rotary_percent = 0.5"),
        ("llama", {"parallel_residual": True}, "parallel_residual = True"),
        ("llama", {"position_embedding_type": "none"}, "position_embedding_type = none"),
        ("llama", {"hidden_size": 34}, "hidden_size is no multiple of num_attention_heads"),
        ("mistral", {"add_bias_linear": True}, "add_bias_linear = True"),
        (
            "mistral",
            {"window_size": (4, 0), "window_attn_skip_freq": 2},
            "window_attn_skip_freq = 2",
        ),
        ("qwen2", {}, "add_qkv_bias = False"),
        ("qwen3", {}, "qk_layernorm = False"),
        ("qwen3", {"qk_layernorm": True, "add_qkv_bias": True}, "add_qkv_bias = True"),
        ("gpt_neox", {}, "num_query_groups = 2"),
        ("gpt2", {}, "position_embedding_type = rope"),
        ("nemotron", {}, "normalization = RMSNorm"),
    ],
)
def test_what_is_in_the_way_is_named(family: str, change: dict, named: str) -> None:
    architecture = replace(LLAMA, **change)
    assert named in FAMILIES[family].misfits(architecture)
    assert family not in exact_families(architecture)
    if family == "llama":
        assert FAMILIES[family].misfits(architecture) == (named,)


def of(family: str, **change: Any) -> Architecture:
    """What the first case of a family computes, changed."""
    first = next(case for case in CASES if case.family == family)
    return replace(FAMILIES[family].architecture(first.config().to_dict()), **change)


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("mixtral", {"moe_layer_pattern": (0, 1, 1, 1)}, "moe_layer_pattern = (0, 1, 1, 1)"),
        ("mixtral", {"moe_router_pre_softmax": True}, "moe_router_pre_softmax = True"),
        ("mixtral", {"moe_router_topk_scaling_factor": 2.0}, "topk_scaling_factor = 2.0"),
        ("mixtral", {"moe_router_score_function": "sigmoid"}, "score_function = sigmoid"),
        (
            "mixtral",
            {"moe_router_num_groups": 2, "moe_router_group_topk": 1},
            "moe_router_num_groups = 2",
        ),
        ("mixtral", {"moe_shared_expert_intermediate_size": 12}, "intermediate_size = 12"),
        ("mixtral", {"moe_router_enable_expert_bias": True}, "enable_expert_bias = True"),
        ("mixtral", {"mtp_num_layers": 1}, "mtp_num_layers = 1"),
        ("qwen2_moe", {"moe_shared_expert_gate": False}, "moe_shared_expert_gate = False"),
        (
            "qwen2_moe",
            {"moe_shared_expert_intermediate_size": None},
            "shared_expert_intermediate_size = None",
        ),
        ("qwen2_moe", {"qk_layernorm": True}, "qk_layernorm = True"),
        ("qwen3_moe", {"qk_layernorm": False}, "qk_layernorm = False"),
        ("qwen3_moe", {"add_qkv_bias": True}, "add_qkv_bias = True"),
        (
            "qwen3_moe",
            {"window_size": (4, 0), "window_attn_skip_freq": 2},
            "window_attn_skip_freq = 2",
        ),
        ("deepseek_v3", {"layernorm_epsilon": 1e-5}, "rms_norm_eps = 1e-05"),
        ("deepseek_v3", {"qk_layernorm": False}, "qk_layernorm = False"),
        ("deepseek_v3", {"moe_router_enable_expert_bias": False}, "enable_expert_bias = False"),
        ("deepseek_v3", {"moe_layer_pattern": (0, 1, 0, 1)}, "moe_layer_pattern = (0, 1, 0, 1)"),
        ("deepseek_v3", {"moe_shared_expert_intermediate_size": 20}, "intermediate_size = 20"),
        (
            "deepseek_v3",
            {"num_experts": 16, "moe_router_group_topk": 1},
            "num_experts_per_tok = 4, topk_group = 1",
        ),
        ("deepseek_v3", {"moe_router_score_function": "softmax"}, "scoring_func = 'softmax'"),
        ("glm4_moe", {"moe_shared_expert_gate": True}, "moe_shared_expert_gate = True"),
        ("glm4_moe", {"rotary_interleaved": True}, "rotary_interleaved = True"),
        ("glm4_moe", {"window_size": (4, 0)}, "window_size = (4, 0)"),
        ("llama", {"mtp_num_layers": 1}, "mtp_num_layers = 1"),
    ],
)
def test_what_is_in_the_way_of_experts_is_named(family: str, change: dict, named: str) -> None:
    assert any(named in text for text in FAMILIES[family].misfits(of(family, **change)))


def test_what_makes_no_difference_is_not_in_the_way() -> None:
    """Widths of layers that are not there, factors of one, groups that are all chosen."""
    for family, change in (
        ("mixtral", {"ffn_hidden_size": 5}),
        ("mixtral", {"moe_router_topk_scaling_factor": 1.0}),
        ("mixtral", {"moe_router_num_groups": 2, "moe_router_group_topk": 2}),
        ("glm4_moe", {"moe_router_pre_softmax": True}),
    ):
        assert of(family).forward_pass() == of(family, **change).forward_pass()
        assert family in exact_families(of(family, **change))
    dense_first = of("glm4_moe", ffn_hidden_size=5)
    assert dense_first.forward_pass() != of("glm4_moe").forward_pass()


def test_attention_scaled_as_no_mscale_says() -> None:
    """transformers takes an mscale_all_dim of 0 for none; the factor is written then."""
    change = {"rope_type": "yarn", "rotary_scaling_factor": 4.0, "mscale": 0.7}
    a = of("deepseek_v3", **change)
    rope = FAMILIES["deepseek_v3"].config(a)["rope_parameters"]
    assert isinstance(rope, dict)
    assert rope["attention_factor"] == pytest.approx(0.1 * 0.7 * math.log(4) + 1)
    assert FAMILIES["deepseek_v3"].misfits(a) == ()


@pytest.mark.parametrize(
    ("change", "factor", "length"),
    [
        ({}, 4.0, 16),
        ({"rope_parameters": {**YARN, "factor": None}}, 4.0, 16),
        ({"rope_parameters": {**YARN, "original_max_position_embeddings": None}}, 4.0, 64),
        ({"original_max_position_embeddings": 32}, 4.0, 32),
        (
            {
                "rope_parameters": {**YARN, "factor": None},
                "original_max_position_embeddings": 32,
            },
            2.0,
            32,
        ),
    ],
)
def test_lengths_of_yarn(change: dict, factor: float, length: int) -> None:
    """Where transformers looks for them, and in which order."""
    fields = {"rope_parameters": YARN, **change}
    a = read("deepseek_v3", **fields)
    assert (a.rotary_scaling_factor, a.original_max_position_embeddings) == (factor, length)
    if None not in fields["rope_parameters"].values():  # theirs cannot be null
        first = next(case for case in CASES if case.family == "deepseek_v3")
        theirs = type(first.config())(**{**first.config().to_dict(), **fields})
        model_class("deepseek_v3")(theirs)  # which decides
        assert theirs.rope_parameters["original_max_position_embeddings"] == length


def test_training_is_not_in_the_way() -> None:
    training = {"attention_dropout": 0.3, "hidden_dropout": 0.2, "init_method_std": 0.5}
    assert set(training) | {"params_dtype"} == set(TRAINING_ONLY)
    architecture = replace(LLAMA, **training, params_dtype="bfloat16")
    assert exact_families(architecture) == ("llama", "mistral")


@pytest.mark.parametrize(
    ("skip", "alike"),
    [(2, (1, 0, 1, 0)), (4, (1, 1, 1, 0)), (1, (0, 0, 0, 0)), (None, (1, 1, 1, 1))],
)
def test_two_spellings_of_the_same_windows(skip: object, alike: tuple) -> None:
    one = replace(LLAMA, window_size=(3, 0), window_attn_skip_freq=skip)
    other = replace(LLAMA, window_size=(3, 0), window_attn_skip_freq=alike)
    assert one.forward_pass() == other.forward_pass()
    assert FAMILIES["mtt"].config(one) == FAMILIES["mtt"].config(other)


def test_transformers_counts_the_token_itself() -> None:
    """Megatron's (N, 0) shows N tokens before the token, `sliding_window` N - 1."""
    architecture = replace(LLAMA, window_size=(4, 0))
    for name in ("mtt", "mistral"):
        config = FAMILIES[name].config(architecture)
        assert config["sliding_window"] == 5
        assert FAMILIES[name].architecture(config).window_size == (4, 0)
    every_second = replace(architecture, window_attn_skip_freq=2)
    assert FAMILIES["mtt"].config(every_second)["layer_types"] == [
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "full_attention",
    ]


# ---- configurations that mean something else


def read(family: str, **change: Any) -> Architecture:
    """The architecture of a family's first case with other fields."""
    first = next(case for case in CASES if case.family == family)
    return FAMILIES[family].architecture({**first.config().to_dict(), **change})


@pytest.mark.parametrize(
    ("family", "change", "found"),
    [
        ("llama", {"attention_bias": True}, "attention_bias = True, mlp_bias = False"),
        ("llama", {"mlp_bias": True}, "attention_bias = False, mlp_bias = True"),
        ("llama", {"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu'"),
        ("llama", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type = 'yarn'"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
        ("llama", {"rope_scaling": {"type": "longrope"}}, "rope_type = 'longrope'"),
        ("llama", {"rope_scaling": {"mrope_section": [1, 2]}}, "rope_type = 'mrope'"),
        ("llama", {"rope_parameters": {**LLAMA3, "low_freq_factor": 2.0}}, "low_freq_factor = 2.0"),
        (
            "llama",
            {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": None}},
            "original_max_position_embeddings = 64",
        ),
        ("llama", {"rope_parameters": LLAMA3, "original_max_position_embeddings": 16}, "= 16"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "factor = None"),
        ("llama", {"rope_parameters": {"full_attention": {}}}, "full_attention"),
        ("llama", {"rope_parameters": 3}, "rope_parameters = 3"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("llama", {"hidden_size": "32"}, "hidden_size = '32'"),
        ("llama", {"hidden_size": True}, "hidden_size = True"),
        ("llama", {"hidden_size": None}, "hidden_size = None"),
        ("llama", {"num_attention_heads": 0, "head_dim": None}, "num_attention_heads = 0"),
        ("llama", {"rms_norm_eps": "1e-6"}, "rms_norm_eps = '1e-6'"),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings = 1"),
        ("mistral", {"attention_bias": True}, "attention_bias = True"),
        ("mistral", {"sliding_window": 4, "layer_types": ["full_attention"] * 4}, "layer_types"),
        ("mistral", {"sliding_window": 0}, "window_size = (-1, 0)"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
        ("qwen2", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "use_sliding_window = False"),
        ("qwen3", {"attention_bias": True}, "attention_bias = True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights = False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
        ("gpt2", {"activation_function": "gelu_10"}, "activation_function = 'gelu_10'"),
        ("gpt_neox", {"attention_bias": False}, "attention_bias = False"),
        ("gpt_neox", {"head_dim": 4}, "head_dim = 4"),
        ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.7}}, "rotary_percent = 0.7"),
        ("nemotron", {"attention_bias": True}, "attention_bias = True, mlp_bias = False"),
        ("mixtral", {"attention_bias": True}, "attention_bias = True"),
        ("mixtral", {"num_experts_per_tok": 5}, "moe_router_topk = 5, num_experts = 4"),
        ("mixtral", {"num_local_experts": "4"}, "num_local_experts = '4'"),
        ("qwen2_moe", {"mlp_only_layers": [0, 1, 2, 3]}, "mlp_only_layers = [0, 1, 2, 3]"),
        ("qwen2_moe", {"mlp_only_layers": 3}, "mlp_only_layers = 3"),
        ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step = 0"),
        ("qwen2_moe", {"decoder_sparse_step": 5}, "decoder_sparse_step = 5"),
        ("qwen2_moe", {"norm_topk_prob": None}, "norm_topk_prob = None"),
        ("qwen2_moe", {"shared_expert_intermediate_size": None}, "intermediate_size = None"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias = True"),
        (
            "qwen3_moe",
            {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention"]},
            "layer_types = ['full_attention']",
        ),
        ("deepseek_v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias = True"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ("deepseek_v3", {"topk_method": "group_limited_greedy"}, "topk_method"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        ("deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob = False"),
        ("deepseek_v3", {"num_experts_per_tok": 1, "topk_group": 1}, "norm_topk_prob = True"),
        ("deepseek_v3", {"topk_group": 1}, "num_experts_per_tok = 4, topk_group = 1"),
        ("deepseek_v3", {"n_group": 3}, "moe_router_num_groups = 3"),
        ("deepseek_v3", {"n_shared_experts": 0}, "n_shared_experts = 0"),
        ("deepseek_v3", {"n_shared_experts": None}, "n_shared_experts = None"),
        ("deepseek_v3", {"first_k_dense_replace": 4}, "first_k_dense_replace = 4"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads = 2"),
        ("deepseek_v3", {"head_dim": 12}, "head_dim = 12"),
        ("deepseek_v3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("deepseek_v3", {"rope_parameters": {**YARN, "truncate": False}}, "truncate = False"),
        ("deepseek_v3", {"rope_parameters": {**YARN, "attention_factor": 2.0}}, "= 2.0"),
        ("deepseek_v3", {"rope_parameters": {**YARN, "mscale": 0.0}}, "attention_factor"),
        ("deepseek_v3", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type = 'longrope'"),
        ("glm4_moe", {"mlp_bias": True}, "mlp_bias = True"),
        ("glm4_moe", {"rope_parameters": YARN}, "rope_type = 'yarn'"),
        ("glm4_moe", {"moe_layer_freq": 2}, "moe_layer_freq = 2"),
    ],
    ids=str,
)
def test_other_functions_are_refused_by_name(family: str, change: dict, found: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        read(family, **change)
    assert found in str(caught.value.found)
    assert caught.value.expected


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"shared_layernorm": True}, "parallel_residual = False"),
        ({"apply_residual_connection_post_layernorm": True}, "post_layernorm = True"),
        ({"embedding_multiplier": 2.0}, "embedding_multiplier = 2.0"),
        ({"residual_multiplier": 0.5}, "residual_multiplier = 0.5"),
        ({"attention_multiplier": 0.5}, "attention_multiplier = 0.5"),
        ({"logits_scaling": 2}, "logits_scaling = 2"),
        ({"mlp_bias": False}, "attention_bias = True, attention_out_bias = True, mlp_bias = False"),
        ({"hidden_act": "tanh"}, "hidden_act = 'tanh'"),
    ],
)
def test_options_of_mtt_that_megatron_has_not(change: dict, named: str) -> None:
    config = {**MTTConfig(hidden_size=32, num_attention_heads=4).to_dict(), **change}
    with pytest.raises(UnsupportedError) as caught:
        FAMILIES["mtt"].architecture(config)
    assert named in str(caught.value.found)


def test_options_of_mtt_that_only_other_megatrons_have() -> None:
    changes = {"position_embedding_type": "alibi", "embedding_norm": True}
    config = {**MTTConfig(hidden_size=32, num_attention_heads=4).to_dict(), **changes}
    architecture = FAMILIES["mtt"].architecture(config)
    assert (architecture.position_embedding_type, architecture.embedding_norm) == ("alibi", True)
    assert changes.items() <= FAMILIES["mtt"].config(architecture).items()
    assert [name for name, family in FAMILIES.items() if not family.misfits(architecture)] == [
        "mtt"
    ]


# ---- spellings of earlier versions


@pytest.mark.parametrize(
    ("family", "new", "old"),
    [
        (
            "llama",
            {"rope_type": "default", "rope_theta": 500.0},
            {"rope_theta": 500.0, "rope_scaling": None},
        ),
        (
            "llama",
            LINEAR,
            {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        ),
        (
            "llama",
            LLAMA3,
            {
                "rope_theta": 5e5,
                "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
            },
        ),
        (
            "gpt_neox",
            {"rope_type": "default", "rope_theta": 77.0, "partial_rotary_factor": 0.5},
            {"rotary_emb_base": 77.0, "rotary_pct": 0.5},
        ),
        (
            "gpt_neox",
            {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
            {},
        ),
        (
            "nemotron",
            {"rope_theta": 9.0, "partial_rotary_factor": 0.25},
            {"rope_theta": 9.0, "partial_rotary_factor": 0.25},
        ),
        ("nemotron", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, {}),
    ],
)
def test_old_and_new_rope(family: str, new: dict, old: dict) -> None:
    """And transformers reads the old spelling the same way."""
    then = read(family, rope_parameters=None, **old)
    assert then == read(family, rope_parameters=new)
    first = next(case for case in CASES if case.family == family)
    plain = {k: v for k, v in first.config().to_dict().items() if k != "rope_parameters"}
    loaded = model_class(family).config_class(**{**plain, **old})
    assert read(family, **loaded.to_dict()) == then


def test_configurations_without_what_came_later() -> None:
    """The first llamas: no key/value heads, no head size, no biases."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    more = {"intermediate_size": 48, "vocab_size": 96, "max_position_embeddings": 64}
    a = FAMILIES["llama"].architecture({**sizes, **more, "rms_norm_eps": 1e-6})
    assert a.forward_pass() == replace(LLAMA, num_query_groups=4).forward_pass()


def test_unknown_fields_are_named() -> None:
    family = FAMILIES["llama"]
    known = case("llama").config().to_dict()
    assert family.warnings(known) == ()
    (warning,) = family.warnings({**known, "attn_temperature": 3, "torch_dtype": "x", "odd": None})
    assert "attn_temperature;" in warning


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_save_pretrained_writes_is_known(case: Case) -> None:
    assert FAMILIES[case.family].warnings(case.config().to_dict()) == ()


# ---- what is declared about transformers' classes


def defaults(config_class: Any) -> dict[str, object]:
    found = {}
    for item in dataclasses.fields(config_class):
        if item.default is not dataclasses.MISSING:
            found[item.name] = item.default
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_the_defaults_are_the_class_s(name: str) -> None:
    ours = {"mtt": MTTConfig, "mtt_seq2seq": MTTSeq2SeqConfig}
    config_class = ours.get(name) or model_class(name).config_class
    theirs = defaults(config_class)
    for field, value in FAMILIES[name].defaults.items():
        assert theirs[field] == value and type(theirs[field]) is type(value), field
    # Every other field it reads is a size, null where it is derived, or written by old versions.
    fields = {n for line in FAMILIES[name].fields for n in line.names} & set(theirs)
    fields -= {"num_experts", "num_local_experts", "num_mtp_layers"}  # with a test of their own
    sizes = ("size", "layers", "heads", "embeddings", "n_embd", "n_layer", "n_head", "n_positions")
    for field in fields - set(FAMILIES[name].defaults):
        assert theirs[field] is None or field.endswith(sizes), field


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_under_either_name(name: str) -> None:
    """transformers 5 writes other names than published files have; one has a default."""
    config_class = model_class(name).config_class
    assert read(name, num_experts=None, num_local_experts=None).num_experts == (
        config_class().num_experts
    )
    for field in ("num_experts", "num_local_experts"):
        none = {"num_experts": None, "num_local_experts": None}
        assert read(name, **{**none, field: 5}).num_experts == 5
        assert config_class(**{field: 5}).num_local_experts == 5
    written = FAMILIES[name].config(read(name))
    assert ("num_experts" in written) == (name == "qwen3_moe")


@pytest.mark.parametrize("last", [0, 3, 4])
def test_windows_that_no_layer_types_say(last: int) -> None:
    """The class gives every other of the first layers one, and writes that down itself."""
    said = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": last}
    a = read("qwen2_moe", layer_types=None, **said)
    theirs = experts("qwen2_moe", **said).config()
    assert a.windowed_layers == tuple(k == "sliding_attention" for k in theirs.layer_types)
    assert any(a.windowed_layers) == (last > 0)


def test_a_window_that_is_switched_off() -> None:
    """Some published configurations name one all the same."""
    size = {"sliding_window": 4096}
    assert read("qwen3_moe", use_sliding_window=False, **size).window_size is None
    assert read("qwen3_moe", use_sliding_window=True, **size).window_size == (4095, 0)


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_layers_for_further_tokens_under_either_name(name: str) -> None:
    none = {"num_mtp_layers": None, "num_nextn_predict_layers": None}
    assert read(name, **none).mtp_num_layers == 1
    for field in none:
        assert read(name, **{**none, field: 3}).mtp_num_layers == 3


@pytest.mark.parametrize("name", [*NATIVE, *NO_DECODERS])
def test_the_classes_are_those_of_transformers(name: str) -> None:
    family, found = FAMILIES[name], model_class(name)
    assert found.__name__ == family.causal_lm
    assert found.config_class.model_type == name
    assert f"{found.base_model_prefix}." == family.prefix
    assert hasattr(transformers, family.base_model)
    plan = bool(found.config_class.base_model_tp_plan)
    assert plan or not family.has_tp_plan
    assert not plan or family.has_tp_plan or name == "nemotron"  # newer versions have one
    backends = found._supports_attention_backend and found._supports_sdpa
    assert bool(backends and found._supports_flash_attn) == family.has_attention_backends


def test_the_code_map_is_that_of_the_package() -> None:
    assert dict(FAMILIES["mtt"].auto_map) == AUTO_MAP


@pytest.mark.parametrize("name", NATIVE)
def test_limits_are_those_of_the_class(name: str) -> None:
    """A width that does not fall into heads is refused exactly where the class refuses it."""
    first = next(case for case in CASES if case.family == name)
    architecture = FAMILIES[name].architecture(first.config().to_dict())
    odd = replace(architecture, hidden_size=34)
    fields = {**first.config().to_dict(), "hidden_size": 34, "n_embd": 34}
    try:
        model_class(name)(model_class(name).config_class(**fields))
        refused = False
    except Exception:
        refused = True
    assert refused == bool(FAMILIES[name].misfits(odd))
