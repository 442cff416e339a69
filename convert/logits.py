"""Logits of a converted folder or a checkpoint against a reference; needs torch."""

from __future__ import annotations

import os
import zipfile
import zlib
from typing import TYPE_CHECKING

from .bert_logits import bert_difference, is_bert, load_bert
from .errors import CorruptError, SourceError, UsageError
from .families import FAMILIES
from .formats import hf_safetensors
from .loading import from_megatron
from .sharding import check_layout
from .sources import is_remote

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel


def load_model(
    path: str | os.PathLike[str], dtype: str = "auto", *, tp_size: int = 1, pp_size: int = 1
) -> PreTrainedModel:
    """The model of a converted folder, or straight from a Megatron checkpoint.

    It is on the CPU, or on all the processes that call this together.

    Raises:
        SourceError: it cannot be loaded.
        LayoutError: it cannot be cut into such parts.
    """
    path = os.fspath(path)
    if is_remote(path) or not (os.path.isdir(path) and hf_safetensors.holds_model(path)):
        return from_megatron(path, dtype=dtype, tp_size=tp_size, pp_size=pp_size)
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    from modeling_mtt import MTTConfig

    options: dict[str, object] = {"trust_remote_code": False, "local_files_only": True}
    if tp_size * pp_size > 1:
        options["distributed_config"] = DistributedConfig(tp_size=tp_size, pp_size=pp_size)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        if is_bert(config):
            return load_bert(path, config, dtype, tp_size * pp_size)
        if isinstance(config, MTTConfig):
            check_layout(config, tp_size, pp_size)
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options).eval()
    except UsageError:
        raise
    except Exception as error:  # a broken config.json may raise anything
        raise SourceError(
            f"{path} cannot be loaded",
            found=str(error) or type(error).__name__,
            expected="a folder that mtt convert wrote, unchanged",
            fix=f"check it with mtt verify {path}, or convert again",
        ) from error


def position_limit(model: PreTrainedModel) -> int | None:
    """The longest sequence of a model with a table of positions; None if it has no table."""
    family = FAMILIES.get(model.config.model_type)
    always = family is not None and family.fixed.get("position_embedding_type")
    if always != "learned_absolute" and (
        getattr(model.config, "position_embedding_type", None) != "learned"
    ):
        return None
    limit: int = model.config.max_position_embeddings
    return limit


def compare_logits(path: str | os.PathLike[str], reference: str | os.PathLike[str]) -> float:
    """The largest difference between the model's logits in float32 and a reference.

    Args:
        path: a converted folder or a Megatron checkpoint.
        reference: an .npz with `input_ids` [batch, sequence] and `logits` or `logits_fp32`
            [batch, sequence, vocabulary]; columns that only one side has are padding.

    Raises:
        CorruptError: the reference does not have these arrays in these shapes, or its tokens are
            not the model's.
        SourceError: the reference or the model cannot be loaded.
    """
    import numpy as np
    import torch

    path, reference = os.fspath(path), os.fspath(reference)
    input_ids, wanted = _read_reference(reference)
    model = load_model(path, dtype="float32")
    if is_bert(model.config):
        return bert_difference(model, reference, input_ids, wanted)
    rows, limit = model.config.vocab_size, position_limit(model)
    if input_ids.min() < 0 or input_ids.max() >= rows:
        raise _unfit(reference, f"ids {input_ids.min()} to {input_ids.max()}", f"0 to {rows - 1}")
    if limit is not None and input_ids.shape[1] > limit:
        raise _unfit(reference, f"{input_ids.shape[1]} tokens", f"at most {limit} positions")
    with torch.no_grad():
        logits = model(torch.from_numpy(input_ids.astype(np.int64))).logits.float().numpy()
    size = min(logits.shape[-1], wanted.shape[-1])
    return float(np.abs(logits[..., :size] - wanted[..., :size]).max())


def _read_reference(path: str) -> tuple[np.ndarray, np.ndarray]:
    """`input_ids` and logits of a reference, once they fit each other."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            input_ids = arrays["input_ids"]
            wanted = arrays["logits_fp32" if "logits_fp32" in arrays else "logits"]
    except OSError as error:
        raise SourceError(f"{path} cannot be read", found=str(error)) from error
    except (
        AttributeError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error
    ) as error:  # fmt: skip
        raise CorruptError(
            f"{path} is no logits reference",
            found=str(error),
            expected="an .npz with input_ids and logits",
        ) from error
    if input_ids.dtype.kind not in "iu" or wanted.dtype.kind != "f":
        raise _unfit(path, f"{input_ids.dtype} and {wanted.dtype}", "integers and floats")
    if input_ids.ndim != 2 or not input_ids.size:
        raise _unfit(path, f"input_ids of shape {list(input_ids.shape)}", "[batch, sequence]")
    if wanted.ndim != 3 or wanted.shape[:2] != input_ids.shape or not wanted.size:
        shape = ", ".join(map(str, input_ids.shape))
        raise _unfit(path, f"logits of shape {list(wanted.shape)}", f"[{shape}, vocabulary]")
    return input_ids, wanted


def _unfit(path: str, found: str, expected: str) -> CorruptError:
    return CorruptError(
        f"{path} does not fit the model",
        found=found,
        expected=expected,
        fix="give input_ids and logits that were computed with this model",
    )
