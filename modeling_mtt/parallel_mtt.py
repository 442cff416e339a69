# Copyright 2026 The mtt authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What transformers' tensor and pipeline parallelism lacks, added from outside.

Key and value heads that several processes share; vocabularies that do not divide evenly, for
transformers before 5.23; tensor parallelism within pipeline stages; weights of a pipeline gathered
to be saved; and one stream of random numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers.distributed import DistributedConfig
from transformers.distributed.pipeline_parallel import apply_pipeline_parallelism
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, ColwiseParallel

from .configuration_mtt import MTTConfig
from .plans_mtt import DISPATCHES

# transformers < 5.23 can neither cut rows unevenly nor combine kinds of parallelism.
_CUTS_UNEVENLY = hasattr(ColwiseParallel, "_from_local_last_dim_shard")
_COMBINES = hasattr(DistributedConfig, "dp_size")


def check_combination(distributed_config: DistributedConfig | dict) -> None:
    """Refuse kinds of parallelism that the installed transformers cannot combine.

    Raises:
        `ValueError`: says what works.
    """
    if isinstance(distributed_config, dict):
        distributed_config = DistributedConfig.from_dict(distributed_config)
    sizes = {
        name: getattr(distributed_config, name) or 1 for name in ("tp_size", "pp_size", "fsdp_size")
    }
    given = " and ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    if not _COMBINES and sum(size > 1 for size in sizes.values()) > 1:
        raise ValueError(
            f"This version of transformers has one kind of parallelism at a time: found {given}. "
            "Use one of them, or transformers 5.23 or newer."
        )


def check_parallel_sizes(config: MTTConfig, distributed_config: DistributedConfig) -> None:
    """Refuse sizes that the model does not divide by, before a weight is read.

    Raises:
        `ValueError`: names the sizes that work.
    """
    tp_size, pp_size = distributed_config.tp_size or 1, distributed_config.pp_size or 1
    ep_size = expert_parallel_size(distributed_config)
    if pp_size > 1 and getattr(config, "num_nextn_predict_layers", 0):
        raise ValueError(
            "Heads that predict further tokens need the embedding and the head in one process: "
            f"found pp_size {pp_size} and num_nextn_predict_layers "
            f"{config.num_nextn_predict_layers}. "
            "Load the model with num_nextn_predict_layers=0, or with pp_size 1."
        )
    if ep_size > 1:
        _check_expert_parallel_size(config, ep_size)
    if ep_size > 1 and (not DISPATCHES or distributed_config.tp_plan == {}):
        return  # whole experts, and nothing else is cut
    sizes = tensor_parallel_sizes(config, whole_experts=ep_size > 1)
    if tp_size not in sizes:
        raise ValueError(
            f"The model cannot be cut into tp_size {tp_size} equal parts: it has "
            f"{config.num_attention_heads} query heads, {config.num_key_value_heads} key and value "
            f"heads and an intermediate size of {config.intermediate_size}"
            f"{'' if ep_size > 1 else _describe_experts(config)}. "
            f"Sizes that work: {', '.join(map(str, sizes))}."
        )
    if shares_heads(config, tp_size) and (distributed_config.fsdp_size or 1) > 1:
        own = [size for size in sizes if not shares_heads(config, size)]
        raise ValueError(
            f"With FSDP every process needs key and value heads of its own: found tp_size "
            f"{tp_size} and {config.num_key_value_heads} heads. "
            f"Sizes that work: {', '.join(map(str, own))}."
        )
    if pp_size > 1 and dist.is_initialized() and dist.get_world_size() % (tp_size * pp_size):
        raise ValueError(
            f"tp_size {tp_size} and pp_size {pp_size} need {tp_size * pp_size} processes: found "
            f"{dist.get_world_size()}."
        )


def check_continuous_batching(
    config: MTTConfig, distributed_config: DistributedConfig | None
) -> None:
    """Refuse layouts whose heads or layers the paged cache of transformers cannot follow.

    Raises:
        `ValueError`: names the sizes that work.
    """
    if distributed_config is None:
        return
    tp_size, pp_size = distributed_config.tp_size or 1, distributed_config.pp_size or 1
    sizes = tensor_parallel_sizes(config, expert_parallel_size(distributed_config) > 1)
    own = [size for size in sizes if not shares_heads(config, size)]
    if getattr(config, "kv_lora_rank", None) is not None:
        own = [1]  # transformers takes heads for cut where there is a `k_proj`
    if pp_size > 1 or tp_size not in own:
        raise ValueError(
            f"generate_batch() gives every process key and value heads of its own, in all layers: "
            f"found tp_size {tp_size}, pp_size {pp_size} and {config.num_key_value_heads} heads. "
            f"Sizes that work: tp_size {', '.join(map(str, own))} with pp_size 1. "
            "generate() works with these."
        )


