"""`DeepseekV3ForCausalLM`: latent attention, experts behind a sigmoid, layers for further tokens.

The class norms the short vectors with an epsilon of 1e-6 whatever its configuration says; Megatron
has one epsilon for all norms.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from ..architecture import Architecture
from ..argument_tables import Neutral
from ..errors import UnsupportedError
from .expert_fields import ScoreFactor
from .expert_layouts import BestTwo, FirstDense, SharedExperts, Sigmoids
from .family import Family, Limit
from .fields import Config, Field, Opposite, Rope, Same, Vocabulary, number
from .further_tokens import FurtherTokens, as_stored, copies, numbered_rules
from .llama import ACTIVATION, DEFAULTS, FIXED
from .mtt import LATENT_ATTENTION
from .names import EXPERTS
from .stacked import unstacked

# Experts as this class has them, and those that were made after it.
ROUTED: tuple[Field, ...] = (
    Same("moe_intermediate_size", "moe_ffn_hidden_size"),
    Same("n_routed_experts", "num_experts"),
    Same("num_experts_per_tok", "moe_router_topk"),
    SharedExperts(),
    FirstDense(),
    Sigmoids(),
    ScoreFactor(),
    BestTwo(never_null=True),
)
ROUTED_FIXED: dict[str, object] = {"moe_router_enable_expert_bias": True}
ROUTED_DEFAULTS: dict[str, object] = {
    "norm_topk_prob": True,
    "n_shared_experts": 1,
}
ROUTED_LIMITS = (
    Limit(
        "moe_shared_expert_intermediate_size is no multiple of moe_ffn_hidden_size = "
        "{moe_ffn_hidden_size}",
        lambda a: (a.moe_shared_expert_intermediate_size or 0) % max(a.moe_ffn_hidden_size, 1) == 0,
    ),
)
# What DeepSeek's own code looks at, and transformers does not.
ROUTED_NEUTRAL = {
    "scoring_func": Neutral("scores that the class does not compute", ("sigmoid",)),
    "topk_method": Neutral("experts chosen as the class does not", ("noaux_tc",)),
    "moe_layer_freq": Neutral("experts in other layers than the class has them", (1,)),
}
# Fields of training.
ROUTED_IGNORED = (
    "output_router_logits",
    "router_aux_loss_coef",
    "aux_loss_alpha",
    "seq_aux",
    "ep_size",
    "pretraining_tp",
)


@dataclass(frozen=True)
class _Heads:
    """What the class derives, and would not compute with otherwise."""

    @property
    def names(self) -> tuple[str, ...]:
        """Keys for all heads, and what transformers 5 writes beside them."""
        return ("num_key_value_heads", "head_dim", "qk_head_dim")

    def read(self, config: Config) -> dict[str, object]:
        """Nothing, once they are what they must be.

        Raises:
            UnsupportedError: they are not.
        """
        heads, plain, rotated = (
            number(name, config.get(name), "int")
            for name in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim")
        )
        wanted = dict(zip(self.names, (heads, rotated, plain + rotated), strict=True))
        if odd := {n: v for n, v in wanted.items() if config.get(n) not in (None, v)}:
            raise UnsupportedError(
                "config.json contradicts itself about the heads",
                found=", ".join(f"{name} = {config[name]!r}" for name in odd),
                expected=", ".join(f"{name} = {value}" for name, value in odd.items()),
            )
        return {}

    def write(self, architecture: Architecture) -> dict[str, object]:
        """Keys for all heads; the class derives the others."""
        return {"num_key_value_heads": architecture.num_attention_heads}


FAMILY = Family(
    name="deepseek_v3",
    causal_lm="DeepseekV3ForCausalLM",
    base_model="DeepseekV3Model",
    prefix="model.",
    rules=numbered_rules,
    respell=partial(unstacked, names=EXPERTS),
    copies=copies,
    as_stored=as_stored,
    fields=(
        Vocabulary(),
        Same("hidden_size", "hidden_size"),
        Same("intermediate_size", "ffn_hidden_size"),
        Same("num_hidden_layers", "num_layers"),
        Same("num_attention_heads", "num_attention_heads"),
        _Heads(),
        *LATENT_ATTENTION.fields,
        Same("max_position_embeddings", "max_position_embeddings"),
        *ROUTED,
        FurtherTokens(),
        ACTIVATION,
        Same("rms_norm_eps", "layernorm_epsilon"),
        Rope(interleaved="rope_interleave", yarn=True),
        Opposite("tie_word_embeddings", "untie_embeddings_and_output_weights"),
        Same("attention_dropout", "attention_dropout"),
        Same("initializer_range", "init_method_std"),
    ),
    fixed={**FIXED, **ROUTED_FIXED, "add_bias_linear": False, "qk_layernorm": True},
    defaults={
        **DEFAULTS,
        **ROUTED_DEFAULTS,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "rope_interleave": True,
    },
    neutral={
        **ROUTED_NEUTRAL,
        "attention_bias": Neutral("biases in attention, but none in the MLP", (False,)),
        "rms_norm_eps": Neutral("another epsilon than the class has for short vectors", (1e-6,)),
    },
    ignored=ROUTED_IGNORED,
    limits=ROUTED_LIMITS,
)
