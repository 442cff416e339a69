"""`MixtralForCausalLM`: a mistral with experts in every layer, chosen by a softmax over the chosen.

`intermediate_size` is the width of one expert. Files have the names of Mistral's own release,
`block_sparse_moe` and `w1` (gate), `w3` (up) and `w2` (down); transformers 5 has others in memory.
"""

from __future__ import annotations

from functools import partial

from .expert_layouts import AllLayers, also
from .family import Family
from .fields import Rope, Same, SlidingWindow
from .llama import CHOICES, DEFAULTS, FIXED, NO_BIASES, SIZES
from .names import ExpertNames, decoder_rules
from .stacked import unstacked

_NAMES = ExpertNames(
    router="block_sparse_moe.gate.weight",
    expert="block_sparse_moe.experts.{e}",
    matrices=("w1", "w3", "w2"),
)

FAMILY = Family(
    name="mixtral",
    causal_lm="MixtralForCausalLM",
    base_model="MixtralModel",
    prefix="model.",
    rules=partial(decoder_rules, experts=_NAMES),
    respell=partial(unstacked, names=_NAMES),
    fields=(
        *(field for field in SIZES if field.names != ("intermediate_size",)),
        Same("intermediate_size", "moe_ffn_hidden_size"),
        Same("num_local_experts", "num_experts", also("num_experts", 8)),
        Same("num_experts_per_tok", "moe_router_topk"),
        AllLayers(),
        *(Rope(base=1e6) if isinstance(field, Rope) else field for field in CHOICES),
        SlidingWindow(),
    ),
    fixed={
        **FIXED,
        "add_bias_linear": False,
        "ffn_hidden_size": lambda facts: facts["moe_ffn_hidden_size"],
    },
    defaults={
        **DEFAULTS,
        "num_key_value_heads": 8,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
    },
    neutral=NO_BIASES,
    # The first is another name of `num_local_experts`; the others are for training.
    ignored=("num_experts", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
)
