"""`Architecture` -> Megatron's arguments: those stored in a checkpoint, and those of a launch.

`arguments.py` reads what is written here, and `model_arguments` makes sure of it: what Megatron's
arguments cannot say is refused by name. Names are those of Megatron-Core 0.16; where an older
release reads another name (`norm_epsilon`, `apply_layernorm_1p`) both are stored. (Source:
training/arguments.py and load_args_from_checkpoint in training/checkpointing.py, core_v0.16.1.)
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import lcm

from . import expert_arguments, latent_arguments
from . import tokenizer_wordpiece as wordpiece
from .architecture import Architecture
from .argument_tables import FOREIGN, NEUTRAL, RENAMED, SETTINGS
from .arguments import OWN, architecture_from_args, is_neutral
from .checkpoint import Layout
from .dtypes import DTYPES, DType
from .errors import UnsupportedError
from .experts import GROUPED, SEQUENTIAL, TE_GROUPED
from .t5_arguments import (
    check_writable,
    ignored_by_trainer,
    sequence_arguments,
    stored_layers,
)

# Stored as they are in the architecture.
_SAME = (
    "hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels "
    "padded_vocab_size max_position_embeddings position_embedding_type rotary_percent "
    "normalization layernorm_epsilon layernorm_zero_centered_gamma add_bias_linear add_qkv_bias "
    "qk_layernorm untie_embeddings_and_output_weights attention_dropout hidden_dropout "
    "init_method_std relative_attention_num_buckets relative_attention_max_distance"
).split()
_DEFAULT_ROPE_SCALING_FACTOR = 8.0
# pretrain_gpt.py accepts these and builds the model without them (see arguments.py).
_IGNORED_BY_PRETRAIN_GPT = {
    "rope_scaling_factor": (8.0, "in every release so far"),
    "rotary_seq_len_interpolation_factor": (None, "before core_v0.19"),
}


@dataclass(frozen=True, slots=True)
class Target:
    """How a Megatron checkpoint is written.

    Attributes:
        format: `torch` or `torch_dist`.
        layout: sizes.
        transformer_impl: `transformer_engine` or `local`.
        make_vocab_size_divisible_by: with the tensor-parallel size, what the vocabulary is padded
            to a multiple of.
        pipeline_layout: a custom pipeline, or None.
        grouped_gemm: whether the experts of a rank are multiplied at once.
        legacy_grouped_gemm: whether by Megatron's own module rather than Transformer Engine's.
    """

    format: str
    layout: Layout
    transformer_impl: str
    make_vocab_size_divisible_by: int
    pipeline_layout: str | None = None
    grouped_gemm: bool = False
    legacy_grouped_gemm: bool = False

    @property
    def expert_module(self) -> str:
        """Which of Megatron's modules has the experts.

        (Source: grouped_mlp_modules, core/extensions/transformer_engine_spec_provider.py and
        core/models/backends.py.)
        """
        if not self.grouped_gemm:
            return SEQUENTIAL
        is_own = self.transformer_impl == "local" or self.legacy_grouped_gemm
        return GROUPED if is_own else TE_GROUPED

    @property
    def stage_size(self) -> int:
        """Ranks of a pipeline stage that hold something of their own."""
        layout = self.layout
        return lcm(layout.tp, layout.expert_tp * layout.ep)

    def padded_vocab_size(self, rows: int) -> int:
        """Rows of the embedding for so many tokens (vocab_size_with_padding, tokenizer.py)."""
        multiple = self.make_vocab_size_divisible_by * self.layout.tp
        return -(-rows // multiple) * multiple


def model_arguments(a: Architecture) -> dict[str, object]:
    """The arguments that describe a model.

    Raises:
        UnsupportedError: the model computes something that they cannot say.
    """
    check_writable(a)
    gelu_tanh, kind = a.activation == "gelu_tanh", a.position_embedding_type
    arguments: dict[str, object] = {
        **stored_layers(a),
        **{name: getattr(a, name) for name in _SAME},
        # Megatron-Core has no ALiBi: `_check` will say so.
        "position_embedding_type": "none" if kind == "alibi" else kind,
        "norm_epsilon": a.layernorm_epsilon,
        "apply_layernorm_1p": a.layernorm_zero_centered_gamma,
        "add_position_embedding": True,
        "use_rotary_position_embeddings": False,
        "rotary_base": _whole(a.rotary_base),
        "rotary_seq_len_interpolation_factor": _whole(a.rotary_seq_len_interpolation_factor),
        "rotary_interleaved": a.rotary_interleaved,
        "window_size": a.window_size,
        "window_attn_skip_freq": _list(a.window_attn_skip_freq),
        "use_rope_scaling": a.rope_scaling_factor is not None,
        "rope_scaling_factor": a.rope_scaling_factor or _DEFAULT_ROPE_SCALING_FACTOR,
        "group_query_attention": a.num_query_groups != a.num_attention_heads,
        "swiglu": a.gated_linear_unit and a.activation == "silu",
        "squared_relu": a.activation == "squared_relu",
        "openai_gelu": False,
        "onnx_safe": False,
        "bias_gelu_fusion": gelu_tanh and a.add_bias_linear,
        "use_te_activation_func": gelu_tanh and not a.add_bias_linear,
        "use_legacy_models": False,
        **expert_arguments.stored(a),
        **latent_arguments.stored(a),
    }
    arguments[OWN] = {
        "vocab_size": a.vocab_size,
        "certain": [name for name in _IGNORED_BY_PRETRAIN_GPT if _is_used(a, name)],
    }
    # A T5's norms after the last layers are no argument: see `t5_arguments.py`.
    impl = "transformer_engine" if a.final_layernorm else "local"
    rest = {"params_dtype": a.params_dtype, "transformer_impl": impl}
    _check(a, architecture_from_args({**arguments, **rest}))
    return arguments


def described_arguments(a: Architecture) -> dict[str, object]:
    """The same, with what only BigScience's and GPT-NeoX's trees have.

    Raises:
        UnsupportedError: the model computes something that no tree's arguments say.
    """
    others: dict[str, object] = {}
    if a.position_embedding_type == "alibi":
        others["position_embedding_type"] = "alibi"
        a = replace(a, position_embedding_type="none")
    if a.embedding_norm:
        others["embed_layernorm"] = True
    if a.parallel_residual:
        others["gpt_j_residual"] = True
    return model_arguments(replace(a, embedding_norm=False, parallel_residual=False)) | others


def _whole(number: float | None) -> float | int | None:
    """Megatron's flags take whole numbers for what a checkpoint may have with a fraction."""
    return int(number) if number is not None and float(number).is_integer() else number


