"""A plan whose tensors are those of a model in memory, where experts of a layer are one tensor.

    files      mlp.experts.E.{gate_proj,up_proj,down_proj}.weight    a matrix for each expert
    in memory  mlp.experts.gate_up_proj    [experts, gate rows and up rows, columns]
               mlp.experts.up_proj         [experts, rows, columns], without gates
               mlp.experts.down_proj       [experts, rows, columns]; biases end in _bias

(Source: `MTTExperts` and its conversion mapping, modeling_mtt/moe_mtt.py.)
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from .plan import ConversionPlan, PlannedFile, PlannedTensor
from .tensors import LazyTensor, concat, stack

_EXPERT = re.compile(
    r"(?P<prefix>.+\.mlp\.experts\.)(?P<e>\d+)\.(?P<kind>gate|up|down)_proj\.(?P<end>weight|bias)"
)
_GATE, _UP = "gate", "up"


def with_experts_together(plan: ConversionPlan) -> ConversionPlan:
    """The plan with one tensor where files have a matrix for each expert."""
    groups: dict[tuple[str, str], dict[tuple[str, int], PlannedTensor]] = defaultdict(dict)
    files: list[PlannedFile] = []
    for file in plan.files:
        kept = []
        for tensor in file.tensors:
            if hit := _EXPERT.fullmatch(tensor.name):
                kind = "down" if hit["kind"] == "down" else _UP
                end = "_bias" if hit["end"] == "bias" else ""
                groups[hit["prefix"], kind + end][hit["kind"], int(hit["e"])] = tensor
            else:
                kept.append(tensor)
        files.append(replace(file, tensors=tuple(kept)))
    if not groups:
        return plan
    together = [_together(prefix, name, parts) for (prefix, name), parts in groups.items()]
    files.append(PlannedFile("experts", (), tuple(together)))
    return replace(plan, files=tuple(files))


def _together(prefix: str, name: str, parts: dict[tuple[str, int], PlannedTensor]) -> PlannedTensor:
    kind, _, bias = name.partition("_")
    numbers = sorted({number for _, number in parts})
    kinds = [_GATE, _UP] if (_GATE, numbers[0]) in parts else [kind]
    experts = [[parts[one, number].source for one in kinds] for number in numbers]
    whole = f"{prefix}{'_'.join(kinds)}_proj{'_' + bias if bias else ''}"
    dtype = parts[kinds[0], numbers[0]].dtype
    return PlannedTensor(whole, stack([_joined(one) for one in experts]), dtype, 0)


def _joined(parts: Sequence[LazyTensor]) -> LazyTensor:
    return parts[0] if len(parts) == 1 else concat(parts)
