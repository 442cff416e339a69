"""How generations of Megatron spell parameter names: one table each, read in both directions.

A new generation is one new file with a `RULES` table, and one line in `DIALECTS`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import UnsupportedError
from ..mapping import RuleTable, shorten
from . import core_local, core_te, legacy

_NOT_YET = (
    (r"encoder\.layers\..*|.*\.(inter|cross)_attention\..*", "an encoder, as in T5"),
    (r"language_model\.(pooler|embedding\.tokentype_embeddings)\..*", "BERT"),
    (r".*\.mlp\.(experts|local_experts|router)\..*", "a mixture of experts"),
    (r"mtp\..*", "multi-token prediction"),
    (r".*\.mixer\..*", "Mamba layers"),
    (r".*\.self_attention\.linear_(q|kv)_.*", "multi-latent attention"),
    (r"language_model\.transformer\..*", "Megatron-LM before v2.1"),
)
DIALECTS = {"core_te": core_te.RULES, "core_local": core_local.RULES, "legacy": legacy.RULES}
# Megatron-Core's `transformer_impl` -> the dialect that is written for it.
WRITABLE = {"transformer_engine": core_te, "local": core_local}


def detect(names: Iterable[str]) -> tuple[str, RuleTable]:
    """The dialect that has rules for the most of these names.

    Raises:
        UnsupportedError: none has a rule for any of them, or they belong to a kind of model that
            mtt does not convert yet.
    """
    names = sorted(names)
    for pattern, kind in _NOT_YET:
        if named := [name for name in names if re.fullmatch(pattern, name)]:
            raise UnsupportedError(
                f"the checkpoint has parameters of {kind}; mtt cannot convert those yet",
                found=shorten(named, 4),
                expected="a dense GPT",
            )

    def known(table: RuleTable) -> int:
        patterns = [pattern for rule in table.rules for pattern in rule.patterns]
        return sum(any(pattern.fullmatch(name) for pattern in patterns) for name in names)

    dialect = max(DIALECTS, key=lambda name: known(DIALECTS[name]))
    if not known(DIALECTS[dialect]):
        raise UnsupportedError(
            "no generation of Megatron that mtt knows spells parameters like this",
            found=shorten(names) or "no model tensors",
            expected="names like decoder.layers.0.self_attention.linear_qkv.weight",
        )
    return dialect, DIALECTS[dialect]
