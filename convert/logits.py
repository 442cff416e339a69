"""Logits of a converted folder or a checkpoint against a reference; needs torch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .errors import CorruptError, SourceError
from .formats import hf_safetensors
from .loading import from_megatron

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(path: str | os.PathLike[str], dtype: str = "auto") -> PreTrainedModel:
    """The model of a converted folder, or straight from a Megatron checkpoint, on the CPU.

    Raises:
        SourceError: it cannot be loaded.
    """
    path = os.fspath(path)
    if not (os.path.isdir(path) and hf_safetensors.holds_model(path)):
        return from_megatron(path, dtype=dtype)
    from transformers import AutoModelForCausalLM

    import modeling_mtt  # noqa: F401 (registers the classes)

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def compare_logits(path: str | os.PathLike[str], reference: str | os.PathLike[str]) -> float:
    """The largest difference between the model's logits in float32 and a reference.

    Args:
        path: a converted folder or a Megatron checkpoint.
        reference: an .npz with `input_ids` [batch, sequence] and `logits` or `logits_fp32`
            [batch, sequence, vocabulary]; columns that only one side has are padding.

    Raises:
        CorruptError: the reference does not have these arrays in these shapes.
    """
    import numpy as np
    import torch

    try:
        with np.load(reference, allow_pickle=False) as arrays:
            input_ids = arrays["input_ids"]
            wanted = arrays["logits_fp32" if "logits_fp32" in arrays else "logits"]
    except OSError as error:
        raise SourceError(f"{os.fspath(reference)} cannot be read", found=str(error)) from error
    except (ValueError, KeyError) as error:
        raise CorruptError(
            f"{os.fspath(reference)} is no logits reference",
            found=str(error),
            expected="an .npz with input_ids and logits",
        ) from error
    model = load_model(path, dtype="float32")
    with torch.no_grad():
        logits = model(torch.from_numpy(input_ids).long()).logits.float().numpy()
    if logits.shape[:-1] != wanted.shape[:-1]:
        raise CorruptError(
            f"{os.fspath(reference)} does not fit the model",
            found=f"logits of shape {list(wanted.shape)}",
            expected=str(list(logits.shape)),
        )
    size = min(logits.shape[-1], wanted.shape[-1])
    return float(np.abs(logits[..., :size] - wanted[..., :size]).max())
