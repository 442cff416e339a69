"""A cache that grows in place holds what one that copies does."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from modeling_mtt import MTTConfig, cache_mtt
from modeling_mtt.cache_mtt import MTTDynamicLayer, growing_cache, let_grow, with_own_counts


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


def test_what_inference_mode_filled_grows_outside_of_it():
    layer, native = MTTDynamicLayer(), DynamicLayer()
    inference, no_grad = torch.inference_mode, torch.no_grad
    for num_tokens, mode in ((20, inference), (1, inference), (1, no_grad), (1, inference)):
        new = states(num_tokens)
        with mode():
            found, expected = layer.update(*new), native.update(*new)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@torch.no_grad()
def test_other_element_types_are_joined_as_torch_does():
    layer, native = MTTDynamicLayer(), DynamicLayer()
    for dtype in (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32, torch.bfloat16):
        new = [each.to(dtype) for each in states(2)]
        found, expected = layer.update(*new), native.update(*new)
        assert found[0].dtype == expected[0].dtype
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@torch.no_grad()
def test_another_batch_is_refused():
    layer = MTTDynamicLayer()
    layer.update(*states(2))
    layer.update(*states(2))
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        layer.update(*(each[:1] for each in states(1)))


@torch.no_grad()
def test_a_cache_under_vmap_is_left_alone():
    layer = MTTDynamicLayer()
    layer.update(*states(2))
    past, _ = layer.update(*states(1))
    keys, values = torch.randn(5, 2, 3, 1, 4), torch.randn(5, 2, 3, 1, 4)
    found = torch.func.vmap(lambda k, v: copy.copy(layer).update(k, v)[0])(keys, values)
    assert torch.equal(found, torch.cat([past.expand(5, *past.shape), keys], dim=-2))


def test_counts_that_stay():
    """A static cache counts in place, so that what it told before is another number later."""
    config = MTTConfig(hidden_size=12, num_attention_heads=3, num_hidden_layers=1)
    cache = StaticCache(config=config, max_cache_len=8)
    cache.update(*states(3), 0)
    told, copied = cache.get_seq_length(), with_own_counts(cache).get_seq_length()
    assert int(told) == int(copied) == 3
    cache.update(*states(2), 0)
    assert int(told) == 5 and int(copied) == 3
    assert with_own_counts(DynamicCache()).get_seq_length() == 0


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("length", [7, 1])
def test_flex_attention_sees_no_slot_of_a_static_cache(tiny_model, length):
    """Its mask is computed when it is used, after the cache has counted the new token."""
    model = tiny_model("gpt", head_dim=16)
    input_ids = torch.randint(1, 96, (2, length))
    options = {"max_new_tokens": 5, "do_sample": False, "disable_compile": True}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(input_ids, **options).logits
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):
        found = model.generate(input_ids, **options, cache_implementation="static").logits
    for each, other in zip(found, expected, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-4, atol=1e-4)
