"""`torch.export` takes the whole model, and what it gives computes the same."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim, export
from transformers import GenerationConfig
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

from tests.modeling_mtt.models import SHAPES

# Dynamo follows the recorder of hidden states, which transformers wraps every model in.
pytestmark = pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", SHAPES)
@pytest.mark.parametrize("strict", [False, True])
def test_export(tiny_model, preset, strict):
    model = tiny_model(preset)
    inputs = {
        "input_ids": torch.randint(1, 96, (2, 7)),
        "attention_mask": torch.ones(2, 7, dtype=torch.long),
        "use_cache": False,
    }
    program = export(model, (), inputs, strict=strict)
    inputs["input_ids"] = torch.randint(1, 96, (2, 7))
    inputs["attention_mask"][0, :3] = 0
    with torch.no_grad():
        close(program.module()(**inputs).logits[:, 3:], model(**inputs).logits[:, 3:])


@pytest.mark.parametrize("preset", SHAPES)
def test_export_for_any_batch_and_length(tiny_model, preset):
    model = tiny_model(preset)
    program = export(
        model,
        (),
        {"input_ids": torch.randint(1, 96, (2, 7)), "use_cache": False},
        dynamic_shapes={
            "input_ids": {0: Dim("batch"), 1: Dim("length", min=2, max=32)},
            "use_cache": None,
        },
    )
    for shape in [(3, 11), (1, 32)]:
        inputs = {"input_ids": torch.randint(1, 96, shape), "use_cache": False}
        with torch.no_grad():
            close(program.module()(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("preset", SHAPES)
def test_export_with_a_static_cache_for_executorch(tiny_model, preset):
    """One token at a time, the cache being part of the program."""
    model = tiny_model(preset)
    input_ids = torch.randint(1, 96, (1, 7))
    with torch.no_grad():
        expected = model(input_ids).logits
    model.generation_config = GenerationConfig(
        use_cache=True,
        cache_implementation="static",
        max_length=16,
        cache_config={"batch_size": 1, "max_cache_len": 16, "device": "cpu"},
    )
    exportable = TorchExportableModuleForDecoderOnlyLM(model)
    program = exportable.export(input_ids=input_ids[:, :1], cache_position=torch.tensor([0]))
    step = program.module()
    with torch.no_grad():
        for position in range(7):
            logits = step(
                input_ids=input_ids[:, position : position + 1],
                cache_position=torch.tensor([position]),
            )
            close(logits[:, -1], expected[:, position])
