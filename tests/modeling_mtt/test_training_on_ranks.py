"""Training on two processes is the training of one, and any one process loads what they save."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modeling_mtt import MTTForCausalLM

MODELS = {"gpt": "gpt", "llama": "llama", "mqa": "nemotron"}
WAYS = {"gpt": ["fsdp", "tp", "accelerate"], "llama": ["fsdp", "tp", "accelerate"]}


@pytest.mark.slow
def test_three_steps(tiny_model, run_python, tmp_path, pytestconfig):
    expected = {}
    ids = torch.randint(1, 96, (4, 8))
    for name, preset in MODELS.items():
        model = tiny_model(preset)
        model.save_pretrained(tmp_path / name)
        torch.save(ids, tmp_path / name / "ids.pt")
        before = model(ids, labels=ids).loss.item()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
        with torch.no_grad():
            expected[name] = model(ids, labels=ids)
        assert expected[name].loss < before - 0.1

    script = Path(__file__).with_name("training_on_ranks.py").read_text()
    run_python(script, str(pytestconfig.rootpath), str(tmp_path), processes=2)
    for name in MODELS:
        for way in WAYS.get(name, ["fsdp", "tp"]):
            model = MTTForCausalLM.from_pretrained(tmp_path / name / way).eval()
            with torch.no_grad():
                found = model(ids, labels=ids)
            message = f"{name} {way}"
            torch.testing.assert_close(
                found.loss, expected[name].loss, rtol=1e-4, atol=1e-4, msg=message
            )
            torch.testing.assert_close(
                found.logits, expected[name].logits, rtol=1e-3, atol=1e-3, msg=message
            )
