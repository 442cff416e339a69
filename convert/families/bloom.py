"""`BloomForCausalLM`: ALiBi, a norm after the embedding, and `query_key_value` by head."""

from __future__ import annotations

from dataclasses import dataclass

from ..architecture import Architecture
from ..argument_tables import Neutral
from ..errors import UnsupportedError
from ..mapping import Rule, RuleTable
from ..ops import TrimVocab
from .family import Family
from .fields import Aliases, Config, Opposite, Same, Vocabulary
from .llama import EVEN_HEADS

_IN, _OUT = "decoder.layers.{i}", "transformer.h.{i}"
_RULES = RuleTable(
    Rule("embedding.word_embeddings.weight", "transformer.word_embeddings.weight", TrimVocab()),
    Rule("embedding.norm.{p}", "transformer.word_embeddings_layernorm.{p}"),
    Rule(f"{_IN}.self_attention.linear_qkv.layer_norm_{{p}}", f"{_OUT}.input_layernorm.{{p}}"),
    Rule(f"{_IN}.self_attention.linear_qkv.{{p}}", f"{_OUT}.self_attention.query_key_value.{{p}}"),
    Rule(f"{_IN}.self_attention.linear_proj.{{p}}", f"{_OUT}.self_attention.dense.{{p}}"),
    Rule(f"{_IN}.mlp.linear_fc1.layer_norm_{{p}}", f"{_OUT}.post_attention_layernorm.{{p}}"),
    Rule(f"{_IN}.mlp.linear_fc1.{{p}}", f"{_OUT}.mlp.dense_h_to_4h.{{p}}"),
    Rule(f"{_IN}.mlp.linear_fc2.{{p}}", f"{_OUT}.mlp.dense_4h_to_h.{{p}}"),
    Rule("decoder.final_layernorm.{p}", "transformer.ln_f.{p}"),
    Rule("output_layer.weight", "lm_head.weight", TrimVocab()),
)


def _rules(architecture: Architecture) -> RuleTable:
    return _RULES


@dataclass(frozen=True)
class Slices:
    """`slow_but_exact`: sums in the order of several ranks, and then without their biases."""

    names: tuple[str, ...] = ("pretraining_tp", "slow_but_exact")

    def read(self, config: Config) -> dict[str, object]:
        """Nothing; raise UnsupportedError for sums without biases."""
        ranks, slow = (config.get(name) for name in self.names)
        if slow and ranks != 1:
            raise UnsupportedError(
                "the class leaves out biases",
                found=f"slow_but_exact = {slow!r}, pretraining_tp = {ranks!r}",
                expected="slow_but_exact = False, with which the model computes what it was "
                "trained to",
            )
        return {}

    def write(self, architecture: Architecture) -> dict[str, object]:
        """Nothing: one rank, which is the class's default."""
        return {}


FAMILY = Family(
    name="bloom",
    causal_lm="BloomForCausalLM",
    base_model="BloomModel",
    prefix="transformer.",
    rules=_rules,
    fields=(
        Vocabulary(),
        Aliases(("hidden_size", "n_embed"), "hidden_size"),
        Aliases(("n_layer", "num_hidden_layers"), "num_layers"),
        Aliases(("n_head", "num_attention_heads"), "num_attention_heads"),
        # The class has no limit; folders of BigScience's say with what they were trained.
        Same("seq_length", "max_position_embeddings", lambda config: 2048),
        Slices(),
        Same("layer_norm_epsilon", "layernorm_epsilon"),
        Opposite("tie_word_embeddings", "untie_embeddings_and_output_weights"),
        Same("attention_dropout", "attention_dropout"),
        Same("hidden_dropout", "hidden_dropout"),
        Same("initializer_range", "init_method_std"),
    ),
    fixed={
        "position_embedding_type": "alibi",
        "embedding_norm": True,
        "activation": "gelu_tanh",
        "ffn_hidden_size": lambda facts: 4 * facts["hidden_size"],
        "num_query_groups": lambda facts: facts["num_attention_heads"],
        "kv_channels": lambda facts: facts["hidden_size"] // max(facts["num_attention_heads"], 1),
    },
    defaults={
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "pretraining_tp": 1,
        "slow_but_exact": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "initializer_range": 0.02,
    },
    neutral={
        "apply_residual_connection_post_layernorm": Neutral(
            "residuals taken after the norm", (False, None)
        ),
    },
    # Of BigScience's training.
    ignored=(
        "attention_softmax_in_fp32",
        "bias_dropout_fusion",
        "masked_softmax_fusion",
        "n_inner",
        "offset_alibi",
        "skip_bias_add",
        "skip_bias_add_qkv",
        "unk_token_id",
    ),
    limits=(EVEN_HEADS,),
    has_tp_plan=False,
    has_attention_backends=False,
)
