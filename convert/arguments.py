"""Megatron's arguments -> `Architecture`; nothing that changes the forward pass is ignored.

Every argument is one of four kinds:

    SETTINGS            read here: a size, or a choice mtt can represent
    NEUTRAL             changes the forward pass in a way mtt cannot represent: any value but the
                        neutral one is refused by name
    LOW_PRECISION       changes rounding while training, not the function: worth a note
    known_arguments.txt has no part in the forward pass (training, data, logging, layout), or
                        only beside an argument that NEUTRAL refuses

What is in none of them is reported by `unknown_arguments`. The lists cover Megatron-LM v1.0 to
core_v0.19, its main and dev branches of August 2026, and the Megatron-DeepSpeed of DeepSpeed and
BigScience. Sources are paths in Megatron-LM at core_v0.16.1 unless another tag is named.

Some arguments never reached the model: Megatron-LM accepted, printed and stored them, and computed
something else. Trainers built on Megatron-Core do pass them on. Files cannot tell the two apart,
so the user is asked (`_ask`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType

from .architecture import PARAMS_DTYPES, Architecture, Sizes, read_shapes
from .dtypes import DType
from .errors import UnsupportedError, UsageError

Arguments = Mapping[str, object]
_NONE: Arguments = MappingProxyType({})
_OFF = (None, False, "", ())  # 0 equals False


@dataclass(frozen=True, slots=True)
class Neutral:
    """What an argument would do to the forward pass, and the values with which it does not."""

    meaning: str
    values: tuple[object, ...] = _OFF


_MLA, _HYBRID = "multi-latent attention", "a hybrid of attention, Mamba and MLP layers"
_MOE, _QUANTISED = "mixture of experts", "weights kept in a quantised form"
_HETEROGENEOUS = "layers that differ from each other"
_LINEAR_ATTENTION = "layers of linear or sparse attention"
_MODELOPT = "a model changed by NVIDIA ModelOpt; modelopt_state, not the arguments, says how"
_HYPER, _EXTRA_HEADS = "several residual streams", "extra heads for speculative decoding"

NEUTRAL: Mapping[str, Neutral] = {
    # model kinds
    "decoder_num_layers": Neutral("an encoder beside the decoder: T5"),
    "export_num_eagle_layers": Neutral(_EXTRA_HEADS),
    "export_num_medusa_heads": Neutral(_EXTRA_HEADS),
    "export_num_mtp": Neutral(_EXTRA_HEADS),
    "export_offline_model": Neutral("a model without its decoder layers"),
    "heterogeneous_block_specs": Neutral(_HETEROGENEOUS),
    "heterogeneous_layers_config_encoded_json": Neutral(_HETEROGENEOUS),
    "heterogeneous_layers_config_path": Neutral(_HETEROGENEOUS),
    "hybrid_attention_ratio": Neutral(_HYBRID),
    "hybrid_layer_pattern": Neutral(_HYBRID),
    "hybrid_mlp_ratio": Neutral(_HYBRID),
    "hybrid_override_pattern": Neutral(_HYBRID),
    "is_hybrid_model": Neutral(_HYBRID),
    "modelopt_enabled": Neutral(_MODELOPT),
    "mtp_num_layers": Neutral("layers that predict further tokens; mtt would drop them"),
    "num_attention_heads_kv": Neutral("EPFL's Megatron-LLM, with other rows and names", (None,)),
    # Layers shared by layer numbers; all are distinct when it equals num_layers.
    # (Source: ParallelTransformer, megatron/model/transformer.py of September 2020.)
    "num_unique_layers": Neutral("layers used more than once"),
    "pos_emb": Neutral("GPT-NeoX, whose arguments have other names", (None,)),
    "retro_add_retriever": Neutral("RETRO's retrieval encoder"),
    "spec": Neutral("layers built by the user's own code"),
    "vision_pretraining": Neutral("a vision model"),
    # With a YAML file the model's arguments stand in a nested namespace (yaml_arguments.py).
    "yaml_cfg": Neutral("a model described by a YAML file that is not in the checkpoint"),
    # attention
    "attention_output_gate": Neutral("a gate on the attention output"),
    "experimental_attention_variant": Neutral(_LINEAR_ATTENTION),
    "export_qk_l2_norm": Neutral("Llama 4's norm without weights on queries and keys"),
    "head_wise_attn_gate": Neutral("a gate on each head's output"),
    "linear_attention_freq": Neutral(_LINEAR_ATTENTION),
    "linear_attention_type": Neutral(_LINEAR_ATTENTION),
    "multi_latent_attention": Neutral(_MLA),
    "qk_l2_norm": Neutral("Llama 4's norm without weights on queries and keys"),
    "softmax_scale": Neutral("attention scores scaled by another number", (None,)),
    "softmax_type": Neutral("a softmax with an offset or a learned sink", (None, "vanilla")),
    "window_size": Neutral("sliding-window attention"),
    "window_attn_skip_freq": Neutral("sliding-window attention on some layers"),
    # positions
    "enable_gpt_oss": Neutral("GPT-OSS's attention sinks, windows and YaRN positions"),
    "mrope_interleaved": Neutral("multimodal rotary positions"),
    "mrope_section": Neutral("multimodal rotary positions"),
    "no_rope_freq": Neutral("layers without rotary positions among layers with them"),
    "rope_type": Neutral("YaRN rotary positions", (None, "rope")),
    "rotary_base_per_layer": Neutral("a rotary base for each layer"),
    "rotary_interleaved": Neutral("rotary pairs of neighbouring channels"),
    # MLP
    "activation_func_clamp_value": Neutral("a clamped activation", (None,)),
    "dense_grouped_gemm": Neutral("gate and up interleaved in blocks of 32 rows"),
    # Attention and MLP go through other code (FPDT_FFN), which nothing here was compared with.
    "ds_sequence_parallel_fpdt": Neutral("Megatron-DeepSpeed's fully pipelined transformer"),
    "glu_activation": Neutral("BigScience's gated MLP, whose second half is the gate"),
    "glu_linear_offset": Neutral("an offset in the gated MLP"),
    "mlp_type": Neutral("Megatron-DeepSpeed's residual experts", (None, "standard")),
    "num_experts": Neutral(_MOE, (*_OFF, (1,))),  # [1]: Megatron-DeepSpeed's way to say none
    "num_experts_switch": Neutral(_MOE),
    "num_moe_experts": Neutral(_MOE),
    "quick_geglu": Neutral("an MLP gated by x * sigmoid(1.702 x)"),
    "use_grouped_gemm_for_dense_mlp": Neutral("gate and up interleaved in blocks of 32 rows"),
    # norms and residuals
    "apply_residual_connection_post_layernorm": Neutral("residuals taken after the norm"),
    "embed_layernorm": Neutral("a norm after the embedding, as in BLOOM"),
    "enable_hyper_connections": Neutral(_HYPER),
    "enable_mhc_connections": Neutral(_HYPER),
    # BigScience adds the embedding norm for its 8-bit optimizer too (megatron/mpu/layers.py).
    "use_bnb_optimizer": Neutral("a norm after the embedding, as in BLOOM"),
    # Multiplies embeddings, attention scores and logits (language_model_embedding.py,
    # language_module.py, transformer_config.py at core_v0.17); all mup_* do nothing without it.
    "use_mup": Neutral("muP's factors on embeddings, scores and logits"),
    # weights that are not plain numbers
    "compression_training": Neutral("DeepSpeed's pruning and quantisation"),
    "export_quant_cfg": Neutral(_QUANTISED, (*_OFF, "None")),
    "export_real_quant_cfg": Neutral(_QUANTISED, (*_OFF, "None")),
    "fp4_param": Neutral(_QUANTISED),
    "fp4_param_gather": Neutral(_QUANTISED),
    "fp8_param": Neutral(_QUANTISED),
    "fp8_param_gather": Neutral(_QUANTISED),
}

# Matrix products in few bits while training. The stored weights are params_dtype, and computing
# with them in params_dtype is what the rounding approximated.
LOW_PRECISION: Mapping[str, str] = {
    "export_kv_cache_quant": "a quantised key/value cache",
    "fp4": "matrix products in FP4",
    "fp8": "matrix products in FP8",
    "fp8_e4m3": "matrix products in FP8",
    "fp8_hybrid": "matrix products in FP8",
    "kitchen_config_file": "matrix products quantised by Kitchen",
    "kitchen_recipe_number": "matrix products quantised by Kitchen",
    "quant_recipe": "matrix products quantised by a recipe",
    "te_precision_config_file": "matrix products in a precision of their own",
    "use_kitchen": "matrix products quantised by Kitchen",
    "use_kitchen_attention": "attention computed by Kitchen",
}

SETTINGS: Mapping[str, type] = {
    **dict.fromkeys(
        "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels "
        "num_key_value_heads padded_vocab_size vocab_size max_position_embeddings".split(),
        int,
    ),
    **dict.fromkeys(
        "layernorm_epsilon rotary_base rotary_percent rope_theta rope_scaling_factor "
        "rotary_seq_len_interpolation_factor attention_dropout hidden_dropout "
        "init_method_std".split(),
        float,
    ),
    **dict.fromkeys(
        "group_query_attention add_position_embedding use_rotary_position_embeddings "
        "use_rope_scaling layernorm_zero_centered_gamma swiglu squared_relu openai_gelu onnx_safe "
        "bias_gelu_fusion use_te_activation_func use_transformer_engine_op_fuser add_bias_linear "
        "add_qkv_bias qk_layernorm untie_embeddings_and_output_weights fp16 bf16 "
        "use_legacy_models use_mcore_models".split(),
        bool,
    ),
    **dict.fromkeys("normalization transformer_impl tokenizer_type".split(), str),
    "position_embedding_type": object,
    "params_dtype": object,
}
_NEEDED = (
    "num_layers hidden_size num_attention_heads max_position_embeddings padded_vocab_size "
    "layernorm_epsilon".split()
)
# Names of core_v0.4 to v0.15, the second one also before; on the right those of the other releases.
RENAMED: Mapping[str, str] = {
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
}
# Megatron-DeepSpeed's names: read from checkpoints, but users say Megatron-LM's.
_FOREIGN = ("num_key_value_heads", "rope_theta")
# Hugging Face's names, for a suggestion.
_TRANSFORMERS = {
    "num_query_groups": "num_key_value_heads",
    "num_attention_heads": "n_head",
    "num_layers": "num_hidden_layers n_layer",
    "hidden_size": "n_embd d_model",
    "ffn_hidden_size": "intermediate_size n_inner",
    "kv_channels": "head_dim",
    "max_position_embeddings": "n_positions",
    "rotary_base": "rope_theta",
    "rotary_percent": "partial_rotary_factor",
    "use_rope_scaling": "rope_scaling rope_parameters",
    "layernorm_epsilon": "rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps",
    "normalization": "norm_type",
    "swiglu, squared_relu or bias_gelu_fusion": "hidden_act activation_function gated_mlp",
    "add_bias_linear": "mlp_bias",
    "add_qkv_bias": "attention_bias",
    "qk_layernorm": "use_qk_norm",
    "untie_embeddings_and_output_weights": "tie_word_embeddings",
    "layernorm_zero_centered_gamma": "zero_centered_norm",
    "init_method_std": "initializer_range",
    "params_dtype": "dtype torch_dtype",
}
SUGGESTIONS = {theirs: ours for ours, names in _TRANSFORMERS.items() for theirs in names.split()}
# How position_embedding_type is written: by Megatron-LM, and by BigScience's enum.
_POSITIONS = {
    **{name: name for name in ("learned_absolute", "rope", "none")},
    "PositionEmbeddingType.rotary": "rope",
    "PositionEmbeddingType.absolute": "learned_absolute",
    "<megatron.enums.PositionEmbeddingType(1)>": "rope",
    "<megatron.enums.PositionEmbeddingType(2)>": "learned_absolute",
}


def architecture_from_args(
    args: Arguments, *, overrides: Arguments = _NONE, legacy: bool | None = None
) -> Architecture:
    """The architecture a checkpoint's arguments describe.

    Args:
        args: the checkpoint's arguments by name; objects other than plain values may be anything.
        overrides: what the user says instead, under Megatron-LM's names.
        legacy: whether the model is Megatron-LM's own GPT (up to core_v0.17) and not
            Megatron-Core's; None reads it from the arguments.

    Raises:
        UnsupportedError: an argument that changes the forward pass has a value mtt cannot
            represent, or sizes contradict each other; all such arguments are named.
        UsageError: a needed argument is missing, cannot be trusted, or an override is not one.
    """
    _check_overrides(overrides)
    said = _said(overrides)
    a = {**_renamed(args, said), **said}
    _refuse(a)
    _check_types(a, said)
    _require(a)
    if legacy is None:
        legacy = _is_legacy(a)
    kind = _position_embedding_type(a)
    activation, gated = _activation(a, legacy)
    biases = _or(a, "add_bias_linear", True)  # an argument since 2023-04
    hidden, heads = a["hidden_size"], a["num_attention_heads"]
    assert isinstance(hidden, int) and isinstance(heads, int)
    rotary = _rotary(a, said, legacy) if kind == "rope" else {}
    return _build(
        num_layers=a["num_layers"],
        hidden_size=hidden,
        ffn_hidden_size=_or(a, "ffn_hidden_size", _default_ffn(hidden, gated)),
        num_attention_heads=heads,
        num_query_groups=_query_groups(a, heads),
        kv_channels=_or(a, "kv_channels", _default_kv_channels(a, hidden, heads)),
        padded_vocab_size=a["padded_vocab_size"],
        max_position_embeddings=a["max_position_embeddings"],
        vocab_size=said["vocab_size"] if "vocab_size" in said else true_vocab_size(a),
        position_embedding_type=kind,
        **rotary,
        normalization=_normalization(a),
        layernorm_epsilon=a["layernorm_epsilon"],
        layernorm_zero_centered_gamma=_or(a, "layernorm_zero_centered_gamma", False),
        activation=activation,
        gated_linear_unit=gated,
        add_bias_linear=biases,
        add_qkv_bias=biases or _or(a, "add_qkv_bias", False),  # an argument since core_v0.5
        qk_layernorm=_or(a, "qk_layernorm", False),
        untie_embeddings_and_output_weights=_or(a, "untie_embeddings_and_output_weights", False),
        attention_dropout=_or(a, "attention_dropout", 0.1),
        hidden_dropout=_or(a, "hidden_dropout", 0.1),
        init_method_std=_or(a, "init_method_std", 0.02),
        params_dtype=_params_dtype(a),
    )


def _build(**fields: object) -> Architecture:
    return Architecture(**fields)  # type: ignore[arg-type]  # _check_types saw every value


def _check_overrides(overrides: Arguments) -> None:
    """Raise UsageError for a name that says nothing about the model."""
    for name in overrides:
        if (name in SETTINGS and name not in _FOREIGN) or name in NEUTRAL or name in RENAMED:
            continue
        if name in SUGGESTIONS:
            message, fix = "is Hugging Face's name", f"use Megatron's: {SUGGESTIONS[name]}"
        elif is_known(name):
            message, fix = "does not change what the model computes", f"leave out --set {name}"
        else:
            near = difflib.get_close_matches(name, [*SETTINGS, *NEUTRAL, *RENAMED], 1, 0.75)
            message = "is not an argument of Megatron"
            fix = f"did you mean {near[0]}?" if near else "see `mtt inspect` for those in use"
        raise UsageError(
            f"--set {name}: this {message}",
            found=f"{name} = {_show(overrides[name])}",
            expected="an argument of Megatron that describes the model",
            fix=fix,
        )


def _said(overrides: Arguments) -> dict[str, object]:
    """Overrides under today's names, with what they imply."""
    said = {RENAMED.get(name, name): value for name, value in overrides.items()}
    if "num_query_groups" in said:
        said.setdefault("group_query_attention", True)
    if "position_embedding_type" in said:
        said.setdefault("use_rotary_position_embeddings", False)
    return said


