"""Layers that predict further tokens as DeepSeek-V3's files have them: numbered after the last.

    model.layers.{num_hidden_layers + k}.enorm, .hnorm, .eh_proj     the two inputs, and one of them
                                        .self_attn, .mlp, ...        a layer like the last one
                                        .shared_head.norm            the norm before the head
                                        .embed_tokens                a copy of the embedding
                                        .shared_head.head            a copy of the head

Megatron keeps no copies: they must be equal when they are read, and are written again, as vLLM
takes the embedding of these layers from there (DeepSeekMTP.load_weights); SGLang passes them over.
transformers' own classes skip these layers unless asked for them, and `save_pretrained` leaves them
out without changing the number in `config.json`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

from ..architecture import Architecture
from ..mapping import Rule, RuleTable
from .fields import Config, number
from .names import decoder_rules

_LAYERS = "decoder.layers.{i}."
_PARTS = {
    "enorm.{p}": "enorm.{p}",
    "hnorm.{p}": "hnorm.{p}",
    "eh_proj.weight": "eh_proj.weight",
    "final_layernorm.{p}": "shared_head.norm.{p}",
}
_NUMBER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class FurtherTokens:
    """`num_nextn_predict_layers`."""

    config: str = "num_nextn_predict_layers"
    other: str = "num_mtp_layers"

    @property
    def names(self) -> tuple[str, ...]:
        """The field of the files, and what transformers 5 calls it in memory."""
        return (self.config, self.other)

    def read(self, config: Config) -> dict[str, object]:
        """How many there are, if their weights are there; one where nothing is said."""
        value = next((config[n] for n in self.names if config.get(n) is not None), 1)
        return {"mtp_num_layers": number(self.config, value, "int")}

    def write(self, architecture: Architecture) -> dict[str, object]:
        """How many there are."""
        return {self.config: architecture.mtp_num_layers}


def numbered_rules(architecture: Architecture) -> RuleTable:
    """The names most classes share, and those of layers after the last."""
    a = architecture
    return _table(decoder_rules(a), a.num_layers, a.mtp_num_layers)


@cache
def _table(table: RuleTable, num_layers: int, mtp_num_layers: int) -> RuleTable:
    if not mtp_num_layers:
        return table
    layer = [rule for rule in table.rules if rule.source.startswith(_LAYERS)]
    first = table.rules.index(layer[0])
    # What has an `eh_proj` beside it belongs to one of the layers after the last.
    plain = (replace(rule, unless="model.layers.{i}.eh_proj.weight") for rule in layer)
    return RuleTable(
        *table.rules[:first],
        *plain,
        *(r for k in range(mtp_num_layers) for r in _further(layer, k, num_layers + k)),
        *table.rules[first + len(layer) :],
    )


def _further(layer: list[Rule], k: int, position: int) -> Iterator[Rule]:
    """The rules of one of them, which stands at a position among all layers."""
    ours, theirs = f"mtp.layers.{k}.", f"model.layers.{position}."
    for one, other in _PARTS.items():
        yield Rule(ours + one, theirs + other)
    for rule in layer:
        yield replace(
            rule,
            source=rule.source.replace(_LAYERS, f"{ours}transformer_layer."),
            target=rule.target.replace("model.layers.{i}.", theirs),
        )


def copies(architecture: Architecture) -> Mapping[str, str]:
    """What is stored more than once: name of the copy -> name of the tensor."""
    embedding = "model.embed_tokens.weight"
    head = "lm_head.weight" if architecture.untie_embeddings_and_output_weights else embedding
    found: dict[str, str] = {}
    for k in range(architecture.mtp_num_layers):
        layer = f"model.layers.{architecture.num_layers + k}"
        found |= {
            f"{layer}.embed_tokens.weight": embedding,
            f"{layer}.shared_head.head.weight": head,
        }
    return found


def as_stored(architecture: Architecture, names: Collection[str]) -> Architecture:
    """The architecture without layers that `config.json` announces and no file has."""
    last = max((int(hit[1]) for name in names if (hit := _NUMBER.search(name))), default=0)
    if last >= architecture.num_layers:
        return architecture
    return replace(architecture, mtp_num_layers=0)
