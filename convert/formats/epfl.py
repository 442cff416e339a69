"""EPFL's Megatron-LLM: Megatron's `torch` files with names, rows and arguments of its own.

    names       language_model.transformer.layers.N.attention..., language_model.lm_head (bare)
    rows        query_key_value by query group, queries and keys in the order of neighbours:
                rotary positions turn pairs (0, 1), (2, 3), ..., as in Meta's Llama
    MLP         each rank's dense_h_to_4h is [up | gate], the other way round than Megatron's
    arguments   num_attention_heads_kv, glu_activation, use_rms_norm, tie_embed_logits, ...

`in_core_words` says all of this as Megatron-Core's local layers would, so that everything after
knows only those. No row of a weight moves but gate and up, for which see `row_order.py`.
(weights_conversion/{hf_to_megatron,megatron_to_hf}.py and utils/permute_qkv.py, epfLLM/Megatron-LLM
at 21e4f4a.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from ..checkpoint import RawCheckpoint
from ..errors import UnsupportedError

Arguments = Mapping[str, object]
_HEAD = "language_model.lm_head"
_SIGNS = ("num_attention_heads_kv", "tie_embed_logits")
_STACK = re.compile(r"language_model\.(transformer|encoder)\.")
_NAMES = (
    (re.compile(r"\.(self_)?attention\.query_key_value\."), ".self_attention.linear_qkv."),
    (re.compile(r"\.(self_)?attention\.dense\."), ".self_attention.linear_proj."),
    (re.compile(r"\.post_attention_layernorm\."), ".pre_mlp_layernorm."),
    (re.compile(r"\.dense_h_to_4h\."), ".linear_fc1."),
    (re.compile(r"\.dense_4h_to_h\."), ".linear_fc2."),
)
_OWN = (
    "num_attention_heads_kv glu_activation use_rms_norm tie_embed_logits use_bias rope_theta "
    "rope_scaling_factor position_embedding_type parallel_attn parallel_layernorm use_post_ln "
    "sliding_window_size"
).split()
_REFUSED = {
    "parallel_attn": "attention and MLP side by side, as in Falcon",
    "parallel_layernorm": "a norm of its own for each of them, as in Falcon 40B",
    "use_post_ln": "norms after the residuals",
    "sliding_window_size": "attention within a window, as in Mistral",
}


def is_epfl(raw: RawCheckpoint) -> bool:
    """Whether Megatron-LLM wrote a checkpoint."""
    if raw.args is None or raw.format != "torch":
        return False
    return any(sign in raw.args for sign in _SIGNS) or any(
        _HEAD in shard.tensors for shard in raw.shards
    )


def in_core_words(raw: RawCheckpoint) -> RawCheckpoint:
    """The checkpoint as Megatron-Core would have said it.

    Raises:
        UnsupportedError: Falcon's layers, another activation than SwiGLU, or windows.
    """
    translated: dict[int, dict[str, object]] = {}
    shards = []
    for shard in raw.shards:
        key = id(shard.args)
        if shard.args is not None and key not in translated:
            translated[key] = _arguments(shard.args)
        tensors = {_name(name): tensor for name, tensor in shard.tensors.items()}
        shards.append(replace(shard, tensors=tensors, args=translated.get(key)))
    args = translated.get(id(raw.args)) or _arguments(raw.args or {})
    evidence = "arguments or names of EPFL's Megatron-LLM: neighbours are rotated, up before gate"
    return replace(
        raw,
        shards=tuple(shards),
        args=args,
        evidence=(*raw.evidence, evidence),
        has_up_first=True,
    )


def _name(name: str) -> str:
    if name == _HEAD:
        return "output_layer.weight"
    name = _STACK.sub("decoder.", name).removeprefix("language_model.")
    for pattern, new in _NAMES:
        name = pattern.sub(new, name)
    return name


def _arguments(args: Arguments) -> dict[str, object]:
    odd = [name for name in _REFUSED if args.get(name) not in (None, False)]
    if odd or args.get("glu_activation") != "swiglu":
        named = [f"{n} = {args[n]!r} ({_REFUSED[n]})" for n in odd]
        named += [f"glu_activation = {args.get('glu_activation')!r}"]
        raise UnsupportedError(
            "Megatron-LLM trained a kind of model that mtt cannot represent",
            found="; ".join(named),
            expected="a Llama: SwiGLU, attention before the MLP",
        )
    heads = args.get("num_attention_heads")
    groups = args.get("num_attention_heads_kv") or heads
    result = {name: value for name, value in args.items() if name not in _OWN}
    scale = args.get("rope_scaling_factor")
    return result | {
        "num_layers": args.get("num_layers") or args.get("encoder_num_layers"),
        "num_query_groups": groups,
        "group_query_attention": groups != heads,
        "swiglu": True,
        "normalization": "RMSNorm" if args.get("use_rms_norm") is True else "LayerNorm",
        "add_bias_linear": args.get("use_bias") is True,
        "untie_embeddings_and_output_weights": args.get("tie_embed_logits") is False,
        "position_embedding_type": "rope",
        "rotary_interleaved": True,
        "rotary_base": args.get("rope_theta") or 10000,
        "rotary_percent": 1.0,
        "rotary_seq_len_interpolation_factor": None if scale in (None, 1) else scale,
    }
