"""Megatron-Core with the TransformerEngine spec: norms are fused into the linear that follows.

Distributed checkpoints spell dense layers like this whatever the spec; so do canonical names.
"""

from ..mapping import Rule, RuleTable
from .dialect import Dialect
from .modules import Modules

_NAMES = (
    "embedding.word_embeddings.weight",
    "embedding.position_embeddings.weight",
    "decoder.layers.{i}.self_attention.linear_qkv.layer_norm_{p}",
    "decoder.layers.{i}.self_attention.linear_qkv.{p}",
    "decoder.layers.{i}.self_attention.q_layernorm.{p}",
    "decoder.layers.{i}.self_attention.k_layernorm.{p}",
    "decoder.layers.{i}.self_attention.linear_proj.{p}",
    "decoder.layers.{i}.mlp.linear_fc1.layer_norm_{p}",
    "decoder.layers.{i}.mlp.linear_fc1.{p}",
    "decoder.layers.{i}.mlp.linear_fc2.{p}",
    "decoder.final_layernorm.{p}",
    "output_layer.weight",
)
RULES = RuleTable(*(Rule(name, name) for name in _NAMES))
DIALECT = Dialect(
    name="core_te",
    rules=RULES,
    generations=((r".*", "Megatron-Core, Transformer Engine layers or a distributed checkpoint"),),
    is_core=True,
)
_LAYER = (
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
_AFTER = ("decoder.final_layernorm", "output_layer")
MODULES = Modules(
    before=("embedding.word_embeddings", "embedding.position_embeddings"),
    layer=_LAYER,
    after=_AFTER,
    stateful=frozenset((*_LAYER, *_AFTER)),
    bare=frozenset(("self_attention.core_attention", "output_layer")),
)
