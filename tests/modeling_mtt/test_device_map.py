"""A model that is partly on the disk computes the same."""

from __future__ import annotations

import pytest
import torch

from modeling_mtt import MTTForCausalLM


@pytest.mark.parametrize("preset", ["gpt", "llama", "nemotron"])
@pytest.mark.parametrize("share", [2.0, 0.7])
def test_device_map(tiny_model, tmp_path, preset, share):
    model = tiny_model(preset)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    ids = torch.randint(1, 96, (2, 7))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    room = int(share * sum(parameter.nbytes for parameter in model.parameters()))
    again = MTTForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": room},
        offload_folder=tmp_path / "offloaded",
    )
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
    assert torch.equal(again.generate(ids, **options), model.generate(ids, **options))
    assert again.model.layers[2].mlp.up_proj.weight.is_meta == (share < 1)
