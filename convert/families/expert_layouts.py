"""Which layers have experts, and what shared ones are, in the words of classes of transformers.

AllLayers()       every layer
FirstDense()      all but the first few
SparseSteps()     every n-th, but those in a list
SharedExperts()   an MLP as wide as a whole number of experts
BestTwo()         groups of experts, judged by the best two of each
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..architecture import Architecture
from ..errors import UnsupportedError
from .expert_fields import Groups, RouterScores
from .fields import MOST_LAYERS, Config, number

_LAYERS = "num_hidden_layers"


def also(name: str, default: int) -> Callable[[Config], object]:
    """The value under another name, else the class's default: what null under the first means."""
    return lambda config: default if config.get(name) is None else config[name]


@dataclass(frozen=True)
class AllLayers:
    """Experts in every layer; no field says so."""

    @property
    def names(self) -> tuple[str, ...]:
        """None of its own."""
        return ()

    def read(self, config: Config) -> dict[str, object]:
        """A 1 for each layer."""
        return {"moe_layer_pattern": (1,) * _num_layers(config)}

    def write(self, architecture: Architecture) -> dict[str, object]:
        """Nothing."""
        return {}


@dataclass(frozen=True)
class FirstDense:
    """`first_k_dense_replace`: how many layers come before those with experts."""

    config: str = "first_k_dense_replace"

    @property
    def names(self) -> tuple[str, ...]:
        """The one field."""
        return (self.config,)

    def read(self, config: Config) -> dict[str, object]:
        """A 0 or 1 for each layer.

        Raises:
            UnsupportedError: no layer has experts.
        """
        layers, first = _num_layers(config), number(self.config, config.get(self.config), "int")
        flags = tuple(int(layer >= first) for layer in range(layers))
        return _pattern(flags, f"{self.config} = {first}, {_LAYERS} = {layers}")

    def write(self, architecture: Architecture) -> dict[str, object]:
        """The number of the first layer with experts."""
        flags = architecture.moe_layers
        return {self.config: flags.index(True) if True in flags else len(flags)}


@dataclass(frozen=True)
class SparseSteps:
    """`decoder_sparse_step` and `mlp_only_layers`, which lists layers without experts."""

    step: str = "decoder_sparse_step"
    dense: str = "mlp_only_layers"

    @property
    def names(self) -> tuple[str, ...]:
        """Both fields."""
        return (self.step, self.dense)

    def read(self, config: Config) -> dict[str, object]:
        """A 0 or 1 for each layer.

        Raises:
            UnsupportedError: a step below one, what is no list of numbers, or no layer has experts.
        """
        layers, step = _num_layers(config), number(self.step, config.get(self.step), "int")
        dense = config.get(self.dense) or []
        if step < 1 or not isinstance(dense, list) or any(type(n) is not int for n in dense):
            raise UnsupportedError(
                "config.json does not say which layers have experts",
                found=f"{self.step} = {step}, {self.dense} = {str(dense)[:60]}",
                expected="a step of at least 1, and numbers of layers",
            )
        flags = (int((n + 1) % step == 0 and n not in set(dense)) for n in range(layers))
        return _pattern(tuple(flags), f"{self.step} = {step}, {self.dense} = {str(dense)[:60]}")

    def write(self, architecture: Architecture) -> dict[str, object]:
        """A step alone where one will do, else all layers without experts."""
        flags = architecture.moe_layers
        for step in range(1, len(flags) + 1):
            if flags == tuple((n + 1) % step == 0 for n in range(len(flags))):
                return {self.step: step, self.dense: []}
        return {self.step: 1, self.dense: [n for n, flag in enumerate(flags) if not flag]}


@dataclass(frozen=True)
class SharedExperts:
    """`n_shared_experts`, each as wide as one of the others; they are one MLP."""

    count: str = "n_shared_experts"
    width: str = "moe_intermediate_size"

    @property
    def names(self) -> tuple[str, ...]:
        """The one field of its own."""
        return (self.count,)

    def read(self, config: Config) -> dict[str, object]:
        """The width of all of them.

        Raises:
            UnsupportedError: there are none; the class then has an MLP without a channel.
        """
        count, width = config.get(self.count), number(self.width, config.get(self.width), "int")
        if type(count) is not int or count < 1:
            raise UnsupportedError(
                "the class always has a shared MLP",
                found=f"{self.count} = {count}",
                expected="at least 1",
            )
        return {"moe_shared_expert_intermediate_size": count * width}

    def write(self, architecture: Architecture) -> dict[str, object]:
        """How many it is as wide as."""
        size = architecture.moe_shared_expert_intermediate_size or 0
        return {self.count: size // max(architecture.moe_ffn_hidden_size, 1)}


@dataclass(frozen=True)
class Sigmoids(RouterScores):
    """`norm_topk_prob` of sigmoids; DeepSeek's own files have a `scoring_func` too."""

    def read(self, config: Config) -> dict[str, object]:
        """Megatron's function.

        Raises:
            UnsupportedError: another function, or sigmoids that Megatron would (not) normalise.
        """
        return super().read({"scoring_func": "sigmoid", **config})


@dataclass(frozen=True)
class BestTwo(Groups):
    """Groups whose scores are the sum of their best two, however many experts are chosen."""

    topk: str = "num_experts_per_tok"

    def read(self, config: Config) -> dict[str, object]:
        """Both numbers, or nothing where groups make no difference.

        Raises:
            UnsupportedError: Megatron would sum another number of scores.
        """
        found = super().read(config)
        if not found:
            return found
        topk = number(self.topk, config.get(self.topk), "int")
        chosen = number(self.chosen, config.get(self.chosen), "int")
        if topk != 2 * chosen:
            raise UnsupportedError(
                "the class judges groups of experts by two scores, Megatron by another number",
                found=f"{self.topk} = {topk}, {self.chosen} = {chosen}",
                expected=f"{self.topk} = {2 * chosen}, twice as many as groups",
            )
        return found


def _num_layers(config: Config) -> int:
    return min(number(_LAYERS, config.get(_LAYERS), "int"), MOST_LAYERS)


def _pattern(flags: tuple[int, ...], found: str) -> dict[str, object]:
    if not any(flags):
        raise UnsupportedError(
            "no layer of the model has experts",
            found=found,
            expected="a layer with experts; without any it is another class",
        )
    return {"moe_layer_pattern": flags}
