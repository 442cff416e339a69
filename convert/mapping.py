"""Names to names, both ways, complete or refused.

A `Rule` connects templates; a `RuleTable` resolves concrete names before any tensor exists:

    {i}        a number (layer)          {p}        "weight" or "bias"
    {q,k,v}    one template each, in this order: `x.{a,b}` is the tuple `x.a`, `x.b`

    Rule("a.{i}.{p}", "b.{i}.{p}")                  rename
    Rule("a.{i}.{p}", "b.{i}.{x,y}.{p}", Split())   one to two; reversed: two to one
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from .architecture import Architecture
from .boxes import Ints
from .errors import MappingError
from .ops import Op, Same
from .tensors import LazyTensor

_PLACEHOLDERS = {"i": r"(?P<i>0|[1-9][0-9]{0,6})", "p": r"(?P<p>weight|bias)"}
_NOT_NEEDED = cast(Architecture, None)
_ALTERNATIVES = re.compile(r"\{([^{}]*,[^{}]*)\}")


@dataclass(frozen=True)
class Rule:
    """One line of a table: source template, target template, and what happens in between.

    A `one_way` rule is a spelling that is read but never written: another line has the same target.
    """

    source: str
    target: str
    op: Op = Same()
    one_way: bool = False

    @property
    def inverse(self) -> Rule:
        """The rule read from right to left."""
        return Rule(self.target, self.source, self.op.inverse)

    @cached_property
    def patterns(self) -> tuple[re.Pattern[str], ...]:
        """One pattern per source template."""
        return tuple(_pattern(template) for template in _expand(self.source))

    def names(self, template: str, values: Mapping[str, str]) -> tuple[str, ...]:
        """The concrete names of a template under the given placeholder values."""
        return tuple(
            name.replace("{i}", values.get("i", "")).replace("{p}", values.get("p", ""))
            for name in _expand(template)
        )


@dataclass(frozen=True)
class Match:
    """A rule applied to concrete names."""

    rule: Rule
    sources: tuple[str, ...]
    targets: tuple[str, ...]


class RuleTable:
    """Rules that together account for every name of a model."""

    def __init__(self, *rules: Rule) -> None:
        self.rules = rules

    @cached_property
    def inverse(self) -> RuleTable:
        """The same table from right to left."""
        return RuleTable(*(rule.inverse for rule in self.rules if not rule.one_way))

    def resolve(self, names: Iterable[str]) -> tuple[Match, ...]:
        """Match every name exactly once.

        Raises:
            MappingError: names without a rule or with two, groups with a member missing, or two
                names that would become one.
        """
        names = list(names)
        present = set(names)
        matches: dict[tuple[int, tuple[str, ...]], Match] = {}
        unmatched, twice, partial = [], [], []
        for name in names:
            found = []
            for number, rule in enumerate(self.rules):
                for pattern in rule.patterns:
                    if hit := pattern.fullmatch(name):
                        sources = rule.names(rule.source, hit.groupdict())
                        targets = rule.names(rule.target, hit.groupdict())
                        found.append(((number, sources), Match(rule, sources, targets)))
            if not found:
                unmatched.append(name)
            elif len(found) > 1:
                twice.append(name)
            elif missing := [s for s in found[0][1].sources if s not in present]:
                partial.append(f"{name} (without {', '.join(missing)})")
            else:
                matches.setdefault(*found[0])
        counts = Counter(target for match in matches.values() for target in match.targets)
        collisions = sorted(target for target, count in counts.items() if count > 1)
        _refuse("tensors without a rule", unmatched)
        _refuse("tensors matched by more than one rule", twice)
        _refuse("tensors that stand alone where a group is needed", partial)
        _refuse("tensors that several sources would become", collisions)
        return tuple(matches.values())

    def rename(self, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """`apply`, for a table whose ops need no architecture.

        Raises:
            MappingError: see `resolve`.
        """
        result: dict[str, LazyTensor] = {}
        for match in self.resolve(tensors):
            sources = tuple(tensors[name] for name in match.sources)
            parts = match.rule.op.apply(sources, _NOT_NEEDED)
            result.update(zip(match.targets, parts, strict=True))
        return result

    def apply(
        self, tensors: Mapping[str, LazyTensor], architecture: Architecture
    ) -> dict[str, LazyTensor]:
        """Rename and re-lay all tensors; nothing is read.

        Returns:
            Tensors in the order of the table: layer by layer, and in a layer rule by rule.

        Raises:
            MappingError: see `resolve`.
        """
        result: list[tuple[Ints, str, LazyTensor]] = []
        for match in self.resolve(tensors):
            parts = match.rule.op.apply(tuple(tensors[s] for s in match.sources), architecture)
            places = self._places(match)
            result.extend(zip(places, match.targets, parts, strict=True))
        return {name: tensor for _, name, tensor in sorted(result, key=lambda item: item[0])}

    def _places(self, match: Match) -> list[Ints]:
        """Where each target of a match stands among all."""
        number, (first, last) = self._numbers[match.rule], self._layer_rules
        hit = match.rule.patterns[0].fullmatch(match.sources[0])
        values = hit.groupdict() if hit else {}
        block = 0 if number < first else 1 if number <= last else 2
        layer, is_bias = int(values.get("i", 0)), int(values.get("p") == "bias")
        return [(block, layer, number, part, is_bias) for part in range(len(match.targets))]

    @cached_property
    def _numbers(self) -> dict[Rule, int]:
        return {rule: number for number, rule in enumerate(self.rules)}

    @cached_property
    def _layer_rules(self) -> tuple[int, int]:
        """The first and the last rule of a layer."""
        numbers = [n for n, rule in enumerate(self.rules) if "{i}" in rule.source]
        return (numbers[0], numbers[-1]) if numbers else (len(self.rules), -1)


def shorten(names: Iterable[str], limit: int = 8) -> str:
    """A list of names for a message: the first few, and how many more."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _refuse(what: str, names: list[str]) -> None:
    if names:
        raise MappingError(
            f"{len(names)} {what}; nothing was written",
            found=shorten(names),
            expected="every tensor accounted for exactly once",
            fix="report the names above if a released Megatron wrote them",
        )


def _expand(template: str) -> tuple[str, ...]:
    group = _ALTERNATIVES.search(template)
    if not group:
        return (template,)
    head, tail = template[: group.start()], template[group.end() :]
    return tuple(head + choice + tail for choice in group.group(1).split(","))


def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{([ip])\}", template)
    text = [re.escape(part) if k % 2 == 0 else _PLACEHOLDERS[part] for k, part in enumerate(parts)]
    return re.compile("".join(text))
