"""Megatron's arguments about experts, and about layers that predict further tokens.

What is computed with experts is said by `moe_*`, which mean nothing in a dense model. Sources are
paths in Megatron-LM at core_v0.16.1 unless another tag is named.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping

from .architecture import ROUTER_SCORE_FUNCTIONS, Architecture
from .argument_tables import OFF, Arguments, Neutral
from .argument_values import Odd, is_in, number, or_default, refusal, show
from .errors import UnsupportedError

_MOST_LAYERS = 100_000
_MESSAGE = "the model computes something that mtt cannot represent"
_INTERLEAVED = "gate and up of experts interleaved in blocks"
_BENCHMARK = "a router that ignores its scores, for benchmarks"

# What changes the forward pass of a model with experts in a way mtt cannot represent.
NEUTRAL: Mapping[str, Neutral] = {
    # Tokens beyond an expert's capacity are dropped, in evaluation too (TopKRouter.routing in
    # core/transformer/moe/router.py); a negative factor is none (TransformerConfig).
    "moe_expert_capacity_factor": Neutral("experts that drop tokens beyond a capacity", (None,)),
    "moe_expert_rank_capacity_factor": Neutral("ranks that drop tokens beyond a capacity", (None,)),
    "moe_token_dropping": Neutral("experts that drop tokens"),
    "moe_apply_probs_on_input": Neutral("weights multiplied before the activation"),
    "moe_extended_tp": Neutral("experts divided over tensor- and expert-parallel ranks at once"),
    "moe_latent_size": Neutral("experts of a narrower model than the layers"),
    "moe_mlp_glu_interleave_size": Neutral(_INTERLEAVED),
    "moe_router_force_biased": Neutral(_BENCHMARK, (None,)),
    "moe_router_force_load_balancing": Neutral(_BENCHMARK),
    "moe_shared_expert_glu_interleave_size": Neutral(_INTERLEAVED),
}
# These only add losses; `sinkhorn` and `quantile_balancing` choose experts in another way.
BALANCING = "moe_router_load_balancing_type"
_BALANCING = ("none", "aux_loss", "seq_aux_loss", "global_aux_loss")
# Stored as they are in the architecture.
_SAME = (
    "num_experts moe_router_topk moe_router_score_function moe_router_pre_softmax "
    "moe_router_topk_scaling_factor moe_router_enable_expert_bias moe_router_num_groups "
    "moe_router_group_topk moe_shared_expert_intermediate_size moe_shared_expert_gate"
).split()
# What a layer that predicts further tokens may be besides a layer like the last.
_NEUTRAL_MTP: Mapping[str, Neutral] = {
    "mtp_hybrid_override_pattern": Neutral("further tokens predicted by a hybrid of layers"),
}


def num_experts(a: Arguments) -> int | None:
    """Experts of a layer; None for a dense model.

    Megatron takes 0 for none; Megatron-DeepSpeed says none with [1].

    Raises:
        UnsupportedError: a number for each layer, as only Megatron-DeepSpeed has it.
    """
    value = a.get("num_experts")
    if is_in(value, (*OFF, (1,))):
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        meaning = "mixture of experts of Megatron-DeepSpeed"
        raise refusal(_MESSAGE, [Odd("num_experts", value, meaning, "None")])
    return value


def expert_fields(a: Arguments, num_layers: int, ffn: int, legacy: bool) -> dict[str, object]:
    """The fields of an `Architecture` about experts; none for a dense model.

    Args:
        a: arguments under today's names.
        num_layers, ffn: of the model.
        legacy: whether the model is Megatron-LM's own.

    Raises:
        UnsupportedError: an argument that changes the forward pass has a value mtt cannot
            represent; all such arguments are named.
    """
    count = num_experts(a)
    if count is None:
        return {}
    _refuse(a, legacy)
    function = str(or_default(a, "moe_router_score_function", "softmax"))
    factor = number(a, "moe_router_topk_scaling_factor", 1)
    groups, chosen = _groups(a)
    return {
        "num_experts": count,
        "moe_ffn_hidden_size": or_default(a, "moe_ffn_hidden_size", ffn),
        "moe_layer_pattern": _pattern(or_default(a, "moe_layer_freq", 1), num_layers),
        "moe_router_topk": or_default(a, "moe_router_topk", 2),
        "moe_router_score_function": function,
        # Sigmoids are of one expert each (topk_routing_with_score_function, moe_utils.py).
        "moe_router_pre_softmax": function == "softmax" and a.get("moe_router_pre_softmax") is True,
        # 0 is none, as Megatron asks whether there is one.
        "moe_router_topk_scaling_factor": factor if factor not in (0, 1) else None,
        "moe_router_enable_expert_bias": a.get("moe_router_enable_expert_bias") is True,
        "moe_router_num_groups": groups,
        "moe_router_group_topk": chosen,
        "moe_shared_expert_intermediate_size": a.get("moe_shared_expert_intermediate_size") or None,
        "moe_shared_expert_gate": bool(a.get("moe_shared_expert_intermediate_size"))
        and a.get("moe_shared_expert_gate") is True,
    }


def _refuse(a: Arguments, legacy: bool) -> None:
    """Raise UnsupportedError for experts that mtt cannot represent, naming all reasons."""
    odd = [
        Odd(name, a[name], neutral.meaning, str(neutral.values[0]))
        for name, neutral in NEUTRAL.items()
        if not is_in(a.get(name), neutral.values) and not _is_negative(name, a.get(name))
    ]
    if legacy:
        odd.append(Odd("num_experts", a["num_experts"], "with Megatron-LM's legacy GPT", "None"))
    kinds = or_default(a, BALANCING, "none")
    names = kinds if isinstance(kinds, (list, tuple)) else (kinds,)
    if any(name not in _BALANCING for name in names):
        meaning = "chooses experts in another way than by their scores"
        odd.append(Odd(BALANCING, kinds, meaning, " or ".join(_BALANCING)))
    function = or_default(a, "moe_router_score_function", "softmax")
    if function not in ROUTER_SCORE_FUNCTIONS:
        known = " or ".join(ROUTER_SCORE_FUNCTIONS)
        odd.append(Odd("moe_router_score_function", function, "", known))
    elif a.get("moe_router_enable_expert_bias") is True and function != "sigmoid":
        odd.append(Odd("moe_router_enable_expert_bias", True, f"with {function}", "False"))
    if odd:
        raise refusal(_MESSAGE, odd)


def _is_negative(name: str, value: object) -> bool:
    """Whether it is a capacity that means none."""
    return name == "moe_expert_capacity_factor" and isinstance(value, (int, float)) and value < 0


def _groups(a: Arguments) -> tuple[int | None, int | None]:
    """Groups of experts and how many are chosen; where all are, there might as well be none.

    (`moe_router_topk_limited_devices` is their old name, with a group per expert-parallel rank:
    TransformerConfig.)
    """
    groups, chosen = a.get("moe_router_num_groups"), a.get("moe_router_group_topk")
    limited = a.get("moe_router_topk_limited_devices")
    if not chosen and limited:
        groups, chosen = a.get("expert_model_parallel_size"), limited
    if not chosen or groups == chosen:
        return None, None
    return groups, chosen  # type: ignore[return-value]  # _check_types saw them


def _pattern(freq: object, num_layers: int) -> tuple[int, ...]:
    """A 1 for each layer with experts (get_gpt_decoder_layer_specs, gpt_layer_specs.py).

    Every `freq`-th layer from the first has them where it is a number; a text is an expression as
    on the command line (moe_freq_type, training/arguments.py).
    """
    value = _evaluated(freq) if isinstance(freq, str) else freq
    if type(value) is int and value >= 1:
        return tuple(int(layer % value == 0) for layer in range(min(num_layers, _MOST_LAYERS)))
    flags = tuple(value) if isinstance(value, (list, tuple)) else ()
    if len(flags) != num_layers or any(type(n) is not int or n not in (0, 1) for n in flags):
        raise UnsupportedError(
            "mtt cannot tell which layers have experts",
            found=f"moe_layer_freq = {show(freq)}, {num_layers} layers",
            expected="moe_layer_freq = a number, or a list with a 1 or 0 for each layer",
            fix="say it: --set moe_layer_freq=VALUE",
        )
    if not any(flags):
        raise UnsupportedError(
            "no layer has the experts that the arguments name",
            found=f"moe_layer_freq = {show(freq)}",
            expected="at least one 1",
            fix="say it: --set num_experts=None",
        )
    return flags


def _evaluated(text: str) -> object:
    """A whole number, or lists of them added and repeated: `([0]*3+[1]*1)*2`; else the text."""
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return text


def _value(node: ast.expr) -> int | list[int]:
    match node:
        case ast.Constant(value=int() as value) if type(value) is int:
            return value
        case ast.List(elts=parts):
            values = [_value(part) for part in parts]
            if all(isinstance(value, int) for value in values):
                return values  # type: ignore[return-value]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            a, b = _value(left), _value(right)
            if isinstance(a, list) and isinstance(b, list) and len(a) + len(b) <= _MOST_LAYERS:
                return a + b
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            a, b = _value(left), _value(right)
            a, b = (b, a) if isinstance(a, int) else (a, b)
            if isinstance(a, list) and isinstance(b, int) and len(a) * max(b, 1) <= _MOST_LAYERS:
                return a * b
    raise ValueError("not such an expression")


def further_tokens(a: Arguments) -> dict[str, object]:
    """How many layers predict further tokens.

    Raises:
        UnsupportedError: they are built otherwise than like the last layer, or are one and the
            same used several times.
    """
    count = a.get("mtp_num_layers") or 0
    if not count:
        return {}
    odd = [
        Odd(name, a[name], neutral.meaning, "None")
        for name, neutral in _NEUTRAL_MTP.items()
        if not is_in(a.get(name), neutral.values)
    ]
    if a.get("mtp_use_repeated_layer") is True and count != 1:
        meaning = "one layer that predicts several further tokens"
        odd.append(Odd("mtp_use_repeated_layer", True, meaning, "False"))
    if odd:
        raise refusal(_MESSAGE, odd)
    return {"mtp_num_layers": count}


def stored(a: Architecture) -> dict[str, object]:
    """The arguments that `expert_fields` and `further_tokens` read, those of a dense model too.

    Raises:
        UnsupportedError: a choice that Megatron's TransformerConfig refuses.
    """
    after = a.moe_router_score_function == "softmax" and not a.moe_router_pre_softmax
    if a.num_experts is not None and a.moe_router_topk == 1 and after:
        raise UnsupportedError(
            "Megatron-Core has no such router; nothing was written",
            found="moe_router_topk = 1 with a softmax over the chosen expert alone",
            expected="several experts for a token, or a softmax over all of them",
            fix="convert it with --to hf, which can represent it",
        )
    pattern = a.moe_layer_pattern
    arguments: dict[str, object] = {name: getattr(a, name) for name in _SAME}
    arguments |= {
        "moe_ffn_hidden_size": a.moe_ffn_hidden_size or None,
        "moe_layer_freq": 1 if all(pattern) else list(pattern),
        "mtp_num_layers": a.mtp_num_layers or None,
    }
    if a.num_experts is None:
        # What Megatron stores then.
        arguments |= {"moe_router_topk": 2, "moe_ffn_hidden_size": None}
    return arguments


def is_carried(name: str, value: object) -> bool:
    """Whether an argument of a source holds for its copy, as far as experts are concerned."""
    if name == BALANCING:
        names = value if isinstance(value, (list, tuple)) else (value,)
        return all(one in _BALANCING for one in names)
    return name not in NEUTRAL or is_in(value, NEUTRAL[name].values)
