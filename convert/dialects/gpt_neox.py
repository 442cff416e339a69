"""GPT-NeoX: modules of a pipeline, in several generations of names.

    2021 on           attention.{query_key_value,dense}, mlp.{dense_h_to_4h,dense_4h_to_h}
    2023, LLaMA       mlp.{w1,w3,w2}: gate, up, down; `scale` is the weight of an RMSNorm
    2024-09 on        mlp.{linear1,linear2}
    Transformer Engine   attention.{qkv,proj}, mlp.{fc1,fc2}_weight, `norm.` within a norm

    norm.weight            final norm, in the first months of 2021 only `weight`
    final_linear.weight    own head

Rows of `query_key_value` are by head, of models with fewer key than query heads by block, and
those of a gated `linear1` are [up | gate]. With `gpt_j_residual` ranks add their output biases
before the sum over ranks, so that the bias is the sum of theirs; without, each adds a copy after
it. Its converter adds them in either case; here copies that are equal are not added then.
(megatron/model/transformer.py, ParallelTransformerLayer, and tools/ckpts/convert_neox_to_hf.py at
ea7aefd8.)
"""

from __future__ import annotations

from ..mapping import Rule, RuleTable
from ..neox_arguments import megatron_arguments
from ..ops import MergeGated
from .dialect import BLOCK, HEAD, Dialect

_IN, _OUT = "layers.{i}", "decoder.layers.{i}"
_QKV, _FC1 = f"{_OUT}.self_attention.linear_qkv", f"{_OUT}.mlp.linear_fc1"
_FC2 = f"{_OUT}.mlp.linear_fc2"
_PROJ = f"{_OUT}.self_attention.linear_proj"


def _norm(source: str, target: str) -> list[Rule]:
    return [
        Rule(f"{source}.{{p}}", f"{target}{{p}}"),
        Rule(f"{source}.norm.{{p}}", f"{target}{{p}}", one_way=True),
        Rule(f"{source}.scale", f"{target}weight", one_way=True),
    ]


RULES = RuleTable(
    Rule("word_embeddings.weight", "embedding.word_embeddings.weight"),
    Rule("position_embeddings.weight", "embedding.position_embeddings.weight"),
    *_norm(f"{_IN}.input_layernorm", f"{_QKV}.layer_norm_"),
    Rule(f"{_IN}.attention.query_key_value.{{p}}", f"{_QKV}.{{p}}"),
    Rule(f"{_IN}.attention.qkv.{{p}}", f"{_QKV}.{{p}}", one_way=True),
    Rule(f"{_IN}.attention.dense.{{p}}", f"{_PROJ}.{{p}}"),
    Rule(f"{_IN}.attention.proj.{{p}}", f"{_PROJ}.{{p}}", one_way=True),
    *_norm(f"{_IN}.post_attention_layernorm", f"{_FC1}.layer_norm_"),
    Rule(f"{_IN}.mlp.layer_norm_{{p}}", f"{_FC1}.layer_norm_{{p}}", one_way=True),
    Rule(f"{_IN}.mlp.linear1.{{p}}", f"{_FC1}.{{p}}"),
    Rule(f"{_IN}.mlp.dense_h_to_4h.{{p}}", f"{_FC1}.{{p}}", one_way=True),
    Rule(f"{_IN}.mlp.fc1_{{p}}", f"{_FC1}.{{p}}", one_way=True),
    Rule(f"{_IN}.mlp.{{w1,w3}}.{{p}}", f"{_FC1}.{{p}}", MergeGated(), one_way=True),
    Rule(f"{_IN}.mlp.linear2.{{p}}", f"{_FC2}.{{p}}"),
    Rule(f"{_IN}.mlp.dense_4h_to_h.{{p}}", f"{_FC2}.{{p}}", one_way=True),
    Rule(f"{_IN}.mlp.fc2_{{p}}", f"{_FC2}.{{p}}", one_way=True),
    Rule(f"{_IN}.mlp.w2.{{p}}", f"{_FC2}.{{p}}", one_way=True),
    *_norm("norm", "decoder.final_layernorm."),
    Rule("{p}", "decoder.final_layernorm.{p}", one_way=True),
    Rule("final_linear.weight", "output_layer.weight"),
)
DIALECT = Dialect(
    name="gpt_neox",
    rules=RULES,
    generations=(
        (r"layers\..*\.(attention\.qkv|mlp\.fc1)[._].*", "GPT-NeoX, Transformer Engine layers"),
        (r"layers\..*\.mlp\.w1\..*", "GPT-NeoX of 2023, LLaMA's MLP"),
        (r"layers\..*\.mlp\.linear1\..*", "GPT-NeoX since 2024-09"),
        (r"layers\..*\.mlp\.dense_h_to_4h\..*", "GPT-NeoX (2021 to 2024)"),
    ),
    is_core=True,
    grouped_order=BLOCK,
    ordered_by_names=((r".*\.attention\.qkv\..*", HEAD),),
    up_first=r".*\.mlp\.(linear1|dense_h_to_4h)\..*",
    arguments=megatron_arguments,
    summed=frozenset((f"{_PROJ}.bias", f"{_FC2}.bias")),
)
