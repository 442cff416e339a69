"""Arguments of every generation -> Architecture; what would change the function is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from mtt_convert import arguments
from mtt_convert.architecture import Architecture
from mtt_convert.arguments import (
    LOW_PRECISION,
    NEUTRAL,
    RENAMED,
    SETTINGS,
    SUGGESTIONS,
    architecture_from_args,
    architecture_from_shapes,
    is_known,
    low_precision,
    true_vocab_size,
    unknown_arguments,
)
from mtt_convert.dtypes import DTYPES
from mtt_convert.errors import MTTError, UnsupportedError, UsageError


class Opaque:
    """Any object of a class that is not loaded."""

    def __repr__(self) -> str:
        return "<megatron.enums.Something(3)>"

    def __bool__(self) -> bool:
        raise AssertionError("nobody asks an unknown object whether it is true")


# The arguments that matter, as each generation stores them.
V1_0 = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "padded_vocab_size": 512,
    "layernorm_epsilon": 1e-5,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "init_method_std": 0.02,
    "openai_gelu": False,
    "fp16": False,
    "model_parallel_size": 2,
    "apply_residual_connection_post_layernorm": False,
}
V2_6 = {
    **V1_0,
    "ffn_hidden_size": 256,
    "kv_channels": 16,
    "bias_gelu_fusion": True,
    "onnx_safe": None,
    "bf16": False,
    "params_dtype": DTYPES["float32"],
    "tensor_model_parallel_size": 1,
    "decoder_seq_length": None,
}
V23_04 = {
    **V2_6,
    "swiglu": False,
    "squared_relu": False,
    "add_bias_linear": True,
    "add_position_embedding": True,
    "use_rotary_position_embeddings": False,
    "rotary_percent": 1.0,
    "apply_layernorm_1p": False,
    "untie_embeddings_and_output_weights": False,
    "transformer_impl": "local",
}
CORE = {  # 0.16.1, Megatron-Core's GPT
    **V23_04,
    "add_qkv_bias": True,
    "group_query_attention": False,
    "num_query_groups": 1,
    "normalization": "LayerNorm",
    "qk_layernorm": False,
    "position_embedding_type": "learned_absolute",
    "rotary_base": 10000,
    "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "layernorm_zero_centered_gamma": False,
    "use_legacy_models": False,
    "deprecated_use_mcore_models": False,
    "use_te_activation_func": False,
    "tokenizer_type": "NullTokenizer",
    "vocab_size": 499,
}
del CORE["apply_layernorm_1p"]
LEGACY = {**CORE, "use_legacy_models": True}  # 0.16.1, Megatron-LM's own GPT
LLAMA = {
    **CORE,
    "ffn_hidden_size": 160,
    "group_query_attention": True,
    "num_query_groups": 2,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-6,
    "swiglu": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "untie_embeddings_and_output_weights": True,
}
DEEPSPEED = {
    **V23_04,
    "normalization": "rmsnorm",
    "num_key_value_heads": 2,
    "rope_theta": 500000,
    "use_rotary_position_embeddings": True,
    "add_position_embedding": False,
    "swiglu": True,
    "num_experts": [1],
    "mlp_type": "standard",
    "attn_mask": Opaque(),
}


def test_generations_of_one_model_agree() -> None:
    expected = Architecture(
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=256,
        num_attention_heads=4,
        num_query_groups=4,
        kv_channels=16,
        padded_vocab_size=512,
        max_position_embeddings=32,
        layernorm_epsilon=1e-5,
        activation="gelu",
        add_qkv_bias=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype="float32",
    )
    assert architecture_from_args(V1_0) == expected
    for args in (V2_6, V23_04, {**CORE, "vocab_size": None}):
        assert architecture_from_args({**args, "bias_gelu_fusion": False}) == expected


def test_llama() -> None:
    expected = Architecture(
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=160,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        padded_vocab_size=512,
        max_position_embeddings=32,
        vocab_size=500,
        position_embedding_type="rope",
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        activation="silu",
        gated_linear_unit=True,
        add_bias_linear=False,
        untie_embeddings_and_output_weights=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype="float32",
    )
    assert architecture_from_args(LLAMA) == expected


def test_megatron_deepspeed() -> None:
    architecture = architecture_from_args(DEEPSPEED)
    assert architecture.num_query_groups == 2
    assert architecture.rotary_base == 500000
    assert architecture.normalization == "RMSNorm"
    assert architecture.position_embedding_type == "rope"


# golden checkpoint -> what its arguments must say; `error` names a refused argument
GOLDEN: dict[str, dict[str, object]] = {
    "mcore/gpt": {"activation": "gelu", "vocab_size": 500, "params_dtype": "float32"},
    "mcore/gpt_bf16": {"params_dtype": "bfloat16"},
    "mcore/llama": {"activation": "silu", "num_query_groups": 2, "layernorm_epsilon": 1e-6},
    "mcore/llama_6l": {"num_layers": 6},
    "mcore/qwen": {"qk_layernorm": True, "kv_channels": 16, "rotary_base": 1e6, "rotary_dim": 8},
    "mcore/nemotron": {"activation": "squared_relu", "layernorm_zero_centered_gamma": True},
    "mcore-te/gpt": {"has_qkv_bias": True},
    "mcore-te/llama": {"has_qkv_bias": False},
    "mcore/mixtral": {
        "num_experts": 4,
        "moe_ffn_hidden_size": 96,
        "moe_layer_pattern": (1, 1, 1, 1),
        "moe_router_topk": 2,
        "moe_router_pre_softmax": False,
    },
    "mcore/moe_mixed": {
        "moe_layer_pattern": (0, 1, 1, 1),
        "moe_router_score_function": "sigmoid",
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_enable_expert_bias": True,
        "moe_shared_expert_intermediate_size": 64,
    },
    "mcore/mla": {
        "multi_latent_attention": True,
        "kv_channels": 24,
        "num_query_groups": 8,
        "rotary_interleaved": True,
        "moe_router_num_groups": 2,
        "rope_type": "rope",
    },
    "mcore/mtp": {"mtp_num_layers": 1},
    "mcore/t5": {"kind": "t5", "encoder_num_layers": 3, "final_layernorm": False},
    "mcore-te/t5_te": {"kind": "t5", "num_layers": 3, "final_layernorm": True},
    "legacy/v1.0-ckptver0-gpt2-tp2pp1": {"ffn_hidden_size": 256, "kv_channels": 16},
    "legacy/v1.0-ckptver0-RELEASE-oldserial-fp16-gpt2-tp1pp1": {"padded_vocab_size": 504},
    "legacy/git-d763f54a21-ckptver1-gpt2-tp2pp1": {"activation": "gelu"},
    "legacy/v2.0-ckptver3-gpt2-tp2pp2": {"activation": "gelu", "vocab_size": None},
    "legacy/v2.6-ckptver3-gpt2-tp1pp1": {"activation": "gelu"},
    "legacy/core_v0.12.0-llama-tp2pp1": {"vocab_size": 497, "num_query_groups": 2},
    "legacy/core_v0.12.0-t5-tp1pp1": {
        "kind": "t5",
        "encoder_num_layers": 3,
        "num_layers": 2,
        "final_layernorm": True,
    },
    "legacy/megatron-deepspeed-346b89a6-2021-gpt2-tp1pp1": {"activation": "gelu"},
    "legacy/megatron-deepspeed-6acc370a-gpt2-tp2pp2": {"normalization": "LayerNorm"},
    "legacy/megatron-deepspeed-6acc370a-llama-tp2pp1": {"normalization": "RMSNorm"},
    "legacy/bigscience-8387ae17-bloom-tp2pp1": {
        "embedding_norm": True,
        "position_embedding_type": "alibi",
    },
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str, golden: Callable[[str], Path]) -> None:
    args = json.loads(golden(f"{name}/args.json").read_text())
    expected = dict(GOLDEN[name])
    assert unknown_arguments(args) == []
    refused = expected.pop("error", None)
    if refused is not None:
        with pytest.raises(UnsupportedError) as caught:
            architecture_from_args(args)
        assert str(refused) in str(caught.value.found)
        return
    architecture = architecture_from_args(args)
    assert {field: getattr(architecture, field) for field in expected} == expected


# ---- what is refused


def odd_value(name: str) -> object:
    """A value that is not neutral, of a kind the argument has."""
    words = {"rope_type": "yarn", "softmax_type": "learnable", "mlp_type": "residual"}
    return words.get(name, {"activation_func_clamp_value": 7.0}.get(name, 2))


@pytest.mark.parametrize("name", NEUTRAL)
def test_every_neutral_argument_is_refused_by_name(name: str) -> None:
    value = odd_value(name)
    with pytest.raises(UnsupportedError) as caught:
        architecture_from_args({**CORE, name: value})
    assert f"{name} = {value!r} ({NEUTRAL[name].meaning})" == caught.value.found
    assert str(caught.value.expected).startswith(f"{name} = ")
    assert f"--set {name}=" in str(caught.value.fix)


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_values_change_nothing(name: str) -> None:
    for value in (None, *NEUTRAL[name].values):
        assert architecture_from_args({**CORE, name: value}) == architecture_from_args(CORE)
    odd = {**CORE, name: odd_value(name)}
    assert architecture_from_args(odd, overrides={name: None}) == architecture_from_args(CORE)


@pytest.mark.parametrize("name", NEUTRAL)
def test_objects_of_unknown_classes_are_never_neutral(name: str) -> None:
    with pytest.raises(UnsupportedError, match="Something") as caught:
        architecture_from_args({**CORE, name: Opaque()})
    assert name in str(caught.value.found)


def test_all_refused_arguments_are_named_at_once() -> None:
    odd = {**CORE, "modelopt_enabled": True, "no_rope_freq": 2, "softmax_type": "learnable"}
    with pytest.raises(UnsupportedError) as caught:
        architecture_from_args(odd)
    assert str(caught.value.found).split(" (")[0] == "modelopt_enabled = True"
    assert "softmax_type = 'learnable' (a softmax with an offset or a learned sink); " in str(
        caught.value.found
    )
    assert caught.value.expected == (
        "modelopt_enabled = False; softmax_type = vanilla; no_rope_freq = None"
    )
    assert "--set softmax_type=vanilla --set no_rope_freq=None" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("window", "skip", "windows"),
    [
        ((127, 0), None, (True, True, True, True)),
        ([127, 0], 2, (True, False, True, False)),
        ((127, 0), [0, 1, 1, 0], (False, True, True, False)),
        ((127, 0), 1, (False, False, False, False)),
        (None, 2, (False, False, False, False)),
    ],
)
def test_windows(window: object, skip: object, windows: tuple) -> None:
    a = architecture_from_args({**CORE, "window_size": window, "window_attn_skip_freq": skip})
    assert a.windowed_layers == windows
    assert a.window_size == ((127, 0) if window else None)


@pytest.mark.parametrize(
    ("name", "value", "more"),
    [
        ("window_size", (127, 3), {}),
        ("window_size", (-1, 0), {}),
        ("window_size", (127,), {}),
        ("window_size", 127, {}),
        ("window_size", "127,0", {}),
        ("window_attn_skip_freq", "2", {"window_size": (127, 0)}),
        ("window_attn_skip_freq", [1, 0], {"window_size": (127, 0)}),
        ("window_attn_skip_freq", 0, {"window_size": (127, 0)}),
        ("rotary_interleaved", 1, {}),
    ],
)
def test_impossible_windows_and_pairs(name: str, value: object, more: dict) -> None:
    with pytest.raises(UnsupportedError) as caught:
        architecture_from_args({**CORE, **more, name: value})
    assert name in str(caught.value.found)


def test_the_legacy_model_has_no_windows() -> None:
    legacy = {**CORE, "use_legacy_models": True, "window_size": (127, 0)}
    with pytest.raises(UsageError, match="not certain"):
        architecture_from_args(legacy)
    sure = architecture_from_args(legacy, overrides={"window_size": None})
    assert sure.window_size is None


def test_interleaved_rotation() -> None:
    rope = {**CORE, "position_embedding_type": "rope", "rotary_interleaved": True}
    assert architecture_from_args(rope).rotary_interleaved
    assert not architecture_from_args(
        {**rope, "position_embedding_type": "none"}
    ).rotary_interleaved
    with pytest.raises(UnsupportedError, match="neighbours"):
        architecture_from_args({**rope, "use_legacy_models": True})


def test_layers_used_once_each_are_plain() -> None:
    once = {**V1_0, "num_unique_layers": 4, "param_sharing_style": "grouped"}
    assert architecture_from_args(once) == architecture_from_args(V1_0)


@pytest.mark.parametrize("name", ["num_layers", "swiglu", "normalization", "rotary_base"])
def test_opaque_settings_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        architecture_from_args({**LLAMA, name: Opaque()})
    assert caught.value.found == f"{name} = <megatron.enums.Something(3)>"


def test_wrong_kinds_of_values() -> None:
    with pytest.raises(UnsupportedError, match="a whole number"):
        architecture_from_args({**CORE, "num_layers": True})
    with pytest.raises(UsageError, match="a whole number"):
        architecture_from_args(CORE, overrides={"num_layers": "many"})


@pytest.mark.parametrize("kind", ["relative", "yarn", "mrope", Opaque()])
def test_other_positions(kind: object) -> None:
    with pytest.raises(UnsupportedError, match="these positions") as caught:
        architecture_from_args({**CORE, "position_embedding_type": kind})
    assert "--set position_embedding_type=" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("rope", "rope"),
        ("none", "none"),
        ("PositionEmbeddingType.absolute", "learned_absolute"),
        ("PositionEmbeddingType.rotary", "rope"),
        ("PositionEmbeddingType.alibi", "alibi"),
        ("alibi", "alibi"),
    ],
)
def test_position_spellings(kind: str, expected: str) -> None:
    architecture = architecture_from_args({**CORE, "position_embedding_type": kind})
    assert architecture.position_embedding_type == expected


@pytest.mark.parametrize(
    ("rotary", "learned", "expected"),
    [(False, True, "learned_absolute"), (True, False, "rope"), (False, False, "none")],
)
def test_positions_before_their_argument(rotary: bool, learned: bool, expected: str) -> None:
    args = {
        **V23_04,
        "use_rotary_position_embeddings": rotary,
        "add_position_embedding": learned,
    }
    assert architecture_from_args(args).position_embedding_type == expected


def test_learned_and_rotary_positions_at_once() -> None:
    args = {**V23_04, "use_rotary_position_embeddings": True}
    with pytest.raises(UnsupportedError, match="at once"):
        architecture_from_args(args)
    settled = architecture_from_args(args, overrides={"add_position_embedding": False})
    assert settled.position_embedding_type == "rope"


# ---- GELU


@pytest.mark.parametrize(
    ("base", "changes", "activation"),
    [
        # Megatron-Core: fusion, or Transformer Engine, computes tanh
        (CORE, {"bias_gelu_fusion": True}, "gelu_tanh"),
        (CORE, {"bias_gelu_fusion": False}, "gelu"),
        (CORE, {"bias_gelu_fusion": True, "add_bias_linear": False}, "gelu"),
        (CORE, {"bias_gelu_fusion": False, "openai_gelu": True}, "gelu"),
        (CORE, {"bias_gelu_fusion": True, "onnx_safe": True}, "gelu_tanh"),
        (CORE, {"bias_gelu_fusion": False, "use_te_activation_func": True}, "gelu_tanh"),
        (CORE, {"bias_gelu_fusion": False, "use_transformer_engine_op_fuser": True}, "gelu_tanh"),
        (CORE, {"bias_gelu_fusion": False, "transformer_impl": "transformer_engine"}, "gelu"),
        (CORE, {"squared_relu": True}, "squared_relu"),
        # Megatron-LM's own GPT since 2023-04: openai_gelu and onnx_safe come first
        (LEGACY, {"bias_gelu_fusion": True}, "gelu_tanh"),
        (LEGACY, {"bias_gelu_fusion": False}, "gelu"),
        (LEGACY, {"bias_gelu_fusion": False, "openai_gelu": True}, "gelu_tanh"),
        (LEGACY, {"bias_gelu_fusion": True, "onnx_safe": True}, "gelu"),
        (LEGACY, {"squared_relu": True}, "squared_relu"),
        (LEGACY, {"squared_relu": True, "openai_gelu": True}, "gelu_tanh"),
        (LEGACY, {"transformer_impl": "transformer_engine"}, "gelu_tanh"),
        # before: fusion comes first
        (V2_6, {"bias_gelu_fusion": True, "onnx_safe": True}, "gelu_tanh"),
        (V2_6, {"bias_gelu_fusion": False, "onnx_safe": True}, "gelu"),
        (V2_6, {"bias_gelu_fusion": False, "openai_gelu": True}, "gelu_tanh"),
        # v1.0 fused nothing
        (V1_0, {}, "gelu"),
        (V1_0, {"openai_gelu": True}, "gelu_tanh"),
    ],
)
def test_activation(base: dict[str, object], changes: dict[str, object], activation: str) -> None:
    architecture = architecture_from_args({**base, **changes})
    assert (architecture.activation, architecture.gated_linear_unit) == (activation, False)


@pytest.mark.parametrize(
    "base", [CORE, LEGACY, {**LEGACY, "transformer_impl": "transformer_engine"}]
)
def test_swiglu(base: dict[str, object]) -> None:
    architecture = architecture_from_args({**base, "swiglu": True, "bias_gelu_fusion": True})
    assert (architecture.activation, architecture.gated_linear_unit) == ("silu", True)


def test_missing_fusion_is_asked_for() -> None:
    args = {name: value for name, value in V2_6.items() if name != "bias_gelu_fusion"}
    with pytest.raises(UsageError, match="which GELU") as caught:
        architecture_from_args(args)
    assert "--set bias_gelu_fusion=True" in str(caught.value.fix)
    settled = architecture_from_args(args, overrides={"bias_gelu_fusion": True})
    assert settled.activation == "gelu_tanh"


def test_two_activations() -> None:
    with pytest.raises(UsageError, match="two activations"):
        architecture_from_args({**CORE, "swiglu": True, "squared_relu": True})


@pytest.mark.parametrize(
    ("changes", "legacy"),
    [
        ({"use_legacy_models": True}, True),
        ({"use_legacy_models": False}, False),
        ({"use_mcore_models": True}, False),
        ({"use_mcore_models": False}, True),
        ({"deprecated_use_mcore_models": False}, False),  # core_v0.18
        ({}, True),
    ],
)
def test_which_gpt_was_trained(changes: dict[str, object], legacy: bool) -> None:
    plain = {**V23_04, "bias_gelu_fusion": False, "openai_gelu": True, **changes}
    assert architecture_from_args(plain).activation == ("gelu_tanh" if legacy else "gelu")
    assert architecture_from_args(plain, legacy=False).activation == "gelu"


# ---- renamed, missing and derived arguments


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [
        ("norm_epsilon", "layernorm_epsilon", 3e-6),
        ("apply_layernorm_1p", "layernorm_zero_centered_gamma", True),
    ],
)
def test_renamed_arguments(old: str, new: str, value: object) -> None:
    assert RENAMED[old] == new
    without = {name: v for name, v in CORE.items() if name != new}
    for args in ({**without, old: value}, {**CORE, old: value, new: value}):
        assert getattr(architecture_from_args(args), new) == value
    for said in (old, new):
        architecture = architecture_from_args(CORE, overrides={said: value})
        assert getattr(architecture, new) == value
    with pytest.raises(UsageError, match="stands twice") as caught:
        architecture_from_args({**CORE, old: value})
    assert f"{old} = {value}" in str(caught.value.found)
    settled = architecture_from_args({**CORE, old: value}, overrides={new: CORE[new]})
    assert settled == architecture_from_args(CORE)


@pytest.mark.parametrize("name", ["num_layers", "hidden_size", "padded_vocab_size"])
def test_missing_arguments_are_asked_for_together(name: str) -> None:
    args = {k: v for k, v in CORE.items() if k not in (name, "layernorm_epsilon")}
    with pytest.raises(UsageError) as caught:
        architecture_from_args(args)
    assert caught.value.found == f"no {name}, layernorm_epsilon"
    assert "--set layernorm_epsilon=1e-5" in str(caught.value.fix)


def test_sizes_filled_in() -> None:
    without = {k: v for k, v in CORE.items() if k not in ("ffn_hidden_size", "kv_channels")}
    assert architecture_from_args(without).ffn_hidden_size == 256
    assert architecture_from_args(without).kv_channels == 16
    gated = {**without, "swiglu": True, "hidden_size": 4096, "num_attention_heads": 32}
    assert architecture_from_args(gated).ffn_hidden_size == 10880
    with pytest.raises(UnsupportedError, match="hidden_size = 64, num_attention_heads = 7"):
        architecture_from_args({**without, "num_attention_heads": 7})


def test_query_groups() -> None:
    assert architecture_from_args({**CORE, "num_query_groups": 2}).num_query_groups == 4
    grouped = {**CORE, "num_query_groups": 2, "group_query_attention": True}
    assert architecture_from_args(grouped).num_query_groups == 2
    assert architecture_from_args(CORE, overrides={"num_query_groups": 1}).num_query_groups == 1
    alone = {name: value for name, value in grouped.items() if name != "group_query_attention"}
    with pytest.raises(UsageError, match="--set group_query_attention=True"):
        architecture_from_args(alone)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"params_dtype": DTYPES["bfloat16"]}, "bfloat16"),
        ({"params_dtype": "torch.float16"}, "float16"),
        ({"params_dtype": None, "bf16": True}, "bfloat16"),
        ({"params_dtype": None, "fp16": True}, "float16"),
        ({"params_dtype": None, "fp16": None}, None),
    ],
)
def test_params_dtype(changes: dict[str, object], expected: str | None) -> None:
    assert architecture_from_args({**CORE, **changes}).params_dtype == expected


def test_quantised_params_dtype() -> None:
    with pytest.raises(UnsupportedError, match="float8_e4m3fn"):
        architecture_from_args({**CORE, "params_dtype": DTYPES["float8_e4m3fn"]})


# ---- rotary arguments that Megatron-LM stored and ignored


def test_rope_scaling() -> None:
    scaled = {**LLAMA, "use_rope_scaling": True}
    assert architecture_from_args(scaled).rope_scaling_factor == 8
    del scaled["rope_scaling_factor"]  # core_v0.10
    assert architecture_from_args(scaled).rope_scaling_factor == 8
    assert (
        architecture_from_args({**LLAMA, "rope_scaling_factor": 32.0}).rope_scaling_factor is None
    )


@pytest.mark.parametrize(
    ("changes", "name", "used", "field"),
    [
        ({"use_rope_scaling": True, "rope_scaling_factor": 32.0}, "rope_scaling_factor", 8.0, None),
        (
            {"rotary_seq_len_interpolation_factor": 4},
            "rotary_seq_len_interpolation_factor",
            1,
            None,
        ),
        ({"use_legacy_models": True, "rotary_base": 500000}, "rotary_base", 10000, None),
        (
            {"use_legacy_models": True, "use_rope_scaling": True},
            "use_rope_scaling",
            False,
            "rope_scaling_factor",
        ),
    ],
)
def test_ignored_rotary_arguments_are_asked_about(
    changes: dict[str, object], name: str, used: object, field: str | None
) -> None:
    args = {**LLAMA, **changes}
    with pytest.raises(UsageError) as caught:
        architecture_from_args(args)
    assert f"--set {name}={used} if Megatron-LM" in str(caught.value.fix)
    assert f"--set {name}={args[name]} if another" in str(caught.value.fix)
    trained = architecture_from_args(args, overrides={name: used})
    other = architecture_from_args(args, overrides={name: args[name]})
    assert trained != other
    if field is None:
        assert getattr(other, name) == args[name]
    without_rope = {**args, "position_embedding_type": "none"}
    assert architecture_from_args(without_rope).rotary_base == 10000


def test_legacy_interpolation_is_used() -> None:
    args = {**LLAMA, "use_legacy_models": True, "rotary_seq_len_interpolation_factor": 4}
    assert architecture_from_args(args).rotary_seq_len_interpolation_factor == 4


# ---- overrides


@pytest.mark.parametrize("theirs", SUGGESTIONS)
def test_hugging_face_names_get_a_suggestion(theirs: str) -> None:
    with pytest.raises(UsageError, match="Hugging Face's name") as caught:
        architecture_from_args(CORE, overrides={theirs: 1})
    assert caught.value.fix == f"use Megatron's: {SUGGESTIONS[theirs]}"
    assert not set(SUGGESTIONS[theirs].split(" or ")[0].split(", ")) - set(SETTINGS)


def test_other_overrides_are_refused() -> None:
    with pytest.raises(UsageError, match="does not change what the model computes"):
        architecture_from_args(CORE, overrides={"lr": 1e-4})
    with pytest.raises(UsageError, match="did you mean num_query_groups"):
        architecture_from_args(CORE, overrides={"num_query_group": 2})
    with pytest.raises(UsageError, match="not an argument of Megatron"):
        architecture_from_args(CORE, overrides={"zzz": 2})


def test_overrides_win() -> None:
    said = architecture_from_args(
        CORE,
        overrides={
            "position_embedding_type": "rope",
            "rotary_base": 5e5,
            "vocab_size": 480,
            "padded_vocab_size": 500,
        },
    )
    assert (said.position_embedding_type, said.rotary_base) == ("rope", 5e5)
    assert (said.vocab_size, said.padded_vocab_size) == (480, 500)
    rotary = {**LLAMA, "use_rotary_position_embeddings": True}
    none = architecture_from_args(rotary, overrides={"position_embedding_type": "none"})
    assert none.position_embedding_type == "none"


# ---- vocabulary


@pytest.mark.parametrize(
    ("args", "size"),
    [
        ({"tokenizer_type": "NullTokenizer", "vocab_size": 499}, 500),
        ({"tokenizer_type": "NullMultimodalTokenizer", "vocab_size": 499}, 500),
        # core_v0.18: EOD is one of vocab_size
        (
            {"tokenizer_type": "NullTokenizer", "vocab_size": 500, "null_tokenizer_eod_id": None},
            500,
        ),
        ({"tokenizer_type": "TikTokenizer", "vocab_size": 131072}, 131072),
        ({"tokenizer_type": "TikTokenizer", "vocab_size": None}, 131072),
        ({"tokenizer_type": "GPT2BPETokenizer", "vocab_size": 50256}, None),
        ({"tokenizer_type": "HuggingFaceTokenizer", "vocab_size": None}, None),
        ({"vocab_size": 500}, 500),
        ({"vocab_size": 500, "padded_vocab_size": 499}, None),
        ({"vocab_size": Opaque()}, None),
        ({"vocab_size": 0}, None),
        ({}, None),
    ],
)
def test_true_vocab_size(args: dict[str, object], size: int | None) -> None:
    assert true_vocab_size(args) == size


# ---- arguments nobody reads


def test_unknown_arguments() -> None:
    args = {
        **CORE,
        "lr": 1e-4,
        "moe_router_topk": 2,
        "attn_mask": Opaque(),
        "zz_gate": True,
        "zz_object": Opaque(),
        "aa_number": 0.5,
        "zz_off": False,
        "zz_none": None,
        "zz_zero": 0,
        "zz_empty": "",
        "zz_list": [],
        "zz_dict": {},
    }
    assert unknown_arguments(args) == ["aa_number", "zz_gate", "zz_object"]


def test_low_precision_is_a_note_not_an_error() -> None:
    assert low_precision(CORE) == []
    for name in LOW_PRECISION:
        args = {**CORE, name: "hybrid"}
        assert architecture_from_args(args) == architecture_from_args(CORE)
        (note,) = low_precision(args)
        assert f"{name} = 'hybrid'" in note


def test_tables_do_not_contradict_each_other() -> None:
    tables = [set(SETTINGS), set(NEUTRAL), set(LOW_PRECISION), set(RENAMED)]
    names = [name for table in tables for name in table]
    assert len(names) == len(set(names))
    lines = Path(arguments.__file__).with_name("known_arguments.txt").read_text().splitlines()
    words = [line for line in lines if line and not line.startswith("#")]
    assert len(words) == len(set(words))
    assert not set(words) & set(names)
    prefixes = tuple(word[:-1] for word in words if word.endswith("*"))
    shadowed = [w for w in words if not w.endswith("*") and w.startswith(prefixes)]
    assert shadowed == []
    blocks = "\n".join(lines).split("\n\n")
    for block in blocks:
        block_words = [line for line in block.splitlines() if not line.startswith("#")]
        assert block_words == sorted(block_words)


@pytest.mark.parametrize(
    "name", ["apply_query_key_layer_scaling", "qk_clip", "moe_router_topk", "lr_decay_style"]
)
def test_known_arguments(name: str) -> None:
    assert is_known(name)


@pytest.mark.parametrize("name", ["gated_linear_unit", "activation_func", "parallel_attn", "mod"])
def test_not_known_arguments(name: str) -> None:
    assert not is_known(name)


# ---- checkpoints without arguments


def shapes(
    *, heads: int = 4, groups: int = 4, gated: bool = False, plain: bool = True
) -> dict[str, tuple[int, ...]]:
    """A GPT-2 (`plain`) or llama of two layers: hidden 64, heads of 16."""
    found: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (512, 64),
        "decoder.final_layernorm.weight": (64,),
    }
    if plain:
        found["embedding.position_embeddings.weight"] = (32, 64)
        found["decoder.final_layernorm.bias"] = (64,)
    else:
        found["output_layer.weight"] = (512, 64)
    for i in range(2):
        prefix = f"decoder.layers.{i}."
        rows = (heads + 2 * groups) * 16
        found |= {
            f"{prefix}self_attention.linear_qkv.weight": (rows, 64),
            f"{prefix}self_attention.linear_proj.weight": (64, heads * 16),
            f"{prefix}mlp.linear_fc1.weight": (512 if gated else 256, 64),
            f"{prefix}mlp.linear_fc2.weight": (64, 256),
        }
        if plain:
            found[f"{prefix}self_attention.linear_qkv.bias"] = (rows,)
            found[f"{prefix}self_attention.linear_proj.bias"] = (64,)
    return found


SAID = {"layernorm_epsilon": 1e-5, "layernorm_zero_centered_gamma": False}
ROPE = {
    "position_embedding_type": "rope",
    "max_position_embeddings": 32,
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "use_rope_scaling": False,
}


def test_gpt2_without_arguments() -> None:
    architecture = architecture_from_shapes(
        shapes(), {**SAID, "num_attention_heads": 4, "bias_gelu_fusion": True}
    )
    same = {**V2_6, "num_layers": 2, "attention_dropout": 0.1, "hidden_dropout": 0.1}
    expected = asdict(architecture_from_args(same))
    assert asdict(architecture) == {**expected, "params_dtype": None}


def test_llama_without_arguments() -> None:
    said = {**SAID, **ROPE, "kv_channels": 16, "swiglu": True}
    architecture = architecture_from_shapes(shapes(groups=2, gated=True, plain=False), said)
    assert architecture.num_attention_heads == 4
    assert architecture.num_query_groups == 2
    assert architecture.kv_channels == 16
    assert architecture.normalization == "RMSNorm"
    assert architecture.position_embedding_type == "rope"
    assert (architecture.activation, architecture.gated_linear_unit) == ("silu", True)
    assert architecture.untie_embeddings_and_output_weights
    assert not architecture.has_qkv_bias


def test_a_query_norm_shows_the_heads() -> None:
    found = shapes(groups=2)
    for i in range(2):
        found[f"decoder.layers.{i}.self_attention.q_layernorm.weight"] = (16,)
    architecture = architecture_from_shapes(found, {**SAID, "squared_relu": True})
    assert architecture.num_attention_heads == 4
    assert architecture.num_query_groups == 2
    assert architecture.qk_layernorm
    assert architecture.activation == "squared_relu"


@pytest.mark.parametrize(
    ("said", "activation"),
    [
        ({"bias_gelu_fusion": True}, "gelu_tanh"),
        ({"bias_gelu_fusion": False}, "gelu"),
        ({"openai_gelu": True}, "gelu_tanh"),
        ({"onnx_safe": True}, "gelu"),
        ({"use_te_activation_func": True}, "gelu_tanh"),
        ({"squared_relu": True}, "squared_relu"),
    ],
)
def test_activations_without_arguments(said: dict[str, object], activation: str) -> None:
    overrides = {**SAID, "num_attention_heads": 4, **said}
    assert architecture_from_shapes(shapes(), overrides).activation == activation


def test_everything_needed_is_asked_for_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        architecture_from_shapes(shapes())
    assert caught.value.found == (
        "no num_attention_heads, layernorm_epsilon, layernorm_zero_centered_gamma, bias_gelu_fusion"
    )
    assert str(caught.value.fix).endswith(
        "--set num_attention_heads=16 --set layernorm_epsilon=1e-5 "
        "--set layernorm_zero_centered_gamma=False --set bias_gelu_fusion=True"
    )
    with pytest.raises(UsageError) as caught:
        architecture_from_shapes(shapes(gated=True, plain=False), {"num_attention_heads": 4})
    assert "swiglu" in str(caught.value.found)
    for name in ROPE:
        assert name in str(caught.value.found)
        assert f"--set {name}=" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"num_layers": 3}, "num_layers = 2"),
        ({"num_attention_heads": 7}, "heads that divide 64 query and 64 key channels"),
        ({"num_attention_heads": 33}, "num_attention_heads = 64"),
        ({"num_attention_heads": 4, "num_query_groups": 2}, "num_query_groups = 4"),
        ({"num_attention_heads": 4, "swiglu": True, "bias_gelu_fusion": True}, "1 row(s)"),
        ({"untie_embeddings_and_output_weights": True}, "= False, as the shapes say"),
        ({"num_attention_heads": "four"}, "a whole number"),
        ({"num_attention_heads": 4, "n_head": 4}, "use Megatron's: num_attention_heads"),
    ],
)
def test_overrides_that_contradict_the_tensors(said: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        architecture_from_shapes(shapes(), {**SAID, **said})
    assert words in str(caught.value)


def test_messages_have_one_shape() -> None:
    with pytest.raises(MTTError) as caught:
        architecture_from_args({**CORE, "num_experts_switch": 8})
    assert str(caught.value) == (
        "the model computes something that mtt cannot represent\n"
        "  found:    num_experts_switch = 8 (mixture of experts)\n"
        "  expected: num_experts_switch = None\n"
        "  fix:      mtt converts plain GPT models; if this is one all the same, "
        "--set num_experts_switch=None"
    )