def _list(flags: int | tuple[int, ...] | None) -> int | list[int] | None:
    """Megatron asks whether it is a list."""
    return list(flags) if isinstance(flags, tuple) else flags


def _is_used(a: Architecture, name: str) -> bool:
    value, (default, _) = getattr(a, name), _IGNORED_BY_PRETRAIN_GPT[name]
    return value is not None and value != default


def _check(wanted: Architecture, said: Architecture) -> None:
    """Hold what the arguments say against what they should."""
    a, b = wanted.forward_pass(), said.forward_pass()
    if lost := [name for name in a if a[name] != b.get(name)]:
        raise UnsupportedError(
            "Megatron-Core's arguments cannot describe this model; nothing was written",
            found=", ".join(f"{name} = {a[name]}" for name in lost),
            expected=", ".join(f"{name} = {b.get(name)}" for name in lost),
            fix="convert it with --to hf, which can represent it",
        )


def ignored_by_training(a: Architecture) -> list[str]:
    """Warnings about what Megatron-LM's own training script would not use."""
    return (
        ignored_by_trainer(a)
        + [
            f"Megatron-LM's pretrain_gpt.py ignores {name} ({getattr(a, name):g}) {when}: "
            "train with a script that passes it to the model"
            for name, (_, when) in _IGNORED_BY_PRETRAIN_GPT.items()
            if _is_used(a, name)
        ]
        + latent_arguments.ignored_by_training(a)
    )


def layout_arguments(a: Architecture, target: Target, rank: int) -> dict[str, object]:
    """The arguments that describe how the model was split and saved, for one rank."""
    layout = target.layout
    interleaved = layout.vpp > 1 and target.pipeline_layout is None
    stage_layers = a.num_layers // (layout.pp * layout.vpp) if interleaved else None
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "transformer_pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "num_layers_per_virtual_pipeline_stage": stage_layers,
        "num_virtual_stages_per_pipeline_rank": None,
        "pipeline_model_parallel_layout": target.pipeline_layout,
        "decoder_first_pipeline_num_layers": None,
        "decoder_last_pipeline_num_layers": None,
        "account_for_embedding_in_pipeline_split": False,
        "account_for_loss_in_pipeline_split": False,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.expert_tp,
        "moe_grouped_gemm": target.grouped_gemm,
        "moe_use_legacy_grouped_gemm": target.legacy_grouped_gemm,
        "context_parallel_size": 1,
        "data_parallel_size": target.stage_size // layout.tp,
        "world_size": target.stage_size * layout.pp,
        "rank": rank,
        "local_rank": rank,
        "transformer_impl": target.transformer_impl,
        "make_vocab_size_divisible_by": target.make_vocab_size_divisible_by,
        "ckpt_format": target.format,
        "use_dist_ckpt": target.format != "torch",
        "no_save_optim": True,
        "no_save_rng": True,
    }


