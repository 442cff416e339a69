"""What was saved carries its code, and runs where this package is not installed."""

from __future__ import annotations

import json

import pytest
import torch

from modeling_mtt import AUTO_MAP

CODE = [
    "attention_mtt.py",
    "base_mtt.py",
    "cache_mtt.py",
    "configuration_mtt.py",
    "generation_mtt.py",
    "layers_mtt.py",
    "linear_mtt.py",
    "mla_mtt.py",
    "mlp_mtt.py",
    "modeling_mtt.py",
    "moe_mtt.py",
    "mtp_mtt.py",
    "norms_mtt.py",
    "parallel_mtt.py",
    "plans_mtt.py",
    "positions_mtt.py",
    "validation_mtt.py",
]

SCRIPT = """
import sys
from pathlib import Path

# Makes an import of the package fail, wherever it is installed.
sys.modules["modeling_mtt"] = None

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

saved, again = sys.argv[1:]
config = AutoConfig.from_pretrained(saved, trust_remote_code=True)
assert type(config).__name__ == "MTTConfig"
assert type(config).__module__.startswith("transformers_modules."), type(config)

input_ids = torch.tensor([[3, 1, 4, 1, 5]])
expected = torch.load(Path(saved) / "expected.pt")
model = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
base = AutoModel.from_pretrained(saved, trust_remote_code=True)
# What Trainer asks, to know whether to shift labels.
assert "MTTForCausalLM" in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
with torch.no_grad():
    torch.testing.assert_close(model(input_ids).logits, expected["logits"])
    states = base(input_ids).last_hidden_state
    torch.testing.assert_close(model.lm_head(states), expected["logits"])
text = model.generate(
    input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=4, do_sample=False
)
assert text.tolist() == expected["text"].tolist()

model.save_pretrained(again)
model = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
with torch.no_grad():
    torch.testing.assert_close(model(input_ids).logits, expected["logits"])
"""


@pytest.mark.parametrize("preset", ["gpt", "nemotron", "deepseek"])
def test_saved_code_runs_and_is_saved_again(tiny_model, run_python, tmp_path, preset):
    saved, again = tmp_path / "saved", tmp_path / "again"
    heads = {"num_nextn_predict_layers": 1} if preset == "deepseek" else {}
    model = tiny_model(preset, **heads)
    model.save_pretrained(saved)
    input_ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        logits = model(input_ids).logits
    text = model.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=4, do_sample=False
    )
    torch.save({"logits": logits, "text": text}, saved / "expected.pt")

    run_python(SCRIPT, str(saved), str(again))
    for folder in [saved, again]:
        assert sorted(path.name for path in folder.glob("*.py")) == CODE
        config = json.loads((folder / "config.json").read_text())
        assert config["auto_map"] == AUTO_MAP


def test_saving_the_base_model_keeps_the_map_complete(tiny_model, tmp_path):
    tiny_model().model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert sorted(path.name for path in tmp_path.glob("*.py")) == CODE
