"""Which layers a rank holds, and which sizes are refused with what advice."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtt_convert import LayoutError
from mtt_convert.architecture import Architecture
from mtt_convert.checkpoint import Layout
from mtt_convert.layouts import plan_stages


def model(**fields) -> Architecture:
    defaults = {
        "num_layers": 12,
        "hidden_size": 64,
        "ffn_hidden_size": 160,
        "num_attention_heads": 8,
        "num_query_groups": 2,
        "kv_channels": 8,
        "padded_vocab_size": 512,
        "max_position_embeddings": 64,
        "layernorm_epsilon": 1e-5,
    }
    return Architecture(**{**defaults, **fields})


def held(stages) -> dict[tuple[int, int], list[int]]:
    """(pipeline rank, chunk) -> layers."""
    return {(stage.pp, stage.vpp): list(stage.layers) for stage in stages}


def test_an_even_pipeline():
    assert held(plan_stages(model(), Layout(pp=3))) == {
        (0, 0): [0, 1, 2, 3],
        (1, 0): [4, 5, 6, 7],
        (2, 0): [8, 9, 10, 11],
    }


def test_virtual_chunks_alternate_between_ranks():
    assert held(plan_stages(model(num_layers=8), Layout(pp=2, vpp=2))) == {
        (0, 0): [0, 1],
        (1, 0): [2, 3],
        (0, 1): [4, 5],
        (1, 1): [6, 7],
    }


@pytest.mark.parametrize(
    ("text", "pp", "expected"),
    [
        ("Ett|tttL", 2, {(0, 0): [0, 1], (1, 0): [2, 3, 4]}),
        ("Et*2|t*3L", 2, {(0, 0): [0, 1], (1, 0): [2, 3, 4]}),
        ("E|(t|)*5L", 7, {(0, 0): [], **{(k, 0): [k - 1] for k in range(1, 6)}, (6, 0): []}),
        ("Et*2|t|t*1|tL", 2, {(0, 0): [0, 1], (1, 0): [2], (0, 1): [3], (1, 1): [4]}),
        ("E,t t|t*3,L", 2, {(0, 0): [0, 1], (1, 0): [2, 3, 4]}),
    ],
)
def test_a_custom_pipeline(text, pp, expected):
    vpp = len(expected) // pp
    stages = plan_stages(model(num_layers=5), Layout(pp=pp, vpp=vpp), text)
    assert held(stages) == expected
    assert [stage.first for stage in stages] == [True] + [False] * (len(stages) - 1)
    assert [stage.last for stage in stages] == [False] * (len(stages) - 1) + [True]


@given(st.integers(1, 24), st.integers(1, 6), st.integers(1, 4))
def test_every_layer_is_held_once_or_the_layout_is_refused(num_layers, pp, vpp):
    try:
        stages = plan_stages(model(num_layers=num_layers), Layout(pp=pp, vpp=vpp))
    except LayoutError as error:
        assert num_layers % (pp * vpp) or pp == 1 < vpp, error
        return
    assert [layer for stage in stages for layer in stage.layers] == list(range(num_layers))


@pytest.mark.parametrize(
    ("fields", "layout", "pipeline", "expected"),
    [
        ({}, Layout(tp=3), None, "a size that divides them: 1, 2, 4, 8"),
        ({"num_query_groups": 8}, Layout(tp=16), None, "a size that divides them: 1, 2, 4, 8"),
        ({"ffn_hidden_size": 162}, Layout(tp=4), None, "a size that divides them: 1, 2"),
        ({}, Layout(pp=5), None, "a size that divides the layers: 1, 2, 3, 4, 6, 12"),
        ({}, Layout(pp=2, vpp=4), None, "a size that divides the layers: 1, 2, 3, 6"),
        ({}, Layout(pp=5, vpp=2), None, "a size that divides the layers: 1, 2, 3, 4, 6, 12"),
        ({}, Layout(vpp=2), None, "--pp 2 or more"),
        ({}, Layout(ep=2), None, "--ep 1"),
        ({}, Layout(tp=0), None, "at least 1"),
        ({}, Layout(pp=2), "Et*5|t*6L", "12 layers"),
        ({}, Layout(pp=2), "Et*6|t*6", "E (embedding) first"),
        ({}, Layout(pp=2), "Et*6|m,t*6L", "E (embedding) first"),
        ({}, Layout(pp=2), "Et*6|t*3|t*3L", "a multiple of 2 stages"),
    ],
)
def test_what_is_refused_names_what_works(fields, layout, pipeline, expected):
    with pytest.raises(LayoutError) as caught:
        plan_stages(model(**fields), layout, pipeline)
    assert expected in caught.value.expected
    assert caught.value.exit_code == 2


def test_a_layout_that_would_unroll_forever_is_refused():
    with pytest.raises(LayoutError, match=re.escape("too long")):
        plan_stages(model(), Layout(pp=1), "E" + "(tt)*99999" + "L")


def test_more_tensor_ranks_than_query_groups():
    """Megatron-Core 0.16 cuts through groups where the sizes allow it."""
    assert len(plan_stages(model(num_query_groups=2), Layout(tp=8))) == 1
    with pytest.raises(LayoutError):
        plan_stages(model(num_query_groups=1, kv_channels=1), Layout(tp=8))


def sparse(**fields) -> Architecture:
    return model(
        **{
            "num_layers": 2,
            "num_experts": 8,
            "moe_ffn_hidden_size": 48,
            "moe_layer_pattern": (0, 1),
            "moe_shared_expert_intermediate_size": 64,
            **fields,
        }
    )


@pytest.mark.parametrize(
    ("fields", "layout", "expected"),
    [
        ({}, Layout(ep=3), "a size that divides them: 1, 2, 4, 8"),
        ({}, Layout(ep=16), "a size that divides them: 1, 2, 4, 8"),
        ({}, Layout(ep=0), "at least 1"),
        ({}, Layout(etp=5), "a size that divides it: 1, 2, 3, 4, 6, 8"),
        ({"moe_ffn_hidden_size": 50}, Layout(tp=4), "a size that divides it: 1, 2, 5, 10"),
        (
            {"moe_shared_expert_intermediate_size": 66},
            Layout(tp=4),
            "a size that divides them: 1, 2",
        ),
    ],
)
def test_experts_that_cannot_be_divided(fields, layout, expected):
    with pytest.raises(LayoutError) as refusal:
        plan_stages(sparse(**fields), layout)
    assert refusal.value.expected.startswith(expected)


def test_experts_need_not_be_divided_like_the_rest():
    a = sparse(moe_ffn_hidden_size=50)
    assert held(plan_stages(a, Layout(tp=4, ep=8, etp=1))) == {(0, 0): [0, 1]}
    # No dense layer: the width of a dense MLP does not matter.
    assert plan_stages(sparse(ffn_hidden_size=161, moe_layer_pattern=(1, 1)), Layout(tp=2))


def test_latent_attention_has_no_query_groups_to_divide():
    a = model(
        multi_latent_attention=True,
        num_query_groups=8,
        position_embedding_type="rope",
        kv_lora_rank=5,
        qk_head_dim=5,
        qk_pos_emb_head_dim=2,
        kv_channels=7,
        v_head_dim=3,
    )
    assert plan_stages(a, Layout(tp=8))
    with pytest.raises(LayoutError, match="8 heads, an MLP of 160"):
        plan_stages(a, Layout(tp=3))


@pytest.mark.parametrize("text", ["Et*6|t*6mL", "Ettttt|t*7mL"])
def test_layers_that_predict_further_tokens_are_letters_too(text):
    (first, last) = plan_stages(model(mtp_num_layers=1), Layout(pp=2), text)
    assert len(first.layers) + len(last.layers) == 12


@pytest.mark.parametrize("text", ["Et*6|t*6L", "Et*6m|t*6L", "Et*6|t*6mmL", "Et*6|mt*6L"])
def test_they_stand_before_the_loss(text):
    with pytest.raises(LayoutError, match="m for every one that predicts further tokens"):
        plan_stages(model(mtp_num_layers=1), Layout(pp=2), text)
