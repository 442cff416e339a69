"""`Qwen3ForCausalLM`: a llama with norms on queries and keys; some layers with a window.

Its `attention_bias` puts a bias on the output projection too, but never on the MLP: Megatron has
no such model.
"""

from __future__ import annotations

from ..argument_tables import Neutral
from .family import Family
from .fields import LayerWindows
from .llama import CHOICES, DEFAULTS, FIXED, NO_BIASES, SIZES
from .names import decoder_rules
from .qwen2 import WINDOWS

FAMILY = Family(
    name="qwen3",
    causal_lm="Qwen3ForCausalLM",
    base_model="Qwen3Model",
    prefix="model.",
    rules=decoder_rules,
    fields=(*SIZES, *CHOICES, LayerWindows(switched=True)),
    fixed={**FIXED, "add_bias_linear": False, "qk_layernorm": True},
    defaults={
        **DEFAULTS,
        **WINDOWS,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "attention_bias": False,
    },
    neutral={
        "mlp_bias": NO_BIASES["mlp_bias"],
        "attention_bias": Neutral(
            "biases in attention, the output's too, but none in the MLP", (False,)
        ),
    },
)
