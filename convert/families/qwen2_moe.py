"""`Qwen2MoeForCausalLM`: a qwen2 with experts, and a gated MLP beside them."""

from __future__ import annotations

from functools import partial

from .expert_fields import RouterScores
from .expert_layouts import SparseSteps
from .family import Family
from .fields import MOST_LAYERS, Config, LayerWindows, Same, number
from .llama import CHOICES, DEFAULTS, FIXED, NO_BIASES, SIZES
from .names import ExpertNames, decoder_rules
from .stacked import unstacked

_NAMES = ExpertNames(shared="mlp.shared_expert")


class _Windows(LayerWindows):
    """Without `layer_types`, every other of the first `max_window_layers` layers has a window.

    (Source: Qwen2MoeConfig of transformers.)
    """

    def read(self, config: Config) -> dict[str, object]:
        """The window, and the layers that have it."""
        if config.get("layer_types") is None and config.get("use_sliding_window") is True:
            layers, last = (
                number(name, config.get(name), "int")
                for name in ("num_hidden_layers", "max_window_layers")
            )
            kinds = ("sliding_attention", "full_attention")
            types = [kinds[n % 2 or n >= last] for n in range(min(layers, MOST_LAYERS))]
            config = {**config, "layer_types": types}
        return super().read(config)


class _Shared(Same):
    """A width that may not be null: the class always has the shared MLP."""

    def read(self, config: Config) -> dict[str, object]:
        """The width."""
        return {self.architecture: number(self.config, config.get(self.config), "int")}


FAMILY = Family(
    name="qwen2_moe",
    causal_lm="Qwen2MoeForCausalLM",
    base_model="Qwen2MoeModel",
    prefix="model.",
    rules=partial(decoder_rules, experts=_NAMES),
    respell=partial(unstacked, names=_NAMES),
    fields=(
        *SIZES,
        Same("moe_intermediate_size", "moe_ffn_hidden_size"),
        Same("num_experts", "num_experts"),
        Same("num_experts_per_tok", "moe_router_topk"),
        _Shared("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
        RouterScores(function=None),
        SparseSteps(),
        *CHOICES,
        Same("qkv_bias", "add_qkv_bias"),
        _Windows(switched=True),
    ),
    fixed={**FIXED, "add_bias_linear": False, "moe_shared_expert_gate": True},
    defaults={
        **DEFAULTS,
        "num_key_value_heads": 16,
        "moe_intermediate_size": 1408,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "shared_expert_intermediate_size": 5632,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "qkv_bias": True,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    neutral={"mlp_bias": NO_BIASES["mlp_bias"]},
    ignored=("output_router_logits", "router_aux_loss_coef"),
)
