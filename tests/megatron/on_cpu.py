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
torch.compile = lambda function=None, **_: function or (lambda decorated: decorated)

from megatron.core.tensor_parallel import random  # noqa: E402
from megatron.core.transformer.torch_norm import WrappedTorchNorm  # noqa: E402

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