def _renamed(args: Arguments, said: Arguments) -> dict[str, object]:
    """Arguments under today's names."""
    a = dict(args)
    for old, new in RENAMED.items():
        value = a.pop(old, None)
        if a.get(new) is None:
            a[new] = value
        elif value is not None and value != a[new] and new not in said:
            raise UsageError(
                "one argument stands twice in the checkpoint, with two values",
                found=f"{old} = {_show(value)}, {new} = {_show(a[new])}",
                expected=f"one value: {old} was renamed to {new}",
                fix=f"say which: --set {new}={_show(value)} or --set {new}={_show(a[new])}",
            )
    return a


def _refuse(a: Arguments) -> None:
    """Raise UnsupportedError if an argument of NEUTRAL is not neutral."""
    odd = [name for name, neutral in NEUTRAL.items() if not _is_in(a.get(name), neutral.values)]
    if "num_unique_layers" in odd and a["num_unique_layers"] == a.get("num_layers"):
        odd.remove("num_unique_layers")
    if odd:
        neutral = {name: _neutral_text(a[name], NEUTRAL[name].values) for name in odd}
        raise UnsupportedError(
            "the model computes something that mtt cannot represent",
            found="; ".join(f"{n} = {_show(a[n])} ({NEUTRAL[n].meaning})" for n in odd),
            expected="; ".join(f"{name} = {text}" for name, text in neutral.items()),
            fix="mtt converts plain GPT models; if this is one all the same, "
            + " ".join(f"--set {name}={text}" for name, text in neutral.items()),
        )


