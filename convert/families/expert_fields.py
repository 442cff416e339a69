"""Fields of `config.json` about experts and latent attention, in both directions.

Only("num_experts", ...)     fields that mean something only where one of them is given
SparseLayers(...)            which layers have experts, as words or as numbers
RouterScores()               how scores become weights
ScoreFactor(), Groups()      what is done with them
LatentHeads()                what latent attention fixes about heads
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..architecture import Architecture
from ..errors import UnsupportedError
from .fields import MOST_LAYERS, Config, Field, number

_DENSE, _SPARSE = "dense", "sparse"


@dataclass(frozen=True)
class Only:
    """Fields that are read where `switch` is neither null nor 0, and written where `holds`."""

    switch: str
    holds: Callable[[Architecture], bool]
    fields: tuple[Field, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Those of all of them."""
        return (self.switch, *(name for field in self.fields for name in field.names))

    def read(self, config: Config) -> dict[str, object]:
        """What they say; nothing where they are off."""
        facts: dict[str, object] = {}
        if config.get(self.switch):
            for field in self.fields:
                facts |= field.read(config)
        return facts

    def write(self, architecture: Architecture) -> dict[str, object]:
        """All of them, or none."""
        config: dict[str, object] = {}
        if self.holds(architecture):
            for field in self.fields:
                config |= field.write(architecture)
        return config


@dataclass(frozen=True)
class SparseLayers:
    """`mlp_layer_types`: "sparse" for layers with experts, "dense" for others; null: all sparse."""

    config: str = "mlp_layer_types"

    @property
    def names(self) -> tuple[str, ...]:
        """The one field."""
        return (self.config,)

    def read(self, config: Config) -> dict[str, object]:
        """A 1 or 0 for each layer.

        Raises:
            UnsupportedError: other words, or not one for each layer.
        """
        num_layers = number("num_hidden_layers", config.get("num_hidden_layers"), "int")
        types = config.get(self.config)
        if types is None:
            return {"moe_layer_pattern": (1,) * min(num_layers, MOST_LAYERS)}
        if (
            not isinstance(types, list)
            or len(types) != num_layers
            or any(kind not in (_DENSE, _SPARSE) for kind in types)
        ):
            raise UnsupportedError(
                "mtt does not know these kinds of layers",
                found=f"{self.config} = {str(types)[:60]}",
                expected=f"{num_layers} times {_SPARSE} or {_DENSE}",
            )
        return {"moe_layer_pattern": tuple(int(kind == _SPARSE) for kind in types)}

    def write(self, architecture: Architecture) -> dict[str, object]:
        """A word for each layer."""
        words = [_SPARSE if flag else _DENSE for flag in architecture.moe_layers]
        return {self.config: words}


@dataclass(frozen=True)
class RouterScores:
    """`scoring_func` and `norm_topk_prob`.

    A softmax over the chosen experts is one over all of them, divided by its sum over those
    chosen. Megatron divides sigmoids by their sum unless there is only one.

    Attributes:
        function, normalise: what the fields are called; without a `function` it is a softmax.
    """

    function: str | None = "scoring_func"
    normalise: str = "norm_topk_prob"
    topk: str = "num_experts_per_tok"

    @property
    def names(self) -> tuple[str, ...]:
        """Both fields."""
        return (self.normalise,) if self.function is None else (self.function, self.normalise)

    def read(self, config: Config) -> dict[str, object]:
        """Megatron's function, and whether its softmax is over all experts.

        Raises:
            UnsupportedError: another function, or sigmoids that Megatron would (not) normalise.
        """
        function = "softmax" if self.function is None else config.get(self.function)
        normal = bool(number(self.normalise, config.get(self.normalise), "bool"))
        several = number(self.topk, config.get(self.topk), "int") > 1
        if function == "softmax":
            return {"moe_router_score_function": "softmax", "moe_router_pre_softmax": not normal}
        if function != "sigmoid" or normal != several:
            raise UnsupportedError(
                "Megatron does not turn scores of experts into weights like this",
                found=f"{self.function} = {function!r}, {self.normalise} = {normal}",
                expected=f"softmax, or sigmoid with {self.normalise} = {several}",
            )
        return {"moe_router_score_function": "sigmoid", "moe_router_pre_softmax": False}

    def write(self, architecture: Architecture) -> dict[str, object]:
        """Both."""
        a = architecture
        function = a.moe_router_score_function
        several = a.moe_router_topk > 1
        normal = several if function == "sigmoid" else not a.moe_router_pre_softmax
        named: dict[str, object] = {} if self.function is None else {self.function: function}
        return {**named, self.normalise: normal}


@dataclass(frozen=True)
class ScoreFactor:
    """`routed_scaling_factor`; 1 is no factor."""

    config: str = "routed_scaling_factor"

    @property
    def names(self) -> tuple[str, ...]:
        """The one field."""
        return (self.config,)

    def read(self, config: Config) -> dict[str, object]:
        """The factor, None for 1 or null."""
        value = config.get(self.config)
        factor = 1.0 if value is None else number(self.config, value, "float")
        return {"moe_router_topk_scaling_factor": None if factor == 1 else factor}

    def write(self, architecture: Architecture) -> dict[str, object]:
        """The factor as a number."""
        factor = architecture.moe_router_topk_scaling_factor
        return {self.config: 1.0 if factor is None else float(factor)}


@dataclass(frozen=True)
class Groups:
    """`n_group` and `topk_group`; where all groups are chosen, there might as well be none."""

    count: str = "n_group"
    chosen: str = "topk_group"
    never_null: bool = False
    """Whether the class needs numbers: one group then, which is chosen."""

    @property
    def names(self) -> tuple[str, ...]:
        """Both fields."""
        return (self.count, self.chosen)

    def read(self, config: Config) -> dict[str, object]:
        """Both numbers, or None for both."""
        if config.get(self.count) is None and config.get(self.chosen) is None:
            return {}
        count, chosen = (number(name, config.get(name), "int") for name in self.names)
        if count == chosen:
            return {}
        return {"moe_router_num_groups": count, "moe_router_group_topk": chosen}

    def write(self, architecture: Architecture) -> dict[str, object]:
        """Both numbers."""
        count, chosen = architecture.moe_router_num_groups, architecture.moe_router_group_topk
        if count == chosen:
            count = chosen = None
        if count is None and self.never_null:
            count = chosen = 1
        return {self.count: count, self.chosen: chosen}


@dataclass(frozen=True)
class LatentHeads:
    """What latent attention fixes: the size of a head, and as many keys as queries."""

    heads: str = "num_attention_heads"

    @property
    def names(self) -> tuple[str, ...]:
        """None of its own."""
        return ()

    def read(self, config: Config) -> dict[str, object]:
        """Those fields, whatever else the configuration says about heads."""
        plain, rotated = (
            number(name, config.get(name), "int")
            for name in ("qk_nope_head_dim", "qk_rope_head_dim")
        )
        return {
            "multi_latent_attention": True,
            "kv_channels": plain + rotated,
            "num_query_groups": number(self.heads, config.get(self.heads), "int"),
        }

    def write(self, architecture: Architecture) -> dict[str, object]:
        """Nothing: other fields say it."""
        return {}
