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
"""Mixtures of experts: the router, the experts, and those that every token goes through.

Weights follow `topk_routing_with_score_function` and `group_limited_topk` in
megatron/core/transformer/moe/moe_utils.py. Experts are kept one by one on disk, as in DeepSeek-V3
and Qwen3-MoE, and together in memory, where one grouped product computes them all.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.integrations import use_experts_implementation

from .configuration_mtt import MTTConfig
from .linear_mtt import build_linear
from .mlp_mtt import MTTMLP


class MTTRouter(nn.Module):
    """Chooses experts for each token, and weighs them; in float32, whatever the model's dtype."""

    e_score_correction_bias: torch.Tensor | None

    def __init__(self, config: MTTConfig) -> None:
        super().__init__()
        assert config.num_experts is not None
        self.num_experts = config.num_experts
        self.top_k = config.num_experts_per_tok
        self.scoring_func = config.scoring_func
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        self.n_group, self.topk_group = config.n_group, config.topk_group
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        bias = torch.zeros(config.num_experts) if config.use_expert_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route tokens.

        Args:
            hidden_states (`torch.Tensor`): `[tokens, hidden_size]`.

        Returns:
            Logits `[tokens, num_experts]`, and weights and numbers of the chosen experts, each
            `[tokens, num_experts_per_tok]`.
        """
        logits = nn.functional.linear(hidden_states.float(), self.weight.float())
        if self.scoring_func == "sigmoid":
            scores = logits.sigmoid()
            choice = scores
            if self.e_score_correction_bias is not None:
                choice = scores + self.e_score_correction_bias
        else:
            scores = logits.softmax(dim=-1)
            # Logits order experts as scores do, but not groups of them.
            choice = logits if self.norm_topk_prob and self.n_group is not None else scores
        if self.n_group is not None:
            choice = self._keep_best_groups(choice)
        chosen = torch.topk(choice, self.top_k, dim=-1)[1]
        weights = scores.gather(1, chosen)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        if self.routed_scaling_factor != 1.0:
            weights = weights * self.routed_scaling_factor
        return logits, weights, chosen

    def _keep_best_groups(self, choice: torch.Tensor) -> torch.Tensor:
        """Return `choice` with minus infinity for the experts of other groups."""
        assert self.n_group is not None and self.topk_group is not None
        groups = choice.unflatten(-1, (self.n_group, -1))
        group_scores = groups.topk(self.top_k // self.topk_group, dim=-1)[0].sum(dim=-1)
        best = torch.topk(group_scores, self.topk_group, dim=-1)[1]
        kept = torch.zeros_like(group_scores, dtype=torch.bool).scatter(1, best, True)
        return groups.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)


@use_experts_implementation
class MTTExperts(nn.Module):
    """The experts of a layer, as tensors that hold them all.

    `gate_up_proj` is `[experts, 2 * intermediate, hidden]`, gates first, or without gates `up_proj`
    is `[experts, intermediate, hidden]`; `down_proj` is `[experts, hidden, intermediate]`. Their
    biases are called as they are, with `_bias`.
    """

    # What the decorator adds.
    has_gate: bool
    has_bias: bool
    _apply_gate: Callable[..., torch.Tensor]

    def __init__(self, config: MTTConfig) -> None:
        super().__init__()
        assert config.num_experts is not None and config.moe_intermediate_size is not None
        self.num_experts = config.num_experts
        hidden_size, intermediate_size = config.hidden_size, config.moe_intermediate_size
        inward, width = "up_proj", intermediate_size
        if config.gated_mlp:
            inward, width = "gate_up_proj", 2 * intermediate_size
        sizes = {
            inward: (self.num_experts, width, hidden_size),
            "down_proj": (self.num_experts, hidden_size, intermediate_size),
        }
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(*size)))
            if config.mlp_bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(*size[:2])))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Compute with one expert after the other: the implementation called `eager`.

        Args:
            hidden_states (`torch.Tensor`): `[tokens, hidden_size]`.
            top_k_index (`torch.Tensor`): numbers of experts `[tokens, num_experts_per_tok]`, and
                `num_experts` or more for one that another process has.
            top_k_weights (`torch.Tensor`): their weights.

        Returns:
            The weighted sum of the experts' outputs, `[tokens, hidden_size]`.
        """
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, place = torch.where(top_k_index == expert)
            if not len(token):
                continue
            inward = "gate_up_proj" if self.has_gate else "up_proj"
            states = self._project(inward, hidden_states[token], expert)
            states = self._apply_gate(states) if self.has_gate else self.act_fn(states)
            states = self._project("down_proj", states, expert)
            states = states * top_k_weights[token, place, None]
            output.index_add_(0, token, states.to(output.dtype))
        return output

    def _project(self, name: str, states: torch.Tensor, expert: int) -> torch.Tensor:
        bias = getattr(self, f"{name}_bias")[expert] if self.has_bias else None
        return nn.functional.linear(states, getattr(self, name)[expert], bias)


