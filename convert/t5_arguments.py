"""What a T5's arguments mean, where it is something else than in a GPT.

    encoder_num_layers, decoder_num_layers    counts; Megatron-Core's trainer gives the decoder
                                              num_layers, which is the encoder's; none before 2022
    the norms after the last layers           there with Transformer Engine, whatever the layers are
    qk_layernorm                              built into no T5
    rotary_base and scalings                  T5Model takes none

Tensors decide where a trainer may have used either of two. (Sources: pretrain_t5.py, T5Model and
t5_spec.py in core/models/T5, and validate_args in training/arguments.py at core_v0.16.1;
ParallelTransformer in legacy/model/transformer.py at core_v0.12.0.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from .architecture import Architecture
from .argument_tables import Arguments
from .argument_values import or_default
from .errors import IncompleteError, LayoutError, UnsupportedError, UsageError

Shapes = Mapping[str, tuple[int, ...]]
_LAYER = re.compile(r"(encoder|decoder)\.layers\.(\d+)\.")
_CROSS = re.compile(r"decoder\.layers\.\d+\.cross_attention\..*")


def is_t5(args: Arguments, shapes: Shapes | None) -> bool:
    """Whether the model is a T5: its tensors or its arguments say so."""
    if any(_CROSS.fullmatch(name) for name in shapes or ()):
        return True
    return args.get("decoder_num_layers") is not None


def t5_fields(a: Arguments, legacy: bool, shapes: Shapes | None) -> dict[str, object]:
    """Fields of an `Architecture` that only a T5 has, or has otherwise than a GPT.

    Args:
        a: the arguments, under today's names.
        legacy: whether the model is Megatron-LM's own T5.
        shapes: canonical name -> shape of the whole tensor, where there is a checkpoint.

    Raises:
        IncompleteError: there are fewer or more layers than any of the arguments says.
        UnsupportedError: a table of its own for the output, which a legacy T5 does not use.
    """
    if legacy and a.get("untie_embeddings_and_output_weights") is True:
        raise UnsupportedError(
            "Megatron-LM's own T5 does not compute with a table of its own for the output",
            found="untie_embeddings_and_output_weights = True",
            expected="untie_embeddings_and_output_weights = False",
            fix="give the checkpoint as Megatron-LM saved it, or correct the argument with "
            "--set untie_embeddings_and_output_weights=False",
        )
    own_final = legacy or a.get("transformer_impl") != "local"
    return {
        "kind": "t5",
        "encoder_num_layers": _layers(a, "encoder", shapes),
        "num_layers": _layers(a, "decoder", shapes),
        "final_layernorm": own_final if shapes is None else _has_final_norm(shapes),
        "qk_layernorm": False,
        "relative_attention_num_buckets": or_default(a, "relative_attention_num_buckets", 32),
        "relative_attention_max_distance": or_default(a, "relative_attention_max_distance", 128),
    }


def _has_final_norm(shapes: Shapes) -> bool:
    return any(f"{stack}.final_layernorm.weight" in shapes for stack in ("encoder", "decoder"))


def _layers(a: Arguments, stack: str, shapes: Shapes | None) -> object:
    """Layers of the encoder or the decoder."""
    said = [a[n] for n in (f"{stack}_num_layers", "num_layers") if a.get(n) is not None]
    if shapes is None:
        return said[0]
    hits = [hit for name in shapes if (hit := _LAYER.match(name))]
    found = len({hit[2] for hit in hits if hit[1] == stack})
    if found not in said:
        raise IncompleteError(
            f"layers of the {stack} are missing; nothing was written",
            found=f"{found} layers",
            expected=" or ".join(map(str, dict.fromkeys(said))),
            fix="check that all files of the iteration were copied, or correct the number with "
            f"--set {stack}_num_layers={found}",
        )
    return found


def stored_layers(a: Architecture) -> dict[str, object]:
    """The arguments for numbers of layers; of a GPT they are what validate_args makes of one."""
    t5 = a.kind == "t5"
    return {
        "num_layers": a.encoder_num_layers if t5 else a.num_layers,
        "encoder_num_layers": a.encoder_num_layers if t5 else a.num_layers,
        "decoder_num_layers": a.num_layers if t5 else None,
    }


def sequence_arguments(args: Arguments, seq_length: int, a: Architecture) -> dict[str, object]:
    """The arguments for lengths of texts, from those of the source where it has them."""
    length = args.get("decoder_seq_length")
    if a.kind != "t5":
        length = None
    elif not isinstance(length, int):
        length = a.max_position_embeddings
    return {"encoder_seq_length": seq_length, "decoder_seq_length": length}


def writable_impl(a: Architecture, asked: str | None, source: str) -> str:
    """The `transformer_impl` that a model is written for.

    Args:
        a: the model.
        asked: what the user wants, if that was said.
        source: the checkpoint's, or Megatron's default.

    Raises:
        UnsupportedError: neither computes this T5.
        UsageError: the one asked for does not.
    """
    if a.kind != "t5":
        return asked or source
    reasons = {}
    if not a.final_layernorm:
        reasons["transformer_engine"] = "norms after the last layers, which this model has not"
    if a.position_embedding_type == "relative":
        reasons["local"] = "no relative positions"
    able = [name for name in ("transformer_engine", "local") if name not in reasons]
    if not able:
        raise UnsupportedError(
            "no T5 of Megatron-Core computes this model; nothing was written",
            found="relative positions, and no norms after the last layers",
            expected="relative positions with Transformer Engine, whose T5 has norms there",
            fix="convert it with --to hf",
        )
    if asked in reasons:
        raise UsageError(
            f"a T5 of --transformer-impl {asked} does not compute this model; nothing was written",
            found=f"--transformer-impl {asked}: {reasons[asked]}",
            expected=able[0],
            fix=f"--transformer-impl {able[0]}, or leave it out",
        )
    return asked or (source if source in able else able[0])


def check_writable(a: Architecture) -> None:
    """Raise UnsupportedError for a T5 that T5Model has no arguments for."""
    if a.kind != "t5":
        return
    limits = {
        "num_query_groups": (a.num_attention_heads, "cross attention has no query groups"),
        "rotary_base": (10000.0, "takes no rotary base"),
        "rope_scaling_factor": (None, "takes no scaling of rotary positions"),
        "rotary_seq_len_interpolation_factor": (None, "takes no scaling of rotary positions"),
        "qk_layernorm": (False, "has no norms of queries and keys"),
    }
    odd = {n: limit for n, limit in limits.items() if getattr(a, n) != limit[0]}
    if odd:
        raise UnsupportedError(
            "Megatron-Core's T5 does not compute this model; nothing was written",
            found="; ".join(f"{n} = {getattr(a, n)} (it {why})" for n, (_, why) in odd.items()),
            expected="; ".join(f"{n} = {value}" for n, (value, _) in odd.items()),
            fix="convert it with --to hf, which can represent it",
        )


def check_stages(a: Architecture, pp: int, vpp: int, pipeline_layout: str | None) -> None:
    """Raise LayoutError for a T5 in a pipeline, which Megatron-LM has not since core_v0.14."""
    if a.kind == "t5" and (pp > 1 or vpp > 1 or pipeline_layout is not None):
        given = f"--pipeline-model-parallel-layout {pipeline_layout}"
        raise LayoutError(
            "Megatron-LM does not train a T5 in a pipeline; nothing was written",
            found=f"--pp {pp}" if pipeline_layout is None else given,
            expected="--pp 1 (pretrain_t5.py refuses more)",
            fix="leave it out; --tp divides every layer",
        )


def ignored_by_trainer(a: Architecture) -> list[str]:
    """A warning where Megatron-LM's own training script would build another model."""
    if a.kind != "t5" or a.num_layers == a.encoder_num_layers:
        return []
    return [
        f"Megatron-LM's pretrain_t5.py gives the decoder as many layers as the encoder "
        f"({a.encoder_num_layers}), and this one has {a.num_layers}: train with a script that "
        "passes decoder_num_layers to the model"
    ]
