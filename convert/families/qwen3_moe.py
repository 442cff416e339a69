"""`Qwen3MoeForCausalLM`: a qwen3 with experts; all layers may have the same window.

transformers 5 writes `num_local_experts` where everyone else reads `num_experts`, and reads both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from ..architecture import Architecture
from .expert_fields import RouterScores
from .expert_layouts import SparseSteps, also
from .family import Family
from .fields import Config, Same, SlidingWindow, number
from .llama import CHOICES, DEFAULTS, FIXED, SIZES
from .names import EXPERTS, decoder_rules
from .qwen3 import FAMILY as QWEN3
from .stacked import unstacked

_SWITCH = "use_sliding_window"


@dataclass(frozen=True)
class _Window(SlidingWindow):
    """A window in all layers, if `use_sliding_window` is on."""

    @property
    def names(self) -> tuple[str, ...]:
        """The switch beside those of the window."""
        return (*super().names, _SWITCH)

    def read(self, config: Config) -> dict[str, object]:
        """The window, if it is on."""
        if not number(_SWITCH, config.get(_SWITCH), "bool"):
            config = {**config, "sliding_window": None}
        return super().read(config)

    def write(self, architecture: Architecture) -> dict[str, object]:
        """The window and its switch."""
        return {_SWITCH: architecture.window_size is not None, **super().write(architecture)}


FAMILY = Family(
    name="qwen3_moe",
    causal_lm="Qwen3MoeForCausalLM",
    base_model="Qwen3MoeModel",
    prefix="model.",
    rules=decoder_rules,
    respell=partial(unstacked, names=EXPERTS),
    fields=(
        *SIZES,
        Same("moe_intermediate_size", "moe_ffn_hidden_size"),
        Same("num_experts", "num_experts", also("num_local_experts", 128)),
        Same("num_experts_per_tok", "moe_router_topk"),
        RouterScores(function=None),
        SparseSteps(),
        *CHOICES,
        _Window(),
    ),
    fixed={**FIXED, "add_bias_linear": False, "qk_layernorm": True},
    defaults={
        **DEFAULTS,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
    },
    neutral=QWEN3.neutral,
    # The first is another name of `num_experts`; the class does not look at the second.
    ignored=(
        "num_local_experts",
        "max_window_layers",
        "output_router_logits",
        "router_aux_loss_coef",
    ),
)
