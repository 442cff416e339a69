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
import os
from collections.abc import Iterable, Mapping
from functools import cache

from .architecture import PARAMS_DTYPES, Architecture
from .argument_tables import (
    FOREIGN,
    LOW_PRECISION,
    NEEDED,
    NEUTRAL,
    NOTHING,
    OFF,
    POSITIONS,
    RENAMED,
    SETTINGS,
    SUGGESTIONS,
    Arguments,
)
from .argument_values import is_in as _is_in
from .argument_values import missing_arguments
from .argument_values import number as _number
from .argument_values import or_default as _or
from .argument_values import show as _show
from .dtypes import DType
from .errors import UnsupportedError, UsageError
from .expert_arguments import BALANCING, expert_fields, further_tokens
from .expert_arguments import NEUTRAL as EXPERT_NEUTRAL
from .latent_arguments import assumed, is_latent, latent_fields
from .sizes import Sizes, read_shapes
from .t5_arguments import Shapes, is_t5, t5_fields

_UNTIED = "untie_embeddings_and_output_weights"
_EMBEDDING_NORM_EPSILON = 1e-5
OWN = "mtt"
"""The argument under which mtt stores what Megatron has no argument for."""


def architecture_from_args(
    args: Arguments,
    *,
    overrides: Arguments = NOTHING,
    legacy: bool | None = None,
    shapes: Shapes | None = None,
) -> Architecture:
    """The architecture a checkpoint's arguments describe.

    Args:
        args: the checkpoint's arguments by name; objects other than plain values may be anything.
        overrides: what the user says instead, under Megatron-LM's names.
        legacy: whether the model is Megatron-LM's own GPT (up to core_v0.17) and not
            Megatron-Core's; None reads it from the arguments.
        shapes: canonical name -> shape of the whole tensor, where a checkpoint is at hand: of a T5
            tensors say what arguments do not.

    Raises:
        IncompleteError: a T5 has not the layers that the arguments say.
        UnsupportedError: an argument that changes the forward pass has a value mtt cannot
            represent, or sizes contradict each other; all such arguments are named.
        UsageError: a needed argument is missing, cannot be trusted, or an override is not one.
    """
    _check_overrides(overrides)
    said = {**_certain(args), **_said(overrides)}
    a = {**_renamed(args, said), **said}
    _refuse(a)
    _check_types(a, said)
    _require(a)
    if legacy is None:
        legacy = _is_legacy(a)
    has_encoder = is_t5(a, shapes)
    activation, gated = _activation(a, legacy)
    biases = _or(a, "add_bias_linear", True)  # an argument since 2023-04
    layers, hidden, heads = a["num_layers"], a["hidden_size"], a["num_attention_heads"]
    assert isinstance(layers, int) and isinstance(hidden, int) and isinstance(heads, int)
    ffn = _or(a, "ffn_hidden_size", _default_ffn(hidden, gated))
    assert isinstance(ffn, int)
    attention = (
        latent_fields(a, heads)
        if is_latent(a)
        else _plain_attention(a, said, hidden, heads, legacy, has_encoder)
    )
    fields = dict(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        **attention,
        padded_vocab_size=a["padded_vocab_size"],
        max_position_embeddings=a["max_position_embeddings"],
        vocab_size=said["vocab_size"] if "vocab_size" in said else true_vocab_size(a),
        **_window(a, said, legacy),
        normalization=_normalization(a),
        layernorm_epsilon=a["layernorm_epsilon"],
        layernorm_zero_centered_gamma=_or(a, "layernorm_zero_centered_gamma", False),
        activation=activation,
        gated_linear_unit=gated,
        add_bias_linear=biases,
        # An argument since core_v0.5, which latent attention does not look at.
        add_qkv_bias=biases or (not is_latent(a) and _or(a, "add_qkv_bias", False)),
        qk_layernorm=_or(a, "qk_layernorm", False),
        embedding_norm=_embedding_norm(a),
        parallel_residual=a.get("gpt_j_residual") is True,
        untie_embeddings_and_output_weights=_or(a, "untie_embeddings_and_output_weights", False),
        attention_dropout=_or(a, "attention_dropout", 0.1),
        hidden_dropout=_or(a, "hidden_dropout", 0.1),
        init_method_std=_or(a, "init_method_std", 0.02),
        params_dtype=_params_dtype(a),
        **expert_fields(a, layers, ffn, legacy),
        **further_tokens(a),
    )
    if has_encoder:
        fields |= t5_fields(a, legacy, shapes)
    return _build(**fields)


