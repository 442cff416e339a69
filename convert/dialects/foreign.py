"""What Megatron trains and mtt does not model: found by its parameters, and named with its layers.

A line of the table is a pattern of names, of Megatron or of transformers, and what has such names.
(Sources: megatron/core/ssm, transformer/, models/{hybrid,multimodal,vision,retro} of core_v0.12 to
v0.19 and main of August 2026; megatron/model/{biencoder,realm,classification,multiple_choice}_model
and vision/ of v2.6; ModelOpt's and NeMo's wrappers of linear layers.)
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from ..checkpoint import Shard
from ..errors import UnsupportedError

_STATE = r"(A_log|D|dt_bias|conv1d\..*|conv1d_.*|in_proj\..*|out_proj\..*|norm\..*)"
_TABLE = (
    (rf".*\.(mixer|mamba)\.(mixer\.)?{_STATE}", "Mamba layers"),
    (
        r".*\.(self_attention|linear_attn)\.(A_log|dt_bias|conv1d\..*|in_proj\w*\..*"
        r"|out_norm\..*|out_proj\..*)",
        "layers of linear attention",
    ),
    (r".*\.indexer\..*", "layers of sparse attention"),
    (r".*\.(core_attention\.softmax_offset|self_attn\.sinks)", "attention with learned sinks"),
    (r".*\.(self_attention|mlp)_hyper_connection\..*", "several residual streams"),
    (r".*\bretriever\..*", "RETRO's retrieval encoder"),
    (r".*\.cross_attention\.(attn|encoder)\..*", "RETRO's retrieval encoder"),
    (
        r"(query_model|context_model|shared_model|question_model|block_model)\..*"
        r"|(ict_head|projection_enc)\..*",
        "two encoders, of REALM or DPR",
    ),
    (r"(classification_head|multichoice_head)\..*", "a head that classifies"),
    (
        r"(.*\.)?(vision_model|vision_projection|vision_encoder|image_encoder|radio_model"
        r"|modality_submodules|audio_model|audio_projection|sound_model)\..*"
        r"|((decoder|backbone)\.)?(class_token|conv1|ln_pre|mask_token|cls_token|linear_encoder)\b.*",
        "a vision or audio model",
    ),
    (r".*\b(medusa_heads|eagle_module)\..*", "extra heads for speculative decoding"),
    (r".*_quantizer\..*", "weights quantised by NVIDIA ModelOpt"),
    (r".*\.(adapter|lora_[AB]\w*)\..*", "adapters beside its layers"),
    (r".*\.fc[12]_latent_proj\..*", "experts in a latent space"),
    (r"decoder\.final_norm\..*", "a hybrid of layers that differ from each other"),
)
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks)\.(\d{1,7})\.")
_OF_STACK = re.compile(r"(?:^|(?:^|\.)(?:decoder|encoder|transformer)\.)layers\.(\d{1,7})\.")
_PATTERNS = ("hybrid_override_pattern", "hybrid_layer_pattern")
_MOST_NAMED = 12


def refuse(shards: Sequence[Shard], args: Mapping[str, object] | None = None) -> None:
    """Raise UnsupportedError for parameters of what mtt does not model.

    Args:
        shards: under the names in their files, layers numbered as there.
        args: Megatron's arguments, of which a pattern of layers is quoted.
    """
    offsets = _offsets(shards)
    found: dict[str, set[int | None]] = defaultdict(set)
    for shard in shards:
        offset = offsets[shard.vpp, shard.pp]
        for name in shard.tensors:
            found[_any_layer(name)].add(_number(name, offset))
    said = [f"{n} = {args[n]!r}" for n in _PATTERNS if args and isinstance(args.get(n), str)]
    if text := _describe(found, said):
        raise UnsupportedError(
            f"the model has {text[0]}, which mtt does not model; nothing was written",
            found=text[1],
            expected="a GPT, T5 or BERT, whose layers are attention and an MLP or experts",
            fix="convert it with the tools of what trained it",
        )


def describe(names: Iterable[str]) -> str | None:
    """What names of a Hugging Face folder show that mtt does not model, with the layers."""
    found: dict[str, set[int | None]] = defaultdict(set)
    for name in names:
        found[_any_layer(name)].add(_number(name, 0))
    text = _describe(found, [])
    return f"{text[0]}: {text[1]}" if text else None


def _describe(found: Mapping[str, set[int | None]], said: Sequence[str]) -> tuple[str, str] | None:
    """What it is, and where; of the first line of the table that matches anything."""
    for pattern, meaning in _TABLE:
        hits = [template for template in sorted(found) if re.fullmatch(pattern, template)]
        if not hits:
            continue
        layers = sorted({n for template in hits for n in found[template] if n is not None})
        shown = hits[0].replace("{}", str(layers[0]) if layers else "0", 1)
        where = f"{_layers(layers)}: {shown}" if layers else shown
        return meaning, "; ".join((where, *said))
    return None


def _layers(numbers: Sequence[int]) -> str:
    """`layer 3`, or `layers 0, 2, 3`."""
    more = len(numbers) - _MOST_NAMED
    text = ", ".join(map(str, numbers[:_MOST_NAMED])) + (f" and {more} more" if more > 0 else "")
    return f"layer{'s' if len(numbers) > 1 else ''} {text}"


def _any_layer(name: str) -> str:
    """A name with `{}` for its layer, so that those of all layers are one."""
    hit = _LAYER.search(name)
    return name if hit is None else f"{name[: hit.start(1)]}{{}}{name[hit.end(1) :]}"


def _number(name: str, offset: int) -> int | None:
    hit = _LAYER.search(name)
    if hit is None:
        return None
    return int(hit[1]) + (offset if _OF_STACK.search(name) else 0)


def _offsets(shards: Sequence[Shard]) -> dict[tuple[int, int], int]:
    """How many layers come before those of each virtual chunk and stage."""
    counts: dict[tuple[int, int], int] = {}
    for shard in shards:
        place = shard.vpp, shard.pp
        numbers = [int(hit[1]) + 1 for name in shard.tensors if (hit := _OF_STACK.search(name))]
        counts[place] = max([counts.get(place, 0), *numbers])
    offsets, position = {}, 0
    for place in sorted(counts):
        offsets[place] = position
        position += counts[place]
    return offsets