def _check_types(a: Arguments, said: Arguments) -> None:
    words = {bool: "True or False", int: "a whole number", float: "a number", str: "a word"}
    for name, kind in SETTINGS.items():
        value = a.get(name)
        if value is None or kind is object:
            continue
        accepted = (int, float) if kind is float else kind
        if isinstance(value, accepted) and (kind is bool or not isinstance(value, bool)):
            continue
        error = UsageError if name in said else UnsupportedError
        raise error(
            f"the argument {name} has a value mtt cannot use",
            found=f"{name} = {_show(value)}",
            expected=words[kind],
            fix=f"say it: --set {name}=VALUE",
        )


def _require(a: Arguments) -> None:
    missing = [name for name in _NEEDED if a.get(name) is None]
    if missing:
        raise _missing(missing, "the checkpoint's arguments do not say everything about the model")


def _missing(names: Iterable[str], message: str) -> UsageError:
    """The error that asks for arguments, each with an example."""
    examples = {
        "num_layers": "24",
        "hidden_size": "1024",
        "num_attention_heads": "16",
        "max_position_embeddings": "2048",
        "padded_vocab_size": "50304",
        "layernorm_epsilon": "1e-5",
        "layernorm_zero_centered_gamma": "False",
        "position_embedding_type": "rope",
        "rotary_base": "10000",
        "rotary_percent": "1.0",
        "use_rope_scaling": "False",
        "group_query_attention": "True",
        "swiglu": "True",
        "bias_gelu_fusion": "True",
    }
    notes = {
        "bias_gelu_fusion": "True: GELU by tanh, False: exact GELU; or squared_relu=True",
        "layernorm_zero_centered_gamma": "True if norm weights are stored minus one",
        "position_embedding_type": "rope or none",
        "swiglu": "silu(gate) * up",
    }
    names = list(names)
    return UsageError(
        message,
        found=f"no {', '.join(names)}",
        expected="; ".join(f"{name} ({notes[name]})" if name in notes else name for name in names),
        fix="with this model's values: "
        + " ".join(f"--set {name}={examples[name]}" for name in names),
    )


