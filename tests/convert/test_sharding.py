"""Straight from Megatron's shards into a model on several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.distributed import DistributedConfig

import modeling_mtt  # noqa: F401 (registers the classes)
import mtt_convert
from mtt_convert.errors import LayoutError

from .surgery import copy_of, edited, model_of

COMBINES = hasattr(DistributedConfig, "dp_size")  # transformers 5.23
LLAMA = "mcore/llama/tp2pp2vpp2/torch"


def load_on(tmp_path: Path, tp_size: int, pp_size: int, *checkpoints: Path) -> dict[str, dict]:
    """Load checkpoints on several processes, which compare; and with one, whose text is equal."""
    places, texts = [], {}
    for number, checkpoint in enumerate(checkpoints):
        folder = tmp_path / f"out{number}"
        if not folder.exists():
            mtt_convert.convert(checkpoint, folder)
        places += [str(checkpoint), str(folder)]
        is_t5 = AutoConfig.from_pretrained(folder).is_encoder_decoder
        model = (AutoModelForSeq2SeqLM if is_t5 else AutoModelForCausalLM).from_pretrained(folder)
        ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
        text = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=5,
            pad_token_id=0,
            **({"decoder_start_token_id": 1} if is_t5 else {}),
        )
        texts[str(checkpoint)] = text.tolist()
    script, facts = Path(__file__).with_name("sharded_loading.py"), tmp_path / "facts.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(tp_size * pp_size), str(script)]
    result = subprocess.run(
        [*command, str(tp_size), str(pp_size), str(facts), *places],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    found: dict[str, dict] = json.loads(facts.read_text())
    assert {name: facts["text"] for name, facts in found.items()} == texts
    return found


def widened(golden, tmp_path: Path) -> Path:
    """A checkpoint of one rank whose rows are long, as those of real models are."""
    root = copy_of(golden, "mcore/gpt/ref/torch", tmp_path / "wide")
    (file,) = root.rglob("model_optim_rng.pt")
    wide = {"kv_channels": 256, "ffn_hidden_size": 4096}
    heads, hidden = 8 * wide["kv_channels"], 64
    shapes = {
        "self_attention.linear_qkv.weight": (3 * heads, hidden),
        "self_attention.linear_qkv.bias": (3 * heads,),
        "self_attention.linear_proj.weight": (hidden, heads),
        "mlp.linear_fc1.weight": (wide["ffn_hidden_size"], hidden),
        "mlp.linear_fc1.bias": (wide["ffn_hidden_size"],),
        "mlp.linear_fc2.weight": (hidden, wide["ffn_hidden_size"]),
    }
    with edited(file) as content:
        vars(content["args"]).update(wide)
        model = model_of(content, "decoder.layers.0.mlp.linear_fc1.weight")
        for name in list(model):
            for ending, shape in shapes.items():
                if name.endswith(ending):
                    model[name] = torch.randn(shape) / 8
    return root


@pytest.mark.slow
def test_tensor_parallel(golden, tmp_path):
    wide = widened(golden, tmp_path)
    t5 = golden("mcore-te/t5_te/tp2/torch_dist")
    facts = load_on(tmp_path, 2, 1, golden(LLAMA), golden("mcore/gpt/tp2pp2/torch"), wide, t5)
    for checkpoint, found in facts.items():
        for num_bytes, share_and_replicated in found["ranks"]:
            assert num_bytes <= share_and_replicated, checkpoint


@pytest.mark.slow
def test_experts_and_latents_in_parts(golden, tmp_path):
    """Gate and up of an expert are one tensor in memory: each process has its part of both."""
    sources = [
        golden(name)
        for name in (
            "mcore/mixtral/tp2ep2/torch",
            "mcore/mla/tp2pp1/torch",
            "mcore/mtp/tp2pp2/torch",
        )
    ]
    load_on(tmp_path, 2, 1, *sources)


@pytest.mark.slow
def test_pipeline_stages_and_shared_heads(golden, tmp_path):
    load_on(tmp_path, 1, 2, golden(LLAMA), golden("mcore/gpt/tp2pp2/torch"))
    load_on(tmp_path, 4, 1, golden(LLAMA))
    if COMBINES:
        load_on(tmp_path, 2, 2, golden(LLAMA))


def test_sizes_that_do_not_divide_are_refused_before_anything_is_read(golden, monkeypatch):
    monkeypatch.setattr("mtt_convert.loading.run", None)
    with pytest.raises(LayoutError) as refusal:
        mtt_convert.from_megatron(golden(LLAMA), tp_size=3)
    assert refusal.value.expected == "tp 1, 2, 4, 8"
    assert refusal.value.fix == "--tp 2"


def test_an_encoder_and_its_decoder_are_no_pipeline(golden, monkeypatch):
    monkeypatch.setattr("mtt_convert.loading.run", None)
    with pytest.raises(LayoutError) as refusal:
        mtt_convert.from_megatron(golden("mcore/t5/tp2/torch"), pp_size=2)
    assert refusal.value.expected == "--pp 1"
