"""Megatron-Core's GPTModel on a machine without a GPU: import this before anything of `megatron`.

Only where code runs is changed, never names, shapes, or what is read from a checkpoint. What has no
CPU kernel is replaced by the same formula in plain torch: norms whose weight is stored minus one.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # the fused kernels are compiled on first use otherwise

import torch
from torch.nn.functional import layer_norm, rms_norm

torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
torch.Tensor.cuda = lambda self, *_, **__: self
_ones = torch.ones  # the only factory that the model calls with device="cuda": masks of windows
torch.ones = lambda *sizes, device=None, **options: _ones(*sizes, **options)


class _Stream:
    """Work in the order it is given, which is all that a stream on a CPU could do."""

    def wait_stream(self, other: Any) -> None:
        """Nothing is behind."""

    def record_event(self, event: Any = None) -> _Stream:
        """An event that has happened."""
        return self

    def synchronize(self) -> None:
        """Nothing is running."""


torch.cuda.Stream = torch.cuda.Event = _Stream  # type: ignore[assignment,misc]
torch.cuda.current_stream = lambda device=None: _Stream()  # type: ignore[assignment,return-value]
torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment]
torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[assignment]
torch.compile = lambda function=None, **_: function or (lambda decorated: decorated)

from megatron.core.tensor_parallel import random  # noqa: E402
from megatron.core.transformer import multi_latent_attention  # noqa: E402
from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: E402
from megatron.core.transformer.moe import moe_utils  # noqa: E402
from megatron.core.transformer.torch_norm import WrappedTorchNorm  # noqa: E402

moe_utils.te_general_gemm = None  # the module forgets it without Transformer Engine
multi_latent_attention.TELinear = type("TELinear", (), {})  # what nothing is an instance of
_new_attention = DotProductAttention.__init__


def _attention(
    self: Any, *positional: Any, k_channels: Any = None, v_channels: Any = None, **options: Any
) -> None:
    """Local attention is not told that values have a size of their own, which it reshapes to."""
    _new_attention(self, *positional, **options)
    if v_channels is not None:
        self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition


DotProductAttention.__init__ = _attention

# Dropout is the only user of CUDA's random state, and there is none at inference.
random.CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()


class ZeroCenteredNorm(torch.nn.Module):
    """A norm that computes with `weight + 1`, as Transformer Engine's and Apex's do."""

    def __init__(self, hidden_size: int, eps: float, normalization: str):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(hidden_size))
        has_bias = normalization == "LayerNorm"
        self.bias = torch.nn.Parameter(torch.empty(hidden_size)) if has_bias else None
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape, weight = x.shape[-1:], self.weight + 1
        if self.bias is None:
            return rms_norm(x, shape, weight, self.eps)
        return layer_norm(x, shape, weight, self.bias, self.eps)


_new_norm = WrappedTorchNorm.__new__


def _norm(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **options: Any) -> Any:
    if config.layernorm_zero_centered_gamma:
        return ZeroCenteredNorm(hidden_size, eps, config.normalization)
    return _new_norm(cls, config, hidden_size, eps, **options)


WrappedTorchNorm.__new__ = _norm