def carried_arguments(args: Mapping[str, object]) -> dict[str, object]:
    """Arguments of a source that hold for its copy too: plain, and not about the model."""
    # What says something of a BERT alone has a value in every checkpoint, and none is written.
    described = {*SETTINGS, *RENAMED, *FOREIGN, OWN} - {"bert_binary_head"}
    return {
        name: value
        for name, value in args.items()
        if name not in described
        and (name not in NEUTRAL or is_neutral(name, value))
        and expert_arguments.is_carried(name, value)
        and _is_plain(value)
    }


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(item) for name, item in value.items())
    return value is None or isinstance(value, (bool, int, float, str, DType))


def precision_arguments(
    dtype: str, args: Mapping[str, object], a: Architecture
) -> dict[str, object]:
    """The arguments for the dtype the weights are written in, and for lengths of texts."""
    given = args.get("seq_length")
    length = given if isinstance(given, int) else a.max_position_embeddings
    return {
        **sequence_arguments(args, length, a),
        "params_dtype": DTYPES[dtype],
        "fp16": dtype == "float16",
        "bf16": dtype == "bfloat16",
        "seq_length": length,
    }


# Stored argument -> the flag that sets it. A flag without a value is given where the argument is
# True, or False for those marked "-".
_SWITCHES = {
    "group_query_attention": "--group-query-attention",
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
    "add_bias_linear": "-disable-bias-linear",
    "qk_layernorm": "--qk-layernorm",
    "swiglu": "--swiglu",
    "squared_relu": "--squared-relu",
    "bias_gelu_fusion": "-no-bias-gelu-fusion",
    "use_te_activation_func": "--use-te-activation-func",
    "untie_embeddings_and_output_weights": "--untie-embeddings-and-output-weights",
    "rotary_interleaved": "--rotary-interleaved",
    "use_rope_scaling": "--use-rope-scaling",
    "multi_latent_attention": "--multi-latent-attention",
    "moe_router_pre_softmax": "--moe-router-pre-softmax",
    "moe_router_enable_expert_bias": "--moe-router-enable-expert-bias",
    "moe_shared_expert_gate": "--moe-shared-expert-gate",
    "fp16": "--fp16",
    "bf16": "--bf16",
}
_VALUES = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels "
    "max_position_embeddings seq_length position_embedding_type normalization attention_dropout "
    "hidden_dropout init_method_std make_vocab_size_divisible_by padded_vocab_size "
    "tensor_model_parallel_size pipeline_model_parallel_size transformer_impl"
).split()
_OPTIONAL_VALUES = (
    "num_layers_per_virtual_pipeline_stage pipeline_model_parallel_layout "
    "rotary_seq_len_interpolation_factor window_size window_attn_skip_freq mtp_num_layers"
).split()
# Given only in a model with experts, and only with latent attention; None is left out.
_EXPERT_VALUES = (
    "num_experts moe_ffn_hidden_size moe_layer_freq moe_router_topk moe_router_score_function "
    "moe_router_topk_scaling_factor moe_router_num_groups moe_router_group_topk "
    "moe_router_dtype moe_shared_expert_intermediate_size expert_model_parallel_size "
    "expert_tensor_parallel_size"
).split()
_LATENT_VALUES = (
    "q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim rope_type "
    "rotary_scaling_factor mscale mscale_all_dim"
).split()


# Of a T5 these stand for two each.
_T5_VALUES = {
    "num_layers": ("encoder_num_layers", "decoder_num_layers"),
    "seq_length": ("encoder_seq_length", "decoder_seq_length"),
}
_RELATIVE_VALUES = ("relative_attention_num_buckets", "relative_attention_max_distance")


