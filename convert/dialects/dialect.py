"""What a generation of Megatron is: its names, and what its names alone do not say."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ..mapping import RuleTable

Arguments = Mapping[str, object]
Shapes = Mapping[str, tuple[int, ...]]
Translated = tuple[dict[str, object], tuple[str, ...]]
HEAD, BLOCK, ELEMENT, PAIRED = "head", "block", "element", "paired"


@dataclass(frozen=True)
class Dialect:
    """One generation.

    Attributes:
        name: what it is called here.
        kind: `kind` of the architectures whose names these are.
        rules: its names to canonical ones. Ops in it need no architecture: they join or exchange
            whole tensors of one rank.
        generations: pattern of a name -> which releases spell it so; the first that is there
            counts.
        is_core: whether Megatron-Core's GPT was trained, or one whose arguments mean the same, and
            not Megatron-LM's own.
        orders: lowest `checkpoint_version` -> order of the rows of `query_key_value` on each
            tensor-parallel rank (see `row_order.py`), the newest first.
        grouped_order: the order in models with fewer key than query heads, if it is another.
        ordered_by_names: (pattern, order): where a name matches, rows are in that order whatever
            the version.
        ordered_by_arguments: argument -> order: code that has the argument keeps rows in that
            order whatever it stamps.
        up_first: a pattern of names: where one matches, ranks have a gated MLP as [up | gate].
        tied_copy: a pattern of names that only copies of a tied embedding have.
        arguments: what its arguments are in Megatron's words, given shapes of whole tensors by
            canonical name and what the user says, with notes; None where they are Megatron's own.
        summed: canonical names with `{i}` for the layer: tensor-parallel ranks hold parts that
            are added, where Megatron's hold copies.
    """

    name: str
    rules: RuleTable
    generations: tuple[tuple[str, str], ...]
    kind: str = "gpt"
    is_core: bool = False
    orders: tuple[tuple[float, str], ...] = ((0.0, HEAD),)
    grouped_order: str | None = None
    ordered_by_names: tuple[tuple[str, str], ...] = ()
    ordered_by_arguments: Mapping[str, str] = field(default_factory=dict)
    up_first: str | None = None
    tied_copy: str | None = None
    arguments: Callable[[Arguments, Shapes, Arguments], Translated] | None = None
    summed: frozenset[str] = frozenset()

    def has_up_first(self, names: Iterable[str]) -> bool:
        """Whether ranks have a gated MLP as [up | gate]."""
        return _any_matches(self.up_first, names)

    def has_tied_copy(self, names: Iterable[str]) -> bool:
        """Whether the output layer is a copy of the embedding, by its name."""
        return _any_matches(self.tied_copy, names)

    def known(self, names: Iterable[str]) -> int:
        """How many of the names have a rule."""
        return self.rules.count_known(names)

    def generation(self, names: Iterable[str]) -> tuple[str, str]:
        """Which releases write such names, and a name that shows it."""
        names = sorted(names)
        for pattern, releases in self.generations:
            if shown := next((name for name in names if re.fullmatch(pattern, name)), None):
                return releases, shown
        return self.name, names[0]

    def qkv_order(
        self,
        names: Iterable[str],
        args: Arguments,
        version: float,
        *,
        is_stamped: bool,
        grouped: bool,
    ) -> tuple[str, str]:
        """The order of the rows of `query_key_value` on a rank, and what says so.

        Args:
            names: as the files have them.
            args: the checkpoint's arguments.
            version: `checkpoint_version`, or what its absence stands for.
            is_stamped: whether it is there.
            grouped: whether there are fewer key than query heads.
        """
        names = sorted(names)
        for pattern, order in self.ordered_by_names:
            if shown := next((name for name in names if re.fullmatch(pattern, name)), None):
                return order, shown
        for name, order in self.ordered_by_arguments.items():
            if name in args:
                return order, f"argument {name}"
        if grouped and self.grouped_order:
            return self.grouped_order, f"{self.name} with query groups"
        stamp = f"checkpoint_version {version:.1f}" if is_stamped else "no checkpoint_version"
        return next(order for lowest, order in self.orders if version >= lowest), stamp


def _any_matches(pattern: str | None, names: Iterable[str]) -> bool:
    return pattern is not None and any(re.fullmatch(pattern, name) for name in names)
