"""`NemotronForCausalLM`: LayerNorm with weights stored minus one, an MLP without a gate."""

from __future__ import annotations

from .family import Family
from .fields import Opposite, Rope, Same
from .llama import ACTIVATION, BIASES, SIZES
from .names import decoder_rules

FAMILY = Family(
    name="nemotron",
    causal_lm="NemotronForCausalLM",
    base_model="NemotronModel",
    prefix="model.",
    rules=decoder_rules,
    fields=(
        *SIZES,
        ACTIVATION,
        Same("norm_eps", "layernorm_epsilon"),
        Rope(partial=True, percent=0.5),
        BIASES,
        Opposite("tie_word_embeddings", "untie_embeddings_and_output_weights"),
        Same("attention_dropout", "attention_dropout"),
        Same("initializer_range", "init_method_std"),
    ),
    fixed={
        "position_embedding_type": "rope",
        "layernorm_zero_centered_gamma": True,
        "hidden_dropout": 0.0,
    },
    defaults={
        "hidden_act": "relu2",
        "norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.0134,
    },
    has_tp_plan=False,  # transformers 5.17 has none, 5.23 has one
)
