"""The order in which Megatron's modules list their parameters, and which of them add state.

A state dict is a walk over modules: those of a layer in the order they were built, and of each
module its parameters, then `_extra_state` where the module has one. Transformer Engine keeps FP8
scales there; without FP8 it is None or empty. Megatron-Core's own layers add the same key.

    embedding, layers of a T5's encoder, its norm,
    layers of the decoder, its norm, layers that predict further tokens, output layer
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

_LAYERS = tuple(re.compile(rf"{stack}\.layers\.(\d+)\.") for stack in ("encoder", "decoder", "mtp"))
_EXPERT = re.compile(r"(?<=\.experts\.)(?P<kind>local_experts|experts)\.(?P<e>\d+)\.")
_PARAMETERS = re.compile(
    r"(?P<module>.+)\.(?P<name>layer_norm_weight|layer_norm_bias|gate_weight|weight|bias"
    r"|expert_bias)(?P<e>\d*)"
)
_ORDER = ("layer_norm_weight", "layer_norm_bias", "gate_weight", "weight", "bias", "expert_bias")
_INNER, _ANY = "transformer_layer.", "{e}"
EXTRA_STATE = "_extra_state"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Modules:
    """The modules of a GPT or a T5; those of a layer are named as within it, `{e}` is an expert.

    Attributes:
        before, layer, after: modules in order.
        mtp: those of a layer that predicts further tokens before and after the layer within it.
        stateful: those with an `_extra_state`.
        bare: those that have it with or without parameters of their own; distributed checkpoints
            leave their state out.
        encoder, between: modules of a layer of a T5's encoder, and those after its layers.
    """

    before: tuple[str, ...]
    layer: tuple[str, ...]
    after: tuple[str, ...]
    mtp: tuple[tuple[str, ...], tuple[str, ...]]
    stateful: frozenset[str]
    bare: frozenset[str]
    encoder: tuple[str, ...] = ()
    between: tuple[str, ...] = ()

    def state_dict(self, tensors: Mapping[str, T]) -> dict[str, T | None]:
        """The parameters of a stage in Megatron's order, with None for every `_extra_state`."""
        held = _by_module(tensors)
        ordered: dict[str, T | None] = {}
        is_last = any(name.startswith("decoder.final_layernorm.") for name in tensors)
        for prefix, module in self._walk(tensors):
            names = held.get(f"{prefix}{module}", ())
            ordered.update((name, tensors[name]) for name in names)
            kind = _kind(module)
            exists = names or (kind in self.bare and (prefix or is_last))
            if kind in self.stateful and exists:
                ordered[f"{prefix}{module}.{EXTRA_STATE}"] = None
        assert set(tensors) <= set(ordered), sorted(set(tensors) - set(ordered))
        return ordered

    def sharded_state(self, names: Collection[str]) -> list[str]:
        """The `_extra_state` entries that a distributed checkpoint has beside these parameters.

        A norm that is called like one fused into a module does not make the module.
        """
        held = _by_module(name for name in names if ".layer_norm_" not in name)
        return [
            f"{prefix}{module}.{EXTRA_STATE}"
            for prefix, module in self._walk(names)
            if f"{prefix}{module}" in held and _kind(module) in self.stateful - self.bare
        ]

    def _walk(self, names: Iterable[str]) -> Iterator[tuple[str, str]]:
        """Prefix and name of every module, in order."""
        names = list(names)
        encoder, layers, mtp = ({int(m[1]) for n in names if (m := p.match(n))} for p in _LAYERS)
        experts = _experts(names)
        yield from (("", module) for module in self.before)
        for layer in sorted(encoder):
            yield from ((f"encoder.layers.{layer}.", module) for module in self.encoder)
        yield from (("", module) for module in self.between)
        for layer in sorted(layers):
            yield from self._layer(f"decoder.layers.{layer}.", experts)
        for module in self.after:
            if module == "output_layer":
                for layer in sorted(mtp):
                    prefix = f"mtp.layers.{layer}."
                    yield from ((prefix, module) for module in self.mtp[0])
                    yield from self._layer(prefix + _INNER, experts)
                    yield from ((prefix, module) for module in self.mtp[1])
            yield "", module

    def _layer(self, prefix: str, experts: Mapping[str, list[int]]) -> Iterator[tuple[str, str]]:
        """The modules of a layer; those of experts expert by expert."""
        of_expert: list[str] = []
        for module in (*self.layer, ""):
            if _ANY in module:
                of_expert.append(module)
                continue
            for number in experts.get(prefix, ()) if of_expert else ():
                yield from ((prefix, name.replace(_ANY, str(number))) for name in of_expert)
            of_expert = []
            if module:
                yield prefix, module


def _experts(names: Iterable[str]) -> dict[str, list[int]]:
    """Prefix of a layer -> the numbers of experts in names like `...experts.local_experts.3.`."""
    found: dict[str, set[int]] = {}
    for name in names:
        if hit := _EXPERT.search(name):
            found.setdefault(name.partition("mlp.experts.")[0], set()).add(int(hit["e"]))
    return {prefix: sorted(numbers) for prefix, numbers in found.items()}


def _by_module(names: Iterable[str]) -> dict[str, list[str]]:
    """Module -> its parameters in order; those of several experts expert by expert."""
    found: dict[str, list[tuple[int, int, str]]] = {}
    for name in names:
        if hit := _PARAMETERS.fullmatch(name):
            place = (int(hit["e"] or 0), _ORDER.index(hit["name"]), name)
            found.setdefault(hit["module"], []).append(place)
    return {module: [name for *_, name in sorted(places)] for module, places in found.items()}


def _kind(module: str) -> str:
    """A module's name in the tables, which have no numbers."""
    return _EXPERT.sub(lambda hit: f"{hit['kind']}.{_ANY}.", module)
