"""`generate()` in every mode gives the text that plain greedy search gives, or a native class."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    QuantizedCache,
)

from tests.modeling_mtt.models import SHAPES

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


def prompts() -> dict[str, torch.Tensor]:
    """Two prompts, the second padded on the left."""
    input_ids = torch.randint(1, 96, (2, 7))
    input_ids[1, :3] = 0
    return {"input_ids": input_ids, "attention_mask": (input_ids != 0).long()}


def search_by_hand(model, input_ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Greedy search without a cache, one forward pass per token."""
    for _ in range(num_tokens):
        with torch.no_grad():
            last = model(input_ids, use_cache=False).logits[:, -1]
        input_ids = torch.cat((input_ids, last.argmax(-1, keepdim=True)), dim=-1)
    return input_ids


@pytest.mark.parametrize("preset", SHAPES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_search(tiny_model, preset, cache):
    model, batch = tiny_model(preset), prompts()
    text = model.generate(**batch, **GREEDY, cache_implementation=cache)
    assert text[0].tolist() == search_by_hand(model, batch["input_ids"][:1], 8)[0].tolist()
    assert text[1, 3:].tolist() == search_by_hand(model, batch["input_ids"][1:, 3:], 8)[0].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
        {"do_sample": True, "temperature": 0.7},
        {"do_sample": True, "top_k": 5, "num_return_sequences": 3},
        {"do_sample": True, "num_beams": 3},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static"},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_mode_gives_the_text_of_llama(tiny_model, options):
    model = tiny_model("llama")
    native = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            rms_norm_eps=model.config.norm_eps,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    ).eval()
    native.load_state_dict(model.state_dict())
    batch = prompts()
    if "prompt_lookup_num_tokens" in options:
        batch = {name: tensor[:1] for name, tensor in batch.items()}
    texts = []
    for each in (model, native):
        torch.manual_seed(1)
        texts.append(each.generate(**batch, **{**GREEDY, **options}))
    assert texts[0].tolist() == texts[1].tolist()


@pytest.mark.parametrize("preset", SHAPES)
def test_beams_need_no_cache(tiny_model, preset):
    model, batch = tiny_model(preset), prompts()
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    text = model.generate(**batch, **options)
    assert text.shape == (4, 15)
    assert text.tolist() == model.generate(**batch, **options, use_cache=False).tolist()


@pytest.mark.parametrize("preset", SHAPES)
def test_assisted_and_prompt_lookup_decoding(tiny_model, preset):
    """A draft model, or the prompt itself, changes how fast the text comes and not the text."""
    model, draft = tiny_model(preset), tiny_model(preset, num_hidden_layers=1)
    input_ids = torch.randint(1, 96, (1, 9)).repeat(1, 2)
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    expected = model.generate(**batch, **GREEDY).tolist()
    assert model.generate(**batch, **GREEDY, assistant_model=draft).tolist() == expected
    assert model.generate(**batch, **GREEDY, prompt_lookup_num_tokens=4).tolist() == expected
    assert model.generate(**batch, **GREEDY, assistant_early_exit=1).tolist() == expected