def trainer(args: Mapping[str, object]) -> str:
    """Megatron-LM's script that trains the model of stored arguments."""
    return "pretrain_gpt.py" if args["decoder_num_layers"] is None else "pretrain_t5.py"


def launch_flags(args: Mapping[str, object]) -> list[list[str]]:
    """Command-line flags of `trainer` that rebuild the model of stored arguments."""
    pairs = {} if args["decoder_num_layers"] is None else _T5_VALUES
    names = [name for value in _VALUES for name in pairs.get(value, (value,))]
    flags = [[_flag(name), _text(args[name])] for name in names]
    if args["position_embedding_type"] == "relative":
        flags += [[_flag(name), _text(args[name])] for name in _RELATIVE_VALUES]
    flags += [["--norm-epsilon", _text(args["layernorm_epsilon"])]]
    if args["group_query_attention"]:
        flags += [["--num-query-groups", _text(args["num_query_groups"])]]
    if args["position_embedding_type"] == "rope":
        flags += [[_flag(name), _text(args[name])] for name in ("rotary_base", "rotary_percent")]
    if args["use_rope_scaling"]:
        flags += [["--rope-scaling-factor", _text(args["rope_scaling_factor"])]]
    if args["add_qkv_bias"] and not args["add_bias_linear"]:
        flags += [["--add-qkv-bias"]]
    optional = list(_OPTIONAL_VALUES)
    if args["num_experts"] is not None:
        optional += _EXPERT_VALUES
        if args["moe_grouped_gemm"]:
            flags += [["--moe-grouped-gemm"]]
        if args["moe_use_legacy_grouped_gemm"]:
            flags += [["--moe-use-legacy-grouped-gemm"]]
        if args["tensor_model_parallel_size"] != 1:
            # Without it, experts are not trained (MoELayer.forward, transformer/moe/moe_layer.py).
            flags += [["--sequence-parallel"]]
    if args["multi_latent_attention"]:
        optional += _LATENT_VALUES
    flags += [[_flag(n), _text(args[n])] for n in optional if args.get(n) is not None]
    for name, flag in _SWITCHES.items():
        wanted = flag.startswith("--")
        if args[name] is wanted:
            flags.append([flag if wanted else f"-{flag}"])
    return flags


def quoted_flags(flags: list[list[str]]) -> list[str]:
    """Each flag with its value as a line of a shell script."""
    return [" ".join(shlex.quote(word) for word in flag) for flag in flags]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _text(value: object) -> str:
    if isinstance(value, (list, tuple)):  # parsed by Megatron as a Python literal
        return str(value).replace(" ", "")
    return repr(value) if isinstance(value, float) else str(value)


def launch_script(
    args: Mapping[str, object], tokenizer_folder: str | None, true_vocab_size: int, version: str
) -> bytes:
    """`megatron_args.sh`: the arguments as a bash array, for the user's own launch script.

    Args:
        args: as stored in the checkpoint.
        tokenizer_folder: where a Hugging Face tokenizer stands beside the script, if there is one.
        true_vocab_size: tokens of the vocabulary, padding left out.
        version: mtt's.
    """
    flags = quoted_flags(launch_flags(args))
    if tokenizer_folder is not None and args["tokenizer_type"] in wordpiece.CASES:
        flags.append(
            f'--tokenizer-type {args["tokenizer_type"]} --vocab-file "$HERE/{args["vocab_file"]}" '
            f"--vocab-extra-ids {args['vocab_extra_ids']}"
        )
    elif tokenizer_folder is not None:
        flags.append(
            f'--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$HERE/{tokenizer_folder}"'
        )
    else:
        # Megatron's null tokenizer adds one token for the end of a document.
        flags.append(f"--tokenizer-type NullTokenizer --vocab-size {true_vocab_size - 1}")
    world = args["world_size"]
    body = "\n".join(f"    {flag}" for flag in flags)
    text = f"""\
# The arguments with which Megatron-LM rebuilds the model in this folder, written by mtt {version}.
#
#     source megatron_args.sh
#     torchrun --nproc-per-node {world} {trainer(args)} "${{MEGATRON_ARGS[@]}}" --data-path ...
#
# There is no optimizer state: training begins with a fresh optimizer.
HERE="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)"
MEGATRON_ARGS=(
{body}
    --load "$HERE" --ckpt-format {args["ckpt_format"]} --exit-on-missing-checkpoint
    --finetune --no-load-optim --no-load-rng
)
"""
    return text.encode()
