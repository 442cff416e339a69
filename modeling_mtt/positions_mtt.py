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
"""Positions that act inside attention: rotations of queries and keys, and ALiBi's biases."""

import math
from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from .configuration_mtt import MTTConfig


class MTTRotaryEmbedding(nn.Module):
    """Cosines and sines for the rotated part of a head, of any rope type transformers knows."""

    inv_freq: torch.Tensor
    original_inv_freq: torch.Tensor

    def __init__(self, config: MTTConfig) -> None:
        super().__init__()
        if getattr(config, "kv_lora_rank", None) is not None:
            # transformers' functions go by `head_dim`, of which rotations see a part.
            config = copy(config)
            config.head_dim = config.rotary_width
        assert config.rope_parameters is not None
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings

        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn: Callable[..., tuple[torch.Tensor, float]]
        if self.rope_type == "default":
            rope_init_fn = self.compute_default_rope_parameters
        else:
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config)
        if self.rope_type == "yarn":
            self.attention_scaling = yarn_attention_scaling(config) or self.attention_scaling

        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(
        config: MTTConfig, device: torch.device | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, float]:
        """Return inverse frequencies `[rotated / 2]`, in radians per token, and a scale of 1.

        As in Megatron, the exponent runs over the rotated part, not over the whole head.
        """
        assert config.rope_parameters is not None and config.head_dim is not None
        rotated = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, rotated, 2, dtype=torch.float, device=device) / rotated
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines of the angles at each position, in the dtype of `x`.

        Args:
            x (`torch.Tensor`): gives dtype and device only.
            position_ids (`torch.Tensor`): `[batch or 1, sequence]`.

        Returns:
            Two tensors `[batch or 1, sequence, rotated]`, laid out like the pairs to rotate.
        """
        # A product, not a matrix product: autocast leaves it in float32.
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float)
        if self.config.rope_interleave:
            angles = angles.repeat_interleave(2, dim=-1)
        else:
            angles = torch.cat((angles, angles), dim=-1)
        cos = angles.cos() * self.attention_scaling
        sin = angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def yarn_attention_scaling(config: MTTConfig) -> float | None:
    """Return what YaRN multiplies cosines and sines by, or None where transformers says the same.

    `mscale` and `mscale_all_dim` count where both are given, be they 0: as in
    `_yarn_get_concentration_factor` of
    megatron/core/models/common/embeddings/yarn_rotary_pos_embedding.py. transformers leaves them
    out where one is 0.
    """
    assert config.rope_parameters is not None
    mscale = config.rope_parameters.get("mscale")
    all_dim = config.rope_parameters.get("mscale_all_dim")
    if mscale is None or all_dim is None:
        return None
    if config.rope_parameters.get("attention_factor") is not None:
        return None
    factor = _yarn_factor(config)
    return _yarn_mscale(factor, mscale) / _yarn_mscale(factor, all_dim)


def _yarn_factor(config: MTTConfig) -> float:
    assert config.rope_parameters is not None
    factor = config.rope_parameters.get("factor")
    if factor is None:
        original = config.rope_parameters["original_max_position_embeddings"]
        return config.max_position_embeddings / original
    return float(factor)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def latent_score_scale(config: MTTConfig) -> float:
    """Return what multiplies the scores of multi-latent attention.

    With YaRN, its `mscale_all_dim` makes them larger, once for queries and once for keys.
    """
    assert config.head_dim is not None and config.rope_parameters is not None
    scale: float = config.head_dim**-0.5
    if config.rope_parameters["rope_type"] == "yarn":
        all_dim = config.rope_parameters.get("mscale_all_dim") or 0.0
        scale *= _yarn_mscale(_yarn_factor(config), all_dim) ** 2
    return scale


def swap_halves(states: torch.Tensor) -> torch.Tensor:
    """Exchange the values of each pair, one of the first half and one of the second."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1)


