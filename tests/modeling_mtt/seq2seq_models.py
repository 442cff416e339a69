"""Tiny encoder-decoders with weights worth comparing, and transformers' T5 with the same."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import T5Config, T5ForConditionalGeneration

from modeling_mtt import MTTForConditionalGeneration, MTTSeq2SeqConfig
from tests.modeling_mtt.oracles import randomise

# What Megatron trains; Google's T5 1.1, which transformers has too; and what neither has. More
# layers on one side, so that nothing can take one number for the other.
PRESETS: dict[str, dict[str, Any]] = {
    "megatron": {},
    "t5": {
        "num_encoder_layers": 3,
        "num_decoder_layers": 2,
        "head_dim": 12,
        "gated_mlp": True,
        "norm_type": "rmsnorm",
        "norm_eps": 1e-6,
        "position_embedding_type": "relative",
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 12,
        "attention_bias": False,
        "attention_out_bias": False,
        "attention_multiplier": 1.0,
        "mlp_bias": False,
        "lm_head_bias": False,
    },
    "rotary": {
        "num_key_value_heads": 2,
        "head_dim": 12,
        "hidden_act": "relu2",
        "zero_centered_norm": True,
        "final_norm": False,
        "use_qk_norm": True,
        "position_embedding_type": "rope",
        "rope_parameters": {"rope_theta": 5000.0, "partial_rotary_factor": 0.5},
        "tie_word_embeddings": False,
    },
}
SHAPES = tuple(PRESETS)


def tiny_seq2seq(preset: str = "megatron", **options: Any) -> MTTForConditionalGeneration:
    defaults: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_encoder_layers": 2,
        "num_decoder_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "decoder_start_token_id": 1,
        "pad_token_id": 0,
    }
    model = MTTForConditionalGeneration(
        MTTSeq2SeqConfig(**{**defaults, **PRESETS[preset], **options})
    )
    randomise(model)
    return model


def native_t5(model: MTTForConditionalGeneration) -> T5ForConditionalGeneration:
    """transformers' T5 with the weights of a model of the preset `t5`."""
    config = model.config
    native = T5ForConditionalGeneration(
        T5Config(
            vocab_size=config.vocab_size,
            d_model=config.hidden_size,
            d_kv=config.head_dim,
            d_ff=config.intermediate_size,
            num_layers=config.num_encoder_layers,
            num_decoder_layers=config.num_decoder_layers,
            num_heads=config.num_attention_heads,
            relative_attention_num_buckets=config.relative_attention_num_buckets,
            relative_attention_max_distance=config.relative_attention_max_distance,
            layer_norm_epsilon=config.norm_eps,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            # No scale before the head; it is tied all the same.
            tie_word_embeddings=False,
            decoder_start_token_id=config.decoder_start_token_id,
            pad_token_id=config.pad_token_id,
            eos_token_id=None,
        )
    ).eval()
    names = [
        (r"^model\.", ""),
        (r"\.layers\.(\d+)\.input_layernorm", r".block.\1.layer.0.layer_norm"),
        (r"\.layers\.(\d+)\.self_attn\.(.)_proj", r".block.\1.layer.0.SelfAttention.\2"),
        (r"\.layers\.(\d+)\.cross_attn_layernorm", r".block.\1.layer.1.layer_norm"),
        (r"\.layers\.(\d+)\.cross_attn\.(.)_proj", r".block.\1.layer.1.EncDecAttention.\2"),
        (
            r"encoder\.layers\.(\d+)\.post_attention_layernorm",
            r"encoder.block.\1.layer.1.layer_norm",
        ),
        (
            r"decoder\.layers\.(\d+)\.post_attention_layernorm",
            r"decoder.block.\1.layer.2.layer_norm",
        ),
        (r"encoder\.layers\.(\d+)\.mlp\.", r"encoder.block.\1.layer.1.DenseReluDense."),
        (r"decoder\.layers\.(\d+)\.mlp\.", r"decoder.block.\1.layer.2.DenseReluDense."),
        (r"\.gate_proj", ".wi_0"),
        (r"\.up_proj", ".wi_1"),
        (r"\.down_proj", ".wo"),
        (r"coder\.norm\.", "coder.final_layer_norm."),
        (
            r"coder\.relative_attention_bias",
            "coder.block.0.layer.0.SelfAttention.relative_attention_bias",
        ),
    ]
    weights = {}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        weights[name] = tensor
    native.load_state_dict(weights)
    return native


def texts(padding: str | None = "right") -> dict[str, torch.Tensor]:
    """Two texts to read, the second shorter and padded."""
    input_ids = torch.randint(2, 96, (2, 9))
    if padding == "right":
        input_ids[1, 5:] = 0
    elif padding == "left":
        input_ids[1, :4] = 0
    return {"input_ids": input_ids, "attention_mask": (input_ids != 0).long()}


def written(length: int = 6) -> torch.Tensor:
    """What the decoder reads, for two texts."""
    decoder_input_ids = torch.randint(2, 96, (2, length))
    decoder_input_ids[:, 0] = 1
    return decoder_input_ids
