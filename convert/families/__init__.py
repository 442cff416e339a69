"""Hugging Face model families: one table file each.

A new family is one new file with the names of `Family`, and one entry in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ..architecture import Architecture
from ..mapping import RuleTable
from . import mtt


class Family(Protocol):
    """What a family module has.

    Attributes:
        NAME: the `model_type` in `config.json`.
        CAUSAL_LM: the class with a language-model head.
        AUTO_MAP: where the Auto classes find code that travels with the weights; empty for
            classes of transformers itself.
        CODE: the package whose modules travel with the weights, or None.
    """

    NAME: str
    CAUSAL_LM: str
    AUTO_MAP: Mapping[str, str]
    CODE: str | None

    def rules(self, architecture: Architecture) -> RuleTable:
        """The table for an architecture, canonical names on the left."""

    def config(self, architecture: Architecture) -> dict[str, object]:
        """The fields of `config.json` that describe an architecture."""


FAMILIES: Mapping[str, Family] = {mtt.NAME: mtt}
