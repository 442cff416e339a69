"""Experts in one tensor per layer, as transformers 5 has them in memory.

    mlp.experts.gate_up_proj    [experts, gate and up rows, columns]
    mlp.experts.down_proj       [experts, rows, columns]

`save_pretrained(..., save_original_format=False)` writes them so; everything else, and everyone who
reads, has a matrix for each expert. mtt reads both and writes the latter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..architecture import Architecture
from ..errors import CorruptError
from ..tensors import LazyTensor
from .names import ExpertNames

_PART = re.compile(r"(.*layers\.\d+\.)mlp\.(.+)")
# Which of `ExpertNames.matrices` are in it.
_STACKS = {"experts.gate_up_proj": (0, 1), "experts.down_proj": (2,)}


def unstacked(
    tensors: Mapping[str, LazyTensor], architecture: Architecture, names: ExpertNames
) -> dict[str, LazyTensor]:
    """Tensors under the names of files, whichever they had.

    Args:
        tensors: all tensors of a folder, by name; nothing is read.
        architecture: says how many experts there are.
        names: what files call experts.

    Raises:
        CorruptError: a tensor of another shape than the experts have, or an expert twice.
    """
    found: dict[str, LazyTensor] = {}
    module = names.router.partition(".")[0]
    for name, tensor in tensors.items():
        hit = _PART.fullmatch(name)
        stack = _STACKS.get(hit[2]) if hit else None
        if hit is None or stack is None:
            parts = {f"{hit[1]}{module}.{hit[2]}" if hit else name: tensor}
        else:
            matrices = tuple(names.matrices[number] for number in stack)
            parts = _experts(name, tensor, architecture, matrices, hit[1] + names.expert)
        if twice := parts.keys() & found.keys():
            raise CorruptError(
                "experts are stored twice",
                found=f"{min(twice)}, and the same in {name}",
                expected="one of them",
                fix="remove the files of one of the two",
            )
        found |= parts
    return found


def _experts(
    name: str, tensor: LazyTensor, a: Architecture, matrices: tuple[str, ...], expert: str
) -> dict[str, LazyTensor]:
    count = len(matrices)
    if len(tensor.shape) != 3 or tensor.shape[0] != a.num_experts or tensor.shape[1] % count:
        raise CorruptError(
            f"{name} has another shape than config.json says",
            found=str(list(tensor.shape)),
            expected=f"{a.num_experts} experts, each a matrix",
            fix="copy the folder again, or correct config.json if it belongs to another model",
        )
    return {
        f"{expert.replace('{e}', str(number))}.{matrix}.weight": part
        for number, one in enumerate(tensor.unstack())
        for matrix, part in zip(matrices, one.chunk(count), strict=True)
    }
