"""`LlamaForCausalLM`, and what the classes that grew from it have in common."""

from __future__ import annotations

from ..argument_tables import Neutral
from .family import Family, Limit
from .fields import Choice, Field, Opposite, Rope, Same, Vocabulary, head_size
from .names import decoder_rules

ACTIVATION = Choice(
    "hidden_act",
    "activation",
    {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_python": "gelu",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_new": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
        "gelu_accurate": "gelu_tanh",
        "gelu_python_tanh": "gelu_tanh",
        "relu2": "squared_relu",
    },
)
SIZES: tuple[Field, ...] = (
    Vocabulary(),
    Same("hidden_size", "hidden_size"),
    Same("intermediate_size", "ffn_hidden_size"),
    Same("num_hidden_layers", "num_layers"),
    Same("num_attention_heads", "num_attention_heads"),
    Same("num_key_value_heads", "num_query_groups", lambda c: c.get("num_attention_heads")),
    Same("head_dim", "kv_channels", head_size),
    Same("max_position_embeddings", "max_position_embeddings"),
)
CHOICES: tuple[Field, ...] = (
    ACTIVATION,
    Same("rms_norm_eps", "layernorm_epsilon"),
    Rope(),
    Opposite("tie_word_embeddings", "untie_embeddings_and_output_weights"),
    Same("attention_dropout", "attention_dropout"),
    Same("initializer_range", "init_method_std"),
)
FIXED = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "hidden_dropout": 0.0,
}
DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
}
EVEN_HEADS = Limit(
    "hidden_size is no multiple of num_attention_heads",
    lambda a: a.hidden_size % a.num_attention_heads == 0,
)
# Fields that the class does not have, and would not compute with.
NO_BIASES = {
    name: Neutral("biases the class does not have", (False, None))
    for name in ("attention_bias", "mlp_bias")
}
# One bias each, and Megatron has either all or those of queries, keys and values.
BIASES = Choice(
    ("attention_bias", "mlp_bias"),
    ("add_qkv_bias", "add_bias_linear"),
    {(False, False): (False, False), (True, True): (True, True)},
)

FAMILY = Family(
    name="llama",
    causal_lm="LlamaForCausalLM",
    base_model="LlamaModel",
    prefix="model.",
    rules=decoder_rules,
    fields=(*SIZES, *CHOICES, BIASES),
    fixed=FIXED,
    defaults={**DEFAULTS, "attention_bias": False, "mlp_bias": False},
    # Of tensor-parallel pretraining, whose slices add up to the same.
    ignored=("pretraining_tp",),
    limits=(EVEN_HEADS,),
)