@pytest.mark.parametrize("preset", SHAPES)
def test_generation_goes_on_from_a_cache(tiny_model, preset):
    model = tiny_model(preset)
    input_ids = torch.randint(1, 96, (1, 6))
    whole = model.generate(input_ids, **GREEDY)
    first = model.generate(
        input_ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
    )
    cache = first.past_key_values
    rest = model.generate(first.sequences, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert rest.tolist() == whole.tolist()


@pytest.mark.parametrize("preset", SHAPES)
def test_what_generate_returns(tiny_model, preset):
    model = tiny_model(preset)
    model.set_attn_implementation("eager")
    result = model.generate(
        **prompts(),
        **GREEDY,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        output_attentions=True,
    )
    assert result.sequences.shape == (2, 15)
    assert len(result.scores) == len(result.logits) == len(result.hidden_states) == 8
    for step, (scores, logits) in enumerate(zip(result.scores, result.logits, strict=True)):
        assert scores.shape == (2, 96)
        assert torch.equal(scores, logits)
        assert torch.equal(logits.argmax(-1), result.sequences[:, 7 + step])
        queries = 7 if step == 0 else 1
        assert [tuple(h.shape) for h in result.hidden_states[step]] == [(2, queries, 32)] * 4
        attentions = result.attentions[step]
        assert [tuple(a.shape) for a in attentions] == [(2, 4, queries, 7 + step)] * 3
    assert result.past_key_values.get_seq_length() == 14


@pytest.mark.slow
@pytest.mark.parametrize("preset", SHAPES)
def test_a_static_cache_compiles_once_and_never_again(tiny_model, preset):
    """Every decoding step runs the graph that the first one compiled."""
    model, batch = tiny_model(preset), prompts()
    expected = model.generate(**batch, **GREEDY).tolist()
    torch._dynamo.reset()
    counters.clear()
    forward = model.forward
    compiled = torch.compile(forward, fullgraph=True, backend="eager", dynamic=False)
    steps = 0

    @functools.wraps(forward)  # generate() asks for the signature
    def count(*arguments: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        decoding = options["input_ids"].shape[1] == 1
        return (compiled if decoding else forward)(*arguments, **options)

    model.forward = count
    options = {**batch, **GREEDY, "cache_implementation": "static", "disable_compile": True}
    with torch._dynamo.config.patch(error_on_recompile=True):
        text = model.generate(**options)
    assert text.tolist() == expected
    assert steps == 8
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("preset", SHAPES)
def test_generate_accepts_a_compile_configuration(tiny_model, preset):
    """Off an accelerator transformers leaves the compilation out; it must not fail."""
    model, batch = tiny_model(preset), prompts()
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    text = model.generate(**batch, **GREEDY, cache_implementation="static", compile_config=config)
    assert text.tolist() == model.generate(**batch, **GREEDY).tolist()


@pytest.mark.parametrize("preset", SHAPES)
def test_a_quantized_cache(tiny_model, preset):
    """Four bits are coarse: the prompt's own logits are exact, and later text is still text."""
    model = tiny_model(preset, head_dim=16)
    batch = {name: tensor[:1] for name, tensor in prompts().items()}
    cache = QuantizedCache("quanto", config=model.config, nbits=4, q_group_size=16)
    text = model.generate(**batch, **GREEDY, past_key_values=cache)
    assert text.shape == (1, 15)
    assert text[0, :8].tolist() == model.generate(**batch, **GREEDY)[0, :8].tolist()
    assert cache.get_seq_length() == 14


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache(tiny_model, cache):
    """transformers moves it with CUDA streams: there is none without a GPU."""
    model = tiny_model("llama").cuda()
    batch = {name: tensor.cuda() for name, tensor in prompts().items()}
    expected = model.generate(**batch, **GREEDY).tolist()
    assert model.generate(**batch, **GREEDY, cache_implementation=cache).tolist() == expected


def few_blocks() -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(
        num_blocks=32, block_size=4, max_batch_tokens=16, use_cuda_graph=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("preset", SHAPES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_continuous_batching(tiny_model, preset, implementation):
    """More requests than fit at once, of different lengths."""
    model = tiny_model(preset)
    requests = [torch.randint(1, 96, (length,)).tolist() for length in (7, 3, 11, 1, 5)]
    expected = [model.generate(torch.tensor([ids]), **GREEDY)[0, len(ids) :] for ids in requests]
    model.set_attn_implementation(
        f"paged|{implementation}" if implementation == "eager" else "sdpa"
    )
    results = model.generate_batch(
        requests,
        generation_config=GenerationConfig(**GREEDY, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=few_blocks(),
        progress_bar=False,
    )
    found = {tuple(result.prompt_ids): result.generated_tokens for result in results.values()}
    for ids, tokens in zip(requests, expected, strict=True):
        assert found[tuple(ids)] == tokens.tolist()


@pytest.mark.slow
def test_continuous_batching_ends_texts_where_the_table_ends(tiny_model):
    """And those of other requests go on."""
    model = tiny_model("gpt", max_position_embeddings=16)
    requests = [torch.randint(1, 96, (length,)).tolist() for length in (14, 3)]
    options = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    paged = {
        "generation_config": GenerationConfig(max_new_tokens=8, **options),
        "continuous_batching_config": few_blocks(),
    }
    results = model.generate_batch(requests, progress_bar=False, **paged).values()
    found = {len(result.prompt_ids): result.generated_tokens for result in results}
    for ids, count in zip(requests, (3, 8), strict=True):
        text = model.generate(torch.tensor([ids]), max_new_tokens=count, **options)
        assert found[len(ids)] == text[0, len(ids) :].tolist()

    manager = model.init_continuous_batching(**paged)
    with pytest.raises(ValueError, match=r"found 17 tokens, expected at most .*\(16\)"):
        manager.add_request([1] * 17)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_positions_beyond_a_learned_table(tiny_model, cache):
    model = tiny_model("gpt", max_position_embeddings=10)
    with pytest.raises(ValueError, match=r"expected at most max_position_embeddings \(10\)"):
        model.generate(torch.randint(1, 96, (1, 8)), max_new_tokens=4, cache_implementation=cache)
    fitting = model.generate(torch.randint(1, 96, (1, 7)), max_new_tokens=4)
    assert fitting.shape == (1, 11)
