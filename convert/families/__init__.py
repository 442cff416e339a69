"""Hugging Face model families: one table file each, read in both directions.

A new family is one new file with a `FAMILY`, and one entry in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..architecture import Architecture
from . import (
    bloom,
    deepseek_v3,
    falcon,
    glm4_moe,
    gpt2,
    gpt_neox,
    llama,
    megatron_bert,
    mistral,
    mixtral,
    mtt,
    mtt_seq2seq,
    nemotron,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from .family import Family

__all__ = ["FAMILIES", "Family", "exact_families"]

# The families of transformers in the order in which they are preferred.
FAMILIES: Mapping[str, Family] = {
    module.FAMILY.name: module.FAMILY
    for module in (
        mtt,
        mtt_seq2seq,
        llama,
        qwen2,
        qwen3,
        mistral,
        mixtral,
        qwen2_moe,
        qwen3_moe,
        glm4_moe,
        deepseek_v3,
        nemotron,
        gpt_neox,
        gpt2,
        bloom,
        falcon,
        megatron_bert,
    )
}


def exact_families(architecture: Architecture) -> tuple[str, ...]:
    """The families of transformers itself that compute exactly an architecture."""
    return tuple(
        name
        for name, family in FAMILIES.items()
        if family.code is None and not family.misfits(architecture)
    )
