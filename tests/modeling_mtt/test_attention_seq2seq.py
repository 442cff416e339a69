"""Every attention implementation computes what eager attention does, within and between sides."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import modeling_flash_attention_utils as flash_utils

from modeling_mtt import attention_mtt
from modeling_mtt.attention_mtt import TORCH_VARLEN
from tests.modeling_mtt import flash_stand_in
from tests.modeling_mtt.seq2seq_models import texts, tiny_seq2seq, written

STAND_INS = {
    "flash_attention_2": flash_stand_in.Flash2,
    "flash_attention_3": flash_stand_in.Flash3,
    "flash_attention_4": flash_stand_in.Flash4,
    TORCH_VARLEN: flash_stand_in.TorchVarlen,
    "old_torch_varlen": flash_stand_in.OldTorchVarlen,
}
IMPLEMENTATIONS = ["sdpa", "flex_attention", *STAND_INS]

pytestmark = pytest.mark.filterwarnings(
    "ignore:flex_attention called without torch.compile:UserWarning",
    "ignore:.*should not be instantiated:DeprecationWarning",
)


@pytest.fixture
def pair(monkeypatch):
    """A model with an implementation, the same with eager attention, and what was called."""

    def build(preset, implementation):
        reference = tiny_seq2seq(preset, head_dim=16)
        reference.set_attn_implementation("eager")
        model = copy.deepcopy(reference)
        if implementation not in STAND_INS:
            model.set_attn_implementation(implementation)
            return model, reference, []
        stand_in = STAND_INS[implementation]()
        if "varlen" in implementation:
            monkeypatch.setattr(attention_mtt, "varlen_attn", stand_in.varlen_attn)
            implementation = TORCH_VARLEN
        else:
            functions = (stand_in.flash_attn_func, stand_in.flash_attn_varlen_func, None)
            helpers = (flash_utils._pad_input, flash_utils._unpad_input)
            monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *a, **k: functions + helpers)
            monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
        # What both can hold, so that only the arithmetic differs.
        for parameter in reference.parameters():
            parameter.data = parameter.data.half().float()
        model.load_state_dict(reference.state_dict())
        for parameter in model.parameters():
            parameter.data = parameter.data.half()
        model.config._attn_implementation = implementation
        return model, reference, stand_in.calls

    # Compiled, flex attention takes seconds for each shape.
    with torch.compiler.set_stance("force_eager"):
        yield build


def close(model, found, expected):
    """Of the largest logit: without a norm after the last layer they are large."""
    tolerance = (1e-2 if model.dtype == torch.half else 2e-5) * expected.abs().max().item()
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=tolerance)


# As long as the text that is read, where transformers takes the padding of keys for that of
# queries; shorter, where it cuts the wrong end off; and one token.
@pytest.mark.parametrize("length", [9, 6, 1])
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("preset", ["megatron", "rotary"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding(pair, implementation, preset, padding, length):
    model, reference, calls = pair(preset, implementation)
    inputs = {**texts(padding), "decoder_input_ids": written(length)}
    with torch.no_grad():
        found, expected = model(**inputs), reference(**inputs)
    close(model, found.logits, expected.logits)
    if calls:
        assert calls.count("packed") >= (5 if padding or "varlen" in implementation else 0)


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_relative_positions(pair, implementation, padding):
    model, reference, _ = pair("t5", implementation)
    inputs = {**texts(padding), "decoder_input_ids": written()}
    with torch.no_grad():
        close(model, model(**inputs).logits, reference(**inputs).logits)


@pytest.mark.parametrize("implementation", ["flash_attention_2", TORCH_VARLEN])
def test_relative_positions_are_refused_by_name(monkeypatch, tmp_path, implementation):
    model = tiny_seq2seq("t5")
    monkeypatch.setattr(
        type(model).__mro__[2],
        "_check_and_adjust_attn_implementation",
        lambda self, requested, *a, **k: requested,
    )
    message = f"found attention implementation '{implementation}', expected one of .*sdpa"
    with pytest.raises(ValueError, match=message):
        model.set_attn_implementation(implementation)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        type(model).from_pretrained(tmp_path, attn_implementation=implementation)
    tiny_seq2seq().set_attn_implementation(implementation)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("preset", ["megatron", "rotary"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_generation(pair, implementation, preset, cache):
    """Token by token, the logits are those of the whole text."""
    model, reference, _ = pair(preset, implementation)
    inputs = texts()
    found = model.generate(
        **inputs,
        max_new_tokens=6,
        do_sample=False,
        disable_compile=True,
        cache_implementation=cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    with torch.no_grad():
        whole = reference(**inputs, decoder_input_ids=found.sequences, use_cache=False).logits
    close(model, torch.stack(found.logits, dim=1), whole[:, :-1])


def test_padding_that_is_seen_would_be_noticed(pair):
    model, reference, _ = pair("megatron", "flash_attention_2")
    inputs = {**texts(), "decoder_input_ids": written()}
    with torch.no_grad():
        expected = reference(**inputs).logits
        inputs["attention_mask"][1, 5] = 1
        found = model(**inputs).logits
    with pytest.raises(AssertionError, match="not close"):
        close(model, found, expected)
