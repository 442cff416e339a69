"""What shapes alone say about a model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mtt_convert.architecture import Architecture
from mtt_convert.errors import IncompleteError, InconsistentError, UnsupportedError
from mtt_convert.sizes import read_shapes
from tests.convert.test_architecture import GPT


def shapes_of(a: Architecture, **changes: tuple[int, ...] | None) -> dict[str, tuple[int, ...]]:
    """The canonical shapes of a model, some of them changed or left out."""
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (a.padded_vocab_size, a.hidden_size),
        "decoder.final_layernorm.weight": (a.hidden_size,),
    }
    if a.has_position_table:
        table = (a.max_position_embeddings, a.hidden_size)
        shapes["embedding.position_embeddings.weight"] = table
    if a.untie_embeddings_and_output_weights:
        shapes["output_layer.weight"] = (a.padded_vocab_size, a.hidden_size)
    if a.has_norm_bias:
        shapes["decoder.final_layernorm.bias"] = (a.hidden_size,)
    for i in range(a.num_layers):
        layer = {
            "self_attention.linear_qkv.weight": (a.qkv_size, a.hidden_size),
            "self_attention.linear_qkv.layer_norm_weight": (a.hidden_size,),
            "self_attention.linear_proj.weight": (a.hidden_size, a.attention_size),
            "mlp.linear_fc1.weight": (a.fc1_size(), a.hidden_size),
            "mlp.linear_fc1.layer_norm_weight": (a.hidden_size,),
            "mlp.linear_fc2.weight": (a.hidden_size, a.ffn_hidden_size),
        }
        if a.has_norm_bias:
            layer["self_attention.linear_qkv.layer_norm_bias"] = (a.hidden_size,)
            layer["mlp.linear_fc1.layer_norm_bias"] = (a.hidden_size,)
        if a.has_qkv_bias:
            layer["self_attention.linear_qkv.bias"] = (a.qkv_size,)
        if a.add_bias_linear:
            layer["self_attention.linear_proj.bias"] = (a.hidden_size,)
            layer["mlp.linear_fc1.bias"] = (a.fc1_size(),)
            layer["mlp.linear_fc2.bias"] = (a.hidden_size,)
        if a.qk_layernorm:
            layer["self_attention.q_layernorm.weight"] = (a.kv_channels,)
            layer["self_attention.k_layernorm.weight"] = (a.kv_channels,)
        shapes |= {f"decoder.layers.{i}.{name}": shape for name, shape in layer.items()}
    for name, shape in changes.items():
        if shape is None:
            del shapes[name]
        else:
            shapes[name] = shape
    return shapes


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"untie_embeddings_and_output_weights": True},
        {"gated_linear_unit": True, "activation": "silu", "add_bias_linear": False},
        {"normalization": "RMSNorm", "add_bias_linear": False, "add_qkv_bias": True},
        {"position_embedding_type": "rope", "qk_layernorm": True},
    ],
)
def test_shapes_say_what_they_can(change: dict[str, object]) -> None:
    architecture = replace(GPT, **change)  # type: ignore[arg-type]
    sizes = read_shapes(shapes_of(architecture))
    assert sizes.attention_size == 128
    assert sizes.key_value_size == 32
    assert sizes.gated is architecture.gated_linear_unit
    assert sizes.kv_channels == (16 if architecture.qk_layernorm else None)
    assert sizes.fields["add_qkv_bias"] is architecture.has_qkv_bias
    for name in set(sizes.fields) - {"add_qkv_bias"}:
        assert sizes.fields[name] == getattr(architecture, name), name
    assert ("position_embedding_type" in sizes.fields) is architecture.has_position_table


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"embedding.word_embeddings.weight": None}, IncompleteError, "word_embeddings"),
        ({"decoder.layers.3.mlp.linear_fc2.bias": (64,)}, IncompleteError, "layers [0, 1, 3]"),
        (
            {"decoder.layers.1.self_attention.linear_qkv.bias": None},
            InconsistentError,
            "self_attention.linear_qkv.bias absent in layer 1",
        ),
        (
            {"decoder.layers.1.mlp.linear_fc2.weight": (64, 128)},
            InconsistentError,
            "mlp.linear_fc2.weight [64, 128] in layer 1",
        ),
        (
            {f"decoder.layers.{i}.mlp.linear_fc2.weight": (64, 100) for i in (0, 1)},
            InconsistentError,
            "256 rows in mlp.linear_fc1.weight, 100 columns",
        ),
        (
            {f"decoder.layers.{i}.mlp.linear_fc2.weight": (32, 256) for i in (0, 1)},
            InconsistentError,
            "mlp.linear_fc2.weight for a width of 32",
        ),
        (
            {f"decoder.layers.{i}.self_attention.linear_qkv.weight": (128, 64) for i in (0, 1)},
            InconsistentError,
            "128 rows in self_attention.linear_qkv.weight",
        ),
        (
            {f"decoder.layers.{i}.mlp.linear_fc1.weight": (256,) for i in (0, 1)},
            InconsistentError,
            "mlp.linear_fc1.weight is not a matrix",
        ),
        ({"decoder.layers.0.mlp.router.weight": (4, 64)}, UnsupportedError, "mixture of experts"),
        (
            {"decoder.layers.0.self_attention.linear_kv_down_proj.weight": (4, 64)},
            UnsupportedError,
            "multi-latent attention",
        ),
        (
            {"decoder.layers.0.cross_attention.linear_q.weight": (64, 64)},
            UnsupportedError,
            "encoder",
        ),
    ],
)
def test_shapes_of_no_gpt(
    changes: dict[str, tuple[int, ...] | None], error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as caught:
        read_shapes(shapes_of(GPT, **changes))
    assert words in str(caught.value)
