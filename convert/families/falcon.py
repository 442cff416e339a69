"""`FalconForCausalLM`: Falcon 7B, 40B and 11B, whose layers have one norm or two.

    new_decoder_architecture  num_ln_in_parallel_attn  parallel_attn  norms of a layer
    false                                              false          input, post_attention
    false                                              true           input, for both
    true                      2, or null               true           ln_attn, ln_mlp
    true                      1                        true           input, for both

Rows of `query_key_value` are by group of heads, as Megatron's: of all heads with `multi_query`, of
each head without, of `num_kv_heads` groups in the new architecture. Falcon's ALiBi is another than
BLOOM's: it is divided by the square root of the head's size, and its products are rounded to
bfloat16. (transformers/models/falcon/modeling_falcon.py of 5.23.)
"""

from __future__ import annotations

from dataclasses import dataclass

from ..architecture import Architecture
from ..argument_tables import Neutral
from ..errors import UnsupportedError
from ..mapping import Rule, RuleTable
from ..ops import TrimVocab
from .family import Family, Limit
from .fields import Aliases, Choice, Config, Opposite, Rope, Same, Vocabulary, number
from .llama import ACTIVATION, EVEN_HEADS

_IN, _OUT = "decoder.layers.{i}", "transformer.h.{i}"
_NORM_1 = f"{_IN}.self_attention.linear_qkv.layer_norm_{{p}}"
_NORM_2 = f"{_IN}.mlp.linear_fc1.layer_norm_{{p}}"


def _table(*norms: Rule) -> RuleTable:
    return RuleTable(
        Rule("embedding.word_embeddings.weight", "transformer.word_embeddings.weight", TrimVocab()),
        Rule(
            f"{_IN}.self_attention.linear_qkv.{{p}}",
            f"{_OUT}.self_attention.query_key_value.{{p}}",
        ),
        Rule(f"{_IN}.self_attention.linear_proj.{{p}}", f"{_OUT}.self_attention.dense.{{p}}"),
        Rule(f"{_IN}.mlp.linear_fc1.{{p}}", f"{_OUT}.mlp.dense_h_to_4h.{{p}}"),
        Rule(f"{_IN}.mlp.linear_fc2.{{p}}", f"{_OUT}.mlp.dense_4h_to_h.{{p}}"),
        *norms,
        Rule("decoder.final_layernorm.{p}", "transformer.ln_f.{p}"),
        Rule("output_layer.weight", "lm_head.weight", TrimVocab()),
    )


_ONE = _table(Rule(_NORM_1, f"{_OUT}.input_layernorm.{{p}}"))
_TWO = _table(
    Rule(_NORM_1, f"{_OUT}.ln_attn.{{p}}"),
    Rule(_NORM_2, f"{_OUT}.ln_mlp.{{p}}"),
)
_SEQUENTIAL = _table(
    Rule(_NORM_2, f"{_OUT}.post_attention_layernorm.{{p}}"),
    Rule(_NORM_1, f"{_OUT}.input_layernorm.{{p}}"),
)


def _rules(architecture: Architecture) -> RuleTable:
    if architecture.shared_layernorm:
        return _ONE
    return _TWO if architecture.parallel_residual else _SEQUENTIAL


@dataclass(frozen=True)
class Decoder:
    """How a layer is built: its groups of heads, residuals and norms."""

    @property
    def names(self) -> tuple[str, ...]:
        """The fields that say it together."""
        return (
            "new_decoder_architecture",
            "num_ln_in_parallel_attn",
            "parallel_attn",
            "multi_query",
            "num_kv_heads",
        )

    def read(self, config: Config) -> dict[str, object]:
        """Groups, residuals and norms.

        Raises:
            UnsupportedError: a combination that the class builds, and fails to run.
        """
        heads = number("num_attention_heads", config.get("num_attention_heads"), "int")
        groups = config.get("num_kv_heads")
        groups = heads if groups is None else number("num_kv_heads", groups, "int")
        new, parallel, multi = (
            bool(number(name, config.get(name), "bool"))
            for name in ("new_decoder_architecture", "parallel_attn", "multi_query")
        )
        norms = config.get("num_ln_in_parallel_attn")
        if norms is None:
            norms = 2 if new else 1
        elif not parallel:
            norms = 1  # not looked at
        runs = (parallel if new else multi or groups == heads) and norms in (
            (1, 2) if new else (1,)
        )
        if not runs:
            raise UnsupportedError(
                "the class cannot run such layers",
                found=", ".join(f"{name} = {config.get(name)!r}" for name in self.names),
                expected="layers of Falcon 7B, 40B or 11B",
            )
        return {
            "num_query_groups": groups if new else 1 if multi else heads,
            "parallel_residual": parallel,
            "shared_layernorm": parallel and norms == 1,
        }

    def write(self, architecture: Architecture) -> dict[str, object]:
        """The old architecture where it can say it."""
        a = architecture
        multi = a.num_query_groups == 1
        whole = multi or a.num_query_groups == a.num_attention_heads
        new = a.parallel_residual and not (a.shared_layernorm and whole)
        return {
            "new_decoder_architecture": new,
            "num_ln_in_parallel_attn": 1 if new and a.shared_layernorm else None,
            "parallel_attn": a.parallel_residual,
            "multi_query": new or multi,
            "num_kv_heads": a.num_query_groups if new else a.num_attention_heads,
        }


FAMILY = Family(
    name="falcon",
    causal_lm="FalconForCausalLM",
    base_model="FalconModel",
    prefix="transformer.",
    rules=_rules,
    fields=(
        Vocabulary(),
        Aliases(("hidden_size", "n_embed"), "hidden_size"),
        Same("num_hidden_layers", "num_layers"),
        Same("num_attention_heads", "num_attention_heads"),
        Decoder(),
        Same(
            "ffn_hidden_size",
            "ffn_hidden_size",
            lambda c: 4 * number("hidden_size", c.get("hidden_size") or c.get("n_embed"), "int"),
        ),
        Choice("activation", "activation", ACTIVATION.words),
        Same("bias", "add_bias_linear"),
        Same("max_position_embeddings", "max_position_embeddings"),
        Same("layer_norm_epsilon", "layernorm_epsilon"),
        Rope(),
        Opposite("tie_word_embeddings", "untie_embeddings_and_output_weights"),
        Same("attention_dropout", "attention_dropout"),
        Same("hidden_dropout", "hidden_dropout"),
        Same("initializer_range", "init_method_std"),
    ),
    fixed={
        "position_embedding_type": "rope",
        "kv_channels": lambda facts: facts["hidden_size"] // max(facts["num_attention_heads"], 1),
    },
    defaults={
        "num_ln_in_parallel_attn": None,
        "num_kv_heads": None,
        "new_decoder_architecture": False,
        "multi_query": True,
        "parallel_attn": True,
        "bias": False,
        "max_position_embeddings": 2048,
        "ffn_hidden_size": None,
        "activation": "gelu",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "initializer_range": 0.02,
    },
    neutral={
        "alibi": Neutral(
            "Falcon's ALiBi, divided by the square root of the head's size", (False, None)
        ),
        "apply_residual_connection_post_layernorm": Neutral(
            "residuals taken after the norm", (False, None)
        ),
    },
    ignored=("ff_factor",),
    limits=(
        EVEN_HEADS,
        Limit(
            "query groups without parallel residuals",
            lambda a: a.parallel_residual or a.num_query_groups in (1, a.num_attention_heads),
        ),
    ),
    has_tp_plan=False,
    has_attention_backends=False,
)
