"""A BERT of transformers, and its logits against a reference; needs torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import CorruptError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedConfig, PreTrainedModel

_MODEL_TYPE = "megatron-bert"
_TOGETHER = ("attention_mask", "tokentype_ids")


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
    model: PreTrainedModel, path: str, input_ids: np.ndarray, wanted: np.ndarray
) -> float:
    """The largest difference of both heads' logits from a reference.

    Args:
        model: in float32.
        path: an .npz that may also have `attention_mask` and `tokentype_ids` [batch, sequence], and
            `binary_logits` [batch, 2]. Masked tokens are not compared: Megatron hides all others
            from them, and transformers hides them from all others.
        input_ids, wanted: its tokens and logits.

    Raises:
        CorruptError: arrays of other shapes, or tokens that are not the model's.
    """
    import numpy as np
    import torch

    more: dict[str, np.ndarray] = {}
    with np.load(path, allow_pickle=False) as arrays:
        more = {name: arrays[name] for name in (*_TOGETHER, "binary_logits") if name in arrays}
    limits = {"tokentype_ids": model.config.type_vocab_size, "attention_mask": 2}
    given = {"input_ids": input_ids, **{n: more[n] for n in _TOGETHER if n in more}}
    for name, values in given.items():
        rows = limits.get(name, model.config.vocab_size)
        fits = values.shape == input_ids.shape and values.dtype.kind in "iub"
        if not fits or values.min() < 0 or values.max() >= rows:
            raise _unfit(path, f"{name} that do not fit", f"0 to {rows - 1} beside input_ids")
    if input_ids.shape[1] > model.config.max_position_embeddings:
        limit = model.config.max_position_embeddings
        raise _unfit(path, f"{input_ids.shape[1]} tokens", f"at most {limit} positions")
    tensors = {name: torch.from_numpy(values.astype(np.int64)) for name, values in given.items()}
    with torch.no_grad():
        output = model(
            tensors["input_ids"],
            attention_mask=tensors.get("attention_mask"),
            token_type_ids=tensors.get("tokentype_ids"),
        )
    binary = getattr(output, "seq_relationship_logits", None)
    logits = (output.logits if binary is None else output.prediction_logits).numpy()
    size = min(logits.shape[-1], wanted.shape[-1])
    seen = more.get("attention_mask", np.ones_like(input_ids)) > 0
    difference = float(np.abs(logits[..., :size] - wanted[..., :size])[seen].max(initial=0.0))
    if "binary_logits" not in more:
        return difference
    if binary is None or binary.shape != more["binary_logits"].shape:
        found = f"binary_logits of shape {list(more['binary_logits'].shape)}"
        raise _unfit(path, found, "none" if binary is None else str(list(binary.shape)))
    return max(difference, float(np.abs(binary.numpy() - more["binary_logits"]).max()))


def _unfit(path: str, found: str, expected: str) -> CorruptError:
    return CorruptError(
        f"{path} does not fit the model",
        found=found,
        expected=expected,
        fix="give input_ids and logits that were computed with this model",
    )
