"""`MistralForCausalLM`: a llama without biases, whose layers may all have the same window."""

from __future__ import annotations

from .family import Family
from .fields import SlidingWindow
from .llama import CHOICES, DEFAULTS, FIXED, NO_BIASES, SIZES
from .names import decoder_rules

FAMILY = Family(
    name="mistral",
    causal_lm="MistralForCausalLM",
    base_model="MistralModel",
    prefix="model.",
    rules=decoder_rules,
    fields=(*SIZES, *CHOICES, SlidingWindow()),
    fixed={**FIXED, "add_bias_linear": False},
    defaults={**DEFAULTS, "num_key_value_heads": 8, "sliding_window": 4096},
    neutral=NO_BIASES,
)
