"""Megatron-Core with the local spec: norms are modules of their own.

(megatron/core/models/gpt/gpt_layer_specs.py, `sharded_state_dict_keys_map`.)
"""

from ..mapping import Rule, RuleTable
from . import core_te
from .dialect import Dialect
from .modules import Modules

_NORMS = {
    "self_attention.linear_qkv.layer_norm_{p}": "input_layernorm.{p}",
    "mlp.linear_fc1.layer_norm_{p}": "pre_mlp_layernorm.{p}",
}


def _local(name: str) -> str:
    for fused, separate in _NORMS.items():
        name = name.replace(fused, separate)
    return name


RULES = RuleTable(*(Rule(_local(rule.source), rule.target) for rule in core_te.RULES.rules))
DIALECT = Dialect(
    name="core_local",
    rules=RULES,
    generations=((r".*", "Megatron-Core, its own layers"),),
    is_core=True,
)
MODULES = Modules(
    before=core_te.MODULES.before,
    layer=(
        "input_layernorm",
        "self_attention.linear_proj",
        "self_attention.linear_qkv",
        "self_attention.q_layernorm",
        "self_attention.k_layernorm",
        "pre_mlp_layernorm",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    ),
    after=core_te.MODULES.after,
    stateful=frozenset(
        (
            "self_attention.linear_proj",
            "self_attention.linear_qkv",
            "mlp.linear_fc1",
            "mlp.linear_fc2",
            "output_layer",
        )
    ),
    bare=frozenset(("output_layer",)),
)
