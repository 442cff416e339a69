"""Heads that classify: on a decoder, trained, saved, loaded with and without the package."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from modeling_mtt import (
    AUTO_MAP,
    MTTForQuestionAnswering,
    MTTForSequenceClassification,
    MTTForTokenClassification,
)

HEADS = {
    AutoModelForQuestionAnswering: MTTForQuestionAnswering,
    AutoModelForSequenceClassification: MTTForSequenceClassification,
    AutoModelForTokenClassification: MTTForTokenClassification,
}
LABELS = {
    AutoModelForQuestionAnswering: {
        "start_positions": torch.tensor([1, 2]),
        "end_positions": torch.tensor([3, 3]),
    },
    AutoModelForSequenceClassification: {"labels": torch.tensor([0, 2])},
    AutoModelForTokenClassification: {"labels": torch.tensor([[0, 1, 2, 0, 1]] * 2)},
}
INPUT_IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])

SCRIPT = """
import sys
from pathlib import Path

# Makes an import of the package fail, wherever it is installed.
sys.modules["modeling_mtt"] = None

import torch
import transformers

auto_class, saved, again = sys.argv[1:]
auto_class = getattr(transformers, auto_class)
expected = torch.load(Path(saved) / "expected.pt")
for folder in [saved, again]:
    model = auto_class.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        torch.testing.assert_close(model(expected["input_ids"])[0], expected["output"])
    model.save_pretrained(again)
"""


def by_name(auto_class: type) -> str:
    return auto_class.__name__


def test_every_head_is_in_the_map():
    for auto_class, model_class in HEADS.items():
        assert AUTO_MAP[auto_class.__name__] == f"modeling_mtt.{model_class.__name__}"
    for name in AUTO_MAP:
        assert hasattr(transformers, name)


@pytest.mark.parametrize("auto_class", HEADS, ids=by_name)
def test_a_head_is_added_to_a_decoder_and_trained(tiny_model, tmp_path, auto_class):
    decoder = tiny_model("gpt", num_labels=3)
    decoder.save_pretrained(tmp_path)
    model = auto_class.from_pretrained(tmp_path, num_labels=3)
    assert type(model) is HEADS[auto_class]
    for name, tensor in decoder.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], tensor), name

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(INPUT_IDS, **LABELS[auto_class]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("auto_class", HEADS, ids=by_name)
def test_states_and_weights_are_captured(tiny_config, auto_class):
    model = auto_class.from_config(tiny_config("gpt"), attn_implementation="eager").eval()
    outputs = model(INPUT_IDS, output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(2, 5, 32)] * 4
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 4, 5, 5)] * 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_is_classified_by_its_last_token(tiny_config, side):
    model = MTTForSequenceClassification(tiny_config("gpt", num_labels=3)).eval()
    short = torch.tensor([[7, 8, 9]])
    padding = torch.zeros(1, 2, dtype=torch.long)
    padded = torch.cat([padding, short] if side == "left" else [short, padding], 1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        found = model(padded, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(found, model(short).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("auto_class", HEADS, ids=by_name)
def test_saved_heads_carry_their_code(tiny_config, run_python, tmp_path, auto_class):
    saved, again = tmp_path / "saved", tmp_path / "again"
    model = auto_class.from_config(tiny_config("bloom")).eval()
    model.save_pretrained(saved)
    assert json.loads((saved / "config.json").read_text())["auto_map"] == AUTO_MAP
    with torch.no_grad():
        output = model(INPUT_IDS)[0]
    torch.save({"input_ids": INPUT_IDS, "output": output}, saved / "expected.pt")
    again.mkdir()
    model.save_pretrained(again)
    run_python(SCRIPT, auto_class.__name__, str(saved), str(again))
