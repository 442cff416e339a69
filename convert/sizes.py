"""What the shapes of a model's tensors say about it, where nothing else does."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from .errors import IncompleteError, InconsistentError, UnsupportedError


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the shapes of a model's tensors say about it."""

    fields: Mapping[str, object] = field(default_factory=dict)
    """Megatron arguments -> values, all that follow from shapes alone."""

    attention_size: int
    """Query channels of all heads."""

    key_value_size: int
    """Key channels of all groups."""

    kv_channels: int | None
    """Channels of one head, where a norm of queries shows them."""

    gated: bool
    """`linear_fc1` has two rows for each column of `linear_fc2`."""


_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_QKV, _PROJ = "self_attention.linear_qkv", "self_attention.linear_proj"
_FC1, _FC2 = "mlp.linear_fc1", "mlp.linear_fc2"
_EMBEDDING, _POSITIONS = "embedding.word_embeddings", "embedding.position_embeddings"
_OTHER_MODELS = {
    "mlp.router.": "mixture of experts",
    "enorm.": "layers that predict further tokens",
    "cross_attention.": "an encoder beside the decoder: T5",
    "self_attention.linear_kv_down_proj.": "multi-latent attention",
    "mixer.": "Mamba layers",
}
Shapes = Mapping[str, tuple[int, ...]]


def read_shapes(shapes: Shapes) -> Sizes:
    """What the shapes of whole tensors say, by canonical names with numbered layers.

    Raises:
        IncompleteError: a layer, or a tensor that every GPT has, is missing.
        InconsistentError: layers that differ, or matrices that do not fit together.
        UnsupportedError: tensors of another kind of model.
    """
    layers = _layers(shapes)
    layer = layers[0]
    vocabulary, hidden = _matrix(shapes, f"{_EMBEDDING}.weight")
    qkv_rows, qkv_columns = _matrix(layer, f"{_QKV}.weight")
    proj_rows, attention = _matrix(layer, f"{_PROJ}.weight")
    fc1_rows, fc1_columns = _matrix(layer, f"{_FC1}.weight")
    fc2_rows, ffn = _matrix(layer, f"{_FC2}.weight")
    widths = {_QKV: qkv_columns, _PROJ: proj_rows, _FC1: fc1_columns, _FC2: fc2_rows}
    for name, width in widths.items():
        if width != hidden:
            raise InconsistentError(
                "tensors do not fit together",
                found=f"{name}.weight for a width of {width}",
                expected=f"{hidden}, the width of {_EMBEDDING}.weight",
                fix="use files of one and the same run",
            )
    if fc1_rows not in (ffn, 2 * ffn):
        raise InconsistentError(
            "tensors do not fit together",
            found=f"{fc1_rows} rows in {_FC1}.weight, {ffn} columns in {_FC2}.weight",
            expected="as many, or twice as many with a gate",
            fix="use files of one and the same run",
        )
    if qkv_rows <= attention or (qkv_rows - attention) % 2:
        raise InconsistentError(
            "tensors do not fit together",
            found=f"{qkv_rows} rows in {_QKV}.weight, {attention} columns in {_PROJ}.weight",
            expected="rows for the queries, and as many for keys as for values",
            fix="use files of one and the same run",
        )
    norm = layer.get("self_attention.q_layernorm.weight")
    has_bias = f"{_QKV}.layer_norm_bias" in layer or "decoder.final_layernorm.bias" in shapes
    fields: dict[str, object] = {
        "num_layers": len(layers),
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "padded_vocab_size": vocabulary,
        "normalization": "LayerNorm" if has_bias else "RMSNorm",
        "add_bias_linear": f"{_PROJ}.bias" in layer,
        "add_qkv_bias": f"{_QKV}.bias" in layer,
        "qk_layernorm": norm is not None,
        "untie_embeddings_and_output_weights": "output_layer.weight" in shapes,
    }
    if "embedding.norm.weight" in shapes:
        fields["embed_layernorm"] = True
    if f"{_POSITIONS}.weight" in shapes:
        fields["position_embedding_type"] = "learned_absolute"
        fields["max_position_embeddings"] = _matrix(shapes, f"{_POSITIONS}.weight")[0]
    return Sizes(
        fields=fields,
        attention_size=attention,
        key_value_size=(qkv_rows - attention) // 2,
        kv_channels=None if norm is None else norm[0],
        gated=fc1_rows == 2 * ffn,
    )


def _layers(shapes: Shapes) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of every layer, which must all be the same."""
    found: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        for part, meaning in _OTHER_MODELS.items():
            if f".{part}" in name:
                raise UnsupportedError(
                    "shapes alone do not say what this model computes",
                    found=f"{name}: {meaning}",
                    expected="the arguments it was trained with: only a plain GPT is told without",
                    fix="give the checkpoint as it was saved, with args in its files",
                )
        if hit := _LAYER.fullmatch(name):
            found.setdefault(int(hit[1]), {})[hit[2]] = tuple(shape)
    if not found or set(found) != set(range(len(found))):
        raise IncompleteError(
            "layers are missing",
            found=f"layers {sorted(found)}",
            expected="all layers from 0",
            fix="check that all files of the iteration were copied",
        )
    for number, layer in found.items():
        if layer != found[0]:
            name = min(name for name, _ in layer.items() ^ found[0].items())
            raise InconsistentError(
                f"layers 0 and {number} differ",
                found=f"{name} {_shape(layer.get(name))} in layer {number}",
                expected=f"{_shape(found[0].get(name))}, as in layer 0",
                fix="use files of one and the same run",
            )
    return [found[number] for number in range(len(found))]


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _matrix(shapes: Shapes, name: str) -> tuple[int, int]:
    shape = shapes.get(name)
    if shape is None:
        raise IncompleteError(f"{name} is missing", expected="a tensor that every GPT has")
    if len(shape) != 2:
        raise InconsistentError(f"{name} is not a matrix", found=_shape(shape), expected="two axes")
    return shape[0], shape[1]
