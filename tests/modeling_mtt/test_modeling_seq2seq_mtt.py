"""The encoder-decoder computes what Megatron's T5 computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.modeling_mtt import megatron_t5

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