def _plain_attention(
    a: Arguments, said: Arguments, hidden: int, heads: int, legacy: bool, has_encoder: bool
) -> dict[str, object]:
    """Heads and positions of attention that is not latent."""
    kind = _position_embedding_type(a, has_encoder)
    if kind == "rope" and has_encoder:
        _ask_t5_rotary(a, said)
    rotary = _rotary(a, said, legacy) if kind == "rope" else {}
    if not _is_in(a.get("rope_type"), (None, "rope")):
        raise UnsupportedError(
            "the model computes something that mtt cannot represent",
            found=f"rope_type = {_show(a['rope_type'])} (YaRN rotary positions)",
            expected="rope_type = rope, or latent attention",
            fix="if the model has plain rotary positions, --set rope_type=rope",
        )
    return {
        "num_query_groups": _query_groups(a, heads),
        "kv_channels": _or(a, "kv_channels", _default_kv_channels(a, hidden, heads)),
        "position_embedding_type": kind,
        **rotary,
    }


def _build(**fields: object) -> Architecture:
    return Architecture(**fields)  # type: ignore[arg-type]  # _check_types saw every value


def _check_overrides(overrides: Arguments) -> None:
    """Raise UsageError for a name that says nothing about the model."""
    for name in overrides:
        if (name in SETTINGS and name not in FOREIGN) or name in NEUTRAL or name in RENAMED:
            continue
        if name in EXPERT_NEUTRAL or name == BALANCING:
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


