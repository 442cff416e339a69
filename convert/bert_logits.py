"""A BERT of transformers, and its logits against a reference; needs torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .errors import CorruptError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedConfig, PreTrainedModel

_MODEL_TYPE = "megatron-bert"
_MASK, _TYPES, _BINARY = "attention_mask", "tokentype_ids", "binary_logits"
ARRAYS = (_TYPES, _BINARY)
"""What a reference of a BERT may have and no other."""


def is_bert(config: PreTrainedConfig) -> bool:
    """Whether a configuration is of a BERT."""
    return bool(config.model_type == _MODEL_TYPE)


def refuse_bert(model: PreTrainedModel, path: str) -> None:
    """Raise UsageError for a model that does not continue texts."""
    if is_bert(model.config):
        raise UsageError(
            "a BERT does not continue texts: it fills gaps in them",
            found=f"{path}, a {_MODEL_TYPE}",
            expected="a model that generates",
            fix="load it with transformers, as the example in its README.md does",
        )


def load_bert(
    path: str, config: PreTrainedConfig, dtype: str, num_processes: int
) -> PreTrainedModel:
    """The model of a folder, of the class with its heads.

    Raises:
        UsageError: several processes, for which transformers cannot split the class.
    """
    check_single(num_processes)
    model: PreTrainedModel = model_class(config).from_pretrained(
        path, dtype=dtype, local_files_only=True
    )
    return model.eval()


def check_single(num_processes: int) -> None:
    """Raise UsageError for several processes."""
    if num_processes > 1:
        raise UsageError(
            "a BERT cannot be split over processes",
            found=f"{num_processes} processes",
            expected="one: transformers has no plan to split MegatronBert",
            fix="leave out tp and pp",
        )


def model_class(config: PreTrainedConfig) -> Any:
    """The class that `architectures` names."""
    import transformers

    return getattr(transformers, config.architectures[0])


def bert_difference(
    model: PreTrainedModel, path: str, arrays: Mapping[str, np.ndarray], wanted: np.ndarray
) -> float:
    """The largest difference of both heads' logits from a reference.

    Args:
        model: in float32.
        path: of the reference, for messages.
        arrays: its `input_ids`, and perhaps `attention_mask` and `tokentype_ids` [batch, sequence],
            and `binary_logits` [batch, 2]. Masked tokens are not compared: Megatron hides all
            others from them, and transformers hides them from all others.
        wanted: its logits.

    Raises:
        CorruptError: arrays of other shapes, or tokens that are not the model's.
    """
    import numpy as np
    import torch

    input_ids = arrays["input_ids"]
    limits = {_TYPES: model.config.type_vocab_size, _MASK: 2}
    given = {name: arrays[name] for name in ("input_ids", _MASK, _TYPES) if name in arrays}
    for name, values in given.items():
        rows = limits.get(name, model.config.vocab_size)
        fits = values.shape == input_ids.shape and values.dtype.kind in "iub"
        if not fits or values.min() < 0 or values.max() >= rows:
            raise unfit(path, f"{name} that do not fit", f"0 to {rows - 1} beside input_ids")
    if input_ids.shape[1] > model.config.max_position_embeddings:
        limit = model.config.max_position_embeddings
        raise unfit(path, f"{input_ids.shape[1]} tokens", f"at most {limit} positions")
    tensors = {name: torch.from_numpy(values.astype(np.int64)) for name, values in given.items()}
    with torch.no_grad():
        output = model(
            tensors["input_ids"],
            attention_mask=tensors.get(_MASK),
            token_type_ids=tensors.get(_TYPES),
        )
    binary = getattr(output, "seq_relationship_logits", None)
    logits = (output.logits if binary is None else output.prediction_logits).numpy()
    size = min(logits.shape[-1], wanted.shape[-1])
    seen = arrays.get(_MASK, np.ones_like(input_ids)) > 0
    difference = float(np.abs(logits[..., :size] - wanted[..., :size])[seen].max(initial=0.0))
    if _BINARY not in arrays:
        return difference
    if binary is None or binary.shape != arrays[_BINARY].shape:
        found = f"{_BINARY} of shape {list(arrays[_BINARY].shape)}"
        raise unfit(path, found, "none" if binary is None else str(list(binary.shape)))
    return max(difference, float(np.abs(binary.numpy() - arrays[_BINARY]).max()))


def unfit(path: str, found: str, expected: str) -> CorruptError:
    """The error for a reference that was not computed with the model."""
    return CorruptError(
        f"{path} does not fit the model",
        found=found,
        expected=expected,
        fix="give input_ids and logits that were computed with this model",
    )
