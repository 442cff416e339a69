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
"""Relative positions: a learned bias of attention scores for each head and bucket of distances."""

import math

import torch
from torch import nn


def relative_buckets(
    distances: torch.Tensor, num_buckets: int, max_distance: int, bidirectional: bool
) -> torch.Tensor:
    """Return the bucket of each distance, in `[0, num_buckets)`.

    The nearest half of the buckets hold one distance each, the others grow with the logarithm of
    the distance; from `max_distance` on all fall into the last.
    (Source: Megatron's `RelativePositionEmbedding`, which has it from T5,
    https://arxiv.org/abs/1910.10683.)

    Args:
        distances (`torch.Tensor`): how many tokens a key lies after its query, of any shape.
        num_buckets (`int`): at least 2, or 4 where `bidirectional`.
        max_distance (`int`): more than half of `num_buckets`.
        bidirectional (`bool`): whether later keys have buckets of their own, the second half;
            else all of them fall into the bucket of distance 0.
    """
    offset = torch.zeros_like(distances)
    if bidirectional:
        num_buckets //= 2
        offset = (distances > 0).long() * num_buckets
        distances = distances.abs()
    else:
        distances = (-distances).clamp(min=0)

    num_exact = num_buckets // 2
    # Order and precision are Megatron's: a distance at the edge of a bucket stays on its side.
    far = distances.clamp(min=num_exact).float() / num_exact
    growth = torch.log(far) / math.log(max_distance / num_exact) * (num_buckets - num_exact)
    far_buckets = (num_exact + growth.long()).clamp(max=num_buckets - 1)
    return offset + torch.where(distances < num_exact, distances, far_buckets)


class MTTRelativePositionBias(nn.Embedding):
    """The bias of each bucket and head, `weight` `[buckets, heads]`, shared by all layers."""

    def __init__(
        self, num_buckets: int, num_heads: int, max_distance: int, bidirectional: bool
    ) -> None:
        super().__init__(num_buckets, num_heads)
        self.max_distance = max_distance
        self.bidirectional = bidirectional

    def forward(self, distances: torch.Tensor) -> torch.Tensor:
        """Return what is added to scores, `[1, heads, queries, keys]`.

        Args:
            distances (`torch.Tensor`): how many tokens a key lies after a query,
                `[queries, keys]`.
        """
        buckets = relative_buckets(
            distances, self.num_embeddings, self.max_distance, self.bidirectional
        )
        return super().forward(buckets).permute(2, 0, 1).unsqueeze(0)


__all__ = ["MTTRelativePositionBias", "relative_buckets"]
