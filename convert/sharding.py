"""One process's part of a model: the plan cut to the slices that transformers' sharding asks for.

The model is built without values and distributed by transformers itself, which says what each
process holds. Everything else follows from the plan: a slice of a lazy tensor is a lazy tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .checkpoint import Replicas
from .errors import InconsistentError, LayoutError, UsageError
from .plan import ConversionPlan
from .replicas import compare
from .seq2seq import check_stages
from .tensors import LazyTensor, concat

if TYPE_CHECKING:
    import torch

    from modeling_mtt import (
        MTTConfig,
        MTTForCausalLM,
        MTTForConditionalGeneration,
        MTTSeq2SeqConfig,
    )

    Model = MTTForCausalLM | MTTForConditionalGeneration


def check_layout(config: MTTConfig | MTTSeq2SeqConfig, tp_size: int, pp_size: int) -> None:
    """Refuse a layout the model cannot have; nothing is read and no process is asked.

    Raises:
        LayoutError: names the sizes that work.
    """
    from modeling_mtt.parallel_mtt import tensor_parallel_sizes

    if tp_size < 1 or pp_size < 1:
        raise UsageError(
            "no processes", found=f"TP{tp_size} x PP{pp_size}", expected="sizes of at least 1"
        )
    if config.is_encoder_decoder:
        check_stages(pp_size)
    sizes = tensor_parallel_sizes(config)
    if tp_size not in sizes:
        raise LayoutError(
            f"the model cannot be cut into {tp_size} equal parts",
            found=f"{config.num_attention_heads} query heads, {config.num_key_value_heads} key and "
            f"value heads, an intermediate size of {config.intermediate_size}",
            expected=f"tp {', '.join(map(str, sizes))}",
            fix=f"--tp {max(size for size in sizes if size <= tp_size)}",
        )


def compare_together(replicas: Iterable[Replicas], policy: str) -> tuple[str, ...]:
    """Compare copies as `replicas.compare` does, each process an equal part of their rows.

    Raises:
        InconsistentError: on all processes, if one of them found a difference.
    """
    import torch.distributed as dist

    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    found: tuple[str, ...] = ()
    error = None
    try:
        found = compare([_part(group, rank, num_ranks) for group in replicas], policy)
    except InconsistentError as difference:
        error = difference
    everywhere: list[Any] = [None] * num_ranks
    dist.all_gather_object(everywhere, (found, error))
    for _, error in everywhere:
        if error is not None:
            raise error
    return tuple(dict.fromkeys(warning for warnings, _ in everywhere for warning in warnings))


def _part(group: Replicas, rank: int, num_ranks: int) -> Replicas:
    """The rows of a group that one process compares; copies of unlike shapes stay whole."""
    shapes = {tensor.shape for tensor in group.tensors}
    if len(shapes) > 1 or not group.tensors[0].shape:
        return group
    rows = group.tensors[0].shape[0]
    start, end = (rows * part // num_ranks for part in (rank, rank + 1))
    return replace(group, tensors=tuple(t.narrow(0, start, end - start) for t in group.tensors))


def local_plan(plan: ConversionPlan, model: Model) -> ConversionPlan:
    """The plan with the tensors this process holds, cut to its slices."""
    parameters = model.state_dict()
    files = tuple(
        replace(
            file,
            tensors=tuple(
                replace(tensor, source=_slice(tensor.source, parameters[tensor.name]))
                for tensor in file.tensors
                if tensor.name in parameters
            ),
        )
        for file in plan.files
    )
    return replace(plan, files=files)


def _slice(source: LazyTensor, parameter: torch.Tensor) -> LazyTensor:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    from torch.distributed.tensor.placement_types import _StridedShard

    if not isinstance(parameter, DTensor):
        return source
    for dim, placement in enumerate(parameter.placements):
        # Gate and up as one tensor: a process has its part of each.
        if isinstance(placement, _StridedShard) and placement.split_factor != 1:
            assert len(parameter.placements) == 1, parameter.placements
            mesh, axis, blocks = parameter.device_mesh, placement.dim, int(placement.split_factor)
            count, rank = mesh.size(dim), mesh.get_local_rank(dim)
            return concat([b.chunk(count, axis)[rank] for b in source.chunk(blocks, axis)], axis)
    sizes, starts = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    for axis, (size, start) in enumerate(zip(sizes, starts, strict=True)):
        source = source.narrow(axis, start, size)
    return source


def placed(
    tensors: Mapping[str, torch.Tensor], model: Model, device: torch.device
) -> dict[str, torch.Tensor]:
    """Local slices as the distributed tensors the model has places for."""
    from torch.distributed.tensor import DTensor

    parameters = model.state_dict()
    result = {}
    for name, local in tensors.items():
        parameter, local = parameters[name], local.to(device)
        if isinstance(parameter, DTensor):
            local = DTensor.from_local(
                local,
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
        result[name] = local
    return result
