"""Architecture: derived sizes, impossible numbers, and what shapes alone say."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest

from mtt_convert.architecture import Architecture
from mtt_convert.errors import IncompleteError, InconsistentError, UnsupportedError
from mtt_convert.sizes import read_shapes

GPT = Architecture(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=256,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=16,
    padded_vocab_size=512,
    max_position_embeddings=32,
    layernorm_epsilon=1e-5,
)


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
            "mlp.linear_fc1.weight": (a.fc1_size, a.hidden_size),
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
            layer["mlp.linear_fc1.bias"] = (a.fc1_size,)
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


def test_derived_sizes() -> None:
    assert GPT.heads_per_group == 4
    assert GPT.attention_size == 128
    assert GPT.qkv_size == (8 + 2 * 2) * 16
    assert GPT.fc1_size == 256
    assert replace(GPT, gated_linear_unit=True).fc1_size == 512


@pytest.mark.parametrize(
    ("add_bias_linear", "add_qkv_bias", "has"),
    [(True, False, True), (False, True, True), (False, False, False), (True, True, True)],
)
def test_qkv_bias(add_bias_linear: bool, add_qkv_bias: bool, has: bool) -> None:
    architecture = replace(GPT, add_bias_linear=add_bias_linear, add_qkv_bias=add_qkv_bias)
    assert architecture.has_qkv_bias is has


def test_norm_bias_and_position_table() -> None:
    assert GPT.has_norm_bias
    assert GPT.has_position_table
    llama = replace(GPT, normalization="RMSNorm", position_embedding_type="rope")
    assert not llama.has_norm_bias
    assert not llama.has_position_table


@pytest.mark.parametrize(("percent", "dim"), [(1.0, 16), (0.5, 8), (0.25, 4)])
def test_rotary_dim(percent: float, dim: int) -> None:
    rope = replace(GPT, position_embedding_type="rope", rotary_percent=percent)
    assert rope.rotary_dim == dim
    assert replace(GPT, rotary_percent=percent).rotary_dim == 0


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"num_layers": 0}, "num_layers = 0"),
        ({"kv_channels": -1}, "kv_channels = -1"),
        ({"num_query_groups": 3}, "num_attention_heads = 8, num_query_groups = 3"),
        ({"num_query_groups": 16}, "num_attention_heads = 8, num_query_groups = 16"),
        ({"vocab_size": 513}, "vocab_size = 513, padded_vocab_size = 512"),
        ({"vocab_size": 0}, "vocab_size = 0, padded_vocab_size = 512"),
        ({"layernorm_epsilon": 0.0}, "layernorm_epsilon = 0.0"),
        ({"layernorm_epsilon": float("nan")}, "layernorm_epsilon = nan"),
        ({"attention_dropout": 1.5}, "attention_dropout = 1.5"),
        ({"init_method_std": -1.0}, "init_method_std = -1.0"),
        ({"rotary_base": 0.0}, "rotary_base = 0.0"),
        ({"rotary_percent": 1.5}, "rotary_percent = 1.5"),
        ({"rope_scaling_factor": 0.0}, "rope_scaling_factor = 0.0"),
        ({"activation": "relu"}, "activation = relu"),
        ({"normalization": "L2Norm"}, "normalization = L2Norm"),
        ({"position_embedding_type": "yarn"}, "position_embedding_type = yarn"),
        ({"params_dtype": "uint8"}, "params_dtype = uint8"),
        (
            {"position_embedding_type": "rope", "rotary_percent": 0.2},
            "kv_channels = 16, rotary_percent = 0.2",
        ),
    ],
)
def test_refuses_what_cannot_be(change: dict[str, object], found: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        replace(GPT, **change)  # type: ignore[arg-type]
    assert caught.value.found == found
    assert caught.value.expected


def test_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        GPT.num_layers = 3  # type: ignore[misc]


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
