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

from .argument_tables import Arguments
from .errors import IncompleteError, UnsupportedError

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
        )
    own_final = legacy or a.get("transformer_impl") != "local"
    return {
        "kind": "t5",
        "encoder_num_layers": _layers(a, "encoder", shapes),
        "num_layers": _layers(a, "decoder", shapes),
        "final_layernorm": own_final if shapes is None else _has_final_norm(shapes),
        "qk_layernorm": False,
        "relative_attention_num_buckets": _or(a, "relative_attention_num_buckets", 32),
        "relative_attention_max_distance": _or(a, "relative_attention_max_distance", 128),
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


def _or(a: Arguments, name: str, default: object) -> object:
    value = a.get(name)
    return default if value is None else value
