"""Arguments of a T5: what they mean otherwise than in a GPT, and what is asked or refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mtt_convert.architecture import Architecture
from mtt_convert.arguments import architecture_from_args, architecture_from_shapes
from mtt_convert.errors import IncompleteError, MTTError, UnsupportedError, UsageError
from mtt_convert.megatron_args import launch_flags, model_arguments
from mtt_convert.parameters import expected, find
from tests.convert.test_arguments import CORE, LEGACY, V2_6

T5 = {
    **CORE,
    "num_layers": 3,
    "encoder_num_layers": 3,
    "decoder_num_layers": 2,
    "transformer_impl": "transformer_engine",
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
}
SMALL = Architecture(
    kind="t5",
    num_layers=2,
    encoder_num_layers=1,
    hidden_size=8,
    ffn_hidden_size=12,
    num_attention_heads=2,
    num_query_groups=2,
    kv_channels=4,
    padded_vocab_size=16,
    max_position_embeddings=6,
    layernorm_epsilon=1e-5,
    add_qkv_bias=True,
)


def test_sizes_and_defaults() -> None:
    a = architecture_from_args(T5)
    assert (a.kind, a.encoder_num_layers, a.num_layers) == ("t5", 3, 2)
    assert (a.relative_attention_num_buckets, a.relative_attention_max_distance) == (8, 20)
    assert a.final_layernorm
    assert not architecture_from_args({**T5, "transformer_impl": "local"}).final_layernorm
    assert architecture_from_args({**T5, **LEGACY, "decoder_num_layers": 2}).final_layernorm


def test_a_gpt_has_layers_of_an_encoder_in_its_arguments_too() -> None:
    a = architecture_from_args({**CORE, "encoder_num_layers": 4, "decoder_num_layers": None})
    assert (a.kind, a.encoder_num_layers) == ("gpt", 0)


def test_no_t5_has_norms_of_queries_and_keys() -> None:
    assert not architecture_from_args({**T5, "qk_layernorm": True}).qk_layernorm


def test_tensors_say_what_arguments_do_not() -> None:
    """An old T5 has one number of layers; and local layers may have norms after them."""
    shapes = expected(replace(SMALL, encoder_num_layers=4, num_layers=4))
    a = architecture_from_args(V2_6, legacy=True, shapes=shapes)
    assert (a.kind, a.encoder_num_layers, a.num_layers, a.final_layernorm) == ("t5", 4, 4, True)
    bare = {name: shape for name, shape in shapes.items() if "final_layernorm" not in name}
    args = {**T5, "encoder_num_layers": 4, "decoder_num_layers": 4}
    assert not architecture_from_args(args, shapes=bare).final_layernorm


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_other_numbers_of_layers_than_any_argument_says(stack: str) -> None:
    shapes = expected(replace(SMALL, encoder_num_layers=3, num_layers=3))
    short = {n: s for n, s in shapes.items() if not n.startswith(f"{stack}.layers.2.")}
    args = {**T5, "decoder_num_layers": 3}
    architecture_from_args(args, shapes=shapes)
    with pytest.raises(IncompleteError) as caught:
        architecture_from_args(args, shapes=short)
    assert (caught.value.found, caught.value.expected) == ("2 layers", "3")


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({"rotary_base": 500000}, "rotary_base"),
        ({"use_rope_scaling": True}, "use_rope_scaling"),
        ({"rotary_seq_len_interpolation_factor": 2}, "rotary_seq_len_interpolation_factor"),
    ],
)
def test_rotary_arguments_that_no_t5_takes_are_asked_about(
    changes: dict[str, Any], asked: str
) -> None:
    args = {**T5, "position_embedding_type": "rope"}
    assert architecture_from_args(args).rotary_base == 10000
    with pytest.raises(UsageError) as caught:
        architecture_from_args({**args, **changes})
    assert f"--set {asked}=" in str(caught.value.fix)
    assert "T5" in str(caught.value.found)
    architecture_from_args({**args, **changes}, overrides=changes)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({**CORE, "position_embedding_type": "relative"}, "relative"),
        ({**T5, "position_embedding_type": "alibi"}, "alibi"),
        ({**T5, "window_size": (4, 0)}, "window_size"),
        (
            {**LEGACY, "decoder_num_layers": 2, "untie_embeddings_and_output_weights": True},
            "untie_embeddings_and_output_weights",
        ),
    ],
)
def test_what_no_t5_or_no_gpt_has_is_refused(args: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        architecture_from_args(args)
    assert said in str(caught.value.found)


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder_num_layers": 0},
        {"kind": "gpt"},
        {"kind": "gpt", "encoder_num_layers": 0, "final_layernorm": False},
        {"kind": "gpt", "encoder_num_layers": 0, "position_embedding_type": "relative"},
        {"parallel_residual": True},
        {"mtp_num_layers": 1},
        {"relative_attention_num_buckets": 0},
    ],
)
def test_numbers_that_no_model_has(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError):
        replace(SMALL, **changes)


def test_parameters() -> None:
    shapes = expected(SMALL)
    names = list(shapes)
    assert len(names) == 2 + 12 + 2 + 2 * (12 + 8) + 2 + 1
    assert names.index("encoder.final_layernorm.bias") < names.index(
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
    )
    assert shapes["decoder.layers.1.cross_attention.linear_kv.weight"] == (16, 8)
    assert shapes["output_layer.bias"] == (16,)
    own = expected(replace(SMALL, untie_embeddings_and_output_weights=True))
    assert "output_layer.bias" not in own
    relative = expected(replace(SMALL, position_embedding_type="relative"))
    assert relative["encoder_relative_pos_emb.relative_attention_bias.weight"] == (32, 2)
    assert "embedding.position_embeddings.weight" not in relative
    cross = find("decoder.layers.7.cross_attention.linear_proj.weight")
    assert cross is not None and cross.split == 1
    copy = find("lm_head.output_layer.bias")
    assert copy is not None and copy.name == "output_layer.bias"


def test_what_is_written_reads_back() -> None:
    for changes in (
        {},
        {"final_layernorm": False},
        {"position_embedding_type": "relative"},
        {"position_embedding_type": "rope", "rotary_percent": 0.5},
        {"untie_embeddings_and_output_weights": True},
    ):
        a = replace(SMALL, **changes)
        args = model_arguments(a)
        impl = {"transformer_impl": "transformer_engine" if a.final_layernorm else "local"}
        assert architecture_from_args({**args, **impl}).forward_pass() == a.forward_pass()
        assert (args["num_layers"], args["decoder_num_layers"]) == (1, 2)


def test_launch_flags() -> None:
    args = model_arguments(replace(SMALL, position_embedding_type="relative"))
    layout = {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 1,
        "transformer_impl": "transformer_engine",
        "make_vocab_size_divisible_by": 8,
        "num_layers_per_virtual_pipeline_stage": None,
        "pipeline_model_parallel_layout": None,
        "encoder_seq_length": 6,
        "decoder_seq_length": 4,
        "fp16": False,
        "bf16": True,
    }
    flags = {flag[0]: flag[1:] for flag in launch_flags({**args, **layout})}
    assert flags["--encoder-num-layers"] == ["1"]
    assert flags["--decoder-seq-length"] == ["4"]
    assert flags["--relative-attention-num-buckets"] == ["32"]
    assert not {"--num-layers", "--seq-length"} & set(flags)


def test_shapes_alone_do_not_make_a_t5() -> None:
    with pytest.raises(MTTError) as caught:
        architecture_from_shapes(expected(SMALL))
    assert "T5" in str(caught.value.found)
