"""What a Megatron GPT computes, in Megatron-Core's words, normalised over generations.

    h = word_embeddings[tokens] (+ position_embeddings[positions])
    for each layer:
        h = h + linear_proj(attention(linear_qkv(norm(h))))
        h = h + linear_fc2(activation(linear_fc1(norm(h))))
    logits = output_layer(final_layernorm(h))

`arguments.py` makes an `Architecture` from a checkpoint; readers, families and writers work with
nothing else. Sources are paths in megatron-core 0.16.1 unless another is named.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UnsupportedError

POSITION_EMBEDDING_TYPES = ("learned_absolute", "rope", "none")
NORMALIZATIONS = ("LayerNorm", "RMSNorm")
ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "squared_relu")
PARAMS_DTYPES = ("float32", "float16", "bfloat16")

# What `use_rope_scaling` fixes besides the factor; Megatron has no argument for them.
# (Source: RotaryEmbedding._apply_scaling, models/common/embeddings/rotary_pos_embedding.py;
# checked by running it: it equals transformers' "llama3" with these numbers.)
ROPE_SCALING_LOW_FREQ_FACTOR = 1.0
ROPE_SCALING_HIGH_FREQ_FACTOR = 4.0
ROPE_SCALING_ORIGINAL_MAX_POSITION_EMBEDDINGS = 8192


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The numbers and choices that decide what a Megatron GPT computes.

    Raises:
        UnsupportedError: numbers that no model can have, or a choice mtt does not know.
    """

    num_layers: int
    """Transformer layers, all alike."""

    hidden_size: int
    """Width of the residual stream."""

    ffn_hidden_size: int
    """Width of the MLP after the activation: a gated `linear_fc1` has twice as many rows."""

    num_attention_heads: int
    """Query heads."""

    num_query_groups: int
    """Key/value heads. Equals `num_attention_heads` without grouped-query attention, whatever
    `args.num_query_groups` says (core_transformer_config_from_args, training/arguments.py)."""

    kv_channels: int
    """Size of one head; `hidden_size / num_attention_heads` unless chosen otherwise. Attention
    scores are scaled by its inverse square root (transformer/dot_product_attention.py)."""

    padded_vocab_size: int
    """Rows of the embedding and output tables, padding included."""

    max_position_embeddings: int
    """Rows of a learned position table; for other models the length they were meant for."""

    vocab_size: int | None = None
    """Rows that are tokens; the rest only pads. None where the checkpoint does not say."""

    position_embedding_type: str = "learned_absolute"
    """`learned_absolute`, `rope` or `none` (models/gpt/gpt_model.py)."""

    rotary_base: float = 10000.0
    """Base of the rotary frequencies; 10000 in models without rope."""

    rotary_percent: float = 1.0
    """Part of each head that is rotated, from its beginning; 1 in models without rope."""

    rope_scaling_factor: float | None = None
    """Factor of Llama 3's frequency scaling, whose other numbers are the `ROPE_SCALING_*` of this
    module; None without `use_rope_scaling`."""

    rotary_seq_len_interpolation_factor: float | None = None
    """Positions are divided by it before they are rotated (linear scaling); None without."""

    normalization: str = "LayerNorm"
    """`LayerNorm`, which always has a bias, or `RMSNorm`, which never has."""

    layernorm_epsilon: float
    """Epsilon of every norm, those of queries and keys included (transformer/attention.py)."""

    layernorm_zero_centered_gamma: bool = False
    """Norm weights are stored minus one, those of queries and keys included (the former
    `apply_layernorm_1p`; TENorm in extensions/transformer_engine.py)."""

    activation: str = "gelu"
    """`gelu` (exact, erf), `gelu_tanh`, `silu` or `squared_relu`."""

    gated_linear_unit: bool = False
    """activation(gate) * up, with gate the first half of `linear_fc1` (transformer/mlp.py)."""

    add_bias_linear: bool = True
    """Every linear layer but the output layer has a bias."""

    add_qkv_bias: bool = False
    """`linear_qkv` has a bias even without `add_bias_linear`: see `has_qkv_bias`."""

    qk_layernorm: bool = False
    """A norm of kind `normalization` on each query and key head, before the rotation."""

    untie_embeddings_and_output_weights: bool = False
    """The output layer has a table of its own."""

    attention_dropout: float = 0.1
    """Training only."""

    hidden_dropout: float = 0.1
    """Training only."""

    init_method_std: float = 0.02
    """Training only."""

    params_dtype: str | None = None
    """Element type the model was trained in, as torch names it; None if unknown."""

    @property
    def has_qkv_bias(self) -> bool:
        """Whether `linear_qkv` has a bias (transformer/attention.py)."""
        return self.add_bias_linear or self.add_qkv_bias

    @property
    def has_norm_bias(self) -> bool:
        """Whether norms have a bias."""
        return self.normalization == "LayerNorm"

    @property
    def has_position_table(self) -> bool:
        """Whether there is an `embedding.position_embeddings.weight`."""
        return self.position_embedding_type == "learned_absolute"

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_query_groups

    @property
    def attention_size(self) -> int:
        """Columns of `linear_proj`: all query heads side by side."""
        return self.num_attention_heads * self.kv_channels

    @property
    def qkv_size(self) -> int:
        """Rows of `linear_qkv`: all query, key and value heads."""
        return (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels

    @property
    def fc1_size(self) -> int:
        """Rows of `linear_fc1`."""
        return self.ffn_hidden_size * (2 if self.gated_linear_unit else 1)

    @property
    def rotary_dim(self) -> int:
        """Channels of each head that are rotated; 0 without rope.

        (Source: RotaryEmbedding.__init__, models/common/embeddings/rotary_pos_embedding.py.)
        """
        if self.position_embedding_type != "rope":
            return 0
        return int(self.kv_channels * self.rotary_percent)

    def __post_init__(self) -> None:
        for name in (
            "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups "
            "kv_channels padded_vocab_size max_position_embeddings"
        ).split():
            self._require(getattr(self, name) >= 1, "a size below one", name, "at least 1")
        self._one_of("position_embedding_type", POSITION_EMBEDDING_TYPES)
        self._one_of("normalization", NORMALIZATIONS)
        self._one_of("activation", ACTIVATIONS)
        if self.params_dtype is not None:
            self._one_of("params_dtype", PARAMS_DTYPES)
        self._require(
            self.num_attention_heads % self.num_query_groups == 0,
            "the heads cannot be divided into the query groups",
            "num_attention_heads num_query_groups",
            "num_attention_heads is a multiple of num_query_groups",
        )
        self._require(
            self.vocab_size is None or 1 <= self.vocab_size <= self.padded_vocab_size,
            "the vocabulary does not fit its table",
            "vocab_size padded_vocab_size",
            "vocab_size from 1 to padded_vocab_size",
        )
        self._require(
            0 < self.layernorm_epsilon < 1, "an impossible epsilon", "layernorm_epsilon", "0 to 1"
        )
        for name in ("attention_dropout", "hidden_dropout"):
            self._require(0 <= getattr(self, name) <= 1, "an impossible dropout", name, "0 to 1")
        self._require(
            self.init_method_std >= 0,
            "an impossible deviation",
            "init_method_std",
            "at least 0",
        )
        self._check_rotation()

    def _check_rotation(self) -> None:
        self._require(self.rotary_base > 0, "an impossible base", "rotary_base", "above 0")
        self._require(
            0 < self.rotary_percent <= 1,
            "an impossible part of the heads is rotated",
            "rotary_percent",
            "above 0, at most 1",
        )
        for name in ("rope_scaling_factor", "rotary_seq_len_interpolation_factor"):
            value = getattr(self, name)
            self._require(
                value is None or value > 0, "an impossible scaling factor", name, "above 0"
            )
        if self.position_embedding_type == "rope":
            self._require(
                self.rotary_dim >= 2 and self.rotary_dim % 2 == 0,
                "rotated channels do not come in pairs",
                "kv_channels rotary_percent",
                f"an even product; it is {self.rotary_dim}",
            )

    def _one_of(self, name: str, choices: tuple[str, ...]) -> None:
        known = getattr(self, name) in choices
        self._require(known, f"an unknown {name}", name, ", ".join(choices))

    def _require(self, holds: bool, message: str, names: str, expected: str) -> None:
        if not holds:
            found = ", ".join(f"{name} = {getattr(self, name)}" for name in names.split())
            raise UnsupportedError(
                f"this is not a model: {message}",
                found=found,
                expected=expected,
                fix=f"correct it with --set {names.split()[0]}=VALUE",
            )