def tensor_parallel_sizes(config: MTTConfig, whole_experts: bool = False) -> list[int]:
    """Return the sizes of tensor parallelism that give every process the same share.

    Args:
        config (`MTTConfig`): the model's.
        whole_experts (`bool`): whether experts are not cut, but dealt.
    """
    num_heads, num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
    assert num_key_value_heads is not None
    even, uneven = [], [config.intermediate_size]
    if getattr(config, "num_experts", None) is not None:
        if "dense" not in config.types_of_mlps():
            uneven = []
        if not whole_experts:
            # A bias of an expert's output would be added once by each process.
            even.append(1 if config.mlp_bias else config.moe_intermediate_size)
        uneven.append(config.shared_expert_intermediate_size or 0)
    widths = [width for width in even + ([] if _CUTS_UNEVENLY else uneven) if width is not None]
    return [
        size
        for size in range(1, num_heads + 1)
        if num_heads % size == 0
        and (num_key_value_heads % size == 0 or size % num_key_value_heads == 0)
        and all(width % size == 0 for width in widths)
    ]


def _describe_experts(config: MTTConfig) -> str:
    if getattr(config, "num_experts", None) is None:
        return ""
    biases = " and have biases, which only whole ones can" if config.mlp_bias else ""
    return f"; experts are {config.moe_intermediate_size} wide{biases}"


def expert_parallelism(size: int) -> DistributedConfig:
    """Return a configuration with which each of `size` processes holds whole experts.

    With transformers 5.23 all else is cut as by `tp_size`; before, all else is whole on each.
    """
    if DISPATCHES:
        return DistributedConfig(tp_size=size, ep_size=size)
    return DistributedConfig(tp_size=size, enable_expert_parallel=True)


def expert_parallel_size(distributed_config: DistributedConfig) -> int:
    """Return among how many processes experts are dealt."""
    if DISPATCHES:
        return distributed_config.ep_size or 1
    return (distributed_config.tp_size or 1) if distributed_config.enable_expert_parallel else 1


def _check_expert_parallel_size(config: MTTConfig, ep_size: int) -> None:
    num_experts = getattr(config, "num_experts", None)
    if num_experts is None:
        raise ValueError(
            f"Expert parallelism deals out experts: found {ep_size} processes, and a model that "
            "has no experts. Use tp_size alone."
        )
    if num_experts % ep_size:
        sizes = [size for size in range(1, num_experts + 1) if num_experts % size == 0]
        raise ValueError(
            f"{num_experts} experts cannot be dealt out to {ep_size} processes evenly. "
            f"Sizes that work: {', '.join(map(str, sizes))}."
        )


def shares_heads(config: MTTConfig, tp_size: int) -> bool:
    """Tell whether several processes use the same key and value head."""
    assert config.num_key_value_heads is not None
    return tp_size > config.num_key_value_heads


