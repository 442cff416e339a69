"""The encoder-decoder computes what Megatron's T5 computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSeq2SeqLM, DynamicCache
from transformers.models.t5.modeling_t5 import T5Attention

from modeling_mtt import MTTForConditionalGeneration, MTTSeq2SeqModel
from modeling_mtt.relative_mtt import relative_buckets
from tests.modeling_mtt import megatron_t5
from tests.modeling_mtt.seq2seq_models import SHAPES, native_t5, texts, tiny_seq2seq, written

TOLERANCE = 4e-4
GOLDEN = {
    "mcore/t5": {"num_heads": 8, "max_position_embeddings": 64, "final_norm": False},
    "mcore-te/t5_te": {"num_heads": 8, "max_position_embeddings": 64},
    "legacy/reference/t5": {"num_heads": 4, "max_position_embeddings": 32},
}


def load_golden(golden, name, **options):
    """A model of Megatron's, its arguments, and the logits it should compute."""
    if name.startswith("legacy"):
        weights, logits = f"{name}.safetensors", f"{name}.npz"
    else:
        weights, logits = f"{name}/reference_megatron.safetensors", f"{name}/logits.npz"
    # Without fused kernels GeLU is the exact one.
    model = megatron_t5.load(golden(weights), **{"hidden_act": "gelu", **GOLDEN[name], **options})
    reference = np.load(golden(logits))
    inputs = {
        each: torch.from_numpy(reference[each]) for each in ("input_ids", "decoder_input_ids")
    }
    if "encoder_attention_mask" in reference:
        # This run hid padding within the encoder, from padding as well, and nothing from the
        # decoder. A query that sees no key sees all of them alike: Megatron fills in -10000.
        seen = torch.from_numpy(reference["encoder_attention_mask"]).bool()
        seen = seen[:, None, :, None] & seen[:, None, None, :]
        hidden = torch.where(seen, 0.0, torch.finfo(torch.float).min)
        with torch.no_grad():
            encoder = model.get_encoder()
            inputs["encoder_outputs"] = encoder(inputs.pop("input_ids"), attention_mask=hidden)
    return model, inputs, torch.from_numpy(reference["logits"])


def largest_difference(model, inputs, logits):
    with torch.no_grad():
        found = model(**inputs).logits
    return (found[..., : logits.shape[-1]] - logits).abs().max().item()


@pytest.mark.parametrize("name", GOLDEN)
def test_logits_are_megatrons(golden, name, record_property):
    difference = largest_difference(*load_golden(golden, name))
    record_property("summary", f"{name}: largest difference of logits {difference:.2g}")
    assert difference < TOLERANCE


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu_pytorch_tanh"},
        {"attention_multiplier": 1.0},
        {"norm_eps": 1e-3},
    ],
)
def test_what_weights_do_not_say_matters(golden, name, change):
    assert largest_difference(*load_golden(golden, name, **change)) > 1.5 * TOLERANCE


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_logits_are_those_of_t5(padding):
    """Relative positions: Megatron has them from T5, and scales scores before it adds them."""
    model = tiny_seq2seq("t5")
    inputs = {**texts(padding), "decoder_input_ids": written(20)}
    with torch.no_grad():
        found, expected = model(**inputs), native_t5(model)(**inputs)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_relative_buckets_are_megatrons():
    distances = torch.arange(-300, 300)
    for num_buckets, max_distance in ((32, 128), (8, 12), (9, 50)):
        for bidirectional in (False, True):
            expected = T5Attention._relative_position_bucket(
                distances, bidirectional, num_buckets, max_distance
            )
            found = relative_buckets(distances, num_buckets, max_distance, bidirectional)
            assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("preset", SHAPES)