def _ask(a: Arguments, name: str, used: object, who: str) -> UsageError:
    """The error for an argument that Megatron-LM stored but did not use."""
    value = a[name]
    return UsageError(
        f"it is not certain that the model was trained with the checkpoint's {name}",
        found=f"{name} = {_show(value)}, which {who}",
        expected=f"{name} = {used}, what Megatron-LM computes with",
        fix=f"--set {name}={used} if Megatron-LM trained the model, "
        f"--set {name}={_show(value)} if another trainer did",
    )


def _is_legacy(a: Arguments) -> bool:
    """Whether Megatron-LM's own GPT was trained.

    core_v0.4 to v0.7 have `use_mcore_models`, core_v0.8 to v0.17 `use_legacy_models`; later trees
    have only Megatron-Core's GPT and keep `deprecated_use_mcore_models`.
    """
    if a.get("use_legacy_models") is not None:
        return a["use_legacy_models"] is True
    if a.get("use_mcore_models") is not None:
        return a["use_mcore_models"] is False
    return "deprecated_use_mcore_models" not in a


def _position_embedding_type(a: Arguments) -> str:
    rotary = a.get("use_rotary_position_embeddings") is True
    kind = a.get("position_embedding_type")
    if kind is None:  # before core_v0.4, and Megatron-DeepSpeed
        learned = a.get("add_position_embedding") is not False
        if rotary and learned:
            raise UnsupportedError(
                "the model has learned and rotary positions at once",
                found="use_rotary_position_embeddings = True, add_position_embedding = True",
                expected="one of them",
                fix="if there is no position table, --set add_position_embedding=False",
            )
        return "rope" if rotary else "learned_absolute" if learned else "none"
    if rotary:  # validate_args, training/arguments.py
        return "rope"
    if str(kind) not in _POSITIONS:
        raise UnsupportedError(
            "mtt does not know these positions (ALiBi, relative, YaRN and multimodal ones among "
            "them)",
            found=f"position_embedding_type = {_show(kind)}",
            expected="learned_absolute, rope or none",
            fix="if it is one of these under another name, --set position_embedding_type=rope",
        )
    return _POSITIONS[str(kind)]


