"""`MegatronBertForPreTraining`, and `MegatronBertForMaskedLM` without a binary head.

    h = word_embeddings[tokens] + position_embeddings[positions] + token_type_embeddings[types]
    for each layer:
        h = h + attention.output(attention(attention.ln(h)))
        h = h + output(activation(intermediate(ln(h))))
    predictions = decoder(LayerNorm(activation(dense(encoder.ln(h)))))
    seq_relationship = Linear(tanh(pooler(encoder.ln(h)[0])))

Padded tokens are hidden from all others here and there; what is computed for them differs, as
Megatron hides everything from them too. (transformers/models/megatron_bert/ of 5.23.)
"""

from __future__ import annotations

from dataclasses import dataclass

from ..architecture import Architecture
from ..argument_tables import Neutral
from ..errors import UnsupportedError
from ..mapping import Rule, RuleTable
from ..ops import AddTokenTypes, SplitQKV, TrimVocab
from .family import Family, Limit
from .fields import Choice, Config, Same, Vocabulary
from .llama import EVEN_HEADS

PRETRAINING, MASKED_LM = "MegatronBertForPreTraining", "MegatronBertForMaskedLM"
_IN, _OUT = "decoder.layers.{i}", "bert.encoder.layer.{i}"
_EMBEDDINGS, _HEAD = "bert.embeddings", "cls.predictions"
_WORDS = "embedding.word_embeddings.weight"


def _table(words: Rule, *types: Rule) -> RuleTable:
    return RuleTable(
        words,
        Rule("embedding.position_embeddings.weight", f"{_EMBEDDINGS}.position_embeddings.weight"),
        *types,
        Rule(f"{_IN}.self_attention.linear_qkv.layer_norm_{{p}}", f"{_OUT}.attention.ln.{{p}}"),
        Rule(
            f"{_IN}.self_attention.linear_qkv.{{p}}",
            f"{_OUT}.attention.self.{{query,key,value}}.{{p}}",
            SplitQKV(),
        ),
        Rule(f"{_IN}.self_attention.linear_proj.{{p}}", f"{_OUT}.attention.output.dense.{{p}}"),
        Rule(f"{_IN}.mlp.linear_fc1.layer_norm_{{p}}", f"{_OUT}.ln.{{p}}"),
        Rule(f"{_IN}.mlp.linear_fc1.{{p}}", f"{_OUT}.intermediate.dense.{{p}}"),
        Rule(f"{_IN}.mlp.linear_fc2.{{p}}", f"{_OUT}.output.dense.{{p}}"),
        Rule("decoder.final_layernorm.{p}", "bert.encoder.ln.{p}"),
        Rule("pooler.dense.{p}", "bert.pooler.dense.{p}"),
        Rule("output_layer.bias", f"{_HEAD}.bias", TrimVocab()),
        Rule("lm_head.dense.{p}", f"{_HEAD}.transform.dense.{{p}}"),
        Rule("lm_head.layer_norm.{p}", f"{_HEAD}.transform.LayerNorm.{{p}}"),
        Rule("output_layer.weight", f"{_HEAD}.decoder.weight", TrimVocab()),
        Rule("binary_head.{p}", "cls.seq_relationship.{p}"),
    )


# The class always has a table of token types.
_TABLES = {
    True: _table(
        Rule(_WORDS, f"{_EMBEDDINGS}.word_embeddings.weight", TrimVocab()),
        Rule(
            "embedding.tokentype_embeddings.weight", f"{_EMBEDDINGS}.token_type_embeddings.weight"
        ),
    ),
    False: _table(
        Rule(
            _WORDS,
            f"{_EMBEDDINGS}.{{word_embeddings,token_type_embeddings}}.weight",
            AddTokenTypes(),
        )
    ),
}


def _rules(architecture: Architecture) -> RuleTable:
    return _TABLES[architecture.num_tokentypes > 0]


