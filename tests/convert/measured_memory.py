"""What a process holds and allocates when MTT generates; run alone, or on ranks by `launch`."""

from __future__ import annotations

import os
from typing import Any

Options = dict[str, Any]


def peak_of(work: Any) -> tuple[int, Any]:
    """The most bytes that were allocated at once on the CPU, beyond what was before; the result."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = work()
    events = recorded.profiler.kineto_results.events()  # in the order of the allocations
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most, result


def measure(options: Options) -> dict[str, int]:
    """Bytes of weights, of the KV cache, and of the rest at its peak, of this process."""
    import torch
    from transformers.distributed import DistributedConfig

    from modeling_mtt import MTTForCausalLM

    torch.manual_seed(0)
    layout = {}
    if options["tp"] * options["pp"] > 1:
        config = DistributedConfig(tp_size=options["tp"], pp_size=options["pp"])
        layout = {"distributed_config": config}
    model = MTTForCausalLM.from_pretrained(options["folder"], **layout).eval()
    model.generation_config.eos_token_id = None  # all texts get all their tokens

    def local(tensor: Any) -> Any:
        return tensor.to_local() if hasattr(tensor, "to_local") else tensor

    weights = sum(local(p).numel() * local(p).element_size() for p in model.parameters())
    ids = torch.randint(3, 90, (options["batch"], options["length"] - 1))

    def generate(ids: torch.Tensor) -> Any:
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=2,
            pad_token_id=0,
            return_dict_in_generate=True,
        )

    with torch.no_grad():
        generate(ids[:, :4])  # what is made once
        peak, output = peak_of(lambda: generate(ids))
    states = [
        states
        for layer in output.past_key_values.layers
        for states in (layer.keys, layer.values)
        if getattr(layer, "is_initialized", True) and states is not None
    ]
    cache = sum(local(s).numel() * local(s).element_size() for s in states)
    return {"weights": weights, "kv_cache": cache, "activations": peak - cache}


def measure_all(options: Options) -> list[dict[str, int]]:
    """`measure` on every rank, given to the first."""
    import torch.distributed as dist

    mine = measure(options)
    everywhere: list[Any] = [None] * int(os.environ["WORLD_SIZE"])
    dist.all_gather_object(everywhere, mine)
    return everywhere