def _rotary(a: Arguments, said: Arguments, legacy: bool) -> dict[str, object]:
    """The rotary fields; each argument that Megatron-LM ignored is asked about.

    (Source: RotaryEmbedding in megatron/legacy/model/language_model.py gets neither a base nor
    llama3 scaling; GPTModel in pretrain_gpt.py and gpt_builders.py gets no scaling factor in any
    release or branch, and no interpolation factor before core_v0.19.)
    """
    # Before core_v0.8 the base was a constant; Megatron-DeepSpeed has rope_theta.
    fixed = _number(a, "rope_theta", 10000)
    base = _number(a, "rotary_base", fixed)
    if legacy and base != fixed and "rotary_base" not in said:
        raise _ask(a, "rotary_base", 10000, "Megatron-LM's legacy GPT ignores")
    scaled = a.get("use_rope_scaling") is True
    if scaled and legacy and "use_rope_scaling" not in said:
        raise _ask(a, "use_rope_scaling", False, "Megatron-LM's legacy GPT ignores")
    factor = _number(a, "rope_scaling_factor", 8)  # core_v0.10 has no argument for it
    if scaled and factor != 8 and "rope_scaling_factor" not in said:
        raise _ask(a, "rope_scaling_factor", 8.0, "pretrain_gpt.py ignores")
    name = "rotary_seq_len_interpolation_factor"
    interpolation = _number(a, name, 1)
    if interpolation != 1 and not legacy and name not in said:
        raise _ask(a, name, 1, "pretrain_gpt.py ignores before core_v0.19")
    return {
        "rotary_base": base,
        "rotary_percent": _number(a, "rotary_percent", 1),
        "rope_scaling_factor": factor if scaled else None,
        name: None if interpolation == 1 else interpolation,
    }


