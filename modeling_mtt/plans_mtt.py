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
"""Which part of a model goes where under tensor, expert and pipeline parallelism.

The tables name everything an MTT model may have. transformers warns about rules that match nothing,
and so each configuration keeps those of what its model does have.
"""

from importlib.util import find_spec
from typing import Any

ATTENTION = {
    "self_attn.q_proj": "colwise",
    "self_attn.k_proj": "colwise",
    "self_attn.v_proj": "colwise",
    "self_attn.q_norm": "replicated_with_grad_allreduce",
    "self_attn.k_norm": "replicated_with_grad_allreduce",
    "self_attn.o_proj": "rowwise",
}
# What is narrow is whole on every process, and so are the latents that the cache holds.
LATENT_ATTENTION = {
    "self_attn.q_proj": "colwise",
    "self_attn.q_b_proj": "colwise",
    "self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
    "self_attn.kv_b_proj": "colwise",
    "self_attn.o_proj": "rowwise",
}
DENSE = {
    "mlp.gate_proj": "colwise",
    "mlp.up_proj": "colwise",
    "mlp.down_proj": "rowwise",
}
# Parameters before their module, whose style wraps what computes with them.
SPARSE = {
    "mlp.experts.gate_up_proj": "packed_colwise",
    "mlp.experts.up_proj": "colwise",
    "mlp.experts.down_proj": "rowwise",
    "mlp.experts": "moe_tp_experts",
    "mlp.shared_experts.gate_proj": "colwise",
    "mlp.shared_experts.up_proj": "colwise",
    "mlp.shared_experts.down_proj": "rowwise",
}
# transformers < 5.23 has the router tell each process which of its experts to run.
DISPATCHES = find_spec("transformers.distributed.expert_parallel") is not None
EXPERTS = {
    "mlp.experts.gate_up_proj": "grouped_gemm",
    "mlp.experts.gate_up_proj_bias": "grouped_gemm",
    "mlp.experts.up_proj": "grouped_gemm",
    "mlp.experts.up_proj_bias": "grouped_gemm",
    "mlp.experts.down_proj": "grouped_gemm",
    "mlp.experts.down_proj_bias": "grouped_gemm",
    "mlp.experts": "ep_dispatch_experts" if DISPATCHES else "moe_tp_experts",
} | ({} if DISPATCHES else {"mlp.gate": "ep_router"})
STAGES = {
    "embed_tokens": (["input_ids"], ["inputs_embeds"]),
    "embed_positions": (["position_ids"], ["inputs_embeds"]),
    "embed_norm": (["inputs_embeds"], ["inputs_embeds"]),
    "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
    "norm": (["hidden_states"], ["hidden_states"]),
}


def plans_of(config: Any) -> tuple[dict[str, str], dict[str, str], dict[str, Any]]:
    """Return the tensor-, expert- and pipeline-parallel plans of a base model.

    Args:
        config (`MTTConfig`): with every field filled in.
    """
    absent = _absent(config)
    attention = ATTENTION if config.kv_lora_rank is None else LATENT_ATTENTION
    kinds = {"dense": DENSE, "sparse": SPARSE}
    mlp_types = config.types_of_mlps()

    tensor_plan: dict[str, str] = {}
    expert_plan: dict[str, str] = {}
    blocks = [("layers.*.", set(mlp_types))]
    if config.num_nextn_predict_layers:
        blocks.append(("mtp.layers.*.transformer_layer.", {mlp_types[-1]} if mlp_types else set()))
    for prefix, types in blocks:
        rules = dict(attention)
        for kind in sorted(types):
            rules |= kinds.get(kind, {})
        if "sparse" in types:
            expert_plan |= {prefix + k: v for k, v in EXPERTS.items() if k not in absent}
        tensor_plan |= {prefix + k: v for k, v in rules.items() if k not in absent}

    stages = set()
    if config.position_embedding_type != "learned":
        stages |= {"embed_positions"}
    if not config.embedding_norm:
        stages |= {"embed_norm"}
    return tensor_plan, expert_plan, {k: v for k, v in STAGES.items() if k not in stages}


def _absent(config: Any) -> set[str]:
    absent = set()
    if config.gated_mlp:
        absent |= {"mlp.experts.up_proj", "mlp.experts.up_proj_bias"}
    else:
        absent |= {"mlp.gate_proj", "mlp.shared_experts.gate_proj"}
        absent |= {"mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj_bias"}
    if not config.mlp_bias:
        absent |= {name for name in EXPERTS if name.endswith("_bias")}
    if config.shared_expert_intermediate_size is None:
        absent |= {name for name in SPARSE if "shared_experts" in name}
    if not config.use_qk_norm:
        absent |= {"self_attn.q_norm", "self_attn.k_norm"}
    if config.q_lora_rank is not None:
        absent |= {"self_attn.q_proj"}
    elif config.kv_lora_rank is not None:
        absent |= {"self_attn.q_b_proj"}
    return absent
