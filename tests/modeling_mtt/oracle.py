"""What a model of transformers that computes the same is compared with, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from modeling_mtt import MTTConfig, MTTForCausalLM

Tensors = dict[str, torch.Tensor]

LARGEST_DIFFERENCE = 1e-5

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
NO_BIAS: dict[str, Any] = {
    "attention_bias": False,
    "attention_out_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
GATED_RMSNORM: dict[str, Any] = {
    "hidden_act": "silu",
    "gated_mlp": True,
    "norm_type": "rmsnorm",
    "position_embedding_type": "rope",
}
LLAMA: dict[str, Any] = {**GATED_RMSNORM, **NO_BIAS}


@dataclass(frozen=True)
class Oracle:
    """An option, the class that has it too, and how one model becomes the other.

    Attributes:
        option: what is compared, in words of `MTTConfig`.
        native: a class name of transformers.
        config: options of its configuration besides `SIZES` and `TOKENS`.
        options: options of `MTTConfig` besides them.
        rename: makes MTT's tensors of the native ones.
        prompt_length: tokens.
    """

    option: str
    native: str
    config: Mapping[str, Any]
    options: Mapping[str, Any]
    rename: Callable[[Tensors], Tensors] = dict
    prompt_length: int = 12

    @property
    def name(self) -> str:
        return f"{self.native}-{self.option}"

    def build(self) -> tuple[PreTrainedModel, MTTForCausalLM]:
        """Return both models, of the same weights."""
        native_class = getattr(transformers, self.native)
        native = native_class(native_class.config_class(**{**SIZES, **TOKENS, **self.config}))
        randomise(native)
        model = MTTForCausalLM(MTTConfig(**{**SIZES, **TOKENS, **self.options})).eval()
        missing, unexpected = model.load_state_dict(self.rename(native.state_dict()), strict=False)
        assert not unexpected, unexpected
        assert missing in ([], ["lm_head.weight"]), missing
        model.tie_weights()
        return native, model


@torch.no_grad()
def randomise(model: PreTrainedModel) -> None:
    """Draw weights such that no weight of 1 and no bias of 0 hides a mistake, and logits differ."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        else:
            parameter.normal_(std=0.25)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.2)
    model.eval()


def prompt(length: int, padding: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and mask `[2, length]`; the second row has 4 tokens of padding."""
    input_ids = torch.randint(1, 96, (2, length))
    if padding == "left":
        input_ids[1, :4] = 0
    elif padding == "right":
        input_ids[1, -4:] = 0
    return input_ids, (input_ids != 0).long()


@torch.no_grad()
def logits(model: PreTrainedModel, oracle: Oracle, padding: str | None) -> torch.Tensor:
    """Return logits `[tokens, vocabulary]` at what is not padding, of a seeded prompt."""
    torch.manual_seed(1)
    input_ids, mask = prompt(oracle.prompt_length, padding)
    return model(input_ids, attention_mask=mask).logits[mask.bool()]


def difference(oracle: Oracle) -> float:
    """Return the largest absolute difference of logits, without padding and with it."""
    torch.manual_seed(0)
    native, model = oracle.build()
    largest = 0.0
    for padding in (None, "left", "right"):
        expected = logits(native, oracle, padding)
        assert expected.std() > 0.5
        found = logits(model, oracle, padding)
        largest = max(largest, float((found - expected).abs().max()))
    return largest


def rename(
    tensors: Tensors, names: Mapping[str, str], split: Mapping[str, Callable[..., Tensors]]
) -> Tensors:
    """Replace parts of names, then split the tensors whose names have a key of `split`."""
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in names.items():
            name = name.replace(old, new)
        for part, function in split.items():
            if part in name:
                pieces = function(tensor)
                renamed |= {name.replace(part, to): piece for to, piece in pieces.items()}
                break
        else:
            renamed[name] = tensor
    return renamed


def split_groups(tensor: torch.Tensor, num_groups: int, head_dim: int = 8) -> Tensors:
    """Split rows ordered by group: its query heads, its key head, its value head."""
    groups = tensor.unflatten(0, (num_groups, -1, head_dim))
    heads = {"q_proj": groups[:, :-2], "k_proj": groups[:, -2:-1], "v_proj": groups[:, -1:]}
    return {name: head.flatten(0, 2) for name, head in heads.items()}


def split_gated(tensor: torch.Tensor) -> Tensors:
    gate, up = tensor.chunk(2)
    return {"gate_proj": gate, "up_proj": up}