def _activation(a: Arguments, legacy: bool) -> tuple[str, bool]:
    """The activation, and whether a gate is multiplied.

    GELU is computed by tanh wherever its bias is fused into it (core/fusions/fused_bias_gelu.py)
    or Transformer Engine computes it (its ops.GELU and LayerNormMLP), otherwise by erf (F.gelu).
    Megatron-Core ignores openai_gelu and onnx_safe. (Source: core/transformer/mlp.py; ParallelMLP
    and ParallelTransformer in megatron/legacy/model/transformer.py.)
    """

    def on(name: str) -> bool:
        return a.get(name) is True

    if on("swiglu") and on("squared_relu"):
        raise UsageError(
            "the model has two activations",
            found="swiglu = True, squared_relu = True",
            expected="one of them",
            fix="--set squared_relu=False or --set swiglu=False",
        )
    if on("swiglu"):
        return "silu", True
    if legacy:
        if a.get("transformer_impl") == "transformer_engine":
            return "gelu_tanh", False
        # From 2cc3dac719 (2023-04), which brought swiglu, the special functions come first.
        if "swiglu" not in a and _bias_gelu_fusion(a):
            return "gelu_tanh", False
        if on("openai_gelu"):
            return "gelu_tanh", False
        if on("onnx_safe"):
            return "gelu", False
    if on("squared_relu"):
        return "squared_relu", False
    if not legacy and (on("use_te_activation_func") or on("use_transformer_engine_op_fuser")):
        return "gelu_tanh", False
    return "gelu_tanh" if _bias_gelu_fusion(a) else "gelu", False


def _bias_gelu_fusion(a: Arguments) -> bool:
    """Whether bias and GELU are fused; without biases there is nothing to fuse."""
    if a.get("add_bias_linear") is False:
        return False
    # The argument is older than tensor_model_parallel_size (2020-10); before it, nothing was fused.
    if a.get("bias_gelu_fusion") is None and "tensor_model_parallel_size" in a:
        raise _missing(["bias_gelu_fusion"], "the arguments do not say which GELU the model has")
    return a.get("bias_gelu_fusion") is True


def _query_groups(a: Arguments, heads: int) -> object:
    if "group_query_attention" in a:
        return _or(a, "num_query_groups", heads) if a["group_query_attention"] is True else heads
    if _or(a, "num_query_groups", heads) != heads:  # Megatron stores both or neither
        raise _missing(["group_query_attention"], "num_query_groups alone may mean nothing")
    return _or(a, "num_key_value_heads", heads)  # Megatron-DeepSpeed; before 2023-06 none


def _default_ffn(hidden: int, gated: bool) -> int:
    """What validate_args fills in; v1.0 and v2.0, without the argument, have 4 * hidden."""
    return int((4 * hidden * 2 / 3) / 64) * 64 if gated else 4 * hidden


