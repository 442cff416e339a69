"""Megatron's arguments about multi-latent attention and its YaRN.

Releases differ, and arguments show which one wrote them: `rope_type` is an argument since
core_v0.14. Before, latent attention always had YaRN, its original length was
`max_position_embeddings`, and scores were scaled by `mscale` rather than `mscale_all_dim`.
Sources are core/transformer/multi_latent_attention.py, and MLATransformerConfig in
core/transformer/transformer_config.py, at core_v0.11 to core_v0.19 and main of August 2026.
"""

from __future__ import annotations

from .architecture import Architecture
from .argument_tables import Arguments
from .argument_values import Odd, missing_arguments, number, or_default, refusal
from .errors import UnsupportedError

_NEEDED = ("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
_SCALES = ("rotary_scaling_factor", "mscale", "mscale_all_dim")
# MLATransformerConfig's, which Megatron-LM has no arguments for.
_DEFAULTS = {"original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}

_PLAIN_SCALES: dict[str, object] = {
    "rotary_scaling_factor": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
}


def is_latent(a: Arguments) -> bool:
    """Whether attention is multi-latent."""
    return a.get("multi_latent_attention") is True


def latent_fields(a: Arguments, heads: int) -> dict[str, object]:
    """The fields of an `Architecture` that latent attention decides, those of rotations too.

    Raises:
        UnsupportedError: something that Megatron's latent attention does not compute, or that mtt
            cannot represent; all such arguments are named.
        UsageError: an argument is missing.
    """
    missing = [name for name in _NEEDED if a.get(name) is None]
    if missing:
        raise missing_arguments(missing, "the arguments do not say everything about attention")
    _refuse(a)
    plain, rotated = a["qk_head_dim"], a["qk_pos_emb_head_dim"]
    assert isinstance(plain, int) and isinstance(rotated, int)  # _check_types
    return {
        "multi_latent_attention": True,
        **{name: a[name] for name in _NEEDED},
        "q_lora_rank": a.get("q_lora_rank"),
        "kv_channels": plain + rotated,
        "num_query_groups": heads,
        # It rotates whatever `position_embedding_type` says, neighbours as pairs
        # (_apply_rotary_pos_emb_bshd, core/models/common/embeddings/rope_utils.py).
        "position_embedding_type": "rope",
        "rotary_interleaved": True,
        "rotary_base": number(a, "rotary_base", 10000),
        **_yarn(a),
    }


def _refuse(a: Arguments) -> None:
    kind = str(or_default(a, "position_embedding_type", "learned_absolute"))
    scaled = number(a, "rotary_scaling_factor", 1) > 1 and number(a, "mscale_all_dim", 0) != 0
    is_rope = _rope_type(a) == "rope"
    is_rotary = a.get("use_rotary_position_embeddings") is True
    other = "Megatron's latent attention does not look at it"
    checks = (
        # GPTModel adds its table of positions all the same.
        (
            "position_embedding_type",
            "beside rotated keys",
            "rope",
            kind not in ("rope", "none") and not is_rotary,
        ),
        ("rope_type", "", "yarn or rope", _rope_type(a) not in ("rope", "yarn")),
        ("rotary_interleaved", "Megatron refuses that", "False", _is_on(a, "rotary_interleaved")),
        ("use_rope_scaling", other, "False", _is_on(a, "use_rope_scaling")),
        ("rotary_percent", "", "1.0", is_rope and number(a, "rotary_percent", 1) != 1),
        (
            "rotary_seq_len_interpolation_factor",
            other,
            "None",
            number(a, "rotary_seq_len_interpolation_factor", 1) != 1,
        ),
        # Scores are scaled without YaRN too.
        ("mscale_all_dim", "scales scores without YaRN", "0.0", is_rope and scaled),
        ("group_query_attention", "", "False", _is_on(a, "group_query_attention")),
        (
            "mla_down_proj_fusion",
            "down projections as one",
            "False",
            _is_on(a, "mla_down_proj_fusion"),
        ),
    )
    odd = [Odd(name, a.get(name), why, word) for name, why, word, is_odd in checks if is_odd]
    if odd:
        raise refusal("the latent attention is one that mtt cannot represent", odd)


def _is_on(a: Arguments, name: str) -> bool:
    return a.get(name) is True


def _rope_type(a: Arguments) -> str:
    """The argument's value, and what its absence stands for."""
    return str(or_default(a, "rope_type", "yarn"))


def _yarn(a: Arguments) -> dict[str, object]:
    """The fields of YaRN; none where it is plain rotation, as with a factor of 1."""
    if _rope_type(a) == "rope":
        return {}
    if missing := [name for name in _SCALES if a.get(name) is None]:
        raise missing_arguments(missing, "the arguments do not say how rotations are scaled")
    factor, mscale, all_dim = (number(a, name, 1) for name in _SCALES)
    if factor == 1:
        return {}
    if "rope_type" not in a and mscale != all_dim:
        raise UnsupportedError(
            "up to core_v0.13 Megatron scales scores by mscale, which mtt cannot represent",
            found=f"mscale = {mscale:g}, mscale_all_dim = {all_dim:g}, and no rope_type, as in "
            "arguments of core_v0.13 and before",
            expected="equal values",
            fix="--set rope_type=yarn if a newer release trained the model",
        )
    return {
        "rope_type": "yarn",
        **dict(zip(_SCALES, (factor, mscale, all_dim), strict=True)),
        **_lengths(a),
    }


def _lengths(a: Arguments) -> dict[str, object]:
    """What YaRN has besides its scales, from arguments or defaults."""
    defaults: dict[str, object] = dict(_DEFAULTS)
    if "rope_type" not in a:
        defaults["original_max_position_embeddings"] = a["max_position_embeddings"]
    return {name: or_default(a, name, value) for name, value in defaults.items()}


def assumed(a: Arguments) -> tuple[str, ...]:
    """A note about what was taken for granted, if anything was."""
    if not is_latent(a) or not _yarn(a):
        return ()
    values = {name: value for name, value in _lengths(a).items() if a.get(name) is None}
    if not values:
        return ()
    return (
        f"the arguments do not say {', '.join(f'{n} ({v})' for n, v in values.items())} of YaRN: "
        "Megatron's defaults are taken; if the model was trained with others, "
        + " ".join(f"--set {name}=VALUE" for name in values),
    )


def stored(a: Architecture) -> dict[str, object]:
    """The arguments that `latent_fields` reads, with Megatron's defaults where they mean nothing.

    Megatron has no arguments for the last three; they are stored for mtt to read.
    """
    if not a.multi_latent_attention:
        return {
            "multi_latent_attention": False,
            "q_lora_rank": None,
            "kv_lora_rank": 32,
            "qk_head_dim": 128,
            "qk_pos_emb_head_dim": 64,
            "v_head_dim": 128,
            "rope_type": None,
            **_PLAIN_SCALES,
        }
    if not a.rotary_interleaved:
        raise UnsupportedError(
            "Megatron-Core's latent attention cannot compute this model; nothing was written",
            found="rotary_interleaved = False",
            expected="rotary_interleaved = True: it rotates neighbours as pairs",
            fix="convert it with --to hf, which can represent it",
        )
    is_yarn = a.rope_type == "yarn"
    return {
        "multi_latent_attention": True,
        "q_lora_rank": a.q_lora_rank,
        **{name: getattr(a, name) for name in _NEEDED},
        # The size by which Megatron's own core attention joins heads (DotProductAttention).
        "kv_channels": a.v_head_dim,
        # Megatron rotates neighbours as pairs, and has no argument that says so.
        "rotary_interleaved": False,
        "rope_type": a.rope_type,
        **({name: getattr(a, name) for name in _SCALES} if is_yarn else _PLAIN_SCALES),
        **({name: getattr(a, name) for name in _DEFAULTS} if is_yarn else {}),
    }


def ignored_by_training(a: Architecture) -> list[str]:
    """Warnings about what Megatron-LM would not use, as it has no arguments for it."""
    if not a.multi_latent_attention or a.rope_type != "yarn":
        return []
    return [
        f"Megatron-LM has no argument for YaRN's {name} ({getattr(a, name):g}, its default is "
        f"{default}): train with a script that sets it in MLATransformerConfig"
        for name, default in _DEFAULTS.items()
        if getattr(a, name) != default
    ]
