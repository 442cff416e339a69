"""`GPTNeoXForCausalLM`: one matrix for queries, keys and values, in Megatron's order."""

from __future__ import annotations

from ..architecture import Architecture
from ..argument_tables import Neutral
from ..mapping import Rule, RuleTable
from ..ops import TrimVocab
from .family import Family
from .fields import Opposite, Rope, Same, Vocabulary
from .llama import ACTIVATION, EVEN_HEADS

_IN, _OUT = "decoder.layers.{i}", "gpt_neox.layers.{i}"
_RULES = RuleTable(
    Rule("embedding.word_embeddings.weight", "gpt_neox.embed_in.weight", TrimVocab()),
    Rule(f"{_IN}.self_attention.linear_qkv.layer_norm_{{p}}", f"{_OUT}.input_layernorm.{{p}}"),
    Rule(f"{_IN}.mlp.linear_fc1.layer_norm_{{p}}", f"{_OUT}.post_attention_layernorm.{{p}}"),
    Rule(f"{_IN}.self_attention.linear_qkv.{{p}}", f"{_OUT}.attention.query_key_value.{{p}}"),
    Rule(f"{_IN}.self_attention.linear_proj.{{p}}", f"{_OUT}.attention.dense.{{p}}"),
    Rule(f"{_IN}.mlp.linear_fc1.{{p}}", f"{_OUT}.mlp.dense_h_to_4h.{{p}}"),
    Rule(f"{_IN}.mlp.linear_fc2.{{p}}", f"{_OUT}.mlp.dense_4h_to_h.{{p}}"),
    Rule("decoder.final_layernorm.{p}", "gpt_neox.final_layer_norm.{p}"),
    Rule("output_layer.weight", "embed_out.weight", TrimVocab()),
)


def _rules(architecture: Architecture) -> RuleTable:
    return _RULES


FAMILY = Family(
    name="gpt_neox",
    causal_lm="GPTNeoXForCausalLM",
    base_model="GPTNeoXModel",
    prefix="gpt_neox.",
    rules=_rules,
    fields=(
        Vocabulary(),
        Same("hidden_size", "hidden_size"),
        Same("intermediate_size", "ffn_hidden_size"),
        Same("num_hidden_layers", "num_layers"),
        Same("num_attention_heads", "num_attention_heads"),
        Same("max_position_embeddings", "max_position_embeddings"),
        ACTIVATION,
        Same("layer_norm_eps", "layernorm_epsilon"),
        Same("use_parallel_residual", "parallel_residual"),
        Rope(partial=True, percent=0.25, old_base="rotary_emb_base", old_percent="rotary_pct"),
        Opposite("tie_word_embeddings", "untie_embeddings_and_output_weights"),
        Same("attention_dropout", "attention_dropout"),
        Same("hidden_dropout", "hidden_dropout"),
        Same("initializer_range", "init_method_std"),
    ),
    fixed={
        "position_embedding_type": "rope",
        "num_query_groups": lambda facts: facts["num_attention_heads"],
        "kv_channels": lambda facts: facts["hidden_size"] // max(facts["num_attention_heads"], 1),
    },
    defaults={
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "initializer_range": 0.02,
    },
    neutral={
        "attention_bias": Neutral("no biases in attention, but some in the MLP", (True,)),
        "head_dim": Neutral("rotary positions for heads of another size", (None,)),
    },
    ignored=("classifier_dropout",),
    limits=(EVEN_HEADS,),
    buffers=r"(.*\.)?(attention\.(bias|masked_bias)|rotary_emb\.inv_freq)",
)
