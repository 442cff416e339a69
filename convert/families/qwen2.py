"""`Qwen2ForCausalLM`: a llama with biases of queries, keys and values; some layers with a window.

`head_dim` is not among the class's own fields, but it computes with one that stands there.
"""

from __future__ import annotations

from .family import Family
from .fields import LayerWindows
from .llama import CHOICES, DEFAULTS, FIXED, NO_BIASES, SIZES
from .names import decoder_rules

WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}

FAMILY = Family(
    name="qwen2",
    causal_lm="Qwen2ForCausalLM",
    base_model="Qwen2Model",
    prefix="model.",
    rules=decoder_rules,
    fields=(*SIZES, *CHOICES, LayerWindows(switched=True)),
    fixed={**FIXED, "add_bias_linear": False, "add_qkv_bias": True},
    defaults={**DEFAULTS, **WINDOWS, "num_key_value_heads": 32},
    neutral={"mlp_bias": NO_BIASES["mlp_bias"]},
    # Some configurations name the biases the class always has.
    ignored=("attention_bias", "qkv_bias"),
)