class MTTMoE(nn.Module):
    """Experts that a router chooses for each token, and one that all go through."""

    def __init__(self, config: MTTConfig) -> None:
        super().__init__()
        self.gate = MTTRouter(config)
        self.experts = MTTExperts(config)
        # The decorator takes these for facts about a class.
        self.experts.has_gate, self.experts.has_bias = config.gated_mlp, config.mlp_bias
        self.shared_experts = None
        if config.shared_expert_intermediate_size is not None:
            self.shared_experts = MTTMLP(config, config.shared_expert_intermediate_size)
        self.shared_expert_gate = None
        if config.use_shared_expert_gate:
            self.shared_expert_gate = build_linear(config.hidden_size, 1, bias=False)

    # vLLM reads this function to find the shared expert, and its gate, in what is added.
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return states `[..., hidden_size]` of the same shape."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, top_k_weights, top_k_index = self.gate(tokens)
        output = self.experts(tokens, top_k_index, top_k_weights).reshape(hidden_states.shape)
        if self.shared_experts is not None:
            shared = self.shared_experts(hidden_states)
            if self.shared_expert_gate is not None:
                shared = torch.sigmoid(self.shared_expert_gate(hidden_states)) * shared
            output = output + shared
        return output


def check_server(config: MTTConfig) -> None:
    """Refuse what vLLM and SGLang, which run experts themselves, would compute differently.

    Raises:
        `ValueError`: names the field.
    """
    if config.num_experts is None:
        return
    found = None
    if config.hidden_act != "silu" or not config.gated_mlp:
        found = f"hidden_act '{config.hidden_act}' and gated_mlp {config.gated_mlp}"
        expected = "'silu' and True"
    elif config.n_group is not None:
        assert config.topk_group is not None
        per_group = config.num_experts_per_tok // config.topk_group
        if not (per_group == 2 and config.use_expert_bias and config.norm_topk_prob):
            found = (
                f"groups of experts scored by their best {per_group}, without DeepSeek-V3's bias"
            )
            if config.use_expert_bias:
                found = f"groups of experts scored by their best {per_group}"
            expected = "a bias and the best 2, as in DeepSeek-V3"
    if found is not None:
        raise ValueError(
            f"The server computes mixtures of experts its own way: found {found}, expected "
            f"{expected}. Serve this model with `python -m modeling_mtt serve`."
        )


def balance_loss(
    router_logits: tuple[torch.Tensor, ...], top_k: int, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """Return Switch Transformer's loss, 1 where all experts get as many tokens, and more elsewhere.

    The share of choices that an expert got times its mean probability, summed over experts and
    multiplied by their number; all layers are one batch, as in Mixtral and Qwen3-MoE.
    (Source: https://arxiv.org/abs/2101.03961, equations 4 to 6.)

    Args:
        router_logits (`tuple[torch.Tensor, ...]`): for each layer `[tokens, num_experts]`.
        top_k (`int`): experts per token.
        attention_mask (`torch.Tensor`, *optional*): 0 where a token does not count,
            `[batch, sequence]`.
    """
    device = router_logits[0].device
    logits = torch.cat([layer.to(device) for layer in router_logits])
    num_experts = logits.shape[-1]
    probabilities = logits.softmax(dim=-1)
    chosen = torch.topk(probabilities, top_k, dim=-1)[1]
    counts = torch.zeros_like(probabilities).scatter(1, chosen, 1.0)
    if attention_mask is None:
        share, probability = counts.mean(dim=0), probabilities.mean(dim=0)
    else:
        weight = attention_mask.reshape(-1, 1).to(device, probabilities.dtype)
        weight = weight.repeat(len(router_logits), 1)
        share = (counts * weight).sum(dim=0) / weight.sum()
        probability = (probabilities * weight).sum(dim=0) / weight.sum()
    return num_experts * (share * probability).sum()


class GatedExperts(WeightConverter):
    """Experts with gates, told by their gates: `up_proj` alone is an expert without.

    Names come in alphabetical order, and so the gate's comes first.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.has_gates = False

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Return the name in memory and the pattern that matched, or the name and None."""
        matched = self._scoped_match(source_key)
        if matched is not None and len(self.source_patterns) == 2:
            self.has_gates = self.has_gates or "gate_proj" in source_key
            if not self.has_gates:
                return source_key, None
        renamed: tuple[str, str | None] = super().rename_source_key(source_key)
        return renamed


def _converters() -> list[WeightConverter]:
    converters = []
    for suffix, end in (("weight", ""), ("bias", "_bias")):
        gate, up, down = (f"mlp.experts.*.{name}_proj.{suffix}" for name in ("gate", "up", "down"))
        together = [MergeModulelist(dim=0), Concatenate(dim=1)]
        converters += [
            GatedExperts([gate, up], f"mlp.experts.gate_up_proj{end}", operations=together),
            # The same names: patterns have to differ.
            WeightConverter(
                f".{up}", f".mlp.experts.up_proj{end}", operations=[MergeModulelist(dim=0)]
            ),
            WeightConverter(
                down, f"mlp.experts.down_proj{end}", operations=[MergeModulelist(dim=0)]
            ),
        ]
    return converters


register_checkpoint_conversion_mapping(MTTConfig.model_type, _converters(), overwrite=True)