def parallel_plan(
    plan: dict[str, str], config: MTTConfig, distributed_config: DistributedConfig
) -> dict[str, str]:
    """Return a tensor-parallel plan with our own styles where those of transformers do not do.

    Called by all processes at once: they form groups.
    """
    tp_size = distributed_config.tp_size
    own = {}
    if shares_heads(config, tp_size):
        num_heads = config.num_key_value_heads
        assert num_heads is not None
        others = dist.get_world_size() // tp_size
        mesh = init_device_mesh(
            "cuda" if dist.get_backend() == "nccl" else "cpu",
            (others, num_heads, tp_size // num_heads),
            mesh_dim_names=("others", "heads", "copies"),
        )["heads", "copies"]
        style = "mtt_shared_heads"
        ALL_PARALLEL_STYLES.register(style, SharedHeadsParallel(mesh))
        for name in plan:
            if name.endswith(("_attn.k_proj", "_attn.v_proj")) and plan[name] == "colwise":
                own[name] = style
    if not _CUTS_UNEVENLY and plan.get("lm_head") == "colwise_gather_output":
        own["lm_head"] = "mtt_gathered_head"
    return {**plan, **own}


def cut_stage(model: nn.Module, mesh: DeviceMesh) -> set[str]:
    """Drop what other pipeline stages hold; doing so again changes nothing.

    Returns:
        The names of modules and parameters that are left.
    """
    apply_pipeline_parallelism(model, mesh)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return names | {
        name for name, module in model.named_modules() if not isinstance(module, nn.Identity)
    }


class SharedHeadsParallel(ColwiseParallel):
    """Key or value projection where more processes share the work than there are heads.

    Neighbouring processes have neighbouring query heads, which is why each holds just one key and
    value head: process `r` of `n` holds head `r * heads // n`, and `n // heads` hold the same one.

    Args:
        mesh (`DeviceMesh`): the processes as `[heads, copies]`.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        """Leave one head of a parameter that has no values yet."""
        values = module._parameters[param]
        if values is not None:
            placed = distribute_tensor(
                values, self.mesh, [Shard(0), Replicate()], src_data_rank=None
            )
            module._parameters[param] = nn.Parameter(placed, requires_grad=values.requires_grad)

    def transform_inputs_pre_forward(
        self, module: nn.Module, args: tuple, kwargs: dict, mesh: DeviceMesh
    ) -> tuple[tuple, dict]:
        """Take whole states, whose gradients come from all processes."""
        hidden_states = args[0]
        if isinstance(hidden_states, DTensor):
            hidden_states = hidden_states.full_tensor()
        return (_SumGradients.apply(hidden_states, mesh.get_group()), *args[1:]), kwargs

    @contextmanager
    def context_around_forward(self, module: nn.Module, mesh: DeviceMesh) -> Iterator[None]:
        """Compute with the local head."""
        own: dict[str, Any] = dict(module._parameters)
        group = self.mesh.get_group("copies")
        for name, values in own.items():
            if isinstance(values, DTensor):
                # A head's gradient comes from the query heads of all processes that share it.
                module._parameters[name] = _SumGradients.apply(values.to_local(), group)
        try:
            yield
        finally:
            module._parameters.update(own)

    def transform_output_post_forward(
        self, module: nn.Module, output: torch.Tensor, mesh: DeviceMesh
    ) -> torch.Tensor:
        """Return the local head."""
        return output


class GatheredHeadParallel(ColwiseParallel):
    """`colwise_gather_output` for any number of rows, which transformers has from 5.23 on."""

    def __init__(self) -> None:
        super().__init__(input_layouts=Replicate(), output_layouts=Replicate())

    def validate_param(self, *args: Any, **kwargs: Any) -> None:
        """Accept any number of rows."""

    def transform_output_post_forward(
        self, module: Any, output: torch.Tensor, mesh: DeviceMesh
    ) -> torch.Tensor:
        """Gather the columns, of which the last process may have fewer."""
        if not isinstance(output, DTensor):
            shape = torch.Size((*output.shape[:-1], module.out_features))
            stride = torch.empty(shape, device="meta").stride()
            output = DTensor.from_local(
                output, mesh, [Shard(-1)], run_check=False, shape=shape, stride=stride
            )
        return super().transform_output_post_forward(module, output, mesh)


ALL_PARALLEL_STYLES.register("mtt_gathered_head", GatheredHeadParallel())


class _SumGradients(torch.autograd.Function):
    """The same values; gradients are summed over a group."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


def share_of_heads(values: torch.Tensor, query_weight: Any) -> torch.Tensor:
    """Return what belongs to the query heads of this process, all of it where there is one.

    Args:
        values (`torch.Tensor`): the same on every process, `[batch or 1, heads, ...]`; its
            gradient becomes the sum of those of all processes.
        query_weight (`torch.Tensor`): the query projection's, which tensor parallelism has cut.
    """
    if not isinstance(query_weight, DTensor):
        return values
    mesh = query_weight.device_mesh
    values = _SumGradients.apply(values, mesh.get_group())
    return values.chunk(mesh.size(), dim=1)[mesh.get_local_rank()]


def gather_stages(state_dict: dict[str, Any], stage: Any) -> dict[str, Any]:
    """Collect the weights of all pipeline stages, in the order of the layers, on the first.

    Args:
        state_dict (`dict[str, torch.Tensor]`): what this stage holds, nothing of it cut.
        stage (`PipelineStage`): transformers' description of this stage.

    Returns:
        All tensors on the CPU; nothing on later stages.
    """
    group = stage.pp_group
    first = dist.get_global_rank(group, 0)
    device = torch.device("cpu") if stage.comm_on_cpu else torch.device("cuda")
    gathered = dict(state_dict)
    for source in range(1, stage.pp_size):
        is_source = stage.pp_rank == source
        facts = [
            [(name, t.shape, t.dtype) for name, t in state_dict.items()] if is_source else None
        ]
        global_rank = dist.get_global_rank(group, source)
        dist.broadcast_object_list(facts, src=global_rank, group=group)
        assert facts[0] is not None
        for name, shape, dtype in facts[0]:
            if is_source:
                dist.send(state_dict[name].to(device).contiguous(), first, group=group)
            elif stage.pp_is_first_stage:
                values = torch.empty(shape, dtype=dtype, device=device)
                dist.recv(values, global_rank, group=group)
                # What is tied to the embedding, or stands on every stage, is here already.
                gathered.setdefault(name, values.cpu())
    return gathered if stage.pp_is_first_stage else {}


def share_random_state(mesh: DeviceMesh | None, device: torch.device) -> None:
    """Give all processes that run one model together the random state of the first of them."""
    if mesh is None:
        return
    names = mesh.mesh_dim_names or ("tp",)
    for name in ("tp", "pp"):
        if name not in names or mesh.size(names.index(name)) == 1:
            continue
        group = mesh.get_group(name if mesh.ndim > 1 else None)
        on_gpu = device.type == "cuda"
        state = torch.cuda.get_rng_state(device) if on_gpu else torch.get_rng_state()
        moved = state.to(device if dist.get_backend(group) == "nccl" else "cpu")
        dist.broadcast(moved, src=dist.get_global_rank(group, 0), group=group)
        if on_gpu:
            torch.cuda.set_rng_state(moved.cpu(), device)
        else:
            torch.set_rng_state(moved.cpu())
