"""How generations of Megatron spell parameter names: one table each, read in both directions.

A new generation is one new file with a `DIALECT`, and one entry in `DIALECTS`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from ..checkpoint import Shard
from ..errors import UnsupportedError
from ..mapping import shorten
from . import core_bert, core_local, core_te, deepspeed, gpt_neox, legacy, legacy_bert, legacy_t5
from .dialect import Dialect as Dialect

_NOT_YET = (
    (
        r"(?!decoder\.|mtp\.).*\.mlp\.(experts|router)\..*"
        r"|.*\.mlp\.(local_experts|deepspeed_moe)\..*",
        "a mixture of experts from before Megatron-Core 0.5",
    ),
    (r".*\.mlp\.router\.bias", "a router with a bias"),
    (r".*\.linear_qkv_down_proj\..*", "latent attention with one down projection"),
)
DIALECTS: tuple[Dialect, ...] = (
    core_te.DIALECT,
    core_local.DIALECT,
    legacy.DIALECT,
    legacy_bert.DIALECT,
    core_bert.DIALECT,
    legacy_t5.DIALECT,
    deepspeed.DIALECT,
    gpt_neox.DIALECT,
)
CORE = (core_te.DIALECT.name, core_local.DIALECT.name)
# Megatron-Core's `transformer_impl` -> the dialect that is written for it.
WRITABLE = {"transformer_engine": core_te, "local": core_local}


def detect(shards: Sequence[Shard]) -> Dialect:
    """The dialect that has rules for the most names of these shards.

    A name counts in each shard that has it: beside which others it is there decides whether a rule
    holds, and another stage's layer of the same number may have others.

    Raises:
        UnsupportedError: none has a rule for any of them, or they belong to a kind of model that
            mtt does not convert yet.
    """
    names = sorted({name for shard in shards for name in shard.tensors})
    for pattern, kind in _NOT_YET:
        if named := [name for name in names if re.fullmatch(pattern, name)]:
            raise UnsupportedError(
                f"the checkpoint has parameters of {kind}; mtt cannot convert those yet",
                found=shorten(named, 4),
                expected="a GPT, a T5 or a BERT without them",
                fix="leave them out where the model is trained; nothing is dropped silently",
            )

    def known(dialect: Dialect) -> int:
        return sum(dialect.known(shard.tensors) for shard in shards)

    dialect = max(DIALECTS, key=known)
    if not known(dialect):
        raise UnsupportedError(
            "no generation of Megatron that mtt knows spells parameters like this",
            found=shorten(names) or "no model tensors",
            expected="names like decoder.layers.0.self_attention.linear_qkv.weight",
        )
    return dialect


def canonical(dialect: Dialect, shards: Sequence[Shard]) -> list[Shard]:
    """The shards under canonical names, with layers numbered as in their files.

    Raises:
        MappingError: a name without a rule or with two, or a group of which a shard lacks a part.
    """
    return [replace(shard, tensors=dialect.rules.rename(shard.tensors)) for shard in shards]