@dataclass(frozen=True)
class Heads:
    """`architectures`, the class whose heads the weights are of."""

    @property
    def names(self) -> tuple[str, ...]:
        """The one field."""
        return ("architectures",)

    def read(self, config: Config) -> dict[str, object]:
        """Whether there is a binary head.

        Raises:
            UnsupportedError: another class, or none.
        """
        found = config.get("architectures")
        if found not in ([PRETRAINING], [MASKED_LM]):
            raise UnsupportedError(
                "mtt converts a megatron-bert with the heads it was trained with",
                found=f"architectures = {found!r}",
                expected=f"[{PRETRAINING!r}] or [{MASKED_LM!r}]",
            )
        return {"bert_binary_head": found == [PRETRAINING]}

    def write(self, architecture: Architecture) -> dict[str, object]:
        """The class."""
        return {"architectures": [PRETRAINING if architecture.bert_binary_head else MASKED_LM]}


@dataclass(frozen=True)
class TokenTypes:
    """`type_vocab_size`; without a table there is one type, of zeros."""

    @property
    def names(self) -> tuple[str, ...]:
        """The one field."""
        return ("type_vocab_size",)

    def read(self, config: Config) -> dict[str, object]:
        """The rows of the table."""
        return Same("type_vocab_size", "num_tokentypes").read(config)

    def write(self, architecture: Architecture) -> dict[str, object]:
        """The rows, at least one."""
        return {"type_vocab_size": max(1, architecture.num_tokentypes)}


_ONE_GELU = Limit(
    "GELU by tanh in the MLPs (bias_gelu_fusion) and exact GELU in the head",
    lambda a: a.activation == a.lm_head_activation or a.activation not in ("gelu", "gelu_tanh"),
    fix="the class has one hidden_act: --set openai_gelu=True computes the head's by tanh too, "
    "which moves predictions in about the third decimal",
)

FAMILY = Family(
    name="megatron-bert",
    kind="bert",
    causal_lm=PRETRAINING,
    other_heads=(MASKED_LM,),
    base_model="MegatronBertModel",
    auto_class="AutoModelForPreTraining",
    prefix="bert.",
    rules=_rules,
    fields=(
        Heads(),
        Vocabulary(),
        Same("hidden_size", "hidden_size"),
        Same("num_hidden_layers", "num_layers"),
        Same("num_attention_heads", "num_attention_heads"),
        Same("intermediate_size", "ffn_hidden_size"),
        Choice(
            "hidden_act",
            ("activation", "lm_head_activation"),
            {
                "gelu": ("gelu", "gelu"),
                "gelu_python": ("gelu", "gelu"),
                "gelu_pytorch_tanh": ("gelu_tanh", "gelu_tanh"),
                "gelu_new": ("gelu_tanh", "gelu_tanh"),
                "gelu_fast": ("gelu_tanh", "gelu_tanh"),
                "gelu_accurate": ("gelu_tanh", "gelu_tanh"),
                "gelu_python_tanh": ("gelu_tanh", "gelu_tanh"),
            },
        ),
        Same("max_position_embeddings", "max_position_embeddings"),
        TokenTypes(),
        Same("layer_norm_eps", "layernorm_epsilon"),
        Same("hidden_dropout_prob", "hidden_dropout"),
        Same("attention_probs_dropout_prob", "attention_dropout"),
        Same("initializer_range", "init_method_std"),
    ),
    fixed={
        "kind": "bert",
        "position_embedding_type": "learned_absolute",
        "num_query_groups": lambda facts: facts["num_attention_heads"],
        "kv_channels": lambda facts: facts["hidden_size"] // max(facts["num_attention_heads"], 1),
    },
    defaults={
        "hidden_act": "gelu",
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.02,
    },
    neutral={
        "is_decoder": Neutral("a decoder made of a BERT", (False,)),
        "add_cross_attention": Neutral("layers that attend to an encoder", (False,)),
        "tie_word_embeddings": Neutral("a head with a table of its own", (True,)),
        "position_embedding_type": Neutral("relative positions", ("absolute", None)),
    },
    limits=(EVEN_HEADS, _ONE_GELU),
    # The head's bias stands twice in the class, and the positions are counted anew.
    buffers=r"(.*\.)?(embeddings\.position_ids|predictions\.decoder\.bias)",
    has_tp_plan=False,
    has_attention_backends=False,
)
