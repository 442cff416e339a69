"""A cache that grows in place holds what one that copies does."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from modeling_mtt import cache_mtt
from modeling_mtt.cache_mtt import MTTDynamicLayer, growing_cache, let_grow


@pytest.fixture(autouse=True)
def _grow_small_ones_too(monkeypatch):
    monkeypatch.setattr(MTTDynamicLayer, "SMALLEST", 0)


def states(num_tokens):
    return torch.randn(2, 3, num_tokens, 4), torch.randn(2, 3, num_tokens, 4)


@torch.no_grad()
def test_what_was_appended_is_there_and_earlier_views_stay():
    layer, native = MTTDynamicLayer(), DynamicLayer()
    views = []
    for num_tokens in [5, 1, 1, 1, 7, *[1] * 30]:
        new = states(num_tokens)
        found, expected = layer.update(*new), native.update(*new)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        views.append((found[0], found[0].clone()))
        assert layer.get_seq_length() == native.get_seq_length()
        assert layer.get_mask_sizes(2) == native.get_mask_sizes(2)
        if num_tokens == 7:
            for each in (layer, native):
                each.crop(-4)
                each.reorder_cache(torch.tensor([1, 0]))
    for view, before in views:
        assert torch.equal(view, before)


@torch.no_grad()
def test_tokens_are_written_where_there_is_room():
    layer = MTTDynamicLayer()
    layer.update(*states(40))
    addresses = [layer.update(*states(1))[0].data_ptr() for _ in range(40)]
    assert len(set(addresses)) <= 5
    reserved = layer._keys.reserved
    assert reserved.shape[-2] <= 1 + 1.25 * 80


@torch.no_grad()
def test_a_crop_does_not_let_others_see_what_follows():
    layer = MTTDynamicLayer()
    layer.update(*states(4))
    seen, _ = layer.update(*states(2))
    before = seen.clone()
    layer.crop(-2)
    layer.update(*states(2))
    assert torch.equal(seen, before)
    twin = copy.deepcopy(layer)
    layer.update(*states(1))
    kept = layer.keys.clone()
    twin.update(*states(1))
    assert torch.equal(layer.keys, kept)


def test_gradients_see_the_past_as_it_was():
    layer = MTTDynamicLayer()
    keys, values = states(3)
    first, _ = layer.update(keys.requires_grad_(), values)
    second, _ = layer.update(*states(1))
    (first.pow(2).sum() + second.pow(2).sum()).backward()
    torch.testing.assert_close(keys.grad, 4 * keys.detach())


def test_which_caches_grow(tiny_model):
    sliding = growing_cache(tiny_model("qwen2").config)
    types = [type(layer) for layer in sliding.layers]
    assert types == [MTTDynamicLayer, DynamicSlidingWindowLayer, DynamicSlidingWindowLayer]
    config = tiny_model("llama").config
    for cache in (
        StaticCache(config=config, max_cache_len=8),
        DynamicCache(config=config, offloading=True),
        None,
    ):
        before = [type(layer) for layer in getattr(cache, "layers", [])]
        let_grow(cache)
        assert [type(layer) for layer in getattr(cache, "layers", [])] == before


@pytest.mark.parametrize("preset", ["gpt", "llama", "bloom"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_early_exit": 1},
    ],
    ids=lambda options: "-".join(options) or "greedy",
)
def test_texts_are_those_of_a_cache_that_copies(tiny_model, monkeypatch, preset, options):
    model = tiny_model(preset)
    input_ids = torch.randint(1, 96, (1, 9))
    options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, **options}
    found = model.generate(input_ids, **options)
    assert any(isinstance(layer, MTTDynamicLayer) for layer in found.past_key_values.layers)
    assert found.past_key_values.layers[0]._keys.reserved is not None
    monkeypatch.setattr(cache_mtt, "MTTDynamicLayer", DynamicLayer)
    expected = model.generate(input_ids, **options)
    assert found.sequences.tolist() == expected.sequences.tolist()
