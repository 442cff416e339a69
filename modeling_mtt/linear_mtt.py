"""Linear layers: built without values, and on a CPU multiplied by the faster library."""

from collections.abc import Callable
from typing import Any

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


# Inductor takes the operator for its own, and asks that its weights be constants. Under this name
# it calls it as it is. A copy of this file that came with a checkpoint finds the name taken.
if _ONEDNN is not None and not hasattr(torch.ops.mtt, "linear"):
    _LIBRARY = torch.library.Library("mtt", "FRAGMENT")  # as long as it lives
    _LIBRARY.define("linear(Tensor states, Tensor weight, Tensor? bias) -> Tensor")
    _LIBRARY.impl("linear", lambda *tensors: _multiply(*tensors), "CPU")
    _LIBRARY.impl("linear", nn.functional.linear, "Meta")


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
    if torch.compiler.is_compiling():
        output = _traced(linear, states)
        return output
    if torch.is_grad_enabled() or type(linear) is not nn.Linear or not _is_plain(linear, states):
        output = linear(states)
        return output
    # Without `nn.Module.__getattr__`, which takes a small model as long as what it looks for.
    weight, bias = linear._parameters["weight"], linear._parameters["bias"]
    assert weight is not None
    if is_transformed():
        return nn.functional.linear(states, weight, bias)
    return _multiply(states, weight, bias)


def _multiply(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Multiply by whichever library is faster, both of which can."""
    smallest = SMALLEST_FOR_ONEDNN if torch.get_num_threads() > 1 else SMALLEST_ON_ONE_THREAD
    if (
        weight.numel() < smallest
        or not torch._C._get_mkldnn_enabled()
        or not _is_readable(states, weight, bias)
    ):
        return nn.functional.linear(states, weight, bias)
    assert _ONEDNN is not None
    return _ONEDNN(states, weight, bias, "none", [], "")


def _traced(linear: nn.Module, states: torch.Tensor) -> Any:
    """`project` of what is being compiled, which is asked no more than a trace can answer."""
    if (
        _ONEDNN is None
        or torch.is_grad_enabled()
        or torch.compiler.is_exporting()
        or type(linear) is not nn.Linear
        or type(linear.weight) is not nn.Parameter
        or type(linear.bias) not in (nn.Parameter, type(None))
        or not linear.weight.is_cpu
        or not linear.weight.dtype == states.dtype == torch.float32
        or linear.weight.numel() < SMALLEST_FOR_ONEDNN
        or linear._forward_hooks
        or linear._forward_pre_hooks
        or "forward" in linear.__dict__
        or modules._global_forward_hooks
        or modules._global_forward_pre_hooks
        or torch.is_autocast_enabled("cpu")
        or forward_ad._current_level >= 0
        or torch._C._functorch.maybe_current_level() is not None
    ):
        return linear(states)
    return torch.ops.mtt.linear(states, linear.weight, linear.bias)


def is_transformed() -> bool:
    """Return whether forward derivatives, vmap or a function mode follow each operation.

    `no_grad` stops none of them, and `type` does not tell the tensors of theirs.
    """
    return (
        forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_function_stack() > 0
    )


def _is_readable(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Return whether oneDNN, which checks little, would read each value where it lies."""
    return (
        weight.layout == states.layout == torch.strided
        and states.shape[-1] == weight.shape[-1]
        and (
            bias is None
            or (
                bias.dtype == weight.dtype
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
        and type(linear._parameters.get("bias")) in (nn.Parameter, type(None))
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
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
    )
