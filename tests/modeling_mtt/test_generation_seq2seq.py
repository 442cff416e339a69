"""The encoder-decoder's `generate()` gives the text of greedy search by hand, and T5's."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import EncoderDecoderCache

from modeling_mtt.cache_mtt import MTTDynamicLayer
from tests.modeling_mtt.seq2seq_models import SHAPES, native_t5, texts, tiny_seq2seq, written

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


def search_by_hand(model, inputs, num_tokens: int) -> torch.Tensor:
    """Greedy search without a cache, one forward pass of both sides per token."""
    ids = torch.ones(len(inputs["input_ids"]), 1, dtype=torch.long)
    for _ in range(num_tokens):
        with torch.no_grad():
            last = model(**inputs, decoder_input_ids=ids, use_cache=False).logits[:, -1]
        ids = torch.cat((ids, last.argmax(-1, keepdim=True)), dim=-1)
    return ids


@pytest.mark.parametrize("preset", SHAPES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_search(preset, cache):
    model, inputs = tiny_seq2seq(preset), texts()
    options = {**GREEDY, "cache_implementation": cache, "disable_compile": True}
    assert model.generate(**inputs, **options).tolist() == search_by_hand(model, inputs, 8).tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
        {"do_sample": True, "temperature": 0.7},
        {"do_sample": True, "top_k": 5, "num_return_sequences": 3},
        {"do_sample": True, "num_beams": 3},
        {"repetition_penalty": 1.5},
        {"encoder_no_repeat_ngram_size": 1},
        {"prompt_lookup_num_tokens": 3},
        {"use_cache": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_mode_gives_the_text_of_t5(options):
    model = tiny_seq2seq("t5")
    inputs = texts("left")
    if "prompt_lookup_num_tokens" in options:
        inputs = {name: tensor[:1] for name, tensor in inputs.items()}
    found = []
    for each in (model, native_t5(model)):
        torch.manual_seed(1)
        found.append(each.generate(**inputs, **{**GREEDY, **options}).tolist())
    assert found[0] == found[1]


@pytest.mark.parametrize("preset", SHAPES)
def test_beams_need_no_cache(preset):
    model, inputs = tiny_seq2seq(preset), texts()
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    text = model.generate(**inputs, **options)
    assert text.shape == (4, 9)
    assert text.tolist() == model.generate(**inputs, **options, use_cache=False).tolist()


@pytest.mark.parametrize("preset", SHAPES)
def test_assisted_decoding(preset):
    """A draft model changes how fast the text comes and not the text."""
    model, draft = tiny_seq2seq(preset), tiny_seq2seq(preset, num_decoder_layers=1)
    inputs = {name: tensor[:1] for name, tensor in texts().items()}
    expected = model.generate(**inputs, **GREEDY).tolist()
    assert model.generate(**inputs, **GREEDY, assistant_model=draft).tolist() == expected


@pytest.mark.parametrize("preset", SHAPES)
def test_generation_goes_on_from_a_beginning(preset):
    model, inputs = tiny_seq2seq(preset), texts()
    whole = model.generate(**inputs, **GREEDY)
    rest = model.generate(
        **inputs, decoder_input_ids=whole[:, :5], **{**GREEDY, "max_new_tokens": 4}
    )
    assert rest.tolist() == whole.tolist()


@pytest.mark.parametrize("preset", SHAPES)
def test_caches(preset):
    """One token after the other, the encoder's states are projected once and never again."""
    model, inputs, decoder_input_ids = tiny_seq2seq(preset), texts(), written(7)
    with torch.no_grad():
        expected = model(**inputs, decoder_input_ids=decoder_input_ids).logits
        encoder_outputs = model.get_encoder()(**inputs)
        cache, steps = None, []
        for chunk in decoder_input_ids.split([3, 1, 1, 2], dim=1):
            step = model(
                attention_mask=inputs["attention_mask"],
                encoder_outputs=encoder_outputs,
                decoder_input_ids=chunk,
                past_key_values=cache,
                use_cache=True,
            )
            cache = step.past_key_values
            steps.append(step.logits)
            encoder_outputs.last_hidden_state.fill_(float("nan"))
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-4, atol=1e-4)
    assert isinstance(cache, EncoderDecoderCache)
    assert all(type(layer) is MTTDynamicLayer for layer in cache.self_attention_cache.layers)
    assert len(cache.cross_attention_cache.layers) == model.config.num_decoder_layers
    assert cache.get_seq_length() == 7 and cache.cross_attention_cache.get_seq_length() == 9


@pytest.mark.parametrize("preset", SHAPES)
def test_generation_has_a_growing_cache(preset):
    model = tiny_seq2seq(preset)
    result = model.generate(**texts(), **GREEDY, return_dict_in_generate=True)
    own = result.past_key_values.self_attention_cache
    assert all(type(layer) is MTTDynamicLayer for layer in own.layers)


@pytest.mark.slow
@pytest.mark.parametrize("preset", SHAPES)
def test_a_static_cache_compiles_once_and_never_again(preset):
    """Every step after the first, which fills the cache of the encoder's states, runs one graph."""
    model, inputs = tiny_seq2seq(preset), texts()
    expected = search_by_hand(model, inputs, 8).tolist()
    torch._dynamo.reset()
    counters.clear()
    forward = model.forward
    compiled = torch.compile(forward, fullgraph=True, backend="eager", dynamic=False)
    steps = 0

    @functools.wraps(forward)  # generate() asks for the signature
    def count(*arguments: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        return (compiled if steps > 1 else forward)(*arguments, **options)

    model.forward = count
    options = {**inputs, **GREEDY, "cache_implementation": "static", "disable_compile": True}
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert model.generate(**options).tolist() == expected
    assert steps == 8
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_what_cannot_end_within_the_table_is_refused_before_it_starts():
    model = tiny_seq2seq()
    options = {"do_sample": False, "cache_implementation": "static", "disable_compile": True}
    assert model.generate(**texts(), max_new_tokens=32, **options).shape == (2, 33)
    with pytest.raises(
        ValueError, match=r"found 33 positions to look up.*Lower max_new_tokens by 1"
    ):
        model.generate(**texts(), max_new_tokens=33, **options)
    with pytest.raises(ValueError, match="found a sequence of 33 tokens"):
        model.generate(**texts(), max_new_tokens=33, do_sample=False)
    assert tiny_seq2seq("t5").generate(**texts(), max_new_tokens=40, **options).shape == (2, 41)


def test_continuous_batching_is_refused():
    with pytest.raises(ValueError, match="use generate\\(\\) in place of generate_batch"):
        tiny_seq2seq().generate_batch([[1, 2, 3]])
