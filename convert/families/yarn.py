"""YaRN in `rope_parameters`, as latent attention has it: rotations and scores are scaled.

    rotations are multiplied by  m(mscale) / m(mscale_all_dim)     m(x) = 0.1 x log(factor) + 1
    scores by                    m(mscale_all_dim) squared         or 1 for a factor of at most 1

(Source: _yarn_get_mscale and YarnRotaryEmbedding in
models/common/embeddings/yarn_rotary_pos_embedding.py; _compute_yarn_parameters of transformers'
modeling_rope_utils.py, which takes an mscale of 0 for none, and DeepseekV3Attention.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..architecture import Architecture
from ..errors import UnsupportedError

Values = Mapping[str, object]
# Field of `rope_parameters` -> of an architecture, and what is computed where it is absent.
_FIELDS: Mapping[str, tuple[str, float]] = {
    "factor": ("rotary_scaling_factor", 1.0),
    "beta_fast": ("beta_fast", 32.0),
    "beta_slow": ("beta_slow", 1.0),
    "mscale": ("mscale", 1.0),
    "mscale_all_dim": ("mscale_all_dim", 0.0),
}
_LENGTH = "original_max_position_embeddings"


def read(rope: Values, config: Values) -> dict[str, object]:
    """The fields of an architecture.

    Raises:
        UnsupportedError: a value that is no number, or rotations scaled otherwise than by Megatron.
    """
    found: dict[str, object] = {"rope_type": "yarn"}
    for name, (ours, otherwise) in _FIELDS.items():
        given = rope.get(name)
        found[ours] = _number(name, otherwise if given is None else given)
    length = next(
        (
            value
            # A field beside the rope's own wins, as it does in transformers.
            for value in (config.get(_LENGTH), rope.get(_LENGTH), config["max_position_embeddings"])
            if value is not None
        ),
        None,
    )
    found[_LENGTH] = int(_number(_LENGTH, length))
    if rope.get("factor") is None:  # transformers then takes how much longer texts may be
        longest = _number("max_position_embeddings", config["max_position_embeddings"])
        found["rotary_scaling_factor"] = longest / _number(_LENGTH, length)
    if rope.get("truncate", True) is not True:
        raise _refusal("truncate", rope["truncate"], "true")
    factor, mscale, all_dim = (
        _number(name, found[name]) for name in ("rotary_scaling_factor", "mscale", "mscale_all_dim")
    )
    computed = _scale(factor, mscale) / _scale(factor, all_dim)
    given = rope.get("attention_factor")
    used = _inferred(factor, rope) if given is None else _number("attention_factor", given)
    if not math.isclose(used, computed, rel_tol=1e-6):
        raise _refusal("attention_factor", used, f"{computed:.6g}, as mscale says to Megatron")
    return found


def write(a: Architecture) -> dict[str, object]:
    """The fields of `rope_parameters`, all of them."""
    rope: dict[str, object] = {"rope_type": "yarn"}
    rope |= {name: float(getattr(a, ours)) for name, (ours, _) in _FIELDS.items()}
    rope[_LENGTH] = a.original_max_position_embeddings
    factor = a.rotary_scaling_factor
    computed = _scale(factor, a.mscale) / _scale(factor, a.mscale_all_dim)
    if not math.isclose(_inferred(factor, rope), computed, rel_tol=1e-6):
        rope["attention_factor"] = computed
    return rope


def _scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _inferred(factor: float, rope: Values) -> float:
    """What transformers multiplies rotations by where no `attention_factor` says it."""
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if not mscale or not all_dim:
        return _scale(factor, 1.0)
    return _scale(factor, _number("mscale", mscale)) / _scale(
        factor, _number("mscale_all_dim", all_dim)
    )


def _number(name: str, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise _refusal(name, value, "a number")
    return float(value)


def _refusal(name: str, value: object, expected: str) -> UnsupportedError:
    return UnsupportedError(
        "Megatron's latent attention does not have this rope scaling",
        found=f"rope_parameters with {name} = {value!r}",
        expected=expected,
    )
