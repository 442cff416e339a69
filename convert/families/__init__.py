"""Hugging Face model families: one table file each.

A family module has `NAME`, `rules(architecture)` and `config(architecture)`; a new family is one
new file and one entry in `FAMILIES`.
"""

from __future__ import annotations

from types import ModuleType

from . import mtt

FAMILIES: dict[str, ModuleType] = {mtt.NAME: mtt}
