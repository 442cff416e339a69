"""Encoder-decoders in use: their logits against a reference, and what generation needs to know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .errors import LayoutError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel

MASKS = ("attention_mask", "encoder_attention_mask")


def is_seq2seq(model: PreTrainedModel) -> bool:
    """Whether a model reads with an encoder what its decoder writes about."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def check_stages(pp_size: int) -> None:
    """Raise LayoutError for a pipeline: a decoder needs all of the encoder in every stage."""
    if pp_size > 1:
        raise LayoutError(
            "an encoder and its decoder cannot be dealt to the stages of a pipeline",
            found=f"--pp {pp_size}",
            expected="--pp 1",
            fix="leave out --pp; --tp divides every layer",
        )


def logits(model: PreTrainedModel, arrays: Mapping[str, np.ndarray]) -> torch.Tensor:
    """The logits [batch, decoder sequence, vocabulary] of an encoder-decoder.

    Args:
        model: on the CPU.
        arrays: `input_ids` and `decoder_input_ids`; and, if there are tokens that only pad, one of
            two masks [batch, sequence] with a 1 for each other token. `attention_mask` is that of
            transformers. `encoder_attention_mask` is what Megatron's encoder is given, while the
            decoder sees padding too: padding sees itself as little as others see it, so that it
            sees all tokens alike (t5_extended_attention_mask in legacy/model/t5_model.py).
    """
    import numpy as np
    import torch

    def array(name: str) -> torch.Tensor:
        return torch.from_numpy(arrays[name].astype(np.int64))

    inputs: dict[str, Any] = {"input_ids": array("input_ids")}
    with torch.no_grad():
        if "encoder_attention_mask" in arrays:
            seen = array("encoder_attention_mask").bool()
            pairs = seen[:, None, :, None] & seen[:, None, None, :]
            hidden = torch.where(pairs, 0.0, torch.finfo(torch.float).min)
            encoder = model.get_encoder()
            inputs = {"encoder_outputs": encoder(inputs["input_ids"], attention_mask=hidden)}
        elif "attention_mask" in arrays:
            inputs["attention_mask"] = array("attention_mask")
        found: torch.Tensor = model(**inputs, decoder_input_ids=array("decoder_input_ids")).logits
    return found


def check_start(model: PreTrainedModel, path: str) -> None:
    """Raise UsageError where nothing says which token a decoder begins with."""
    config = model.generation_config
    if config.decoder_start_token_id is None and config.bos_token_id is None:
        raise UsageError(
            "nothing says which token the decoder begins with",
            found=f"{path}, without decoder_start_token_id and bos_token_id",
            expected="the token that stood before the decoder's texts in training",
            fix="convert the checkpoint with the tokenizer it was trained with, or write "
            "decoder_start_token_id into generation_config.json",
        )
