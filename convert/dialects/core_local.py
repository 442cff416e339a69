"""Megatron-Core with the local spec: norms are modules of their own.

(megatron/core/models/gpt/gpt_layer_specs.py, `sharded_state_dict_keys_map`.)
"""

from ..mapping import Rule, RuleTable
from . import core_te
from .core_te import LATENT, LAYER, NORM_1, NORM_2
from .dialect import Dialect
from .modules import Modules

_ATTENTION = f"{LAYER}self_attention"
_Q_NORM, _K_NORM = f"{_ATTENTION}.q_layernorm.{{p}}", f"{_ATTENTION}.k_layernorm.{{p}}"
_INPUT_NORM = Rule(f"{LAYER}input_layernorm.{{p}}", NORM_1)
_MLP_NORM = Rule(f"{LAYER}pre_mlp_layernorm.{{p}}", NORM_2)
RULES = RuleTable(
    *core_te.BEFORE,
    *core_te.of_encoder(_INPUT_NORM, _MLP_NORM, *core_te.PLAIN_LAYER),
    *core_te.AFTER_ENCODER,
    *core_te.with_mtp(
        _INPUT_NORM,
        # The norm of latent attention's short queries is called like that of query heads.
        Rule(_Q_NORM, _Q_NORM, unless=LATENT),
        Rule(_Q_NORM, f"{_ATTENTION}.linear_q_up_proj.layer_norm_{{p}}", beside=LATENT),
        Rule(_K_NORM, _K_NORM),
        Rule(
            f"{_ATTENTION}.kv_layernorm.{{p}}",
            f"{_ATTENTION}.linear_kv_up_proj.layer_norm_{{p}}",
        ),
        *core_te.ATTENTION,
        *core_te.CROSS_ATTENTION,
        _MLP_NORM,
        *core_te.MLP,
    ),
    *core_te.AFTER,
)
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
        *core_te.PROJECTIONS,
        "self_attention.q_layernorm",
        "self_attention.k_layernorm",
        "self_attention.kv_layernorm",
        "pre_mlp_layernorm",
        *core_te.LAYER_MLPS,
    ),
    after=core_te.MODULES.after,
    mtp=core_te.MODULES.mtp,
    stateful=frozenset((*core_te.PROJECTIONS, *core_te.MLPS, "eh_proj", "output_layer")),
    bare=frozenset(("output_layer",)),
)
_T5_ATTENTION = ("self_attention.linear_proj", "self_attention.linear_qkv")
_T5_CROSS = tuple(f"cross_attention.{n}" for n in ("linear_proj", "linear_q", "linear_kv"))
_T5_MLP = ("mlp.linear_fc1", "mlp.linear_fc2")
_T5_HEADS = ("lm_head.output_layer", "output_layer")
T5_MODULES = Modules(
    before=core_te.T5_MODULES.before,
    encoder=("input_layernorm", *_T5_ATTENTION, "pre_mlp_layernorm", *_T5_MLP),
    between=core_te.T5_MODULES.between,
    layer=(
        "input_layernorm",
        *_T5_ATTENTION,
        "pre_cross_attn_layernorm",
        *_T5_CROSS,
        "pre_mlp_layernorm",
        *_T5_MLP,
    ),
    after=core_te.T5_MODULES.after,
    mtp=((), ()),
    stateful=frozenset((*_T5_ATTENTION, *_T5_CROSS, *_T5_MLP, *_T5_HEADS)),
    bare=frozenset(),
)
