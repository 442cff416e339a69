"""What one or a few fields of `config.json` say, in both directions from one declaration.

    Same("rms_norm_eps", "layernorm_epsilon")         equal values
    Aliases(("n_head", "num_attention_heads"), ...)   the same, under one of several names
    Opposite("tie_word_embeddings", "untie_...")      True for False
    Choice("hidden_act", "activation", {...})         one word for another
    Rope(), SlidingWindow(), LayerWindows()           what takes several fields

`read` takes the fields of a configuration, with the class's defaults where the file is silent, and
gives those of an `Architecture`; `write` goes back. What `write` cannot say, reading back shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Protocol

from ..architecture import (
    ROPE_SCALING_HIGH_FREQ_FACTOR,
    ROPE_SCALING_LOW_FREQ_FACTOR,
    ROPE_SCALING_ORIGINAL_MAX_POSITION_EMBEDDINGS,
    Architecture,
)
from ..errors import UnsupportedError
from . import yarn

Config = Mapping[str, object]
Names = str | tuple[str, ...]
_KINDS = {
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "bool": (bool, "true or false"),
}
MOST_LAYERS = 100_000  # more than any model has, and few enough to count
_DECLARED = {field.name: str(field.type) for field in fields(Architecture)}
_TYPES = {name: kind.removesuffix(" | None") for name, kind in _DECLARED.items()}
_OPTIONAL = {name for name, kind in _DECLARED.items() if kind.endswith(" | None")}


class Field(Protocol):
    """Fields of `config.json` and what they say about an architecture."""

    @property
    def names(self) -> tuple[str, ...]:
        """The fields of `config.json` it accounts for."""

    def read(self, config: Config) -> dict[str, object]:
        """Fields of the architecture.

        Raises:
            UnsupportedError: a value is missing, of another type, or means something that an
                `Architecture` cannot hold.
        """

    def write(self, architecture: Architecture) -> dict[str, object]:
        """Fields of `config.json`."""


@dataclass(frozen=True)
class Same:
    """Equal values under two names; `otherwise` computes what null stands for.

    Without it, null is None where the architecture's field may be that.
    """

    config: str
    architecture: str
    otherwise: Callable[[Config], object] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The one field."""
        return (self.config,)

    def read(self, config: Config) -> dict[str, object]:
        """The value, checked to be of the architecture's type."""
        value = config.get(self.config)
        if value is None and self.otherwise is not None:
            value = self.otherwise(config)
        if value is None and self.architecture in _OPTIONAL:
            return {self.architecture: None}
        kind = _TYPES[self.architecture]
        return {self.architecture: number(self.config, value, kind)}

    def write(self, architecture: Architecture) -> dict[str, object]:
        """The value."""
        value = getattr(architecture, self.architecture)
        if _TYPES[self.architecture] == "float" and value is not None:
            value = float(value)
        return {self.config: value}


@dataclass(frozen=True)
class Aliases:
    """Equal values, under the first of these names or one of the others that a class reads too."""

    names: tuple[str, ...]
    architecture: str

    def read(self, config: Config) -> dict[str, object]:
        """The value.

        Raises:
            UnsupportedError: two names with two values.
        """
        said = {name: config[name] for name in self.names if config.get(name) is not None}
        if len({repr(value) for value in said.values()}) > 1:
            raise UnsupportedError(
                "config.json says one thing twice, with two values",
                found=_values(tuple(said), tuple(said.values())),
                expected="one value",
            )
        name = next(iter(said), self.names[0])
        return Same(name, self.architecture).read(said)

    def write(self, architecture: Architecture) -> dict[str, object]:
        """The value, under the first name."""
        return Same(self.names[0], self.architecture).write(architecture)


@dataclass(frozen=True)
class Opposite:
    """One is true where the other is false."""

    config: str
    architecture: str

    @property
    def names(self) -> tuple[str, ...]:
        """The one field."""
        return (self.config,)

    def read(self, config: Config) -> dict[str, object]:
        """The opposite."""
        return {self.architecture: not number(self.config, config.get(self.config), "bool")}

    def write(self, architecture: Architecture) -> dict[str, object]:
        """The opposite."""
        return {self.config: not getattr(architecture, self.architecture)}


