"""Random encoder-decoders of ours with the options that Megatron's T5 has, beyond the goldens'."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeling_mtt import MTTForConditionalGeneration, MTTSeq2SeqConfig

_SIZES: dict[str, Any] = {
    "vocab_size": 89,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}
_NO_BIAS = {"attention_bias": False, "attention_out_bias": False, "mlp_bias": False}
_OWN_HEAD = {"tie_word_embeddings": False, "lm_head_bias": False}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@dataclass(frozen=True)
class Model:
    """A model; `needs_te`: Megatron's local layers do not compute it."""

    name: str
    options: dict[str, Any] = field(repr=False)
    needs_te: bool = False

    def __str__(self) -> str:
        return self.name

    def save(self, folder: Path) -> MTTForConditionalGeneration:
        """Save it with random weights, norms and biases among them, and logits beside it."""
        torch.manual_seed(0)
        model = MTTForConditionalGeneration(MTTSeq2SeqConfig(**{**_SIZES, **self.options})).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter + 0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        ids = {
            "input_ids": torch.randint(89, (2, 20)),
            "decoder_input_ids": torch.randint(89, (2, 12)),
        }
        with torch.no_grad():
            logits = model(**ids).logits
        np.savez(folder / "logits.npz", logits=logits, **ids)
        return model


MODELS = [
    Model("learned without final norms", {"final_norm": False, "hidden_act": "gelu"}),
    Model("learned, GELU by tanh", {"hidden_act": "gelu_pytorch_tanh"}),
    Model(
        "rope, gated, RMSNorm, own head, other layers and heads",
        {
            "position_embedding_type": "rope",
            "rope_parameters": _ROPE,
            "hidden_act": "silu",
            "gated_mlp": True,
            "norm_type": "rmsnorm",
            "head_dim": 16,
            "num_encoder_layers": 3,
            "num_decoder_layers": 1,
            **_NO_BIAS,
            **_OWN_HEAD,
        },
    ),
    Model(
        "half of each head rotated by neighbours, squared ReLU, norms minus one",
        {
            "position_embedding_type": "rope",
            "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5},
            "rope_interleave": True,
            "hidden_act": "relu2",
            "zero_centered_norm": True,
        },
    ),
    Model(
        "no positions, no biases",
        {
            "position_embedding_type": "none",
            "num_decoder_layers": 3,
            "hidden_act": "gelu",
            **_NO_BIAS,
        },
    ),
    Model(
        "relative positions",
        {
            "position_embedding_type": "relative",
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 12,
        },
        needs_te=True,
    ),
]
