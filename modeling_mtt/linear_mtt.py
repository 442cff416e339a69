"""Matrix products on a CPU by the faster of the two libraries that PyTorch brings."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules import module as module_hooks

# Weights of fewer values fit a cache near the core, where MKL starts sooner.
SMALLEST_FOR_ONEDNN = 2**18

# PyTorch multiplies float32 by MKL, which uses one thread for one row and reads weights several
# times for a few. oneDNN does neither. It has no name in Python but this operator's, which
# torch.compile emits for the same reason.
_ONEDNN: Callable[..., torch.Tensor] | None = None
if torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available():
    _ONEDNN = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)


def project(linear: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """Return `linear(states)`.

    Only what is a plain `nn.Linear` in float32, on a CPU and without gradients, is computed any
    other way; whatever took its place, or watches it, is called.

    Args:
        linear (`nn.Module`): a layer of `[in_features]` to `[out_features]`.
        states (`torch.Tensor`): `[..., in_features]`.
    """
    output: torch.Tensor
    if _ONEDNN is None or torch.compiler.is_compiling() or not _is_plain(linear, states):
        output = linear(states)
    else:
        output = _ONEDNN(states, linear.weight, linear.bias, "none", [], "")
    return output


def _is_plain(linear: nn.Module, states: torch.Tensor) -> bool:
    if type(linear) is not nn.Linear:
        return False
    weight = linear.weight
    return (
        type(states) is torch.Tensor
        and type(weight) is nn.Parameter
        and states.dtype == weight.dtype == torch.float32
        and states.device.type == weight.device.type == "cpu"
        and weight.numel() >= SMALLEST_FOR_ONEDNN
        and states.numel() > 0
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
        and "forward" not in linear.__dict__
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
        and not module_hooks._has_any_global_hook()
        and not torch._C._is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
    )