@dataclass(frozen=True)
class Choice:
    """Words of `config.json` -> words of the architecture; either side may be several fields.

    Of the words that mean the same, the first is written.
    """

    config: Names
    architecture: Names
    words: Mapping[object, object]

    @property
    def names(self) -> tuple[str, ...]:
        """The field, or the fields that choose together."""
        return _tuple(self.config)

    def read(self, config: Config) -> dict[str, object]:
        """What the words stand for."""
        found = tuple(config.get(name) for name in self.names)
        for word, meaning in self.words.items():
            if _tuple(word) == found and list(map(type, _tuple(word))) == list(map(type, found)):
                return dict(zip(_tuple(self.architecture), _tuple(meaning), strict=True))
        raise UnsupportedError(
            "the model computes something that mtt cannot represent",
            found=_values(self.names, found),
            expected=" or ".join(_values(self.names, _tuple(word)) for word in self.words),
        )

    def write(self, architecture: Architecture) -> dict[str, object]:
        """The first words that mean this; none if there are none."""
        wanted = tuple(getattr(architecture, name) for name in _tuple(self.architecture))
        for word, meaning in self.words.items():
            if _tuple(meaning) == wanted:
                return dict(zip(self.names, _tuple(word), strict=True))
        return {}


@dataclass(frozen=True)
class Vocabulary:
    """`vocab_size`, the rows of the tables in the files: all of them are tokens."""

    config: str = "vocab_size"

    @property
    def names(self) -> tuple[str, ...]:
        """The one field."""
        return (self.config,)

    def read(self, config: Config) -> dict[str, object]:
        """The rows, none of them padding as far as a configuration can tell."""
        rows = number(self.config, config.get(self.config), "int")
        return {"padded_vocab_size": rows, "vocab_size": rows}

    def write(self, architecture: Architecture) -> dict[str, object]:
        """The true size, or all rows where it is unknown."""
        return {self.config: architecture.vocab_size or architecture.padded_vocab_size}


@dataclass(frozen=True)
class Rope:
    """Rotary positions: `rope_parameters` of transformers 5, and what earlier versions wrote.

    (Source: `RotaryEmbeddingConfigMixin` of transformers' modeling_rope_utils.py, for which value
    wins where there are several.)

    Attributes:
        partial: whether the class can rotate a part of each head.
        percent: the part it rotates where the configuration does not say.
        old_base, old_percent: where earlier versions wrote base and part.
        optional: whether `position_embedding_type` says if there are rotary positions at all.
        interleaved: the field that says whether neighbours are pairs, where there is one.
        yarn: whether the class has YaRN as Megatron's latent attention has it.
        base: the base where the configuration does not say.
    """

    partial: bool = False
    percent: float = 1.0
    old_base: str = "rope_theta"
    old_percent: str = "partial_rotary_factor"
    optional: bool = False
    interleaved: str | None = None
    yarn: bool = False
    base: float = 10000.0

    @property
    def names(self) -> tuple[str, ...]:
        """The field of transformers 5, and the old ones."""
        more = (self.interleaved,) if self.interleaved else ()
        length = "original_max_position_embeddings"
        return ("rope_parameters", "rope_scaling", self.old_base, self.old_percent, length, *more)

    def read(self, config: Config) -> dict[str, object]:
        """Base, part and scaling.

        Raises:
            UnsupportedError: a scaling that Megatron has not, or a part where all is rotated.
        """
        if self.optional and config.get("position_embedding_type") != "rope":
            return {}
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if not isinstance(rope, Mapping):
            raise _cannot_use("rope_parameters", rope, "an object")
        if nested := [name for name, value in rope.items() if isinstance(value, Mapping)]:
            raise UnsupportedError(
                "the model has rotary positions of several kinds",
                found=f"rope_parameters for {', '.join(map(str, nested))}",
                expected="one kind in all layers",
            )
        base = _first(rope.get("rope_theta"), config.get(self.old_base), self.base)
        percent = _first(
            rope.get("partial_rotary_factor"), config.get(self.old_percent), self.percent
        )
        percent = number(self.old_percent, percent, "float")
        if not self.partial and percent != 1:
            raise UnsupportedError(
                "the class does not rotate a part of each head",
                found=f"partial_rotary_factor = {percent}",
                expected="1.0, or none",
            )
        return {
            "rotary_base": number("rope_theta", base, "float"),
            "rotary_percent": percent,
            **self._scaling(rope, config),
            **self._pairs(config),
        }

    def _scaling(self, rope: Config, config: Config) -> dict[str, object]:
        kind = _first(rope.get("rope_type"), rope.get("type"), "default")
        if self.yarn and kind == "yarn" and config.get("kv_lora_rank") is not None:
            return yarn.read(rope, config)
        return _scaling(rope, config)

    def _pairs(self, config: Config) -> dict[str, object]:
        name = self.interleaved
        return {"rotary_interleaved": number(name, config.get(name), "bool")} if name else {}

    def write(self, architecture: Architecture) -> dict[str, object]:
        """`rope_parameters`; of two scalings at once only one."""
        a = architecture
        if a.position_embedding_type != "rope":
            none: dict[str, object] = {"rope_parameters": None} if self.optional else {}
            return none | ({self.interleaved: False} if self.interleaved else {})
        rope: dict[str, object] = {"rope_theta": float(a.rotary_base), "rope_type": "default"}
        if self.partial and (self.percent, a.rotary_percent) != (1, 1):
            rope["partial_rotary_factor"] = float(a.rotary_percent)
        if a.rope_scaling_factor is not None:
            rope |= {"rope_type": "llama3", "factor": float(a.rope_scaling_factor), **_LLAMA3}
        elif a.rotary_seq_len_interpolation_factor is not None:
            factor = float(a.rotary_seq_len_interpolation_factor)
            rope |= {"rope_type": "linear", "factor": factor}
        elif self.yarn and a.rope_type == "yarn":
            rope |= yarn.write(a)
        pairs = {self.interleaved: a.rotary_interleaved} if self.interleaved else {}
        return {"rope_parameters": rope, **pairs}


