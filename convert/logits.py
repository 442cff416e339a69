"""Logits of a converted folder or a checkpoint against a reference; needs torch."""

from __future__ import annotations

import os
import zipfile
import zlib
from typing import TYPE_CHECKING

from . import bert_logits, seq2seq
from .bert_logits import bert_difference, is_bert, load_bert, unfit
from .errors import CorruptError, SourceError, UsageError
from .families import FAMILIES
from .formats import hf_safetensors
from .loading import from_megatron
from .sharding import check_layout
from .sources import is_remote

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

_IDS, _DECODER_IDS = "input_ids", "decoder_input_ids"
_OPTIONAL = (_DECODER_IDS, *seq2seq.MASKS, *bert_logits.ARRAYS)
_REFERENCE = "an .npz with input_ids and logits"
_OTHER = "give the .npz that the original model's logits were saved in"


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
    import transformers
    from transformers import AutoConfig
    from transformers.distributed import DistributedConfig

    from modeling_mtt import MTTConfig, MTTSeq2SeqConfig

    options: dict[str, object] = {"trust_remote_code": False, "local_files_only": True}
    if tp_size * pp_size > 1:
        options["distributed_config"] = DistributedConfig(tp_size=tp_size, pp_size=pp_size)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        if is_bert(config):
            return load_bert(path, config, dtype, tp_size * pp_size)
        if isinstance(config, (MTTConfig, MTTSeq2SeqConfig)):
            check_layout(config, tp_size, pp_size)
        family = FAMILIES.get(config.model_type)
        name = family.auto_class if family else "AutoModelForCausalLM"
        auto_class = getattr(transformers, name)
        return auto_class.from_pretrained(path, dtype=dtype, **options).eval()
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
            [batch, sequence, vocabulary]; columns that only one side has are padding. With
            `decoder_input_ids` [batch, decoder sequence], and logits of these, for an
            encoder-decoder (see `seq2seq.logits` for masks).

    Raises:
        CorruptError: the reference does not have these arrays in these shapes, or its tokens are
            not the model's.
        SourceError: the reference or the model cannot be loaded.
    """
    import numpy as np
    import torch

    path, reference = os.fspath(path), os.fspath(reference)
    arrays, wanted = _read_reference(reference)
    model = load_model(path, dtype="float32")
    if is_bert(model.config):
        return bert_difference(model, reference, arrays, wanted)
    rows, limit = model.config.vocab_size, position_limit(model)
    if (_DECODER_IDS in arrays) != seq2seq.is_seq2seq(model):
        raise unfit(
            reference,
            f"{', '.join(arrays)} for a {type(model).__name__}",
            f"{_DECODER_IDS} for an encoder-decoder, and for no other model",
        )
    for name in (_IDS, _DECODER_IDS):
        ids = arrays.get(name, arrays[_IDS])
        if ids.min() < 0 or ids.max() >= rows:
            raise unfit(reference, f"ids {ids.min()} to {ids.max()}", f"0 to {rows - 1}")
        if limit is not None and ids.shape[1] > limit:
            raise unfit(reference, f"{ids.shape[1]} tokens", f"at most {limit} positions")
    if _DECODER_IDS in arrays:
        logits = seq2seq.logits(model, arrays).float().numpy()
    else:
        with torch.no_grad():
            tokens = torch.from_numpy(arrays[_IDS].astype(np.int64))
            logits = model(tokens).logits.float().numpy()
    size = min(logits.shape[-1], wanted.shape[-1])
    return float(np.abs(logits[..., :size] - wanted[..., :size]).max())


def _read_reference(path: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Ids, masks, and the logits of a reference, once they fit each other."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as stored:
            given = {name: stored[name] for name in _OPTIONAL if name in stored}
            arrays = {_IDS: stored[_IDS], **given}
            wanted = stored["logits_fp32" if "logits_fp32" in stored else "logits"]
    except OSError as error:
        raise SourceError(
            f"{path} cannot be read", found=str(error), expected=_REFERENCE, fix=_OTHER
        ) from error
    except (
        AttributeError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error
    ) as error:  # fmt: skip
        raise CorruptError(
            f"{path} is no logits reference",
            # Of a file that is no .npz NumPy says how to unpickle it.
            found=str(error) if zipfile.is_zipfile(path) else "another kind of file",
            expected=_REFERENCE,
            fix=_OTHER,
        ) from error
    last = arrays.get(_DECODER_IDS, arrays[_IDS])
    for ids in (arrays[_IDS], last):
        if ids.dtype.kind not in "iu" or wanted.dtype.kind != "f":
            raise unfit(path, f"{ids.dtype} and {wanted.dtype}", "integers and floats")
        if ids.ndim != 2 or not ids.size:
            raise unfit(path, f"input_ids of shape {list(ids.shape)}", "[batch, sequence]")
    if wanted.ndim != 3 or wanted.shape[:2] != last.shape or not wanted.size:
        shape = ", ".join(map(str, last.shape))
        raise unfit(path, f"logits of shape {list(wanted.shape)}", f"[{shape}, vocabulary]")
    for name in (_DECODER_IDS, *seq2seq.MASKS):
        other = arrays.get(name, arrays[_IDS])
        fits = len(other) == len(arrays[_IDS]) and (
            name == _DECODER_IDS or other.shape == arrays[_IDS].shape
        )
        if not fits or other.dtype.kind not in "iufb":
            shapes = f"{list(other.shape)} beside input_ids of shape {list(arrays[_IDS].shape)}"
            raise unfit(path, f"{name} of shape {shapes}", "rows of the same texts")
    return arrays, wanted