def _default_kv_channels(a: Arguments, hidden: int, heads: int) -> int:
    if a.get("kv_channels") is None and (heads < 1 or hidden % heads):
        raise UnsupportedError(
            "the hidden size cannot be divided into heads",
            found=f"hidden_size = {hidden}, num_attention_heads = {heads}",
            expected="a multiple of num_attention_heads, or kv_channels",
            fix="--set kv_channels=VALUE",
        )
    return hidden // max(heads, 1)


def _normalization(a: Arguments) -> str:
    name = _or(a, "normalization", "LayerNorm")  # an argument since 2023-09
    known = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}  # Megatron-DeepSpeed: lower case
    if str(name).lower() not in known:
        raise UnsupportedError(
            "mtt does not know this norm",
            found=f"normalization = {_show(name)}",
            expected="LayerNorm or RMSNorm",
        )
    return known[str(name).lower()]


def _params_dtype(a: Arguments) -> str | None:
    value = a.get("params_dtype")
    if value is None:  # v1.0
        flags = {"fp16": "float16", "bf16": "bfloat16"}
        named = [dtype for flag, dtype in flags.items() if a.get(flag) is True]
        return named[0] if named else "float32" if a.get("fp16") is False else None
    name = value.name if isinstance(value, DType) else str(value).removeprefix("torch.")
    if name not in PARAMS_DTYPES:
        raise UnsupportedError(
            "mtt does not convert weights of this type",
            found=f"params_dtype = {_show(value)}",
            expected=", ".join(PARAMS_DTYPES),
            fix="if the tensors are of another type, --set params_dtype=bfloat16",
        )
    return name


def true_vocab_size(args: Arguments) -> int | None:
    """The number of tokens, without padding rows; None if the arguments do not say it.

    Megatron builds only its null and TikToken tokenizers from `vocab_size`; with any other it is
    just what somebody typed ("before EOD or padding", says its help). The null tokenizers add one
    for EOD; since core_v0.18, which has `null_tokenizer_eod_id`, the text one does not.
    (Source: training/tokenizer/tokenizer.py; core/tokenizers/utils/build_tokenizer.py and
    text/libraries/null_tokenizer.py at core_v0.18.)
    """
    size, kind = args.get("vocab_size"), args.get("tokenizer_type")
    if kind == "TikTokenizer" and size is None:
        size = 2**17
    if not isinstance(size, int) or isinstance(size, bool):
        return None
    if kind == "NullMultimodalTokenizer" or (
        kind == "NullTokenizer" and "null_tokenizer_eod_id" not in args
    ):
        size += 1
    elif kind not in (None, "NullTokenizer", "TikTokenizer"):
        return None
    padded = args.get("padded_vocab_size")
    return size if size >= 1 and not (isinstance(padded, int) and size > padded) else None


def architecture_from_shapes(
    shapes: Mapping[str, tuple[int, ...]], overrides: Arguments = _NONE
) -> Architecture:
    """The architecture of a checkpoint without arguments, from shapes and what the user says.

    Args:
        shapes: canonical name, with numbered layers, -> shape of the whole tensor.
        overrides: what shapes cannot tell, under Megatron-LM's names.

    Raises:
        IncompleteError: tensors that every GPT has are missing.
        InconsistentError: layers or tensors that do not fit together.
        UnsupportedError: tensors of another kind of model.
        UsageError: an override contradicts a shape, or something is still unknown: then all that
            is needed is listed, with examples.
    """
    _check_overrides(overrides)
    said = _said(overrides)
    _check_types(said, said)
    sizes = read_shapes(shapes)
    seen = {**sizes.fields, **_heads(sizes, said)}
    for name, value in seen.items():
        if said.get(name, value) != value:
            raise UsageError(
                f"--set {name} contradicts the tensors",
                found=f"{name} = {_show(said[name])}",
                expected=f"{name} = {_show(value)}, as the shapes say",
                fix=f"leave out --set {name}",
            )
    a = {**seen, "group_query_attention": True, **said}
    missing = [name for name in _unseen(a, sizes.gated) if a.get(name) is None]
    if missing:
        raise _missing(missing, "the checkpoint has no arguments, and shapes do not say everything")
    if (a.get("swiglu") is True) != sizes.gated:
        raise UsageError(
            "--set swiglu contradicts the tensors",
            found=f"swiglu = {_show(a.get('swiglu'))}",
            expected=f"{sizes.gated}: linear_fc1 has {2 if sizes.gated else 1} row(s) for each "
            "column of linear_fc2",
            fix=f"--set swiglu={sizes.gated} if that is the activation",
        )
    # Trees without arguments know openai_gelu; whatever the user says counts.
    legacy = a.get("openai_gelu") is True or a.get("onnx_safe") is True
    return architecture_from_args(
        {"swiglu": False, "bias_gelu_fusion": False, **a}, overrides=overrides, legacy=legacy
    )


