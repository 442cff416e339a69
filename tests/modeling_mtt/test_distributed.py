"""Two processes compute what one does."""

from __future__ import annotations

import pytest
import torch

SCRIPT = """
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

sys.path.insert(0, sys.argv[1])
import modeling_mtt

for saved in sys.argv[3:]:
    expected = torch.load(Path(saved) / "expected.pt")
    config = DistributedConfig(**{sys.argv[2]: 2})
    model = AutoModelForCausalLM.from_pretrained(saved, distributed_config=config)
    input_ids, mask = expected["input_ids"], torch.ones_like(expected["input_ids"])
    with torch.no_grad():
        logits = model(input_ids, attention_mask=mask).logits
        torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-4)
        if sys.argv[2] == "pp_size":
            logits = model(inputs_embeds=expected["embeddings"], attention_mask=mask).logits
            torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-4)
    padded = expected["padded"]
    options = {"attention_mask": (padded != 0).long(), "max_new_tokens": 6, "do_sample": False}
    for cache in ["dynamic", "static"]:
        text = model.generate(padded, cache_implementation=cache, **options)
        assert text.tolist() == expected["text"].tolist(), (saved, cache)

torch.distributed.destroy_process_group()
"""

SHAPES = {
    "pp_size": {
        "gpt": {},
        "gpt-untied": {"tie_word_embeddings": False},
        # More stages than layers: the last stage holds the only layer.
        "gpt-one-layer": {"num_hidden_layers": 1},
        "llama": {},
        "bloom": {},
        # The last stage holds no layer of the first one's type.
        "qwen2": {},
    },
    "tp_size": {
        "gpt": {},
        "llama": {},
        "nemotron": {"num_key_value_heads": 2},
        # Three of the six slopes for each process.
        "bloom": {},
        "falcon": {"num_key_value_heads": 2},
        "qwen2": {},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["pp_size", "tp_size"])
def test_two_processes(tiny_model, run_python, tmp_path, pytestconfig, parallel):
    folders = []
    for name, options in SHAPES[parallel].items():
        model = tiny_model(name.split("-")[0], **options)
        input_ids = torch.randint(1, 96, (2, 7))
        with torch.no_grad():
            embeddings = model.get_input_embeddings()(input_ids)
            logits = model(input_ids).logits
        padded = input_ids.clone()
        padded[1, :3] = 0
        mask = (padded != 0).long()
        text = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)
        folder = tmp_path / name
        model.save_pretrained(folder)
        expected = {"input_ids": input_ids, "embeddings": embeddings, "logits": logits}
        torch.save({**expected, "padded": padded, "text": text}, folder / "expected.pt")
        folders.append(str(folder))
    run_python(SCRIPT, str(pytestconfig.rootpath), parallel, *folders, processes=2)
