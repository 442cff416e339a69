"""Values of Megatron's arguments: defaults, kinds, and how they are shown in messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .argument_tables import Arguments
from .dtypes import DType
from .errors import UnsupportedError, UsageError


def or_default(a: Arguments, name: str, default: object) -> object:
    """An argument's value, or the default where it is absent or None."""
    value = a.get(name)
    return default if value is None else value


def number(a: Arguments, name: str, default: float) -> float:
    """An argument that is a number, or the default."""
    value = or_default(a, name, default)
    assert isinstance(value, (int, float))  # _check_types
    return float(value)


def is_in(value: object, values: tuple[object, ...]) -> bool:
    """Whether a plain value is one of these; an object of an unknown class never is."""
    if isinstance(value, list):
        value = tuple(value)
    plain = value is None or isinstance(value, (bool, int, float, str, tuple, dict))
    return plain and value in values


def show(value: object) -> str:
    """A value for a message, cut where it is long."""
    text = str(value) if isinstance(value, DType) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def missing_arguments(names: Iterable[str], message: str) -> UsageError:
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
        "gpt_j_residual": "True",
        "untie_embeddings_and_output_weights": "True",
        "kv_lora_rank": "512",
        "qk_head_dim": "128",
        "qk_pos_emb_head_dim": "64",
        "v_head_dim": "128",
        "rotary_scaling_factor": "40",
        "mscale": "1.0",
        "mscale_all_dim": "1.0",
    }
    notes = {
        "bias_gelu_fusion": "True: GELU by tanh, False: exact GELU; or squared_relu=True",
        "layernorm_zero_centered_gamma": "True if norm weights are stored minus one",
        "position_embedding_type": "rope, alibi or none",
        "swiglu": "silu(gate) * up",
        "untie_embeddings_and_output_weights": "True if there is a head, and its file is missing",
        "gpt_j_residual": "True if attention and MLP run beside each other",
    }
    names = list(names)
    return UsageError(
        message,
        found=f"no {', '.join(names)}",
        expected="; ".join(f"{name} ({notes[name]})" if name in notes else name for name in names),
        fix="with this model's values: "
        + " ".join(f"--set {name}={examples[name]}" for name in names),
    )


@dataclass(frozen=True, slots=True)
class Odd:
    """An argument that is in the way: its value, what that does, and what would be possible."""

    name: str
    value: object
    meaning: str
    instead: str


def refusal(message: str, odd: Sequence[Odd]) -> UnsupportedError:
    """The error that names all arguments that are in the way."""
    return UnsupportedError(
        message,
        found="; ".join(
            f"{one.name} = {show(one.value)}" + (f" ({one.meaning})" if one.meaning else "")
            for one in odd
        ),
        expected="; ".join(f"{one.name} = {one.instead}" for one in odd),
        fix="if the arguments are wrong, say it: "
        + " ".join(f"--set {one.name}={one.instead.split()[0]}" for one in odd),
    )
