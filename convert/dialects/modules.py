"""The order in which Megatron's modules list their parameters, and which of them add state.

A state dict is a walk over modules: those of a layer in the order they were built, and of each
module its parameters, then `_extra_state` where the module has one. Transformer Engine keeps FP8
scales there; without FP8 it is None or empty. Megatron-Core's own layers add the same key.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

_LAYER = re.compile(r"(encoder|decoder)\.layers\.(\d+)\.")
_PARAMETERS = ("layer_norm_weight", "layer_norm_bias", "weight", "bias")
EXTRA_STATE = "_extra_state"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Modules:
    """The modules of a GPT or a T5; those of a layer are named as within the layer.

    Attributes:
        before, layer, after: modules in order.
        stateful: those with an `_extra_state`.
        bare: those that have it with or without parameters of their own; distributed checkpoints
            leave their state out.
        encoder, between: modules of a layer of a T5's encoder, and those after its layers.
    """

    before: tuple[str, ...]
    layer: tuple[str, ...]
    after: tuple[str, ...]
    stateful: frozenset[str]
    bare: frozenset[str]
    encoder: tuple[str, ...] = ()
    between: tuple[str, ...] = ()

    def state_dict(self, tensors: Mapping[str, T]) -> dict[str, T | None]:
        """The parameters of a stage in Megatron's order, with None for every `_extra_state`."""
        ordered: dict[str, T | None] = {}
        is_last = any(name.startswith("decoder.final_layernorm.") for name in tensors)
        for prefix, module in self._walk(tensors):
            names = [f"{prefix}{module}.{parameter}" for parameter in _PARAMETERS]
            present = [name for name in names if name in tensors]
            ordered.update((name, tensors[name]) for name in present)
            exists = present or (module in self.bare and (prefix or is_last))
            if module in self.stateful and exists:
                ordered[f"{prefix}{module}.{EXTRA_STATE}"] = None
        assert set(tensors) <= set(ordered), sorted(set(tensors) - set(ordered))
        return ordered

    def sharded_state(self, names: Collection[str]) -> list[str]:
        """The `_extra_state` entries that a distributed checkpoint has beside these parameters."""
        return [
            f"{prefix}{module}.{EXTRA_STATE}"
            for prefix, module in self._walk(names)
            if module in self.stateful - self.bare
            and any(f"{prefix}{module}.{parameter}" in names for parameter in _PARAMETERS)
        ]

    def _walk(self, names: Iterable[str]) -> Iterable[tuple[str, str]]:
        found = {(hit[1], int(hit[2])) for name in names if (hit := _LAYER.match(name))}
        yield from (("", module) for module in self.before)
        yield from self._layers(found, "encoder", self.encoder)
        yield from (("", module) for module in self.between)
        yield from self._layers(found, "decoder", self.layer)
        yield from (("", module) for module in self.after)

    @staticmethod
    def _layers(
        found: Collection[tuple[str, int]], stack: str, modules: tuple[str, ...]
    ) -> Iterable[tuple[str, str]]:
        for number in sorted(number for name, number in found if name == stack):
            yield from ((f"{stack}.layers.{number}.", module) for module in modules)