_LLAMA3: Mapping[str, object] = {
    "low_freq_factor": ROPE_SCALING_LOW_FREQ_FACTOR,
    "high_freq_factor": ROPE_SCALING_HIGH_FREQ_FACTOR,
    "original_max_position_embeddings": ROPE_SCALING_ORIGINAL_MAX_POSITION_EMBEDDINGS,
}


def _scaling(rope: Config, config: Config) -> dict[str, object]:
    """The scaling of rotary positions, if Megatron has it."""
    kind = _first(rope.get("rope_type"), rope.get("type"), "default")
    if rope.get("mrope_section") is not None:
        kind = "mrope"
    if kind == "default":
        return {}
    if kind == "linear":
        factor = number("factor", rope.get("factor"), "float")
        return {"rotary_seq_len_interpolation_factor": factor}
    if kind == "llama3":
        # A field beside the rope's own wins; where both are silent, the model's length counts.
        original = "original_max_position_embeddings"
        length = config.get("max_position_embeddings")
        found = dict(rope) | {original: _first(config.get(original), rope.get(original), length)}
        if odd := [name for name, value in _LLAMA3.items() if found.get(name) != value]:
            raise UnsupportedError(
                "Megatron has Llama 3's rope scaling with fixed numbers only",
                found=", ".join(f"{name} = {found.get(name)}" for name in odd),
                expected=", ".join(f"{name} = {_LLAMA3[name]:g}" for name in odd),
            )
        return {"rope_scaling_factor": number("factor", rope.get("factor"), "float")}
    raise UnsupportedError(
        "Megatron's GPT does not have this rope scaling",
        found=f"rope_type = {kind!r}",
        expected="default, linear or llama3",
    )


@dataclass(frozen=True)
class SlidingWindow:
    """`sliding_window`, the same in all layers; a token sees that many, itself included."""

    @property
    def names(self) -> tuple[str, ...]:
        """The window; classes of this kind do not look at `layer_types`."""
        return ("sliding_window", "layer_types")

    def read(self, config: Config) -> dict[str, object]:
        """The window Megatron counts, without the token itself.

        Raises:
            UnsupportedError: `layer_types` says something else than the class computes.
        """
        size = config.get("sliding_window")
        computed = "full_attention" if size is None else "sliding_attention"
        types = config.get("layer_types") or []
        if not isinstance(types, list) or any(kind != computed for kind in types):
            raise UnsupportedError(
                "the class has one kind of attention in all layers",
                found=f"sliding_window = {size}, layer_types = {_short(types)}",
                expected=f"{computed} in all layers",
            )
        return {} if size is None else {"window_size": _window(size)}

    def write(self, architecture: Architecture) -> dict[str, object]:
        """The window."""
        window = architecture.window_size
        return {"sliding_window": None if window is None else window[0] + 1}


