"""Weights quantised while they load: with torchao, bitsandbytes and quanto, on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from modeling_mtt import MTTForCausalLM
from tests.modeling_mtt.models import SHAPES

# bitsandbytes packs blocks of 32 rows, and shares a scale between 64 values.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16}
# Of a logit's standard deviation: eight bits, and four.
TOLERANCES = {8: 0.1, 4: 0.9}

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning", "ignore:.*constructor_call:DeprecationWarning"
)


def torchao_config() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def nf4_config() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


CONFIGS: dict[str, tuple[Any, int]] = {
    "torchao-int8": (torchao_config, 8),
    "bitsandbytes-int8": (lambda: BitsAndBytesConfig(load_in_8bit=True), 8),
    "bitsandbytes-nf4": (nf4_config, 4),
    "quanto-int8": (lambda: QuantoConfig(weights="int8"), 8),
}


def is_quantised(linear: nn.Linear) -> bool:
    return type(linear) is not nn.Linear or type(linear.weight.data) is not torch.Tensor


@pytest.mark.parametrize("preset", SHAPES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_quantised_weights_give_close_logits(tiny_model, tmp_path, kind, preset):
    build_config, bits = CONFIGS[kind]
    model = tiny_model(preset, **SIZES)
    model.save_pretrained(tmp_path)
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=build_config())
    assert type(quantised) is MTTForCausalLM
    for name, module in quantised.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            assert is_quantised(module), name

    input_ids = torch.randint(1, 96, (2, 8))
    with torch.no_grad():
        expected = model(input_ids).logits
        difference = (quantised(input_ids).logits - expected).abs().mean() / expected.std()
    assert 0 < difference < TOLERANCES[bits]
    text = quantised.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=4, do_sample=False
    )
    assert text.shape == (2, 12)


@pytest.mark.parametrize("kind", ["torchao-int8", "bitsandbytes-nf4"])
def test_quantised_weights_are_saved_and_loaded(tiny_model, tmp_path, kind):
    model = tiny_model("llama", **SIZES)
    model.save_pretrained(tmp_path / "whole")
    build_config, _ = CONFIGS[kind]
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole", quantization_config=build_config()
    )
    quantised.save_pretrained(tmp_path / "quantised")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised")
    input_ids = torch.randint(1, 96, (2, 8))
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids).logits, quantised(input_ids).logits)
