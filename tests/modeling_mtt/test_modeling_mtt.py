"""The model by itself: caches, padding, positions, training, saving."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    AutoModelForCausalLM,
    CompileConfig,
    DynamicCache,
    StaticCache,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_mtt import MTTForCausalLM, MTTModel
from tests.modeling_mtt.models import PRESETS


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(1, 96, shape)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("preset", "present", "absent"),
    [
        ("gpt", ["model.embed_positions.weight"], ["mlp.gate_proj", "q_norm"]),
        ("llama", ["model.layers.2.mlp.gate_proj.weight"], ["embed_positions", "bias", "q_norm"]),
        ("nemotron", ["model.layers.0.self_attn.k_norm.bias"], ["embed_positions", "gate_proj"]),
    ],
)
def test_parameters_exist_only_where_configured(tiny_model, preset, present, absent):
    names = tiny_model(preset).state_dict().keys()
    assert set(present) <= names
    assert not [name for name in names if any(part in name for part in absent)]


@pytest.mark.parametrize("zero_centered_norm", [False, True])
@pytest.mark.parametrize("norm_type", ["layernorm", "rmsnorm"])
def test_fresh_norms_do_nothing(tiny_config, norm_type, zero_centered_norm):
    config = tiny_config(
        norm_type=norm_type, zero_centered_norm=zero_centered_norm, use_qk_norm=True
    )
    state_dict = MTTForCausalLM(config).state_dict()
    norms = {name: tensor for name, tensor in state_dict.items() if "norm" in name}
    assert len(norms) == (4 * 3 + 1) * (2 if norm_type == "layernorm" else 1)
    for name, tensor in norms.items():
        value = 1.0 if name.endswith(".weight") and not zero_centered_norm else 0.0
        assert torch.all(tensor == value), name


@pytest.mark.parametrize("preset", PRESETS)
def test_cache_changes_nothing(tiny_model, preset):
    model = tiny_model(preset)
    input_ids = ids(2, 10)
    with torch.no_grad():
        expected = model(input_ids, use_cache=False)
        assert expected.past_key_values is None

        cache = DynamicCache(config=model.config)
        for start, stop in [(0, 6), (6, 7), (7, 10)]:
            logits = model(input_ids[:, start:stop], past_key_values=cache).logits
            close(logits, expected.logits[:, start:stop])

        cache = StaticCache(config=model.config, max_cache_len=12)
        for start, stop in [(0, 6), (6, 7), (7, 10)]:
            logits = model(input_ids[:, start:stop], past_key_values=cache).logits
            close(logits, expected.logits[:, start:stop])


@pytest.mark.parametrize("preset", PRESETS)
def test_padding_on_the_left_changes_nothing(tiny_model, preset):
    model = tiny_model(preset)
    long, short = ids(1, 9), ids(1, 5)
    padded = torch.cat([long, torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1)])
    options = {"max_new_tokens": 6, "do_sample": False}
    together = model.generate(padded, attention_mask=(padded != 0).long(), **options)
    for row, alone in enumerate([long, short]):
        expected = model.generate(alone, attention_mask=torch.ones_like(alone), **options)
        assert together[row, -6:].tolist() == expected[0, -6:].tolist()


@pytest.mark.parametrize("preset", [p for p in PRESETS if p != "llama"])
def test_static_cache_compiles_in_one_graph(tiny_model, preset):
    model = tiny_model(preset)
    input_ids = ids(2, 5)
    options = {
        "attention_mask": torch.ones_like(input_ids),
        "max_new_tokens": 6,
        "do_sample": False,
    }
    expected = model.generate(input_ids, **options)

    # "eager" runs the graph as it was captured: what is tested is that it is one graph.
    compile_config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compile_config._compile_all_devices = True
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    found = model.generate(
        input_ids, cache_implementation="static", compile_config=compile_config, **options
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("preset", PRESETS)
def test_eager_attention_agrees_and_gives_weights(tiny_model, preset):
    model = tiny_model(preset)
    input_ids, attention_mask = ids(2, 7), torch.ones(2, 7, dtype=torch.long)
    attention_mask[0, :3] = 0
    with torch.no_grad():
        expected = model(input_ids, attention_mask=attention_mask).logits
        model.set_attn_implementation("eager")
        outputs = model(
            input_ids,
            attention_mask=attention_mask,
            output_attentions=True,
            output_hidden_states=True,
        )
    close(outputs.logits[:, 3:], expected[:, 3:])
    config = model.config
    shape = (2, config.num_attention_heads, 7, 7)
    assert [tuple(weights.shape) for weights in outputs.attentions] == [shape] * 3
    shape = (2, 7, config.hidden_size)
    assert [tuple(states.shape) for states in outputs.hidden_states] == [shape] * 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("preset", ["bloom", "qwen2"])
def test_flex_attention_agrees(tiny_model, preset):
    model = tiny_model(preset, head_dim=16)
    torch.compiler.reset()
    input_ids, attention_mask = ids(2, 30), torch.ones(2, 30, dtype=torch.long)
    attention_mask[0, :3] = 0
    with torch.no_grad():
        expected = model(input_ids, attention_mask=attention_mask).logits
        model.set_attn_implementation("flex_attention")
        found = model(input_ids, attention_mask=attention_mask).logits
    close(found[:, 3:], expected[:, 3:])


def test_other_attention_functions_get_every_argument(tiny_model):
    """Of the caller, as the lengths of packed sequences for FlashAttention, and of the layer."""
    seen = []

    def probe(module, *tensors, **kwargs):
        lengths = kwargs.pop("cu_seq_lens_q"), kwargs.pop("cu_seq_lens_k")
        seen.append((module.layer_idx, kwargs["sliding_window"], *lengths))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *tensors, **kwargs)

    AttentionInterface.register("mtt_probe", probe)
    AttentionMaskInterface.register("mtt_probe", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model = tiny_model("qwen2")
    input_ids, lengths = ids(1, 6), torch.tensor([0, 6])
    with torch.no_grad():
        expected = model(input_ids).logits
        model.set_attn_implementation("mtt_probe")
        close(model(input_ids, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths).logits, expected)
    assert [(layer_idx, window) for layer_idx, window, *_ in seen] == [(0, None), (1, 4), (2, 4)]
    assert all(found is lengths for _, _, *both in seen for found in both)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("preset", PRESETS)
def test_packed_sequences_do_not_see_each_other(tiny_model, preset, implementation):
    model = tiny_model(preset)
    model.set_attn_implementation(implementation)
    first, second = ids(1, 20), ids(1, 14)
    positions = torch.cat([torch.arange(20), torch.arange(14)]).unsqueeze(0)
    both = torch.cat([first, second], 1)
    with torch.no_grad():
        packed = model(both, position_ids=positions, use_cache=False).logits
        close(packed[:, :20], model(first).logits)
        close(packed[:, 20:], model(second).logits)


@pytest.mark.parametrize("preset", PRESETS)
def test_masks_of_four_dimensions(tiny_model, preset):
    """Two texts with one beginning, in one row: a tree that its mask and positions describe."""
    model = tiny_model(preset)
    beginning, first, second = ids(1, 6), ids(1, 3), ids(1, 3)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 6, 7, 8]])
    seen = torch.ones(12, 12, dtype=torch.bool).tril()
    seen[9:, 6:9] = False
    options = {"position_ids": positions, "use_cache": False}
    with torch.no_grad():
        if "sliding_attention" in (model.config.layer_types or []):
            window = positions[0, :, None] - positions[0] < model.config.sliding_window
            masks = {
                "full_attention": seen[None, None],
                "sliding_attention": (seen & window)[None, None],
            }
        else:
            masks = seen[None, None]
        tree = model(torch.cat([beginning, first, second], 1), attention_mask=masks, **options)
        close(tree.logits[:, :9], model(torch.cat([beginning, first], 1)).logits)
        close(tree.logits[:, 9:], model(torch.cat([beginning, second], 1)).logits[:, 6:])


@pytest.mark.parametrize("preset", PRESETS)
def test_embeddings_of_the_users_own_are_finished(tiny_model, preset):
    model = tiny_model(preset)
    input_ids = ids(2, 6)
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(input_ids)
        close(model(inputs_embeds=embeddings).logits, model(input_ids).logits)


def test_a_stage_without_the_first_layer_adds_no_positions(tiny_model):
    model = tiny_model("gpt").model
    states = torch.randn(1, 5, 32)
    with torch.no_grad():
        expected = states
        mask = torch.full((5, 5), torch.finfo(torch.float).min).triu(1)[None, None]
        for layer in model.layers[1:]:
            expected = layer(expected, attention_mask=mask)
        expected = model.norm(expected)

        model.layers[0] = nn.Identity()
        model.layers[0].forward = lambda hidden_states, **kwargs: hidden_states
        close(model(inputs_embeds=states).last_hidden_state, expected)


def test_exactly_one_input(tiny_model):
    model = tiny_model().model
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds, got neither"):
        model()
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds, got both"):
        model(ids(1, 2), inputs_embeds=torch.zeros(1, 2, 32))


def test_positions_beyond_the_table(tiny_model):
    model = tiny_model("gpt")
    message = (
        r"Position 32 .* found a sequence of 33 tokens, expected at most "
        r"max_position_embeddings \(32\)\. Shorten"
    )
    model(ids(1, 32))
    with pytest.raises(ValueError, match=message):
        model(ids(1, 33))
    with pytest.raises(ValueError, match=message):
        model(ids(1, 1), position_ids=torch.tensor([[32]]))

    tiny_model("llama")(ids(1, 33))


def test_compiled_generation_beyond_the_table_does_not_start_without_padding(tiny_model):
    """`generate` then passes no mask to the model."""
    torch.compiler.reset()
    model = tiny_model("gpt")
    model.forward = torch.compile(model.forward, backend="eager")
    with pytest.raises(ValueError, match=r"found 34 positions .* \(32\)"):
        model.generate(ids(2, 30), max_new_tokens=5, do_sample=False)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_beyond_the_table_does_not_start(tiny_model, monkeypatch, cache, compiled):
    model = tiny_model("gpt")
    input_ids = ids(2, 30)
    input_ids[0, :10] = 0
    options = {
        "attention_mask": (input_ids != 0).long(),
        "do_sample": False,
        "cache_implementation": cache,
    }
    if compiled:
        torch.compiler.reset()
        model.forward = torch.compile(model.forward, backend="eager")
    # The last token is never looked up.
    assert model.generate(input_ids, max_new_tokens=3, **options).shape == (2, 33)
    monkeypatch.setattr(model.model, "embed_tokens", None)
    message = (
        r"found 34 positions .* expected at most max_position_embeddings \(32\)\. "
        r"Lower max_new_tokens by 2"
    )
    with pytest.raises(ValueError, match=message):
        model.generate(input_ids, max_new_tokens=5, **options)


def test_positions_are_not_read_in_vain_off_the_cpu(tiny_model, monkeypatch):
    """Reading them makes an accelerator wait; `meta` stands in for one, and cannot be read."""
    model = tiny_model("gpt").model
    on_device = torch.empty(1, 1, dtype=torch.long, device="meta")
    model._check_positions(on_device, 32)
    model._check_positions(on_device, None)
    model._check_positions(on_device, torch.empty((), device="meta"))
    with pytest.raises(RuntimeError, match="meta"):
        model._check_positions(on_device, 33)


def test_padding_may_exceed_the_table(tiny_model):
    model = tiny_model("gpt")
    input_ids = ids(1, 30)
    padded = torch.cat([torch.zeros(1, 10, dtype=torch.long), input_ids], 1)
    options = {"max_new_tokens": 2, "do_sample": False}
    found = model.generate(padded, attention_mask=(padded != 0).long(), **options)
    expected = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)
    assert found[0, -2:].tolist() == expected[0, -2:].tolist()


def test_hidden_dropout_comes_after_embeddings_attention_and_mlp(tiny_model):
    model = tiny_model("gpt", hidden_dropout=1.0).model.train()
    states = model(ids(1, 4)).last_hidden_state
    close(states, model.norm.bias.expand_as(states))


@pytest.mark.parametrize("preset", PRESETS)
def test_gradient_checkpointing_changes_nothing(tiny_model, preset):
    model = tiny_model(preset).train()
    input_ids = ids(2, 8)

    def backward(**options):
        outputs = model(
            input_ids, labels=input_ids, output_mtp_logits=model.model.mtp is not None, **options
        )
        further = sum(logits.square().mean() for logits in outputs.mtp_logits or ())
        (outputs.loss + further).backward()

    backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    # Renamed in transformers 5.23.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)()
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    backward(use_cache=False)
    for name, parameter in model.named_parameters():
        close(parameter.grad, expected[name])


@pytest.mark.parametrize("preset", PRESETS)
def test_logits_to_keep(tiny_model, preset):
    model = tiny_model(preset)
    input_ids = ids(2, 6)
    with torch.no_grad():
        every = model(input_ids).logits
        close(model(input_ids, logits_to_keep=2).logits, every[:, -2:])
        chosen = torch.tensor([0, 3])
        close(model(input_ids, logits_to_keep=chosen).logits, every[:, chosen])


def test_loss_of_accumulated_batches(tiny_model):
    """`num_items_in_batch` makes the losses of parts add up to the loss of the whole."""
    model = tiny_model("gpt")
    input_ids = ids(3, 8)
    labels = input_ids.clone()
    labels[0, 3:] = -100
    predicted = int((labels[:, 1:] != -100).sum())
    with torch.no_grad():
        whole = model(input_ids, labels=labels).loss
        parts = [
            model(
                input_ids[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=predicted
            )
            for row in range(3)
        ]
    close(sum(part.loss for part in parts), whole)


@pytest.mark.parametrize("preset", ["gpt", "llama"])
def test_vocabulary_is_resized(tiny_model, preset):
    """And the table of positions keeps its rows."""
    model = tiny_model(preset)
    input_ids = ids(2, 6)
    with torch.no_grad():
        expected = model(input_ids).logits
        model.resize_token_embeddings(101, mean_resizing=False)
        assert model.config.vocab_size == model.lm_head.out_features == 101
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        assert tied == model.config.tie_word_embeddings
        if preset == "gpt":
            assert model.model.embed_positions.num_embeddings == 32
        close(model(input_ids).logits[..., :96], expected)
        assert model(torch.tensor([[100]])).logits.shape == (1, 1, 101)


@pytest.mark.parametrize("preset", PRESETS)
def test_save_and_load(tiny_model, tmp_path, preset):
    model = tiny_model(preset)
    input_ids = ids(1, 5)
    model.save_pretrained(tmp_path)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MTTForCausalLM
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings

    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is MTTModel
    with torch.no_grad():
        close(loaded(input_ids).logits, model(input_ids).logits)
        close(base(input_ids).last_hidden_state, model.model(input_ids).last_hidden_state)


@pytest.mark.parametrize("preset", PRESETS)
def test_bfloat16(tiny_model, preset):
    model = tiny_model(preset)
    input_ids = ids(1, 5)
    with torch.no_grad():
        expected = model(input_ids).logits
        logits = model.bfloat16()(input_ids).logits
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).abs().mean() < 0.1 * expected.std()
