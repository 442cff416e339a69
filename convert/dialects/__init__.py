"""How generations of Megatron spell parameter names: one table each, read in both directions.

A new generation is one new file with a `RULES` table, and one line in `DIALECTS`.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import UnsupportedError
from ..mapping import RuleTable, shorten
from . import core_local, core_te, legacy

DIALECTS = {"core_te": core_te.RULES, "core_local": core_local.RULES, "legacy": legacy.RULES}


def detect(names: Iterable[str]) -> tuple[str, RuleTable]:
    """The dialect that has rules for the most of these names.

    Raises:
        UnsupportedError: none has a rule for any of them.
    """
    names = list(names)

    def known(table: RuleTable) -> int:
        patterns = [pattern for rule in table.rules for pattern in rule.patterns]
        return sum(any(pattern.fullmatch(name) for pattern in patterns) for name in names)

    dialect = max(DIALECTS, key=lambda name: known(DIALECTS[name]))
    if not known(DIALECTS[dialect]):
        raise UnsupportedError(
            "no generation of Megatron that mtt knows spells parameters like this",
            found=shorten(sorted(names)) or "no model tensors",
            expected="names like decoder.layers.0.self_attention.linear_qkv.weight",
        )
    return dialect, DIALECTS[dialect]