def _certain(args: Arguments) -> dict[str, object]:
    """What a checkpoint that mtt wrote says about arguments that Megatron-LM may ignore."""
    own = args.get(OWN)
    names = own.get("certain") if isinstance(own, dict) else None
    if not isinstance(names, list):
        return {}
    known = [name for name in names if isinstance(name, str) and name in SETTINGS]
    return {name: args[name] for name in known if args.get(name) is not None}


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
    missing = [name for name in NEEDED if a.get(name) is None]
    if missing:
        raise missing_arguments(
            missing, "the checkpoint's arguments do not say everything about the model"
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


def _position_embedding_type(a: Arguments, has_encoder: bool) -> str:
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
    if str(kind) not in POSITIONS or (kind == "relative" and not has_encoder):
        raise UnsupportedError(
            "mtt does not know these positions (YaRN, multimodal, relative in a GPT among them)",
            found=f"position_embedding_type = {_show(kind)}",
            expected="learned_absolute, rope, alibi or none",
            fix="if it is one of these under another name, --set position_embedding_type=rope",
        )
    return POSITIONS[str(kind)]


def _ask_t5_rotary(a: Arguments, said: Arguments) -> None:
    """Ask about rotary arguments that no T5 of Megatron takes (T5Model, models/T5/t5_model.py)."""
    who = "Megatron's T5 ignores"
    for name, used in (("rotary_base", 10000), ("rotary_seq_len_interpolation_factor", 1)):
        if _number(a, name, used) != used and name not in said:
            raise _ask(a, name, used, who)
    if a.get("use_rope_scaling") is True and "use_rope_scaling" not in said:
        raise _ask(a, "use_rope_scaling", False, who)


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
    if legacy and a.get("rotary_interleaved") is True:
        raise UnsupportedError(
            "Megatron-LM's legacy GPT rotates neighbours with the frequencies of halves",
            found="rotary_interleaved = True",
            expected="rotary_interleaved = False, or a model of Megatron-Core",
        )
    return {
        "rotary_interleaved": a.get("rotary_interleaved") is True,
        "rotary_base": base,
        "rotary_percent": _number(a, "rotary_percent", 1),
        "rope_scaling_factor": factor if scaled else None,
        name: None if interpolation == 1 else interpolation,
    }


def _window(a: Arguments, said: Arguments, legacy: bool) -> dict[str, object]:
    """The window of attention, and the layers without it.

    (Source: TransformerConfig; Megatron-LM's legacy GPT has no windows.)
    """
    size, skip = a.get("window_size"), a.get("window_attn_skip_freq")
    if not size:
        return {}
    if legacy and "window_size" not in said:
        raise _ask(a, "window_size", None, "Megatron-LM's legacy GPT ignores")
    numbers = tuple(size) if isinstance(size, (list, tuple)) else ()
    whole = len(numbers) == 2 and all(type(n) is int for n in numbers)
    if not whole or numbers[0] < 0 or numbers[1] != 0:
        raise UnsupportedError(
            "mtt cannot represent this window of attention",
            found=f"window_size = {_show(size)}",
            expected="window_size = (N, 0): N tokens to the left of each, and none to the right",
            fix="if that is what was computed, --set window_size='(N,0)'",
        )
    flags = tuple(skip) if isinstance(skip, (list, tuple)) else skip
    kinds = flags if isinstance(flags, tuple) else (flags,) if flags is not None else ()
    if any(type(n) is not int for n in kinds):
        raise UnsupportedError(
            "mtt cannot tell which layers have a window",
            found=f"window_attn_skip_freq = {_show(skip)}",
            expected="a number, or a list with a 1 or 0 for each layer",
            fix="say it: --set window_attn_skip_freq=VALUE",
        )
    return {"window_size": numbers, "window_attn_skip_freq": flags}


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
        raise missing_arguments(
            ["bias_gelu_fusion"], "the arguments do not say which GELU the model has"
        )
    return a.get("bias_gelu_fusion") is True


def _query_groups(a: Arguments, heads: int) -> object:
    if "group_query_attention" in a:
        return _or(a, "num_query_groups", heads) if a["group_query_attention"] is True else heads
    if _or(a, "num_query_groups", heads) != heads:  # Megatron stores both or neither
        raise missing_arguments(
            ["group_query_attention"], "num_query_groups alone may mean nothing"
        )
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


def _embedding_norm(a: Arguments) -> bool:
    """BigScience's norm after the embedding, which its 8-bit optimizer brings along too.

    (Source: VocabParallelEmbedding in megatron/mpu/layers.py at 8387ae17: the norm is made with
    its default epsilon, whatever layernorm_epsilon says.)
    """
    if a.get("embed_layernorm") is not True and a.get("use_bnb_optimizer") is not True:
        return False
    if a["layernorm_epsilon"] != _EMBEDDING_NORM_EPSILON:
        raise UnsupportedError(
            "the norm after the embedding has another epsilon than those of the layers",
            found=f"layernorm_epsilon = {a['layernorm_epsilon']}",
            expected=f"{_EMBEDDING_NORM_EPSILON}, which the norm after the embedding has",
            fix=f"--set layernorm_epsilon={_EMBEDDING_NORM_EPSILON} if it is that in all",
        )
    return True


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

    A checkpoint that mtt wrote says it under `mtt`. Megatron builds only its null and TikToken
    tokenizers from `vocab_size`; with any other it is just what somebody typed ("before EOD or
    padding", says its help). The null tokenizers add one
    for EOD; since core_v0.18, which has `null_tokenizer_eod_id`, the text one does not.
    (Source: training/tokenizer/tokenizer.py; core/tokenizers/utils/build_tokenizer.py and
    text/libraries/null_tokenizer.py at core_v0.18.)
    """
    own = args.get(OWN)
    if isinstance(own, dict) and type(own.get("vocab_size")) is int:
        return _fitting(own["vocab_size"], args)
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
    return _fitting(size, args)


def _fitting(size: int, args: Arguments) -> int | None:
    padded = args.get("padded_vocab_size")
    return size if size >= 1 and not (isinstance(padded, int) and size > padded) else None


def architecture_from_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    overrides: Arguments = NOTHING,
    *,
    may_lack_head: bool = False,
) -> Architecture:
    """The architecture of a checkpoint without arguments, from shapes and what the user says.

    Args:
        shapes: canonical name, with numbered layers, -> shape of the whole tensor.
        overrides: what shapes cannot tell, under Megatron-LM's names.
        may_lack_head: whether an output layer could be missing unseen.

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
    # An output layer may be the copy of the embedding that a last stage holds; it is compared.
    # One that is missing is reported as such.
    is_open = may_lack_head or (said.get(_UNTIED) is False and seen[_UNTIED])
    for name, value in seen.items():
        if said.get(name, value) != value and not (name == _UNTIED and is_open):
            raise UsageError(
                f"--set {name} contradicts the tensors",
                found=f"{name} = {_show(said[name])}",
                expected=f"{name} = {_show(value)}, as the shapes say",
                fix=f"leave out --set {name}, or give the --config of this model",
            )
    a = {**seen, "group_query_attention": True, **said}
    missing = [name for name in _unseen(a, sizes.gated) if a.get(name) is None]
    if may_lack_head and not seen[_UNTIED] and said.get(_UNTIED) is None:
        missing.append(_UNTIED)
    if missing:
        raise missing_arguments(
            missing, "the checkpoint has no arguments, and shapes do not say everything"
        )
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
    known = {*SETTINGS, *NEUTRAL, *LOW_PRECISION, *RENAMED, OWN}
    return sorted(
        name
        for name, value in args.items()
        if name not in known and not is_known(name) and not _is_in(value, (*OFF, {}))
    )


def notes(args: Arguments, overrides: Arguments = NOTHING) -> tuple[str, ...]:
    """What was taken for granted because arguments do not say it."""
    return assumed({**_renamed(args, overrides), **_said(overrides)})


def low_precision(args: Arguments) -> list[str]:
    """What training computed in few bits: notes that change nothing in a conversion."""
    return [
        f"trained with {meaning} ({name} = {_show(args[name])}); the weights stand as they are, "
        "and what is computed with them in their own type differs by that rounding"
        for name, meaning in LOW_PRECISION.items()
        if not _is_in(args.get(name), (*OFF, "none", "None"))
    ]


def is_neutral(name: str, value: object) -> bool:
    """Whether an argument of NEUTRAL has a value that changes nothing."""
    return _is_in(value, NEUTRAL[name].values)


def is_known(name: str) -> bool:
    """Whether an argument is on the list of those without a part in the forward pass."""
    names, prefixes = _known_arguments()
    return name in names or name.startswith(prefixes)


@cache
def _known_arguments() -> tuple[frozenset[str], tuple[str, ...]]:
    """Names and prefixes (`name*`) of known_arguments.txt."""
    path = os.path.join(os.path.dirname(__file__), "known_arguments.txt")
    with open(path, encoding="utf-8") as file:
        words = [line for line in file.read().splitlines() if line and not line.startswith("#")]
    names = frozenset(word for word in words if not word.endswith("*"))
    return names, tuple(word[:-1] for word in words if word.endswith("*"))


def _neutral_text(value: object, values: tuple[object, ...]) -> str:
    """The neutral value to name beside a value that is not."""
    if isinstance(value, bool) and False in values:
        return "False"
    words = [word for word in values if isinstance(word, str) and word]
    return words[0] if words else "None"