def _unseen(a: Arguments, gated: bool) -> Iterable[str]:
    """What shapes do not say and every model must have."""
    yield "num_attention_heads"
    yield "layernorm_epsilon"
    yield "layernorm_zero_centered_gamma"
    kinds = "squared_relu openai_gelu onnx_safe use_te_activation_func".split()
    if gated:
        yield "swiglu"
    elif all(a.get(name) is None for name in kinds):
        yield "bias_gelu_fusion"
    yield "position_embedding_type"
    yield "max_position_embeddings"
    if a.get("position_embedding_type", "rope") == "rope":
        yield from ("rotary_base", "rotary_percent", "use_rope_scaling")


def _heads(sizes: Sizes, said: Arguments) -> dict[str, object]:
    """Head numbers and size, from whichever of them is known; empty if none is."""
    channels, heads = sizes.kv_channels or said.get("kv_channels"), said.get("num_attention_heads")
    if channels is None and isinstance(heads, int) and heads > 0:
        channels = sizes.attention_size // heads
    if not isinstance(channels, int):
        return {}
    if channels < 1 or sizes.attention_size % channels or sizes.key_value_size % channels:
        given = {
            name: said[name] for name in ("kv_channels", "num_attention_heads") if name in said
        }
        raise UsageError(
            "the attention tensors cannot be divided into such heads",
            found=", ".join(f"{name} = {value}" for name, value in given.items()),
            expected=f"heads that divide {sizes.attention_size} query and "
            f"{sizes.key_value_size} key channels",
            fix="correct --set num_attention_heads",
        )
    return {
        "kv_channels": channels,
        "num_attention_heads": sizes.attention_size // channels,
        "num_query_groups": sizes.key_value_size // channels,
    }


def unknown_arguments(args: Arguments) -> list[str]:
    """Names this version does not know, of arguments that are set to something.

    They may change the forward pass: worth a warning.
    """
    known = {*SETTINGS, *NEUTRAL, *LOW_PRECISION, *RENAMED}
    return sorted(
        name
        for name, value in args.items()
        if name not in known and not is_known(name) and not _is_in(value, (*_OFF, {}))
    )


def low_precision(args: Arguments) -> list[str]:
    """What training computed in few bits: notes that change nothing in a conversion."""
    return [
        f"trained with {meaning} ({name} = {_show(args[name])}); the weights stand as they are, "
        "and what is computed with them in their own type differs by that rounding"
        for name, meaning in LOW_PRECISION.items()
        if not _is_in(args.get(name), (*_OFF, "none", "None"))
    ]


def is_known(name: str) -> bool:
    """Whether an argument is on the list of those without a part in the forward pass."""
    names, prefixes = _known_arguments()
    return name in names or name.startswith(prefixes)


@cache
def _known_arguments() -> tuple[frozenset[str], tuple[str, ...]]:
    """Names and prefixes (`name*`) of known_arguments.txt."""
    text = files(__package__).joinpath("known_arguments.txt").read_text(encoding="utf-8")
    words = [line for line in text.splitlines() if line and not line.startswith("#")]
    names = frozenset(word for word in words if not word.endswith("*"))
    return names, tuple(word[:-1] for word in words if word.endswith("*"))


def _or(a: Arguments, name: str, default: object) -> object:
    """An argument's value, or the default where it is absent or None."""
    value = a.get(name)
    return default if value is None else value


def _number(a: Arguments, name: str, default: float) -> float:
    value = _or(a, name, default)
    assert isinstance(value, (int, float))  # _check_types
    return float(value)


def _is_in(value: object, values: tuple[object, ...]) -> bool:
    """Whether a plain value is one of these; an object of an unknown class never is."""
    if isinstance(value, list):
        value = tuple(value)
    plain = value is None or isinstance(value, (bool, int, float, str, tuple, dict))
    return plain and value in values


def _neutral_text(value: object, values: tuple[object, ...]) -> str:
    """The neutral value to name beside a value that is not."""
    if isinstance(value, bool) and False in values:
        return "False"
    words = [word for word in values if isinstance(word, str) and word]
    return words[0] if words else "None"


def _show(value: object) -> str:
    text = str(value) if isinstance(value, DType) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