def test_padding_changes_nothing(preset):
    """A text alone and among longer ones; where padding is no position, on the left as well."""
    model = tiny_seq2seq(preset)
    for padding in ("right",) if preset == "megatron" else ("left", "right"):
        inputs, decoder_input_ids = texts(padding), written()
        alone = inputs["input_ids"][1:][inputs["attention_mask"][1:].bool()][None]
        with torch.no_grad():
            among = model(**inputs, decoder_input_ids=decoder_input_ids).logits[1:]
            expected = model(alone, decoder_input_ids=decoder_input_ids[1:]).logits
        torch.testing.assert_close(among, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", SHAPES)
def test_later_tokens_are_not_seen_and_all_read_ones_are(preset):
    model = tiny_seq2seq(preset)
    inputs, decoder_input_ids = texts(None), written()
    with torch.no_grad():
        logits = model(**inputs, decoder_input_ids=decoder_input_ids).logits
        decoder_input_ids[:, -1] = 90
        later = model(**inputs, decoder_input_ids=decoder_input_ids).logits
        inputs["input_ids"][:, -1] = 91
        read = model(**inputs, decoder_input_ids=decoder_input_ids).logits
    torch.testing.assert_close(later[:, :-1], logits[:, :-1], rtol=1e-5, atol=1e-5)
    assert (later[:, -1] - logits[:, -1]).abs().max() > 1e-3
    assert ((read - later).abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("preset", SHAPES)
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_saved_is_loaded_and_has_each_weight_once(tmp_path, preset, tied):
    model = tiny_seq2seq(preset, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert not any("coder.embed" in name for name in names)
    assert "model.shared.weight" in names
    assert ("lm_head.weight" in names) != tied
    assert ("model.embed_positions.weight" in names) == (preset == "megatron")

    again, told = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is MTTForConditionalGeneration
    assert not told["missing_keys"] and not told["unexpected_keys"]
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is MTTSeq2SeqModel
    for side in (again.model.encoder, again.model.decoder):
        assert side.embed_tokens.weight is again.model.shared.weight
        if preset == "megatron":
            assert side.embed_positions.weight is again.model.embed_positions.weight
    assert (again.lm_head.weight is again.model.shared.weight) == tied
    inputs = {**texts(), "decoder_input_ids": written()}
    with torch.no_grad():
        expected = model(**inputs).logits
        torch.testing.assert_close(again(**inputs).logits, expected)
        states = base(**inputs).last_hidden_state
        torch.testing.assert_close(model.lm_head(states), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_resized_embeddings(tied):
    model = tiny_seq2seq(tie_word_embeddings=tied)
    inputs = {**texts(), "decoder_input_ids": written()}
    with torch.no_grad():
        expected = model(**inputs).logits
        model.resize_token_embeddings(104, mean_resizing=False)
        found = model(**inputs).logits
    torch.testing.assert_close(found[..., :96], expected)
    assert found.shape[-1] == model.config.vocab_size == 104
    assert model.lm_head.bias.shape == (104,)
    assert model.model.encoder.embed_tokens.weight is model.model.shared.weight
    inputs["input_ids"][0, 0] = inputs["decoder_input_ids"][0, 1] = 103
    assert model(**inputs).logits.isfinite().all()


def test_new_embeddings_are_those_of_both_sides():
    model = tiny_seq2seq()
    new = torch.nn.Embedding(96, 32)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new
    assert model.model.encoder.embed_tokens is model.model.decoder.embed_tokens is new


def test_loss_is_that_of_the_labels():
    """The decoder reads them one to the right, and -100 is neither read nor counted."""
    model = tiny_seq2seq("t5")
    labels = written()
    labels[1, 3:] = -100
    read = model.prepare_decoder_input_ids_from_labels(labels)
    assert read.tolist()[1] == [1, *labels[1, :3].tolist(), 0, 0]
    inputs = texts(None)
    found = model(**inputs, labels=labels)
    expected = native_t5(model)(**inputs, labels=labels)
    torch.testing.assert_close(found.loss, expected.loss)
    halved = model(**inputs, labels=labels, num_items_in_batch=18).loss
    torch.testing.assert_close(halved, found.loss / 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_start_token_id": None}, "neither decoder_start_token_id nor bos_token_id"),
        ({"pad_token_id": None}, "found no pad_token_id"),
    ],
)
def test_labels_need_tokens(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_seq2seq(**options)(**texts(), labels=written())


def test_bos_is_where_the_decoder_starts_if_nothing_else_is():
    model = tiny_seq2seq(decoder_start_token_id=None, bos_token_id=7)
    assert model.prepare_decoder_input_ids_from_labels(written())[:, 0].tolist() == [7, 7]
    assert model.generate(**texts(), max_new_tokens=2)[:, 0].tolist() == [7, 7]


def test_arguments_that_do_not_go_together():
    model = tiny_seq2seq()
    inputs, decoder_input_ids = texts(), written()
    embeddings = model.model.shared(inputs["input_ids"])
    for wrong, message in (
        ({}, "exactly one of decoder_input_ids or decoder_inputs_embeds, got neither"),
        ({"inputs_embeds": embeddings}, "exactly one of input_ids or inputs_embeds, got both"),
        (
            {"decoder_input_ids": decoder_input_ids, "past_key_values": DynamicCache()},
            "found DynamicCache, expected EncoderDecoderCache",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model(**inputs, **wrong)
    with pytest.raises(ValueError, match="found no encoder_hidden_states"):
        model.get_decoder()(decoder_input_ids)


def test_embeddings_in_place_of_tokens():
    model = tiny_seq2seq()
    inputs, decoder_input_ids = texts(), written()
    with torch.no_grad():
        expected = model(**inputs, decoder_input_ids=decoder_input_ids)
        found = model(
            attention_mask=inputs["attention_mask"],
            inputs_embeds=model.model.shared(inputs["input_ids"]),
            decoder_inputs_embeds=model.model.shared(decoder_input_ids),
        )
        states = (expected.encoder_last_hidden_state,)
        again = model(**inputs, encoder_outputs=states, decoder_input_ids=decoder_input_ids)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(again.logits, expected.logits)
    assert len(expected.to_tuple()) == 3  # logits, cache, what the encoder returned


def test_a_table_of_positions_ends():
    model = tiny_seq2seq()
    long = torch.randint(2, 96, (1, 33))
    with pytest.raises(ValueError, match="found a sequence of 33 tokens, expected at most max_pos"):
        model(long, decoder_input_ids=written()[:1])
    with pytest.raises(ValueError, match="found a sequence of 33 tokens, expected at most max_pos"):
        model(written()[:1], decoder_input_ids=long)
    cache = model(written()[:1], decoder_input_ids=long[:, :32]).past_key_values
    with pytest.raises(ValueError, match="found a sequence of 33 tokens, expected at most max_pos"):
        model(written()[:1], decoder_input_ids=long[:, :1], past_key_values=cache)


def test_recorded_states():
    model = tiny_seq2seq("t5")
    model.set_attn_implementation("eager")
    inputs = {**texts(), "decoder_input_ids": written()}
    options = {"output_hidden_states": True, "output_attentions": True}
    native = native_t5(model)
    native.set_attn_implementation("eager")
    found, expected = (each(**inputs, **options) for each in (model, native))
    for name in (
        "decoder_hidden_states",
        "decoder_attentions",
        "cross_attentions",
        "encoder_hidden_states",
        "encoder_attentions",
    ):
        assert len(found[name]) > 1
        if not expected[name]:
            continue  # transformers < 5.23 records no attention of T5
        for ours, theirs in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