def swap_neighbours(states: torch.Tensor) -> torch.Tensor:
    """Exchange the values of each pair of neighbours."""
    return states.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def rotation_of_heads(
    cos: torch.Tensor, sin: torch.Tensor, interleave: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `rotate_heads` takes, the same for all heads and layers.

    A pair `(a, b)` turns into `(a cos - b sin, b cos + a sin)`: with its values exchanged, sines
    are negative for the first of it.

    Args:
        cos, sin (`torch.Tensor`): `[batch or 1, sequence, rotated]`, laid out like the pairs.
        interleave (`bool`): whether pairs are neighbours (Megatron's `rotary_interleaved`, GPT-J)
            rather than one value of each half (GPT-NeoX).

    Returns:
        Factors of a head's values, and of those exchanged: `[batch or 1, sequence, 1, rotated]`.
    """
    if interleave:
        sin = torch.stack((-sin[..., 0::2], sin[..., 1::2]), dim=-1).flatten(-2)
    else:
        first, second = sin.chunk(2, dim=-1)
        sin = torch.cat((-first, second), dim=-1)
    return cos.unsqueeze(2), sin.unsqueeze(2)


def rotate_heads(
    states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool = False
) -> torch.Tensor:
    """Rotate the first values of each head.

    Args:
        states (`torch.Tensor`): `[batch, sequence, heads, head_dim]`.
        cos, sin (`torch.Tensor`): see `rotation_of_heads`, with `rotated <= head_dim`.
        interleave (`bool`): as it was there.
    """
    num_rotated = cos.shape[-1]
    rotated = states if num_rotated == states.shape[-1] else states[..., :num_rotated]
    swapped = swap_neighbours(rotated) if interleave else swap_halves(rotated)
    rotated = torch.addcmul(rotated * cos, swapped, sin)
    if num_rotated == states.shape[-1]:
        return rotated
    return torch.cat((rotated, states[..., num_rotated:]), dim=-1)


def alibi_slopes(num_heads: int, device: torch.device) -> torch.Tensor:
    """Return ALiBi's slopes `[heads]` in float32, a loss of score per token of distance.

    Powers of two have a geometric series that starts at its own ratio. Other numbers of heads take
    the series of the next smaller power, and every other value of the next larger one.
    (Source: https://arxiv.org/abs/2108.12409, and its authors' `get_slopes`.)
    """
    power = 2 ** math.floor(math.log2(num_heads))
    exponents = torch.arange(1, power + 1, device=device) * (8 / power)
    others = (2 * torch.arange(num_heads - power, device=device) + 1) * (4 / power)
    return torch.exp2(-torch.cat((exponents, others)))


def alibi_distances(
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    position_ids: torch.Tensor,
    layer_idx: int,
) -> torch.Tensor:
    """Return how many tokens each key lies after each query: 0 or less where it is seen.

    Tokens are counted by the padding mask where there is one, as in Bloom, so that padding is no
    distance. A softmax does not change when a query's distances all shift, which is why the
    positions of queries need not be counted the same way. It is counted from the query, and not
    from the first key, to keep the bias of near keys small: bfloat16 tells 0 and 1 apart, but not
    1000 and 1001.

    Args:
        attention_mask (`torch.Tensor`, *optional*): `[batch, past + sequence]`, or another mask.
        past_key_values (`Cache`, *optional*): tells how many keys there are.
        position_ids (`torch.Tensor`): of the queries, `[batch or 1, sequence]`.
        layer_idx (`int`): a layer this process holds.

    Returns:
        Distances `[batch or 1, 1, queries, keys]`.
    """
    num_keys = position_ids.shape[-1]
    if past_key_values is not None:
        num_keys, _ = past_key_values.get_mask_sizes(num_keys, layer_idx)

    if attention_mask is not None and attention_mask.ndim == 2:
        positions = attention_mask.to(position_ids.device).long().cumsum(-1) - 1
        # A static cache has slots for keys to come.
        positions = nn.functional.pad(positions, (0, max(num_keys - positions.shape[-1], 0)))
        positions = positions[:, :num_keys]
    elif past_key_values is None:
        positions = position_ids
    else:
        positions = torch.arange(num_keys, device=position_ids.device).unsqueeze(0)
    return positions[:, None, None, :] - position_ids[:, None, :, None]
