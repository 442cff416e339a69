"""`modeling_mtt`: the class that computes Megatron's T5, an encoder and a decoder that reads it.

Every linear layer has a bias or none has, and a tied head has one too, as Megatron builds them
(T5LMHead, megatron/core/models/T5/t5_model.py).
"""

from __future__ import annotations

from ..architecture import Architecture
from ..argument_tables import Neutral
from ..mapping import Rule, RuleTable
from ..ops import SplitGated, SplitKV, SplitQKV, TrimVocab
from .family import Family
from .fields import Choice, Rope, Same
from .mtt import LAYERS, TRAINING, WIDTHS

_SELF = "self_attention"


def _layer(stack: str, fc1: str, *between: Rule, gated: bool) -> tuple[Rule, ...]:
    """A layer of one side; `between` comes before its MLP."""
    inside, outside = f"{stack}.layers.{{i}}", f"model.{stack}.layers.{{i}}"
    return (
        Rule(f"{inside}.{_SELF}.linear_qkv.layer_norm_{{p}}", f"{outside}.input_layernorm.{{p}}"),
        Rule(
            f"{inside}.{_SELF}.linear_qkv.{{p}}",
            f"{outside}.self_attn.{{q_proj,k_proj,v_proj}}.{{p}}",
            SplitQKV(),
        ),
        Rule(f"{inside}.{_SELF}.linear_proj.{{p}}", f"{outside}.self_attn.o_proj.{{p}}"),
        Rule(f"{inside}.{_SELF}.q_layernorm.{{p}}", f"{outside}.self_attn.q_norm.{{p}}"),
        Rule(f"{inside}.{_SELF}.k_layernorm.{{p}}", f"{outside}.self_attn.k_norm.{{p}}"),
        *between,
        Rule(
            f"{inside}.mlp.linear_fc1.layer_norm_{{p}}",
            f"{outside}.post_attention_layernorm.{{p}}",
        ),
        Rule(f"{inside}.mlp.linear_fc1.{{p}}", f"{outside}.mlp.{fc1}.{{p}}", SplitGated())
        if gated
        else Rule(f"{inside}.mlp.linear_fc1.{{p}}", f"{outside}.mlp.{fc1}.{{p}}"),
        Rule(f"{inside}.mlp.linear_fc2.{{p}}", f"{outside}.mlp.down_proj.{{p}}"),
    )


_IN, _OUT = "decoder.layers.{i}", "model.decoder.layers.{i}"
_CROSS = (
    Rule(f"{_IN}.pre_cross_attn_layernorm.{{p}}", f"{_OUT}.cross_attn_layernorm.{{p}}"),
    Rule(f"{_IN}.cross_attention.linear_q.{{p}}", f"{_OUT}.cross_attn.q_proj.{{p}}"),
    Rule(
        f"{_IN}.cross_attention.linear_kv.{{p}}",
        f"{_OUT}.cross_attn.{{k_proj,v_proj}}.{{p}}",
        SplitKV(),
    ),
    Rule(f"{_IN}.cross_attention.linear_proj.{{p}}", f"{_OUT}.cross_attn.o_proj.{{p}}"),
)


def _table(gated: bool) -> RuleTable:
    fc1 = "{gate_proj,up_proj}" if gated else "up_proj"
    return RuleTable(
        Rule("embedding.word_embeddings.weight", "model.shared.weight", TrimVocab()),
        Rule("embedding.position_embeddings.weight", "model.embed_positions.weight"),
        *(
            Rule(
                f"{side}_relative_pos_emb.relative_attention_bias.weight",
                f"model.{side}.relative_attention_bias.weight",
            )
            for side in ("encoder", "decoder")
        ),
        *_layer("encoder", fc1, gated=gated),
        Rule("encoder.final_layernorm.{p}", "model.encoder.norm.{p}"),
        *_layer("decoder", fc1, *_CROSS, gated=gated),
        Rule("decoder.final_layernorm.{p}", "model.decoder.norm.{p}"),
        Rule("output_layer.{p}", "lm_head.{p}", TrimVocab()),
    )


_TABLES = {gated: _table(gated) for gated in (True, False)}


def _rules(architecture: Architecture) -> RuleTable:
    return _TABLES[architecture.gated_linear_unit]


FAMILY = Family(
    name="mtt_seq2seq",
    causal_lm="MTTForConditionalGeneration",
    base_model="MTTSeq2SeqModel",
    prefix="model.",
    kind="t5",
    auto_map={
        "AutoConfig": "configuration_seq2seq_mtt.MTTSeq2SeqConfig",
        "AutoModel": "modeling_seq2seq_mtt.MTTSeq2SeqModel",
        "AutoModelForSeq2SeqLM": "modeling_seq2seq_mtt.MTTForConditionalGeneration",
    },
    code="modeling_mtt",
    auto_class="AutoModelForSeq2SeqLM",
    rules=_rules,
    fields=(
        *WIDTHS,
        Same("num_encoder_layers", "encoder_num_layers"),
        Same("num_decoder_layers", "num_layers"),
        *LAYERS,
        Same("final_norm", "final_layernorm"),
        Choice(
            "position_embedding_type",
            "position_embedding_type",
            {"learned": "learned_absolute", "relative": "relative", "rope": "rope", "none": "none"},
        ),
        Same("max_position_embeddings", "max_position_embeddings"),
        Same("relative_attention_num_buckets", "relative_attention_num_buckets"),
        Same("relative_attention_max_distance", "relative_attention_max_distance"),
        Rope(partial=True, optional=True, interleaved="rope_interleave"),
        Choice(
            ("attention_bias", "attention_out_bias", "mlp_bias"),
            ("add_qkv_bias", "add_bias_linear"),
            {(False, False, False): (False, False), (True, True, True): (True, True)},
        ),
        Same("use_qk_norm", "qk_layernorm"),
        Choice(
            ("tie_word_embeddings", "lm_head_bias"),
            "untie_embeddings_and_output_weights",
            {(True, True): False, (False, False): True},
        ),
        *TRAINING,
    ),
    fixed={"kind": "t5"},
    defaults={
        "hidden_act": "gelu_pytorch_tanh",
        "gated_mlp": False,
        "norm_type": "layernorm",
        "norm_eps": 1e-5,
        "zero_centered_norm": False,
        "final_norm": True,
        "position_embedding_type": "learned",
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "rope_interleave": False,
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "lm_head_bias": True,
        "use_qk_norm": False,
        "tie_word_embeddings": True,
        "attention_dropout": 0.1,
        "hidden_dropout": 0.1,
        "initializer_range": 0.02,
    },
    neutral={
        "attention_multiplier": Neutral("attention scores scaled by another number", (None,)),
    },
)
