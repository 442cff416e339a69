"""GPT-NeoX's arguments in Megatron's words.

A checkpoint has eight of them; its `configs/` folder, where it is there, has those that were
written down for the run, and the rest has the defaults of neox_args.py. What neither says and
changes the computation is asked for. Sources are paths in GPT-NeoX at ea7aefd8.
"""

from __future__ import annotations

from collections.abc import Mapping

from .argument_tables import Neutral
from .argument_values import missing_arguments
from .errors import UnsupportedError
from .sizes import read_shapes

Arguments = Mapping[str, object]
# GPT-NeoX's name -> Megatron's, and GPT-NeoX's default.
_RENAMED: Mapping[str, tuple[str, object]] = {
    "num_layers": ("num_layers", None),
    "hidden_size": ("hidden_size", None),
    "num_attention_heads": ("num_attention_heads", None),
    "rotary_pct": ("rotary_percent", 1.0),
    "rotary_emb_base": ("rotary_base", 10000),
    "gpt_j_residual": ("gpt_j_residual", False),
    "bias_gelu_fusion": ("bias_gelu_fusion", False),
    "attention_dropout": ("attention_dropout", 0.0),
    "hidden_dropout": ("hidden_dropout", 0.0),
    "init_method_std": ("init_method_std", 0.02),
    "make_vocab_size_divisible_by": ("make_vocab_size_divisible_by", None),
    "seq_length": ("seq_length", None),
    "vocab_file": ("vocab_file", None),
    "merge_file": ("merge_file", None),
}
# Those of `_RENAMED` without which the model is not known: a checkpoint without `configs/` lacks
# all of them, and their defaults would be a guess.
_TELLING = (
    "rotary_pct gpt_j_residual pos_emb norm activation bias_gelu_fusion no_weight_tying".split()
)
_POSITIONS = {"learned": "learned_absolute", "rotary": "rope", "alibi": "alibi", "none": "none"}
_NORMS = {
    "layernorm": ("LayerNorm", "layernorm_epsilon", 1e-5),
    "te_layernorm": ("LayerNorm", "layernorm_epsilon", 1e-5),
    "rmsnorm": ("RMSNorm", "rms_norm_epsilon", 1e-8),
    "te_rmsnorm": ("RMSNorm", "rms_norm_epsilon", 1e-8),
}
_OFF: tuple[object, ...] = (None, False, 0, "", {}, [])
_NEUTRAL: Mapping[str, Neutral] = {
    "gpt_j_tied": Neutral("one norm for attention and MLP", _OFF),
    "use_qk_layernorm": Neutral("a norm over all heads of a rank", _OFF),
    "use_mup": Neutral("muP's factors", _OFF),
    "soft_prompt_tuning": Neutral("a learned prompt", _OFF),
    "moe_num_experts": Neutral("mixture of experts", (*_OFF, 1)),
    "use_bnb_optimizer": Neutral("norms within the embeddings", _OFF),
    "opt_pos_emb_offset": Neutral("positions that begin elsewhere", _OFF),
    "mlp_type": Neutral("another MLP", (None, "regular", "llama")),
    "output_layer_parallelism": Neutral("a head cut along its width", (None, "column")),
}
_GLOBAL = ("global", "flash")
_USUAL_LENGTH = 2048
_UNTIED = "untie_embeddings_and_output_weights"


def megatron_arguments(
    neox: Arguments, shapes: Mapping[str, tuple[int, ...]], overrides: Arguments
) -> tuple[dict[str, object], tuple[str, ...]]:
    """What GPT-NeoX's arguments and a model's shapes say, in Megatron's words.

    Args:
        neox: arguments under names with underscores.
        shapes: canonical name, with numbered layers, -> shape of the whole tensor.
        overrides: what the user says, under Megatron's names.

    Returns:
        Arguments for `architecture_from_args`, those that nothing says left out; notes.

    Raises:
        UnsupportedError: an option of GPT-NeoX that mtt cannot represent, by name.
        UsageError: options that change the computation are not known.
    """
    _refuse(neox)
    sizes = read_shapes(shapes)
    args: dict[str, object] = {**sizes.fields, "group_query_attention": False}
    known = any(neox.get(name) is not None for name in _TELLING)
    for theirs, (ours, default) in _RENAMED.items():
        value = neox.get(theirs)
        if value is None and (known or theirs not in _TELLING):
            value = default
        if value is not None:
            args[ours] = float(value) if ours == "rotary_percent" and value == 1 else value
    notes: list[str] = []
    if type(neox.get("no_weight_tying")) is bool:
        args[_UNTIED] = neox["no_weight_tying"]
    args |= _positions(neox, args, known, notes)
    if known:
        args |= _norm(neox, str(sizes.fields["normalization"]))
        _require_positions(args, overrides)
    else:
        args.pop("normalization")
    heads, groups = neox.get("num_attention_heads"), neox.get("num_kv_heads")
    if groups is not None and groups != heads:
        args |= {"group_query_attention": True, "num_query_groups": groups}
    if not known:
        _ask(args, overrides, gated=sizes.gated)
    args |= {"swiglu": sizes.gated, "squared_relu": False}
    _check_activation(neox, gated=sizes.gated)
    if type(neox.get("sliding_window_width")) is int:
        args["window_size"] = (neox["sliding_window_width"], 0)
    return args, tuple(notes)