@dataclass(frozen=True)
class LayerWindows:
    """A window in the layers that `layer_types` names.

    Attributes:
        switched: whether `use_sliding_window` must be on, and `max_window_layers` says how many
            layers come before those with a window where `layer_types` does not.
    """

    switched: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The window and where it is."""
        switch = ("use_sliding_window", "max_window_layers") if self.switched else ()
        return ("sliding_window", "layer_types", *switch)

    def read(self, config: Config) -> dict[str, object]:
        """The window, and the layers that have it.

        Raises:
            UnsupportedError: a kind of layer mtt does not know, or windows without a size.
        """
        size, types = config.get("sliding_window"), config.get("layer_types")
        if self.switched and not number(
            "use_sliding_window", config.get("use_sliding_window"), "bool"
        ):
            size = None
        num_layers = number("num_hidden_layers", config.get("num_hidden_layers"), "int")
        if types is not None:
            flags = _flags(types, num_layers)
        elif size is None:
            return {}
        elif self.switched:
            first = number("max_window_layers", config.get("max_window_layers"), "int")
            flags = tuple(int(layer >= first) for layer in range(min(num_layers, MOST_LAYERS)))
        else:
            return {"window_size": _window(size)}
        if not any(flags):
            return {}
        if size is None:
            raise UnsupportedError(
                "layers have a window of no size",
                found=f"{', '.join(f'{n} = {_short(config.get(n))}' for n in self.names)}",
                expected="a sliding_window, or no sliding_attention in layer_types",
            )
        return {"window_size": _window(size), "window_attn_skip_freq": flags}

    def write(self, architecture: Architecture) -> dict[str, object]:
        """All of the fields, and all saying the same."""
        flags, window = architecture.windowed_layers, architecture.window_size
        types = ["sliding_attention" if flag else "full_attention" for flag in flags]
        size = window[0] + 1 if window is not None and any(flags) else None
        if not self.switched:
            return {"sliding_window": size, "layer_types": types}
        first = flags.index(True) if True in flags else len(flags)
        return {
            "use_sliding_window": any(flags),
            "sliding_window": size,
            "max_window_layers": first if all(flags[first:]) else len(flags),
            "layer_types": types,
        }


def _flags(types: object, num_layers: int) -> tuple[int, ...]:
    kinds = {"full_attention": 0, "sliding_attention": 1}
    if (
        not isinstance(types, list)
        or any(kind not in kinds for kind in map(str, types))
        or len(types) != num_layers
    ):
        raise UnsupportedError(
            "mtt does not know these kinds of layers",
            found=f"layer_types = {_short(types)}",
            expected=f"{num_layers} times full_attention or sliding_attention",
        )
    return tuple(kinds[kind] for kind in types)


def _window(size: object) -> tuple[int, int]:
    """Megatron's window of tokens to the left and right, the token itself not counted."""
    return number("sliding_window", size, "int") - 1, 0


def head_size(config: Config) -> int:
    """`hidden_size / num_attention_heads`, what a head is where nothing else is said.

    Raises:
        UnsupportedError: one of them is missing, or no size.
    """
    hidden, heads = (
        number(name, config.get(name), "int") for name in ("hidden_size", "num_attention_heads")
    )
    return hidden // max(heads, 1)


def number(name: str, value: object, kind: str) -> int:
    """A value of `config.json`, once it is of the kind it must be.

    Raises:
        UnsupportedError: it is not, or there is none.
    """
    accepted, words = _KINDS[kind]
    fits = isinstance(value, (int, float) if accepted is float else accepted)
    if not fits or (isinstance(value, bool) and accepted is not bool):
        raise _cannot_use(name, value, words)
    assert isinstance(value, (int, float))
    return float(value) if accepted is float else value  # type: ignore[return-value]


def _cannot_use(name: str, value: object, expected: str) -> UnsupportedError:
    return UnsupportedError(
        f"config.json has no {name}" if value is None else f"config.json's {name} cannot be used",
        found=f"{name} = {_short(value)}",
        expected=expected,
    )


def _first(*values: object) -> object:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)


def _tuple(value: object) -> tuple:  # type: ignore[type-arg]
    return value if isinstance(value, tuple) else (value,)


def _values(names: tuple[str, ...], values: tuple[object, ...]) -> str:
    return ", ".join(f"{n} = {_short(v)}" for n, v in zip(names, values, strict=True))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
