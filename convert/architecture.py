"""What a Megatron model computes, in Megatron-Core's words, normalised over generations.

    h = word_embeddings[tokens] (+ position_embeddings[positions])      (then a norm, in BLOOM)
    for each layer:
        h = h + linear_proj(attention(linear_qkv(norm(h))))
        h = h + linear_fc2(activation(linear_fc1(norm(h))))
    logits = output_layer(final_layernorm(h))

With `parallel_residual`, both norms of a layer see the same h, and both results are added to it;
with `shared_layernorm` there is only the first.
A T5 has two such stacks over one embedding. Its encoder sees all tokens; each layer of its decoder
has a second attention between the two lines, with a norm before it, to what the encoder gives
(models/T5/t5_model.py). Relative positions are added to the scores of self attention.

`arguments.py` makes an `Architecture` from a checkpoint; readers, families and writers work with
nothing else. Sources are paths in megatron-core 0.16.1 unless another is named.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UnsupportedError

POSITION_EMBEDDING_TYPES = ("learned_absolute", "rope", "alibi", "relative", "none")
KINDS = ("gpt", "t5", "bert")
NORMALIZATIONS = ("LayerNorm", "RMSNorm")
ROUTER_SCORE_FUNCTIONS = ("softmax", "sigmoid")
ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "squared_relu")
_MOST_TOKENTYPES = 1 << 20
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

# What is computed only with experts, with latent attention, and with YaRN.
_EXPERTS = (
    "moe_ffn_hidden_size",
    "moe_layer_pattern",
    "moe_router_topk",
    "moe_router_score_function",
    "moe_router_pre_softmax",
    "moe_router_topk_scaling_factor",
    "moe_router_enable_expert_bias",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
)
_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
_YARN = (
    "rotary_scaling_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)

# What `use_rope_scaling` fixes besides the factor; Megatron has no argument for them.
# (Source: RotaryEmbedding._apply_scaling, models/common/embeddings/rotary_pos_embedding.py;
# checked by running it: it equals transformers' "llama3" with these numbers.)
ROPE_SCALING_LOW_FREQ_FACTOR = 1.0
ROPE_SCALING_HIGH_FREQ_FACTOR = 4.0
ROPE_SCALING_ORIGINAL_MAX_POSITION_EMBEDDINGS = 8192


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The numbers and choices that decide what a Megatron model computes.

    Raises:
        UnsupportedError: numbers that no model can have, or a choice mtt does not know.
    """

    kind: str = "gpt"
    """`gpt`, a decoder; `t5`, an encoder and a decoder that reads it; `bert`, an encoder."""

    num_layers: int
    """Transformer layers; those of the decoder where there is an encoder too."""

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
    """`learned_absolute`, `rope` or `none` (models/gpt/gpt_model.py); `relative` in a `t5` only; or
    `alibi`, scores that fall with distance, which no Megatron-Core computes (BigScience's
    megatron/model/transformer.py)."""

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

    shared_layernorm: bool = False
    """With `parallel_residual`, one norm feeds attention and MLP, as in Falcon 7B."""

    num_experts: int | None = None
    """Experts of every layer that has them; None for a dense model. All that begins with `moe_`
    is about them (transformer/moe/)."""

    moe_ffn_hidden_size: int = 0
    """Width of one expert."""

    moe_layer_pattern: tuple[int, ...] = ()
    """A 1 for each layer with experts, a 0 for each without; empty for a dense model."""

    moe_router_topk: int = 1
    """Experts that a token goes to."""

    moe_router_score_function: str = "softmax"
    """`softmax` or `sigmoid` of the router's scores. The sigmoids of the chosen experts are divided
    by their sum if there are several (topk_routing_with_score_function, moe_utils.py)."""

    moe_router_pre_softmax: bool = False
    """The softmax is over all experts rather than those chosen."""

    moe_router_topk_scaling_factor: float | None = None
    """Multiplies the weights of the chosen experts; None for no factor."""

    moe_router_enable_expert_bias: bool = False
    """A number per expert, kept in float32, is added to its score when experts are chosen."""

    moe_router_num_groups: int | None = None
    """Groups of neighbouring experts that are chosen first; None without."""

    moe_router_group_topk: int | None = None
    """Groups that are chosen, by the sum of their best `moe_router_topk // moe_router_group_topk`
    scores (group_limited_topk, moe_utils.py)."""

    moe_shared_expert_intermediate_size: int | None = None
    """Width of an MLP that every token goes through beside its experts; None without."""

    moe_shared_expert_gate: bool = False
    """What the shared MLP adds is multiplied by the sigmoid of one more score."""

    multi_latent_attention: bool = False
    """Keys and values of all heads come from one short vector per token, and one rotated key serves
    all heads (transformer/multi_latent_attention.py). `kv_channels` is `qk_head_dim` plus
    `qk_pos_emb_head_dim` then, and `qk_layernorm` norms the short vectors."""

    q_lora_rank: int | None = None
    """Size of the short vector of queries; None if they are projected directly."""

    kv_lora_rank: int = 0
    """Size of the short vector of keys and values."""

    qk_head_dim: int = 0
    """Channels of a query or key head that are not rotated."""

    qk_pos_emb_head_dim: int = 0
    """Channels that are."""

    v_head_dim: int = 0
    """Channels of a value head."""

    rope_type: str = "rope"
    """`rope` or `yarn`; the next six fields belong to the latter
    (models/common/embeddings/yarn_rotary_pos_embedding.py)."""

    rotary_scaling_factor: float = 1.0
    """How many times longer than the original length texts may be."""

    original_max_position_embeddings: int = 4096
    """The original length."""

    beta_fast: float = 32.0
    """Turns over the original length above which a frequency is kept."""

    beta_slow: float = 1.0
    """Turns below which it is divided by the factor."""

    mscale: float = 1.0
    """Scales rotations, in relation to `mscale_all_dim`."""

    mscale_all_dim: float = 0.0
    """Scales attention scores (by the square of what it gives)."""

    mtp_num_layers: int = 0
    """Layers after the last one that predict further tokens
    (transformer/multi_token_prediction.py)."""

    encoder_num_layers: int = 0
    """Layers of the encoder of a `t5`."""

    relative_attention_num_buckets: int = 32
    """Distances that relative positions tell apart (models/common/embeddings/relative_pos_emb.py);
    of `position_embedding_type` `relative`."""

    relative_attention_max_distance: int = 128
    """The distance from which on they are all one."""

    final_layernorm: bool = True
    """A norm after the last layer, of encoder and decoder alike. Megatron-Core's T5 of local layers
    has none (models/T5/t5_spec.py)."""

    num_tokentypes: int = 0
    """Rows of the table of token types of a `bert`, which tell a first text from a second; 0 for no
    table (LanguageModelEmbedding, models/common/embeddings/language_model_embedding.py)."""

    bert_binary_head: bool = False
    """A `bert` has a pooler, and a head that says whether the second text follows the first
    (models/bert/bert_model.py)."""

    lm_head_activation: str = "gelu"
    """`gelu` or `gelu_tanh` in the head of a `bert`, whatever `activation` says
    (models/bert/bert_lm_head.py; BertLMHead in legacy/model/bert_model.py at core_v0.12)."""

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
        """Columns of `linear_proj`: what all query heads give, side by side."""
        size = self.v_head_dim if self.multi_latent_attention else self.kv_channels
        return self.num_attention_heads * size

    @property
    def qkv_size(self) -> int:
        """Rows of `linear_qkv`: all query, key and value heads."""
        return (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels

    @property
    def kv_size(self) -> int:
        """Rows of the `linear_kv` of cross attention: all key and value heads."""
        return 2 * self.num_query_groups * self.kv_channels

    def fc1_size(self, width: int | None = None) -> int:
        """Rows of the `linear_fc1` of an MLP of this width, `ffn_hidden_size` unless told."""
        return (width or self.ffn_hidden_size) * (2 if self.gated_linear_unit else 1)

    @property
    def moe_layers(self) -> tuple[bool, ...]:
        """Whether each layer has experts."""
        return tuple(map(bool, self.moe_layer_pattern)) or (False,) * self.num_layers

    @property
    def rotary_dim(self) -> int:
        """Channels of each head that are rotated; 0 without rope.

        (Source: RotaryEmbedding.__init__, models/common/embeddings/rotary_pos_embedding.py.)
        """
        if self.position_embedding_type != "rope":
            return 0
        if self.multi_latent_attention:
            return self.qk_pos_emb_head_dim
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
        if self.kind != "t5":
            del facts["encoder_num_layers"]
        if self.kind != "bert":
            del facts["num_tokentypes"], facts["bert_binary_head"], facts["lm_head_activation"]
        else:  # a table of one type may be of zeros
            facts["num_tokentypes"] = max(1, self.num_tokentypes)
        if self.position_embedding_type != "relative":
            del facts["relative_attention_num_buckets"], facts["relative_attention_max_distance"]
        facts["add_qkv_bias"] = self.has_qkv_bias
        if self.position_embedding_type != "rope":
            for name in (*_ROTARY, "rope_type"):
                del facts[name]
        if self.position_embedding_type != "rope" or self.rope_type != "yarn":
            for name in _YARN:
                del facts[name]
        for is_there, names in (
            (self.num_experts is not None, _EXPERTS),
            (self.multi_latent_attention, _LATENT),
        ):
            if not is_there:
                for name in names:
                    del facts[name]
        if self.num_experts is not None:
            facts |= self._routing()
        if all(self.moe_layers):
            del facts["ffn_hidden_size"]
        flags = self.windowed_layers
        facts["window_size"] = self.window_size if any(flags) else None
        skipped = None if all(flags) or not any(flags) else _skip_freq(flags)
        facts["window_attn_skip_freq"] = skipped
        return facts

    def _routing(self) -> dict[str, object]:
        """How experts are chosen, without what makes no difference."""
        softmax = self.moe_router_score_function == "softmax"
        factor = self.moe_router_topk_scaling_factor
        facts: dict[str, object] = {
            "moe_router_pre_softmax": softmax and self.moe_router_pre_softmax,
            "moe_router_topk_scaling_factor": None if factor == 1 else factor,
        }
        if self.moe_router_num_groups == self.moe_router_group_topk:
            facts |= {"moe_router_num_groups": None, "moe_router_group_topk": None}
        return facts

    def __post_init__(self) -> None:
        for name in (
            "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups "
            "kv_channels padded_vocab_size max_position_embeddings"
        ).split():
            self._require(getattr(self, name) >= 1, "a size below one", name, "at least 1")
        self._one_of("kind", KINDS)
        self._one_of("position_embedding_type", POSITION_EMBEDDING_TYPES)
        self._one_of("normalization", NORMALIZATIONS)
        self._one_of("activation", ACTIVATIONS)
        self._one_of("lm_head_activation", ACTIVATIONS[:2])
        self._require(
            0 <= self.num_tokentypes <= _MOST_TOKENTYPES,
            "an impossible number of token types",
            "num_tokentypes",
            f"0 to {_MOST_TOKENTYPES}",
        )
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
        self._require(
            self.parallel_residual or not self.shared_layernorm,
            "one norm cannot feed attention and MLP one after the other",
            "shared_layernorm parallel_residual",
            "shared_layernorm only with parallel_residual",
        )
        self._check_rotation()
        self._check_window()
        self._check_experts()
        self._check_latent_attention()
        self._check_encoder()

    def _check_encoder(self) -> None:
        """A T5's encoder, and what only a T5 has or has not."""
        is_t5 = self.kind == "t5"
        self._require(
            is_t5 == (self.encoder_num_layers >= 1),
            "layers of an encoder that is none" if not is_t5 else "an encoder without layers",
            "encoder_num_layers kind",
            "at least 1 in a t5, else 0",
        )
        kinds = ("learned_absolute", "rope", "relative", "none")
        self._require(
            self.position_embedding_type in kinds
            if is_t5
            else self.position_embedding_type != "relative",
            "positions of another kind of model",
            "position_embedding_type kind",
            "relative in a t5, alibi elsewhere",
        )
        self._require(
            is_t5 or self.final_layernorm, "no norm at the end", "final_layernorm kind", "True"
        )
        for name in ("relative_attention_num_buckets", "relative_attention_max_distance"):
            self._require(getattr(self, name) >= 1, "a size below one", name, "at least 1")
        if not is_t5:
            return
        absent = {
            "num_experts": None,
            "multi_latent_attention": False,
            "mtp_num_layers": 0,
            "window_size": None,
            "parallel_residual": False,
            "embedding_norm": False,
        }
        for name, value in absent.items():
            self._require(getattr(self, name) == value, "no T5 has that", name, f"{value} in a t5")

    def _check_experts(self) -> None:
        if self.num_experts is None:
            self._require(
                not any(self.moe_layer_pattern),
                "layers of experts that do not exist",
                "moe_layer_pattern",
                "no 1 in it without num_experts",
            )
            return
        for name in ("num_experts", "moe_ffn_hidden_size", "moe_router_topk"):
            self._require(getattr(self, name) >= 1, "a size below one", name, "at least 1")
        self._one_of("moe_router_score_function", ROUTER_SCORE_FUNCTIONS)
        self._require(
            len(self.moe_layer_pattern) == self.num_layers
            and set(self.moe_layer_pattern) <= {0, 1}
            and any(self.moe_layer_pattern),
            "experts in other layers than there are",
            "moe_layer_pattern num_layers",
            "a 1 or 0 for each layer, and at least one 1",
        )
        self._require(
            self.moe_router_topk <= self.num_experts,
            "a token goes to more experts than there are",
            "moe_router_topk num_experts",
            "at most num_experts",
        )
        groups, chosen = self.moe_router_num_groups, self.moe_router_group_topk
        if groups is None and chosen is None:
            return
        self._require(
            groups is not None
            and chosen is not None
            and 1 <= chosen <= groups
            and self.num_experts % groups == 0
            and chosen <= self.moe_router_topk <= chosen * (self.num_experts // groups),
            "experts cannot be chosen by groups like this",
            "moe_router_num_groups moe_router_group_topk moe_router_topk num_experts",
            "groups that divide num_experts, and an expert of each chosen one at least",
        )

    def _check_latent_attention(self) -> None:
        if not self.multi_latent_attention:
            return
        for name in ("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"):
            self._require(getattr(self, name) >= 1, "a size below one", name, "at least 1")
        self._require(
            self.q_lora_rank is None or self.q_lora_rank >= 1,
            "a size below one",
            "q_lora_rank",
            "at least 1, or None",
        )
        self._require(
            self.kv_channels == self.qk_head_dim + self.qk_pos_emb_head_dim
            and self.num_query_groups == self.num_attention_heads,
            "latent attention with other heads than its own",
            "kv_channels qk_head_dim qk_pos_emb_head_dim num_query_groups",
            "kv_channels is qk_head_dim plus qk_pos_emb_head_dim, and every head is a query group",
        )

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
