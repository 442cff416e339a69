"""What a BERT's arguments and tensors say beyond what those of a GPT do.

(pretrain_bert.py and megatron/legacy/model/bert_model.py at core_v0.12.0; core/models/bert.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .architecture import Architecture
from .argument_tables import Arguments

_TYPES = "embedding.tokentype_embeddings.weight"


def bert_architecture(
    a: Architecture,
    args: Arguments,
    overrides: Arguments,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    legacy: bool,
) -> Architecture:
    """The architecture of a BERT.

    The head of masked tokens never fuses its bias, so that its GELU is exact however the MLPs
    compute theirs; of Megatron-LM's own models alone `openai_gelu` says otherwise. A user who says
    `openai_gelu` wants one GELU, by tanh, in MLPs and head.

    Args:
        a: what the arguments say of any model.
        args, overrides: the checkpoint's arguments, and what the user says instead.
        shapes: canonical name -> shape of the whole tensor.
        legacy: whether the model is Megatron-LM's own.
    """
    said = {**args, **overrides}
    binary = said.get("bert_binary_head")
    if not isinstance(binary, bool):  # not stored before v2.1
        binary = "binary_head.weight" in shapes
    types = shapes.get(_TYPES, (2 if binary else 0,))  # model_provider, pretrain_bert.py
    if overrides.get("openai_gelu") is True:
        activation = a.activation if a.activation == "gelu_tanh" else "gelu"
    else:
        by_tanh = legacy and said.get("openai_gelu") is True
        activation = "gelu_tanh" if by_tanh else "gelu"
    return replace(
        a,
        kind="bert",
        num_tokentypes=types[0] if types else 0,
        bert_binary_head=binary,
        lm_head_activation=activation,
    )
