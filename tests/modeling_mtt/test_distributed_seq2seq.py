"""Two processes compute what one does with an encoder-decoder; pipelines are refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers.distributed import DistributedConfig

from tests.modeling_mtt.seq2seq_models import SHAPES, texts, tiny_seq2seq, written

SCRIPT = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForSeq2SeqLM
from transformers.distributed import DistributedConfig

sys.path.insert(0, sys.argv[1])
import modeling_mtt

for saved in sys.argv[2:]:
    expected = torch.load(Path(saved) / "expected.pt")
    config = DistributedConfig(tp_size=2)
    model = AutoModelForSeq2SeqLM.from_pretrained(saved, distributed_config=config)
    cut = {name for name, weight in model.named_parameters() if isinstance(weight, DTensor)}
    assert {f"model.decoder.layers.0.{name}.weight" for name in (
        "self_attn.q_proj", "cross_attn.k_proj", "cross_attn.o_proj", "mlp.down_proj"
    )} <= cut, cut
    assert "model.shared.weight" in cut
    inputs = expected["inputs"]
    with torch.no_grad():
        logits = model(**inputs, decoder_input_ids=expected["decoder_input_ids"]).logits
    scale = expected["logits"].abs().max().item()
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=2e-5 * scale)
    for cache in ("dynamic", "static"):
        for key, options in expected["modes"].items():
            # Only the first process has the seed of the one process.
            torch.manual_seed(1 + dist.get_rank())
            options = {**options, "cache_implementation": cache, "disable_compile": True}
            text = model.generate(**inputs, **options)
            assert text.tolist() == expected["texts"][key], (saved, key, cache)
    model.train()
    model(**inputs, labels=expected["decoder_input_ids"]).loss.backward()
    # Key biases have no gradient but errors of rounding.
    floor = 1e-6 * max(gradient.abs().max().item() for gradient in expected["gradients"].values())
    for name, gradient in expected["gradients"].items():
        found = model.get_parameter(name).grad
        found = found.full_tensor() if isinstance(found, DTensor) else found
        tolerance = max(1e-4 * gradient.abs().max().item(), floor)
        torch.testing.assert_close(found, gradient, rtol=0, atol=tolerance, msg=name)
    model.save_pretrained(Path(saved) / "again")

dist.destroy_process_group()
"""

MODES = {
    "greedy": {"max_new_tokens": 6, "do_sample": False},
    "beams": {"max_new_tokens": 6, "do_sample": False, "num_beams": 3},
    "sampling": {"max_new_tokens": 6, "do_sample": True},
}


@pytest.mark.slow
def test_two_processes(run_python, tmp_path, pytestconfig):
    folders = []
    for preset in SHAPES:
        # One key and value head for both processes, where heads are grouped.
        options = {"num_key_value_heads": 1} if preset == "rotary" else {}
        model = tiny_seq2seq(preset, **options)
        inputs, decoder_input_ids = texts(), written()
        with torch.no_grad():
            logits = model(**inputs, decoder_input_ids=decoder_input_ids).logits
        generated = {}
        for key, mode in MODES.items():
            torch.manual_seed(1)
            generated[key] = model.generate(**inputs, **mode).tolist()
        model.train()
        model(**inputs, labels=decoder_input_ids).loss.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters()}
        folder = tmp_path / preset
        model.save_pretrained(folder)
        expected = {"inputs": inputs, "decoder_input_ids": decoder_input_ids, "logits": logits}
        expected |= {"modes": MODES, "texts": generated, "gradients": gradients}
        torch.save(expected, folder / "expected.pt")
        folders.append(folder)
    run_python(SCRIPT, str(pytestconfig.rootpath), *map(str, folders), processes=2)
    for folder in folders:
        before, after = (load_file(f / "model.safetensors") for f in (folder, folder / "again"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_pipelines_are_refused(tmp_path):
    model = tiny_seq2seq()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="found pp_size 2, expected 1"):
        type(model).from_pretrained(tmp_path, distributed_config=DistributedConfig(pp_size=2))
