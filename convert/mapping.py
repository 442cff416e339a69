"""Names to names, both ways, complete or refused.

A `Rule` connects templates; a `RuleTable` resolves concrete names before any tensor exists:

    {i}        a number (layer)          {p}        "weight" or "bias"
    {e}        a number (expert)
    {q,k,v}    one template each, in this order: `x.{a,b}` is the tuple `x.a`, `x.b`

    Rule("a.{i}.{p}", "b.{i}.{p}")                  rename
    Rule("a.{i}.{p}", "b.{i}.{x,y}.{p}", Split())   one to two; reversed: two to one
    Rule("a.{i}", "b.{i}", beside="c.{i}")          only in layers that have a c
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import cast

from .architecture import Architecture
from .boxes import Ints
from .errors import MappingError
from .ops import Op, Same
from .tensors import LazyTensor

_PLACEHOLDERS = {
    "i": r"(?P<i>0|[1-9][0-9]{0,6})",
    "e": r"(?P<e>0|[1-9][0-9]{0,6})",
    "p": r"(?P<p>weight|bias)",
}
_NOT_NEEDED = cast(Architecture, None)
_DIGITS = re.compile(r"\d+")
_ALTERNATIVES = re.compile(r"\{([^{}]*,[^{}]*)\}")


@dataclass(frozen=True)
class Rule:
    """One line of a table: source template, target template, and what happens in between.

    A `one_way` rule is a spelling that is read but never written: another line has the same target.
    A rule `beside` a name holds where that name is present too, one `unless` a name where it is
    not; both are templates that are spelled alike on either side.
    """

    source: str
    target: str
    op: Op = Same()
    one_way: bool = False
    beside: str | None = None
    unless: str | None = None

    @property
    def inverse(self) -> Rule:
        """The rule read from right to left."""
        return replace(self, source=self.target, target=self.source, op=self.op.inverse)

    def holds(self, values: Mapping[str, str], present: Collection[str]) -> bool:
        """Whether it applies under these placeholder values, among these names."""
        if self.beside is not None and self.names(self.beside, values)[0] not in present:
            return False
        return self.unless is None or self.names(self.unless, values)[0] not in present

    def names(self, template: str, values: Mapping[str, str]) -> tuple[str, ...]:
        """The concrete names of a template under the given placeholder values."""
        names = _expand(template)
        for placeholder, value in values.items():
            names = tuple(name.replace(f"{{{placeholder}}}", value) for name in names)
        return names


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
            for number, rule, values in self._rules_for(name, present):
                sources = rule.names(rule.source, values)
                targets = rule.names(rule.target, values)
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

    def count_known(self, names: Iterable[str]) -> int:
        """How many of these names have a rule."""
        names = list(names)
        present = set(names)
        return sum(any(True for _ in self._rules_for(name, present)) for name in names)

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

    def _rules_for(
        self, name: str, present: Collection[str]
    ) -> Iterator[tuple[int, Rule, Mapping[str, str]]]:
        """The rules that match a name among these, numbered, with the placeholders' values."""
        for number, rule, template in self._candidates.get(_shape_of(name), ()):
            hit = _pattern(template).fullmatch(name)
            if hit and rule.holds(hit.groupdict(), present):
                yield number, rule, hit.groupdict()

    @cached_property
    def _candidates(self) -> dict[str, list[tuple[int, Rule, str]]]:
        """The rules, each with a template, that a name may match, by it without its numbers."""
        found: dict[str, list[tuple[int, Rule, str]]] = defaultdict(list)
        for number, rule in enumerate(self.rules):
            for template in _expand(rule.source):
                shape = template.replace("{i}", "0").replace("{e}", "0")
                for kind in ("weight", "bias") if "{p}" in shape else ("",):
                    key = _shape_of(shape.replace("{p}", kind))
                    found[key].append((number, rule, template))
        return found

    def _places(self, match: Match) -> list[Ints]:
        """Where each target of a match stands among all."""
        number = self._numbers[match.rule]
        hit = _pattern(_expand(match.rule.source)[0]).fullmatch(match.sources[0])
        values = hit.groupdict() if hit else {}
        block, group = self._blocks[number]
        layer, expert = int(values.get("i", 0)), int(values.get("e", 0))
        is_bias = int(values.get("p") == "bias")
        return [
            (block, layer, group, expert, number, part, is_bias)
            for part in range(len(match.targets))
        ]

    @cached_property
    def _numbers(self) -> dict[Rule, int]:
        return {rule: number for number, rule in enumerate(self.rules)}

    @cached_property
    def _blocks(self) -> list[tuple[int, int]]:
        """Of each rule, the run of rules that go through layers, and that through experts."""
        blocks: list[tuple[int, int]] = []
        before: tuple[str, str | None] | None = None
        for number, rule in enumerate(self.rules):
            layers = rule.source.partition("{i}")[0] if "{i}" in rule.source else ""
            experts = layers if "{e}" in rule.source else None
            block, group = blocks[-1] if blocks else (-1, -1)
            if before is None or layers != before[0]:
                block += 1
            if experts is None or before is None or experts != before[1]:
                group = number
            blocks.append((block, group))
            before = layers, experts
        return blocks


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


@cache
def _expand(template: str) -> tuple[str, ...]:
    group = _ALTERNATIVES.search(template)
    if not group:
        return (template,)
    head, tail = template[: group.start()], template[group.end() :]
    return tuple(head + choice + tail for choice in group.group(1).split(","))


@cache  # of the hundreds in all tables a checkpoint needs a few
def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{([iep])\}", template)
    text = [re.escape(part) if k % 2 == 0 else _PLACEHOLDERS[part] for k, part in enumerate(parts)]
    return re.compile("".join(text))


def _shape_of(name: str) -> str:
    """A name with every number replaced, so that those of all layers and experts are one."""
    return _DIGITS.sub("0", name)
