# Copyright 2026 The mtt authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""MTT encoder-decoder configuration."""

from dataclasses import field
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from .configuration_mtt import MTTConfig, fill_in_heads, rope_parameters_as_given
from .plans_mtt import ATTENTION, DENSE
from .validation_mtt import check_positions, check_sizes

SEQ2SEQ_AUTO_MAP = {
    "AutoConfig": "configuration_seq2seq_mtt.MTTSeq2SeqConfig",
    "AutoModel": "modeling_seq2seq_mtt.MTTSeq2SeqModel",
    "AutoModelForSeq2SeqLM": "modeling_seq2seq_mtt.MTTForConditionalGeneration",
}

_LAYER = ATTENTION | DENSE
# There are no norms of heads between the sides.
_CROSS_ATTENTION = {
    name.replace("self_attn", "cross_attn"): style
    for name, style in ATTENTION.items()
    if name.endswith("_proj")
}


@strict
class MTTSeq2SeqConfig(PreTrainedConfig):
    r"""Configuration of an MTT encoder-decoder: what Megatron calls T5.

    The fields are the options of Megatron's T5 that change its forward pass, under Hugging Face
    names. It is not Google's T5: scores are scaled, and norms, activation and positions are chosen
    as for a GPT. The defaults describe Megatron's T5 of 220 million parameters.

    Args:
        vocab_size (`int`, *optional*, defaults to 29096):
            Rows of the embedding, which both sides share, and of the head. Megatron's padding rows
            are not part of it.
        hidden_size (`int`, *optional*, defaults to 768):
            Width of the residual stream.
        intermediate_size (`int`, *optional*, defaults to 3072):
            Width of the MLP after activation, i.e. of each of gate and up in a gated MLP.
        num_encoder_layers (`int`, *optional*, defaults to 12):
            Number of encoder layers.
        num_decoder_layers (`int`, *optional*, defaults to 12):
            Number of decoder layers; also called `num_hidden_layers`, which sizes caches.
        num_attention_heads (`int`, *optional*, defaults to 12):
            Number of query heads.
        num_key_value_heads (`int`, *optional*):
            Number of key and value heads; must divide `num_attention_heads`. `None` means as many
            as query heads.
        head_dim (`int`, *optional*):
            Width of one head. `None` means `hidden_size // num_attention_heads`; any other value
            is allowed.
        hidden_act (`str`, *optional*, defaults to `"gelu_pytorch_tanh"`):
            `"gelu"` (exact, with erf), `"gelu_pytorch_tanh"`, `"silu"` or `"relu2"` (ReLU squared).
        gated_mlp (`bool`, *optional*, defaults to `False`):
            Whether the MLP is `down(act(gate(x)) * up(x))` rather than `down(act(up(x)))`.
        norm_type (`str`, *optional*, defaults to `"layernorm"`):
            `"layernorm"` (weight and bias) or `"rmsnorm"` (weight only), for every norm there is.
        norm_eps (`float`, *optional*, defaults to 1e-5):
            Added to the variance, or to the mean square, before its root is taken.
        zero_centered_norm (`bool`, *optional*, defaults to `False`):
            Whether the stored norm weights are gamma - 1.
        final_norm (`bool`, *optional*, defaults to `True`):
            Whether a norm comes after the last layer of each side. Megatron-Core's T5 of local
            layers has none where Transformer Engine is not installed.
        position_embedding_type (`str`, *optional*, defaults to `"learned"`):
            `"learned"` (one table, added to the token embeddings of both sides), `"relative"` (a
            bias on the scores of self-attention for each head and bucket of distances, as in T5),
            `"rope"` (in self-attention) or `"none"`. Positions count from the first token of a row,
            padding included.
        max_position_embeddings (`int`, *optional*, defaults to 512):
            Rows of the learned table, or the sequence length in tokens the model was trained with.
        relative_attention_num_buckets (`int`, *optional*, defaults to 32):
            Only with `"relative"`: how many buckets distances fall into; the encoder has half of
            them for each direction.
        relative_attention_max_distance (`int`, *optional*, defaults to 128):
            Only with `"relative"`: the distance in tokens from which on all share a bucket.
        rope_parameters (`dict`, *optional*):
            Only with `"rope"`: `rope_theta`, `rope_type`, `partial_rotary_factor` and whatever the
            rope type asks for.
        rope_interleave (`bool`, *optional*, defaults to `False`):
            Whether neighbouring values are rotated as a pair rather than one value of each half.
        attention_bias (`bool`, *optional*, defaults to `True`):
            Whether the query, key and value projections have a bias.
        attention_out_bias (`bool`, *optional*, defaults to `True`):
            Whether the output projections of attention have a bias.
        attention_multiplier (`float`, *optional*):
            Multiplies attention scores, before a relative bias is added. `None` means
            `head_dim ** -0.5`.
        mlp_bias (`bool`, *optional*, defaults to `True`):
            Whether the projections of the MLP have a bias.
        lm_head_bias (`bool`, *optional*, defaults to `True`):
            Whether the head has a bias. Megatron-Core's has one where the head is tied.
        use_qk_norm (`bool`, *optional*, defaults to `False`):
            Whether each head of queries and keys is normalised in self-attention.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`):
            Whether the head shares the weight of the token embeddings. Encoder and decoder always
            share theirs.
        attention_dropout (`float`, *optional*, defaults to 0.1):
            Probability of dropping an attention weight in training.
        hidden_dropout (`float`, *optional*, defaults to 0.1):
            Probability of dropping a value in training, after the embeddings and before each
            residual addition.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of freshly initialised weights.
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether the model returns keys and values for later calls.
        bos_token_id (`int`, *optional*):
            Beginning of a text.
        eos_token_id (`int` or `list[int]`, *optional*):
            End of a text.
        pad_token_id (`int`, *optional*):
            Padding.
        decoder_start_token_id (`int`, *optional*):
            What the decoder starts with; `bos_token_id` where there is none.

    Raises:
        `StrictDataclassError`: a value has the wrong type, or contradicts another one.

    ```python
    >>> from modeling_mtt import MTTForConditionalGeneration, MTTSeq2SeqConfig

    >>> config = MTTSeq2SeqConfig(num_encoder_layers=2, num_decoder_layers=2)
    >>> model = MTTForConditionalGeneration(config)
    ```
    """

    model_type = "mtt_seq2seq"
    keys_to_ignore_at_inference = ["past_key_values"]
    # The decoder's, because caches have as many layers as this says.
    attribute_map = {"num_hidden_layers": "num_decoder_layers"}
    base_model_tp_plan = {
        "shared": "embedding_rowwise",
        "encoder.embed_tokens": "embedding_rowwise",
        "decoder.embed_tokens": "embedding_rowwise",
        **{f"encoder.layers.*.{name}": style for name, style in _LAYER.items()},
        **{
            f"decoder.layers.*.{name}": style for name, style in (_LAYER | _CROSS_ATTENTION).items()
        },
    }

    vocab_size: int = 29096
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_encoder_layers: int = 12
    num_decoder_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: Literal["gelu", "gelu_pytorch_tanh", "silu", "relu2"] = "gelu_pytorch_tanh"
    gated_mlp: bool = False
    norm_type: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    zero_centered_norm: bool = False
    final_norm: bool = True
    position_embedding_type: Literal["learned", "relative", "rope", "none"] = "learned"
    max_position_embeddings: int = 512
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    # A factory, so that the class has no such attribute: see `rope_parameters_as_given`.
    rope_parameters: RopeParameters | dict | None = field(default_factory=lambda: None)
    rope_interleave: bool = False
    attention_bias: bool = True
    attention_out_bias: bool = True
    attention_multiplier: float | int | None = None
    mlp_bias: bool = True
    lm_head_bias: bool = True
    use_qk_norm: bool = False
    tie_word_embeddings: bool = True
    attention_dropout: float | int = 0.1
    hidden_dropout: float | int = 0.1
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None
    is_encoder_decoder: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        fill_in_heads(self)
        absent = set()
        if not self.gated_mlp:
            absent.add("gate_proj")
        if not self.use_qk_norm:
            absent |= {"q_norm", "k_norm"}
        # transformers warns about rules that match nothing.
        self.base_model_tp_plan = {
            name: style
            for name, style in self.base_model_tp_plan.items()
            if name.rpartition(".")[2] not in absent
        }

        kwargs.setdefault("auto_map", dict(SEQ2SEQ_AUTO_MAP))
        with rope_parameters_as_given(self):
            super().__post_init__(**kwargs)

    __eq__ = MTTConfig.__eq__  # `rope_parameters` may be missing

    def get_text_config(
        self, decoder: bool | None = None, encoder: bool | None = None
    ) -> "MTTSeq2SeqConfig":
        """Return this configuration, which holds for both sides: transformers makes a copy."""
        return self

    def types_of_layers(self) -> list[str]:
        """Return what the attention of each layer sees, for `MTTAttention`: everything."""
        return ["full_attention"] * max(self.num_encoder_layers, self.num_decoder_layers)

    def start_token(self) -> int:
        """Return the token that the decoder starts with.

        Raises:
            `ValueError`: the configuration has none.
        """
        for token in (self.decoder_start_token_id, self.bos_token_id):
            if token is not None:
                return token
        raise ValueError(
            "The configuration does not say what the decoder starts with: found neither "
            "decoder_start_token_id nor bos_token_id. Set config.decoder_start_token_id."
        )

    def validate_architecture(self) -> None:
        """Check what no single field shows; `@strict` calls it after construction."""
        check_sizes(self, "num_encoder_layers", "num_decoder_layers")
        check_positions(self)
        if not self.is_encoder_decoder:
            raise ValueError("is_encoder_decoder (False) must be True: see MTTConfig for decoders.")
        if self.position_embedding_type == "relative":
            num_buckets = self.relative_attention_num_buckets
            if num_buckets < 4:
                raise ValueError(
                    f"relative_attention_num_buckets ({num_buckets}) must be at least 4: one for "
                    "near and one for far keys, on either side."
                )
            if self.relative_attention_max_distance <= num_buckets // 2:
                raise ValueError(
                    f"relative_attention_max_distance ({self.relative_attention_max_distance}) "
                    f"must be more than half of relative_attention_num_buckets ({num_buckets}): "
                    "each of so many near distances has a bucket of its own."
                )


__all__ = ["SEQ2SEQ_AUTO_MAP", "MTTSeq2SeqConfig"]
