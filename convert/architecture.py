"""What a Megatron GPT computes, in Megatron-Core's words, normalised over generations.

    h = word_embeddings[tokens] (+ position_embeddings[positions])      (then a norm, in BLOOM)
    for each layer:
        h = h + linear_proj(attention(linear_qkv(norm(h))))
        h = h + linear_fc2(activation(linear_fc1(norm(h))))
    logits = output_layer(final_layernorm(h))

With `parallel_residual`, both norms of a layer see the same h, and both results are added to it.

`arguments.py` makes an `Architecture` from a checkpoint; readers, families and writers work with
nothing else. Sources are paths in megatron-core 0.16.1 unless another is named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from .errors import IncompleteError, InconsistentError, UnsupportedError

POSITION_EMBEDDING_TYPES = ("learned_absolute", "rope", "alibi", "none")
NORMALIZATIONS = ("LayerNorm", "RMSNorm")
ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "squared_relu")
PARAMS_DTYPES = ("float32", "float16", "bfloat16")
# Fields without a part in the forward pass.
TRAINING_ONLY = ("attention_dropout", "hidden_dropout", "init_method_std", "params_dtype")
_ROTARY = (
    "rotary_base",
    "rotary_percent",
    "rotary_interleaved",
    "rope_scaling_factor",
    "rotary_seq_len_interpolation_factor",
)

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
    """`learned_absolute`, `rope` or `none` (models/gpt/gpt_model.py); or `alibi`, scores that fall
    with distance, which no Megatron-Core computes (BigScience's megatron/model/transformer.py)."""

    rotary_base: float = 10000.0
    """Base of the rotary frequencies; 10000 in models without rope."""

    rotary_percent: float = 1.0
    """Part of each head that is rotated, from its beginning; 1 in models without rope."""

    rope_scaling_factor: float | None = None
    """Factor of Llama 3's frequency scaling, whose other numbers are the `ROPE_SCALING_*` of this
    module; None without `use_rope_scaling`."""

    rotary_seq_len_interpolation_factor: float | None = None
    """Positions are divided by it before they are rotated (linear scaling); None without."""

    rotary_interleaved: bool = False
    """Rotated pairs are neighbouring channels; otherwise a channel of the first half of the rotated
    part pairs with one of the second (_rotate_half, models/common/embeddings/rope_utils.py)."""

    window_size: tuple[int, int] | None = None
    """Sliding-window attention: tokens seen to the left, the token itself not counted, and to the
    right, which is 0. transformers' `sliding_window` counts the token itself: it is one more.
    (Source: get_sliding_window_causal_mask, transformer/utils.py.)"""

    window_attn_skip_freq: int | tuple[int, ...] | None = None
    """Layers without the window: every N-th, or those with a 0 in a list of all layers; None for no
    layer (is_layer_window_attention, transformer/utils.py)."""

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
    """`linear_qkv` has a bias, whatever `add_bias_linear` says; `has_qkv_bias` asks for both, as
    newer trees store this one as implied by that one and older trees do not."""

    qk_layernorm: bool = False
    """A norm of kind `normalization` on each query and key head, before the rotation."""

    embedding_norm: bool = False
    """A norm after the embedding, as in BLOOM; no Megatron-Core computes that."""

    parallel_residual: bool = False
    """Attention and MLP of a layer read the same residual stream, as in GPT-NeoX; no Megatron-Core
    computes that."""

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

    @property
    def windowed_layers(self) -> tuple[bool, ...]:
        """Whether each layer has the window."""
        skip, layers = self.window_attn_skip_freq, range(1, self.num_layers + 1)
        if self.window_size is None or skip is None:
            return (self.window_size is not None,) * self.num_layers
        if isinstance(skip, int):
            return tuple(number % skip != 0 for number in layers)
        return tuple(map(bool, skip))

    def forward_pass(self) -> dict[str, object]:
        """What is computed, spelled so that two models that compute the same say the same.

        Fields of training are left out, as are those that other fields make meaningless; the
        vocabulary is the rows that are tokens.
        """
        facts = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in (*TRAINING_ONLY, "padded_vocab_size"):
            del facts[name]
        facts["vocab_size"] = self.vocab_size or self.padded_vocab_size
        facts["add_qkv_bias"] = self.has_qkv_bias
        if self.position_embedding_type != "rope":
            for name in _ROTARY:
                del facts[name]
        flags = self.windowed_layers
        facts["window_size"] = self.window_size if any(flags) else None
        skipped = None if all(flags) or not any(flags) else _skip_freq(flags)
        facts["window_attn_skip_freq"] = skipped
        return facts

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
        self._check_window()

    def _check_window(self) -> None:
        window, skip = self.window_size, self.window_attn_skip_freq
        self._require(
            window is None or (len(window) == 2 and window[0] >= 0 and window[1] == 0),
            "an impossible window",
            "window_size",
            "(tokens to the left, 0), as a GPT does not see what comes next",
        )
        counts = len(skip) == self.num_layers if isinstance(skip, tuple) else True
        self._require(
            counts and (not isinstance(skip, int) or skip >= 1),
            "windows for other layers than there are",
            "window_attn_skip_freq num_layers",
            "a number of at least 1, or a 1 or 0 for each layer",
        )

    def _check_rotation(self) -> None:
        self._require(
            0 < self.rotary_base < float("inf"), "an impossible base", "rotary_base", "above 0"
        )
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


def _skip_freq(flags: tuple[bool, ...]) -> int | tuple[int, ...]:
    """`window_attn_skip_freq` for layers with and without a window: a number where one will do."""
    first = flags.index(False) + 1
    if first > 1 and flags == tuple(number % first != 0 for number in range(1, len(flags) + 1)):
        return first
    return tuple(map(int, flags))


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the shapes of a model's tensors say about it."""

    fields: Mapping[str, object] = field(default_factory=dict)
    """Megatron arguments -> values, all that follow from shapes alone."""

    attention_size: int
    """Query channels of all heads."""

    key_value_size: int
    """Key channels of all groups."""

    kv_channels: int | None
    """Channels of one head, where a norm of queries shows them."""

    gated: bool
    """`linear_fc1` has two rows for each column of `linear_fc2`."""


_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_QKV, _PROJ = "self_attention.linear_qkv", "self_attention.linear_proj"
_FC1, _FC2 = "mlp.linear_fc1", "mlp.linear_fc2"
_EMBEDDING, _POSITIONS = "embedding.word_embeddings", "embedding.position_embeddings"
_OTHER_MODELS = {
    "mlp.router.": "mixture of experts",
    "cross_attention.": "an encoder beside the decoder: T5",
    "self_attention.linear_kv_down_proj.": "multi-latent attention",
    "mixer.": "Mamba layers",
}
Shapes = Mapping[str, tuple[int, ...]]


def read_shapes(shapes: Shapes) -> Sizes:
    """What the shapes of whole tensors say, by canonical names with numbered layers.

    Raises:
        IncompleteError: a layer, or a tensor that every GPT has, is missing.
        InconsistentError: layers that differ, or matrices that do not fit together.
        UnsupportedError: tensors of another kind of model.
    """
    layers = _layers(shapes)
    layer = layers[0]
    vocabulary, hidden = _matrix(shapes, f"{_EMBEDDING}.weight")
    qkv_rows, qkv_columns = _matrix(layer, f"{_QKV}.weight")
    proj_rows, attention = _matrix(layer, f"{_PROJ}.weight")
    fc1_rows, fc1_columns = _matrix(layer, f"{_FC1}.weight")
    fc2_rows, ffn = _matrix(layer, f"{_FC2}.weight")
    widths = {_QKV: qkv_columns, _PROJ: proj_rows, _FC1: fc1_columns, _FC2: fc2_rows}
    for name, width in widths.items():
        if width != hidden:
            raise InconsistentError(
                "tensors do not fit together",
                found=f"{name}.weight for a width of {width}",
                expected=f"{hidden}, the width of {_EMBEDDING}.weight",
            )
    if fc1_rows not in (ffn, 2 * ffn):
        raise InconsistentError(
            "tensors do not fit together",
            found=f"{fc1_rows} rows in {_FC1}.weight, {ffn} columns in {_FC2}.weight",
            expected="as many, or twice as many with a gate",
        )
    if qkv_rows <= attention or (qkv_rows - attention) % 2:
        raise InconsistentError(
            "tensors do not fit together",
            found=f"{qkv_rows} rows in {_QKV}.weight, {attention} columns in {_PROJ}.weight",
            expected="rows for the queries, and as many for keys as for values",
        )
    norm = layer.get("self_attention.q_layernorm.weight")
    has_bias = f"{_QKV}.layer_norm_bias" in layer or "decoder.final_layernorm.bias" in shapes
    fields: dict[str, object] = {
        "num_layers": len(layers),
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "padded_vocab_size": vocabulary,
        "normalization": "LayerNorm" if has_bias else "RMSNorm",
        "add_bias_linear": f"{_PROJ}.bias" in layer,
        "add_qkv_bias": f"{_QKV}.bias" in layer,
        "qk_layernorm": norm is not None,
        "untie_embeddings_and_output_weights": "output_layer.weight" in shapes,
    }
    if "embedding.norm.weight" in shapes:
        fields["embed_layernorm"] = True
    if f"{_POSITIONS}.weight" in shapes:
        fields["position_embedding_type"] = "learned_absolute"
        fields["max_position_embeddings"] = _matrix(shapes, f"{_POSITIONS}.weight")[0]
    return Sizes(
        fields=fields,
        attention_size=attention,
        key_value_size=(qkv_rows - attention) // 2,
        kv_channels=None if norm is None else norm[0],
        gated=fc1_rows == 2 * ffn,
    )


def _layers(shapes: Shapes) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of every layer, which must all be the same."""
    found: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        for part, meaning in _OTHER_MODELS.items():
            if f".{part}" in name:
                raise UnsupportedError(
                    "the model computes something that mtt cannot represent",
                    found=f"{name}: {meaning}",
                    expected="a plain GPT",
                )
        if hit := _LAYER.fullmatch(name):
            found.setdefault(int(hit[1]), {})[hit[2]] = tuple(shape)
    if not found or set(found) != set(range(len(found))):
        raise IncompleteError(
            "layers are missing",
            found=f"layers {sorted(found)}",
            expected="all layers from 0",
        )
    for number, layer in found.items():
        if layer != found[0]:
            name = min(name for name, _ in layer.items() ^ found[0].items())
            raise InconsistentError(
                f"layers 0 and {number} differ",
                found=f"{name} {_shape(layer.get(name))} in layer {number}",
                expected=f"{_shape(found[0].get(name))}, as in layer 0",
            )
    return [found[number] for number in range(len(found))]


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _matrix(shapes: Shapes, name: str) -> tuple[int, int]:
    shape = shapes.get(name)
    if shape is None:
        raise IncompleteError(f"{name} is missing", expected="a tensor that every GPT has")
    if len(shape) != 2:
        raise InconsistentError(f"{name} is not a matrix", found=_shape(shape), expected="two axes")
    return shape[0], shape[1]
