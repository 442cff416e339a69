"""Positions inside attention: what the models of transformers do not show."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_mtt.positions_mtt import (
    alibi_distances,
    alibi_slopes,
    rotate_heads,
    rotation_of_heads,
)
from tests.modeling_mtt.oracles import ORACLES


@pytest.mark.parametrize(
    ("interleave", "turned"),
    [(False, [-3.0, -4.0, 1.0, 2.0, 5.0]), (True, [-2.0, 1.0, -4.0, 3.0, 5.0])],
)
def test_rotations_turn_pairs_of_the_rotated_part(interleave, turned):
    states = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).view(1, 1, 1, 5)
    quarter = rotation_of_heads(torch.zeros(1, 1, 4), torch.ones(1, 1, 4), interleave)
    assert rotate_heads(states, *quarter, interleave).flatten().tolist() == turned


@pytest.mark.parametrize(
    ("num_heads", "slopes"),
    [
        (1, [2**-8]),
        (4, [2**-2, 2**-4, 2**-6, 2**-8]),
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
    ],
)
def test_slopes(num_heads, slopes):
    assert alibi_slopes(num_heads, torch.device("cpu")).tolist() == slopes


def test_distances_count_tokens_and_not_padding():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 1]])
    positions = torch.tensor([[0, 0, 1, 2], [0, 1, 1, 2]])
    distances = alibi_distances(mask, None, positions, 0)
    assert distances.shape == (2, 1, 4, 4)
    assert distances[0, 0, 3, 1:].tolist() == [-2, -1, 0]
    assert distances[1, 0, 3, [0, 1, 3]].tolist() == [-2, -1, 0]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_padding_inside_a_text_is_no_distance(cache):
    """A batch that was padded on the right and goes on, as Bloom computes it."""
    oracle = next(oracle for oracle in ORACLES if oracle.native == "BloomForCausalLM")
    native, model = oracle.build()
    input_ids = torch.randint(1, 96, (2, 12))
    input_ids[1, 5:8] = 0
    options = {"attention_mask": (input_ids != 0).long(), "max_new_tokens": 8, "do_sample": False}
    expected = native.generate(input_ids, **options)
    assert model.generate(input_ids, cache_implementation=cache, **options).tolist() == (
        expected.tolist()
    )


def test_near_keys_are_told_apart_in_low_precision(tiny_model):
    """bfloat16 has 1 and 2 but not 1001: biases are counted from the query, not the first key."""
    model = tiny_model("bloom").bfloat16()
    input_ids = torch.randint(1, 96, (1, 12))
    positions = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        near = model(input_ids, position_ids=positions, use_cache=False).logits
        far = model(input_ids, position_ids=positions + 4096, use_cache=False).logits
    assert torch.equal(far, near)


def test_attention_that_cannot_add_a_bias_is_refused(tiny_model):
    AttentionInterface.register("mtt_flash_like", ALL_ATTENTION_FUNCTIONS["sdpa"])
    model = tiny_model("bloom")
    model.config._attn_implementation = "mtt_flash_like"
    message = r"'mtt_flash_like', expected one of \('eager', 'sdpa', 'flex_attention'\)"
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([[1, 2]]))


def test_continuous_batching_is_refused_by_alibi(tiny_model):
    model = tiny_model("bloom")
    with pytest.raises(ValueError, match=r"continuous batching.*use generate\(\)"):
        model.generate_batch([[1, 2, 3]])
    with pytest.raises(ValueError, match=r"continuous batching.*use generate\(\)"):
        model(torch.tensor([[1, 2, 3]]), cache=object())
