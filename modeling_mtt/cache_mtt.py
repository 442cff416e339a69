"""A cache that grows in place, and one whose counts stay."""

from copy import copy
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.utils import is_tracing

from .configuration_mtt import MTTConfig
from .linear_mtt import is_transformed


class MTTDynamicLayer(DynamicLayer):
    """`DynamicLayer` that has room for tokens to come, and does not copy the past for each.

    `keys` and `values` are views `[batch, key_value_heads, sequence, head_dim]` of a larger tensor.
    A tensor that something else put in their place (a crop, a reordered beam) is copied once, and
    what the views of earlier calls show never changes.
    """

    keys: torch.Tensor | None
    values: torch.Tensor | None

    # Of the tokens there are: each is copied about 1 / ROOM times in all.
    ROOM = 0.25
    # Fewer values than these are copied in less time than it takes to say where they are.
    SMALLEST = 2**16

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._keys = _Growing()
        self._values = _Growing()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states `[batch, key_value_heads, new tokens, head_dim]` and return them all."""
        # A gradient needs the past as it was; a compiler cannot follow who holds which memory.
        keys, values = self.keys, self.values
        if (
            keys is None
            or values is None
            or keys.numel() < self.SMALLEST
            or torch.is_grad_enabled()
            or is_tracing(key_states)
            or is_transformed()
            or not (_is_alike(keys, key_states) and _is_alike(values, value_states))
        ):
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys = keys = self._keys.append(keys, key_states)
        self.values = values = self._values.append(values, value_states)
        return keys, values


def _is_alike(past: torch.Tensor, new: torch.Tensor) -> bool:
    """Return whether a copy into the past does what `torch.cat` would: it also casts, and fills."""
    return (
        type(new) is type(past) is torch.Tensor
        and new.dtype == past.dtype
        and new.device == past.device
        and new.shape[:-2] == past.shape[:-2]
        and new.shape[-1] == past.shape[-1]
    )


class _Growing:
    """One tensor that is appended to along its second last dimension."""

    def __init__(self) -> None:
        self.reserved: torch.Tensor | None = None
        self.shown: torch.Tensor | None = None

    def append(self, past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        length = past.shape[-2]
        total = length + new.shape[-2]
        if (
            past is not self.shown
            or self.reserved is None
            or total > self.reserved.shape[-2]
            # What inference_mode made is not written to outside of it.
            or (self.reserved.is_inference() and not torch.is_inference_mode_enabled())
        ):
            room = 1 + int(total * MTTDynamicLayer.ROOM)
            self.reserved = past.new_empty((*past.shape[:-2], total + room, past.shape[-1]))
            self.reserved.narrow(-2, 0, length).copy_(past)
        self.reserved.narrow(-2, length, total - length).copy_(new)
        self.shown = self.reserved.narrow(-2, 0, total)
        return self.shown


def growing_cache(config: MTTConfig) -> DynamicCache:
    """Return an empty cache for a model of this configuration."""
    cache = DynamicCache(config=config)
    let_grow(cache)
    return cache


def let_grow(cache: Any) -> None:
    """Give an empty `DynamicCache` layers that grow in place, where it had the plain ones.

    An encoder's keys and values never grow: of an `EncoderDecoderCache` it is the decoder's own.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if type(cache) is DynamicCache and not cache.offloading:
        cache.layers = [
            MTTDynamicLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
        ]


def with_own_counts(cache: Cache) -> Cache:
    """Return the cache, but that the numbers of tokens it tells do not change later.

    Static caches count in place, and flex attention computes its mask when it is used: by then the
    first layer has counted the new tokens.
    """

    def seen_tokens(layer_idx: int = 0) -> int | torch.Tensor:
        seen: int | torch.Tensor = cache.get_seq_length(layer_idx)
        return seen.clone() if isinstance(seen, torch.Tensor) else seen

    same = copy(cache)
    same.get_seq_length = seen_tokens
    return same
