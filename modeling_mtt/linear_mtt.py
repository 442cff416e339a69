"""Linear layers: built without values, and on a CPU multiplied by the faster library."""

from collections.abc import Callable

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as modules

# Weights of fewer values are read sooner by MKL, which has less to prepare. On one thread that
# holds for more of them: then oneDNN only wins where MKL reads weights several times.
SMALLEST_FOR_ONEDNN = 2**18
SMALLEST_ON_ONE_THREAD = 2**20

# PyTorch multiplies float32 by MKL, which uses one thread for one row and reads weights several
# times for a few. oneDNN does neither. It has no name in Python but this operator's.
_ONEDNN: Callable[..., torch.Tensor] | None = None
if torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available():
    _ONEDNN = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)


def build_linear(in_features: int, out_features: int, bias: bool) -> nn.Linear:
    """Return an `nn.Linear` whose values a checkpoint or `_init_weights` has yet to give.

    `nn.Linear` draws its own, on the meta device too: a tenth of the time that loading takes.
    """
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.in_features, linear.out_features = in_features, out_features
    linear.weight = nn.Parameter(torch.empty(out_features, in_features))
    linear.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)
    return linear


def project(linear: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """Return `linear(states)`.

    Only what is a plain `nn.Linear` in float32, on a CPU and without gradients, is computed any
    other way; whatever took its place, or watches it, is called.

    Args:
        linear (`nn.Module`): a layer of `[in_features]` to `[out_features]`.
        states (`torch.Tensor`): `[..., in_features]`.
    """
    output: torch.Tensor
    if (
        torch.is_grad_enabled()
        or type(linear) is not nn.Linear
        or torch.compiler.is_compiling()
        or not _is_plain(linear, states)
    ):
        output = linear(states)
        return output
    # Without `nn.Module.__getattr__`, which takes a small model as long as what it looks for.
    weight, bias = linear._parameters["weight"], linear._parameters["bias"]
    assert weight is not None and _ONEDNN is not None
    smallest = SMALLEST_FOR_ONEDNN if torch.get_num_threads() > 1 else SMALLEST_ON_ONE_THREAD
    if weight.numel() < smallest or is_transformed() or not _is_readable(states, weight, bias):
        return nn.functional.linear(states, weight, bias)
    return _ONEDNN(states, weight, bias, "none", [], "")


def is_transformed() -> bool:
    """Return whether forward derivatives, vmap or a function mode follow each operation.

    `no_grad` stops none of them, and `type` does not tell the tensors of theirs.
    """
    return (
        forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_function_stack() > 0
    )


def _is_readable(states: torch.Tensor, weight: nn.Parameter, bias: nn.Parameter | None) -> bool:
    """Return whether oneDNN, which checks little, would read each value where it lies."""
    return (
        weight.layout == states.layout == torch.strided
        and states.shape[-1] == weight.shape[-1]
        and (
            bias is None
            or (
                type(bias) is nn.Parameter
                and bias.dtype == weight.dtype
                and bias.is_cpu
                and bias.shape == weight.shape[:1]
                and bias.is_contiguous()
            )
        )
    )


def _is_plain(linear: nn.Linear, states: torch.Tensor) -> bool:
    weight = linear._parameters.get("weight")
    return (
        _ONEDNN is not None
        and type(weight) is nn.Parameter
        and type(states) is torch.Tensor
        and weight.is_cpu
        and states.is_cpu
        and states.dtype == weight.dtype == torch.float32
        and states.numel() > 0
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
        and "forward" not in linear.__dict__
        and not modules._global_forward_hooks
        and not modules._global_forward_pre_hooks
        and torch._C._get_mkldnn_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
    )
