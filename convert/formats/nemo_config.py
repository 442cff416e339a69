"""The YAML files that NeMo and Megatron-Bridge keep beside weights, in Megatron's words.

    NeMo 2           <checkpoint>/context/model.yaml, beside <checkpoint>/weights/   `config:`
    Megatron-Bridge  iter_0001000/run_config.yaml                                    `model:`
    NeMo 1           model_config.yaml in the .nemo archive                          the whole file

The first two say Megatron-Core's `TransformerConfig` and what `GPTModel` takes beside; NeMo 1 has
names of its own. What they share with Megatron's arguments keeps its name, so whatever mtt
refuses there it refuses here. A file that leaves out something that changes the computation,
because the class it names decides it, is not used: mtt asks for the arguments instead.

(nemo/collections/llm/gpt/model/base.py,
megatron/bridge/models/gpt_provider.py, NeMo's megatron_gpt_config.yaml.)
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from .. import sources
from ..errors import UnsupportedError
from .yaml_files import read_yaml

Config = Mapping[str, object]
# Without these a default of some class decides what the model computes.
_TELLING = (
    "num_layers hidden_size num_attention_heads ffn_hidden_size normalization layernorm_epsilon "
    "activation_func gated_linear_unit add_bias_linear position_embedding_type "
    "share_embeddings_and_output_weights seq_length"
).split()
_RENAMED = {
    "num_moe_experts": "num_experts",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
}
# Fields that may have a value for each layer.
_LISTS = ("moe_layer_freq", "moe_router_load_balancing_type")
_ACTIVATIONS: dict[tuple[str, bool], Config] = {
    ("silu", True): {"swiglu": True},
    ("gelu", False): {"swiglu": False},
    ("squared_relu", False): {"swiglu": False, "squared_relu": True},
}
_NEMO_ACTIVATIONS: dict[str, Config] = {
    "gelu": {"swiglu": False},
    "openai-gelu": {"swiglu": False, "openai_gelu": True},
    "squared-relu": {"swiglu": False, "squared_relu": True},
    "swiglu": {"swiglu": True},
    "fast-swiglu": {"swiglu": True},
}
_NEMO_NORMS: dict[str, Config] = {
    "layernorm": {"normalization": "LayerNorm"},
    "low_precision_layernorm": {"normalization": "LayerNorm"},
    "layernorm1p": {"normalization": "LayerNorm", "layernorm_zero_centered_gamma": True},
    "rmsnorm": {"normalization": "RMSNorm"},
}
_NEMO_NEUTRAL: dict[str, tuple[object, ...]] = {
    "transformer_block_type": (None, "pre_ln"),
    "normalize_attention_scores": (None, True),
    "embedding_scale": (None, 1, 1.0),
    "headscale": (None, False),
    "attention_type": (None, "multihead"),
    # Its ALiBi may give only some heads a slope.
    "position_embedding_type": (None, "learned_absolute", "rope", "none"),
}
# Read below, or how a model was trained and run: nothing to warn of.
_NEMO_KNOWN = frozenset(
    (
        "mcore_gpt precision bias_activation_fusion bias_gelu_fusion qkv_bias rotary_percentage "
        "scale_positional_embedding share_embeddings_and_output_weights "
        "activations_checkpoint_granularity activations_checkpoint_layers_per_pipeline "
        "apex_transformer_log_level bias_dropout_add_fusion do_layer_norm_weight_decay "
        "get_attention_mask_from_fusion grad_allreduce_chunk_size_mb grad_div_ar_fusion "
        "gradient_as_bucket_view megatron_amp_O2 name native_amp_growth_interval "
        "native_amp_init_scale nemo_version nsys_profile "
        "num_micro_batches_with_partial_activation_checkpoints post_process pre_process "
        "reduce_amax resume_from_checkpoint sync_batch_comm target transformer_engine "
        "ub_tp_comm_overlap use_emha use_flash_attention use_scaled_init_method"
    ).split()
) | set(_NEMO_NEUTRAL)


def arguments_beside(folder: str) -> tuple[Config | None, str]:
    """Megatron's arguments from a YAML file beside weights, and what was found.

    Returns:
        None if there is no such file, or if it does not say everything.

    Raises:
        CorruptError: the file is no YAML.
        UnsupportedError: it names an activation mtt cannot represent.
    """
    path = os.path.join(folder, "run_config.yaml")
    section, writer = "model", "Megatron-Bridge"
    if not sources.is_file(path):
        path = os.path.join(os.path.dirname(folder), "context", "model.yaml")
        section, writer = "config", "NeMo 2"
        if os.path.basename(folder) != "weights" or not sources.is_file(path):
            return None, ""
    config = read_yaml(sources.read(path), path).get(section)
    name = os.path.basename(path)
    if not isinstance(config, dict):
        return None, f"{name} of {writer} describes no model"
    if missing := [key for key in _TELLING if config.get(key) is None]:
        return None, f"{name} of {writer} does not say {', '.join(missing)}"
    return _from_provider(config, path), f"{name} of {writer} says what the model is"


def _from_provider(config: Config, path: str) -> dict[str, object]:
    """Arguments from the fields of `TransformerConfig` and `GPTModel`."""
    args = _scalars(config)
    function = _name_of(config["activation_func"])
    gated = config["gated_linear_unit"] is True
    known = _ACTIVATIONS.get((function, gated))
    if known is None:
        raise _unknown(path, f"activation_func = {function}, gated_linear_unit = {gated}")
    args |= known
    fused = config.get("bias_activation_fusion") is True and config["add_bias_linear"] is True
    args["bias_gelu_fusion"] = fused and function == "gelu"
    args["untie_embeddings_and_output_weights"] = (
        config["share_embeddings_and_output_weights"] is not True
    )
    groups, heads = config.get("num_query_groups"), config["num_attention_heads"]
    args["group_query_attention"] = groups is not None and groups != heads
    args.setdefault("max_position_embeddings", config["seq_length"])
    if config.get("rope_scaling") is True:
        args["use_rope_scaling"] = True
    elif config.get("scale_factor") is not None:  # NeMo 2's Llama 3.1
        args |= {"use_rope_scaling": True, "rope_scaling_factor": config["scale_factor"]}
    return args


def from_model_config(config: Config, path: str) -> dict[str, object]:
    """Arguments from NeMo 1's `model_config.yaml`.

    Raises:
        UnsupportedError: it describes something mtt cannot represent.
    """
    odd = [k for k, values in _NEMO_NEUTRAL.items() if config.get(k) not in values]
    activation = str(config.get("activation", "gelu"))
    norm = str(config.get("normalization", "layernorm"))
    if odd or activation not in _NEMO_ACTIVATIONS or norm not in _NEMO_NORMS:
        named = [*odd, "activation", "normalization"]
        raise _unknown(path, ", ".join(f"{key} = {config.get(key)}" for key in named))
    args = {name: value for name, value in _scalars(config).items() if name not in _NEMO_KNOWN}
    has_bias = config.get("bias", True) is True
    fused = config.get("bias_activation_fusion", config.get("bias_gelu_fusion", True)) is True
    args |= {**_NEMO_ACTIVATIONS[activation], **_NEMO_NORMS[norm]}
    if config.get("openai_gelu") is True:
        args["openai_gelu"] = True
    groups, heads = config.get("num_query_groups"), config.get("num_attention_heads")
    args |= {
        "add_bias_linear": has_bias,
        "add_qkv_bias": config.get("qkv_bias", has_bias) is True,
        "bias_gelu_fusion": fused and has_bias and activation == "gelu",
        "untie_embeddings_and_output_weights": (
            config.get("share_embeddings_and_output_weights", True) is not True
        ),
        "group_query_attention": groups is not None and groups != heads,
        "rotary_percent": config.get("rotary_percentage", 1.0),
        "use_rope_scaling": config.get("scale_positional_embedding") is True,
        "use_mcore_models": config.get("mcore_gpt", False) is True,
        "position_embedding_type": config.get("position_embedding_type", "learned_absolute"),
    }
    return args


def _scalars(config: Config) -> dict[str, object]:
    """Fields that are plain values, under Megatron's names."""
    return {
        _RENAMED.get(name, name): value
        for name, value in config.items()
        if isinstance(name, str)
        and not name.startswith("_")
        and (value is None or isinstance(value, (bool, int, float, str)) or name in _LISTS)
        and name not in ("normalization_impl", "activation", "bias", "vocab_size")
    }


def _name_of(value: object) -> str:
    """The name of a function, as `_target_` or in words."""
    if isinstance(value, dict):
        value = value.get("_target_")
    return str(value).rpartition(".")[2]


def _unknown(path: str, found: str) -> UnsupportedError:
    return UnsupportedError(
        f"{path} describes something that mtt cannot represent",
        found=found,
        expected="SwiGLU, GELU or squared ReLU after LayerNorm or RMSNorm, as in a GPT",
    )
