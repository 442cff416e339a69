"""`GPT2LMHeadModel`: learned positions, LayerNorm, biases, matrices stored [in, out]."""

from __future__ import annotations

from ..architecture import Architecture
from ..argument_tables import Neutral
from ..mapping import Rule, RuleTable
from ..ops import Chain, ConcatQKV, SplitQKV, Transpose, TrimVocab
from .family import Family
from .fields import Choice, Config, Opposite, Same, Vocabulary, number
from .llama import EVEN_HEADS

_IN, _OUT = "decoder.layers.{i}", "transformer.h.{i}"
_RULES = RuleTable(
    Rule("embedding.word_embeddings.weight", "transformer.wte.weight", TrimVocab()),
    Rule("embedding.position_embeddings.weight", "transformer.wpe.weight"),
    Rule(f"{_IN}.self_attention.linear_qkv.layer_norm_{{p}}", f"{_OUT}.ln_1.{{p}}"),
    Rule(
        f"{_IN}.self_attention.linear_qkv.weight",
        f"{_OUT}.attn.c_attn.weight",
        Chain((SplitQKV(), ConcatQKV(), Transpose())),
    ),
    Rule(
        f"{_IN}.self_attention.linear_qkv.bias",
        f"{_OUT}.attn.c_attn.bias",
        Chain((SplitQKV(), ConcatQKV())),
    ),
    Rule(f"{_IN}.self_attention.linear_proj.weight", f"{_OUT}.attn.c_proj.weight", Transpose()),
    Rule(f"{_IN}.self_attention.linear_proj.bias", f"{_OUT}.attn.c_proj.bias"),
    Rule(f"{_IN}.mlp.linear_fc1.layer_norm_{{p}}", f"{_OUT}.ln_2.{{p}}"),
    Rule(f"{_IN}.mlp.linear_fc1.weight", f"{_OUT}.mlp.c_fc.weight", Transpose()),
    Rule(f"{_IN}.mlp.linear_fc1.bias", f"{_OUT}.mlp.c_fc.bias"),
    Rule(f"{_IN}.mlp.linear_fc2.weight", f"{_OUT}.mlp.c_proj.weight", Transpose()),
    Rule(f"{_IN}.mlp.linear_fc2.bias", f"{_OUT}.mlp.c_proj.bias"),
    Rule("decoder.final_layernorm.{p}", "transformer.ln_f.{p}"),
    Rule("output_layer.weight", "lm_head.weight", TrimVocab()),
)


def _rules(architecture: Architecture) -> RuleTable:
    return _RULES


def _inner(config: Config) -> int:
    """The width of the MLP where `n_inner` is null."""
    return 4 * number("n_embd", config.get("n_embd"), "int")


FAMILY = Family(
    name="gpt2",
    causal_lm="GPT2LMHeadModel",
    base_model="GPT2Model",
    prefix="transformer.",
    rules=_rules,
    fields=(
        Vocabulary(),
        Same("n_embd", "hidden_size"),
        Same("n_layer", "num_layers"),
        Same("n_head", "num_attention_heads"),
        Same("n_positions", "max_position_embeddings"),
        Same("n_inner", "ffn_hidden_size", _inner),
        Choice(
            "activation_function",
            "activation",
            {
                "gelu_new": "gelu_tanh",
                "gelu_fast": "gelu_tanh",
                "gelu_pytorch_tanh": "gelu_tanh",
                "gelu_python_tanh": "gelu_tanh",
                "gelu_accurate": "gelu_tanh",
                "gelu": "gelu",
                "gelu_python": "gelu",
                "silu": "silu",
                "swish": "silu",
                "relu2": "squared_relu",
            },
        ),
        Same("layer_norm_epsilon", "layernorm_epsilon"),
        Opposite("tie_word_embeddings", "untie_embeddings_and_output_weights"),
        Same("attn_pdrop", "attention_dropout"),
        Same("embd_pdrop", "hidden_dropout"),
        Same("resid_pdrop", "hidden_dropout"),
        Same("initializer_range", "init_method_std"),
    ),
    fixed={
        "position_embedding_type": "learned_absolute",
        "num_query_groups": lambda facts: facts["num_attention_heads"],
        "kv_channels": lambda facts: facts["hidden_size"] // max(facts["num_attention_heads"], 1),
    },
    defaults={
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "initializer_range": 0.02,
    },
    neutral={
        "scale_attn_weights": Neutral("attention scores that are not scaled", (True,)),
        "scale_attn_by_inverse_layer_idx": Neutral(
            "attention scores divided by the layer's number", (False,)
        ),
        "add_cross_attention": Neutral("layers that attend to an encoder", (False,)),
    },
    # The order of scaling and multiplication is rounding, not the function.
    ignored=(
        "reorder_and_upcast_attn",
        "n_ctx",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
    ),
    limits=(EVEN_HEADS,),
    buffers=r"(.*\.)?attn\.(bias|masked_bias)",
    has_tp_plan=False,
)