def _refuse(neox: Arguments) -> None:
    """Raise for options that change the computation and have no counterpart."""
    odd = {
        name: neox[name]
        for name, neutral in _NEUTRAL.items()
        if name in neox and neox[name] not in neutral.values
    }
    meanings = {name: neutral.meaning for name, neutral in _NEUTRAL.items()}
    if kinds := sorted(_attention_kinds(neox.get("attention_config")) - set(_GLOBAL)):
        odd["attention_config"] = ", ".join(kinds)[:60]
        meanings["attention_config"] = "layers of other kinds"
    if odd:
        raise UnsupportedError(
            "the model computes something that mtt cannot represent",
            found="; ".join(f"{name} = {v} ({meanings[name]})" for name, v in odd.items()),
            expected="a GPT-NeoX without that",
        )


def _ask(args: Arguments, overrides: Arguments, *, gated: bool) -> None:
    """Raise for all that a checkpoint without its configuration does not say."""
    needed = ["num_attention_heads", "gpt_j_residual", "layernorm_epsilon"]
    needed += ["position_embedding_type", "max_position_embeddings"]
    needed += [] if gated else ["bias_gelu_fusion"]
    said = {**args, **overrides}
    if said.get("position_embedding_type") in (None, "rope"):
        needed.append("rotary_percent")
    # A head may be there and its file may not.
    if not args[_UNTIED] and _UNTIED not in overrides:
        del said[_UNTIED]
        needed.append(_UNTIED)
    if unknown := [name for name in needed if said.get(name) is None]:
        raise missing_arguments(
            unknown, "the checkpoint is GPT-NeoX's, and its configuration is not beside it"
        )


def _attention_kinds(config: object) -> set[str]:
    """The words in `attention_config`, which nests lists: [[["flash"], 24]]."""
    if isinstance(config, str):
        return {config}
    if isinstance(config, list):
        return {kind for item in config for kind in _attention_kinds(item)}
    return set()


def _positions(
    neox: Arguments, args: Arguments, known: bool, notes: list[str]
) -> dict[str, object]:
    kind = neox.get("pos_emb")
    if kind is not None and str(kind) not in _POSITIONS:
        raise UnsupportedError(
            "mtt does not know these positions",
            found=f"pos_emb = {kind}",
            expected=", ".join(_POSITIONS),
        )
    has_table = args.get("position_embedding_type") == "learned_absolute"
    found: dict[str, object] = {}
    if kind is not None:
        found["position_embedding_type"] = _POSITIONS[str(kind)]
    elif not has_table and neox.get("rotary_pct") is not None:
        found["position_embedding_type"] = "rope"
    length = neox.get("max_position_embeddings") or neox.get("seq_length")
    if has_table:
        return found
    if type(length) is not int and known:
        length = _USUAL_LENGTH
        notes.append(
            f"nothing says for how many positions the model is meant: {length} is written, which "
            "changes nothing that is computed (--set max_position_embeddings=N says another)"
        )
    return {**found, "max_position_embeddings": length}


def _require_positions(args: Arguments, overrides: Arguments) -> None:
    """Raise where nothing tells; learned ones, the default, would have a table."""
    if "position_embedding_type" not in {**args, **overrides}:
        raise missing_arguments(
            ["position_embedding_type"], "the checkpoint's arguments do not say which positions"
        )


def _norm(neox: Arguments, seen: str) -> dict[str, object]:
    """The kind of norm, which shapes show where nothing says it, and its epsilon."""
    name = neox.get("norm") or seen.lower()
    if str(name) not in _NORMS:
        raise UnsupportedError(
            "mtt does not know this norm", found=f"norm = {name}", expected=", ".join(_NORMS)
        )
    kind, argument, default = _NORMS[str(name)]
    value = neox.get(argument)
    return {"normalization": kind, "layernorm_epsilon": default if value is None else value}


def _check_activation(neox: Arguments, *, gated: bool) -> None:
    kind = neox.get("activation") or ("swiglu" if gated else "gelu")
    accepted = ("swiglu", "silu", "swish") if gated else ("gelu",)
    if kind not in accepted:
        raise UnsupportedError(
            "the model computes something that mtt cannot represent",
            found=f"activation = {kind}, {'with' if gated else 'without'} a gate",
            expected=" or ".join(accepted),
        )
