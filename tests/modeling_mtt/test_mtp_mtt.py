"""Heads that predict further tokens: kept or dropped, their logits, and drafts made of them."""

from __future__ import annotations

import warnings

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from modeling_mtt import MTTConfig, MTTForCausalLM, MTTModel
from modeling_mtt.mtp_mtt import MTTCandidateGenerator

PATTERN = [7, 21, 35, 2, 60]


def generate(model: MTTForCausalLM, ids: torch.Tensor, **options) -> tuple[torch.Tensor, int]:
    """Return a text, and how often the model was called for it."""
    calls: list[None] = []
    hook = model.model.register_forward_pre_hook(lambda *_: calls.append(None))
    text = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    hook.remove()
    return text, len(calls)


@pytest.fixture(scope="module")
def trained() -> dict[int, MTTForCausalLM]:
    """Models with one and with three heads that have learned to count through a pattern."""
    models = {}
    for num_heads in (1, 3):
        torch.manual_seed(0)
        config = MTTConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            num_nextn_predict_layers=num_heads,
            initializer_range=0.1,
            bos_token_id=None,
            eos_token_id=None,
        )
        model = MTTForCausalLM(config).train()
        ids = torch.tensor([PATTERN * 8])
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        for _ in range(60):
            outputs = model(ids, labels=ids, output_mtp_logits=True)
            loss = outputs.loss
            for ahead, logits in enumerate(outputs.mtp_logits, start=2):
                loss = loss + nn.functional.cross_entropy(logits[0, :-ahead], ids[0, ahead:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        models[num_heads] = model.eval()
    return models


@pytest.mark.parametrize("num_heads", [1, 3])
def test_drafts_save_calls_and_change_nothing(trained, num_heads):
    model, options = trained[num_heads], {"max_new_tokens": 20, "do_sample": False}
    ids = torch.tensor([PATTERN + PATTERN[:2]])
    expected, plain = generate(model, ids, **options)
    text, calls = generate(model, ids, use_mtp=True, **options)
    assert text.tolist() == expected.tolist()
    assert plain == 20
    # Every draft is accepted: a call for the first token, then one for all heads' and one more.
    assert calls == 1 + -(-19 // (num_heads + 1))


@pytest.mark.parametrize("preset", ["gpt", "llama", "nemotron", "bloom", "falcon", "deepseek"])
@pytest.mark.parametrize("num_heads", [1, 2, 3])
def test_wrong_drafts_change_nothing(tiny_model, preset, num_heads):
    """Heads of random weights are wrong nearly always, and after some right ones."""
    model = tiny_model(preset, num_nextn_predict_layers=num_heads)
    ids = torch.randint(1, 96, (1, 6))
    expected, _ = generate(model, ids, max_new_tokens=12, do_sample=False)
    text, _ = generate(model, ids, max_new_tokens=12, do_sample=False, use_mtp=True)
    assert text.tolist() == expected.tolist()


@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("right", [True, False])
def test_drafts_are_what_whole_texts_say(trained, tiny_model, monkeypatch, num_heads, right):
    """Whatever was accepted before, and was not: the logits of a draft are `mtp_logits`."""
    model, seen = trained[num_heads], []
    if not right:
        model = tiny_model("llama", num_nextn_predict_layers=num_heads)
    draft = MTTCandidateGenerator.get_candidates

    def watch(self, input_ids, **kwargs):
        ids, logits = draft(self, input_ids, **kwargs)
        if logits is not None:
            seen.append((input_ids.shape[1] - 2, ids, logits))
        return ids, logits

    monkeypatch.setattr(MTTCandidateGenerator, "get_candidates", watch)
    ids = torch.tensor([[11, 80, 3, 9, 50, 17, 90]])
    _, calls = generate(model, ids, max_new_tokens=20, do_sample=False, use_mtp=True)
    assert (calls < 12) == right
    with torch.no_grad():
        for place, text, logits in seen:
            further = model(text, output_mtp_logits=True).mtp_logits
            expected = torch.stack([each[0, place] for each in further[: logits.shape[1]]])
            torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-4)


def test_a_text_may_end_within_a_draft(trained):
    model = trained[3]
    ids = torch.tensor([PATTERN])
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": PATTERN[2]}
    expected, _ = generate(model, ids, pad_token_id=0, **options)
    text, calls = generate(model, ids, pad_token_id=0, use_mtp=True, **options)
    assert text.tolist() == expected.tolist() == [PATTERN + PATTERN[:3]]
    assert calls == 2


def test_a_text_may_end_where_the_table_of_positions_does(trained):
    ids = torch.tensor([(PATTERN * 12)[:60]])
    text, _ = generate(trained[3], ids, max_new_tokens=5, do_sample=False, use_mtp=True)
    assert text[0, 60:].tolist() == (PATTERN * 13)[60:65]


def test_sampling_with_drafts(trained):
    torch.manual_seed(3)
    text, calls = generate(
        trained[1], torch.tensor([PATTERN * 2]), max_new_tokens=20, do_sample=True, use_mtp=True
    )
    assert text.shape == (1, 30)
    assert calls < 20


def test_going_on_from_a_cache(trained):
    model, ids = trained[3], torch.tensor([PATTERN * 3])
    with torch.no_grad():
        past = model(ids[:, :9]).past_key_values
    options = {"max_new_tokens": 10, "do_sample": False}
    expected, _ = generate(model, ids, **options)
    text, calls = generate(model, ids, past_key_values=past, use_mtp=True, **options)
    assert text.tolist() == expected.tolist()
    assert calls < 10


@pytest.mark.parametrize("preset", ["llama", "gpt", "bloom"])
def test_heads_look_ahead_by_their_number(tiny_model, preset):
    """A later token changes what head `k` says of the tokens `k` before it, and of none earlier."""
    model = tiny_model(preset, num_nextn_predict_layers=2)
    ids = torch.randint(1, 96, (1, 10))
    changed = ids.clone()
    changed[0, 6] = (changed[0, 6] % 95) + 1
    with torch.no_grad():
        first, second = (model(each, output_mtp_logits=True) for each in (ids, changed))
    for head, (old, new) in enumerate(zip(first.mtp_logits, second.mtp_logits, strict=True), 1):
        differs = (old - new).abs().amax(-1)[0] > 1e-4
        assert differs.nonzero()[0].item() == 6 - head
    assert first.logits.shape == first.mtp_logits[0].shape


def test_logits_to_keep_and_embeddings(tiny_model):
    model = tiny_model("mtp")
    ids = torch.randint(1, 96, (2, 8))
    with torch.no_grad():
        expected = model(ids, output_mtp_logits=True).mtp_logits
        embeds = model.model.embed_tokens(ids)
        found = model(inputs_embeds=embeds, output_mtp_logits=True, logits_to_keep=3).mtp_logits
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other[:, -3:], rtol=1e-4, atol=1e-4)


def test_padding_on_the_left(tiny_model):
    model = tiny_model("mtp")
    ids = torch.randint(1, 96, (1, 6))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    with torch.no_grad():
        expected = model(ids, output_mtp_logits=True).mtp_logits
        found = model(padded, attention_mask=(padded != 0).long(), output_mtp_logits=True)
    for one, other in zip(found.mtp_logits, expected, strict=True):
        torch.testing.assert_close(one[:, 3:], other, rtol=1e-4, atol=1e-4)


def test_heads_are_kept_or_left_out(tiny_model, tmp_path):
    model = tiny_model("mtp")
    model.save_pretrained(tmp_path)
    kept = MTTForCausalLM.from_pretrained(tmp_path)
    assert kept.state_dict().keys() == model.state_dict().keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        left_out, info = MTTForCausalLM.from_pretrained(
            tmp_path, num_nextn_predict_layers=0, output_loading_info=True
        )
    assert not info["unexpected_keys"]
    assert left_out.model.mtp is None and not hasattr(left_out.config, "mtp")
    ids = torch.randint(1, 96, (1, 5))
    with torch.no_grad():
        assert left_out(ids).logits.equal(kept(ids).logits)
    base = MTTModel.from_pretrained(tmp_path)
    assert base.mtp.layers[1].eh_proj.weight.equal(model.model.mtp.layers[1].eh_proj.weight)


def test_what_needs_heads_says_so(tiny_model):
    model, ids = tiny_model("llama"), torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="no heads that predict further tokens: found num_nextn"):
        model(ids, output_mtp_logits=True)
    with pytest.raises(ValueError, match="no heads that predict further tokens: found num_nextn"):
        model.generate(ids, max_new_tokens=2, use_mtp=True)


def test_logits_of_heads_need_the_whole_text(tiny_model):
    model, ids = tiny_model("mtp"), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        past = model(ids).past_key_values
    with pytest.raises(ValueError, match="found past_key_values with tokens, expected none"):
        model(ids, past_key_values=past, output_mtp_logits=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers (-1) must not be less than 0"),
        (
            {
                "num_nextn_predict_layers": 1,
                "sliding_window": 4,
                "num_hidden_layers": 2,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            "num_nextn_predict_layers goes with layers of one type",
        ),
    ],
)
def test_what_does_not_go_together(options, message):
    with pytest.raises(StrictDataclassError) as raised:
        MTTConfig(**options)
    assert message in str(raised.value)
