"""Several processes compute what one does, or say beforehand why they will not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.distributed import DistributedConfig

from modeling_mtt import MTTForCausalLM, expert_parallelism

COMBINES = hasattr(DistributedConfig, "dp_size")  # transformers 5.23
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt": ("gpt", {}),
    "llama": ("llama", {}),
    "qwen": ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
    "mqa": ("nemotron", {}),
    "alibi": ("gpt", {"position_embedding_type": "alibi", "embedding_norm": True}),
}
SPARSE: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "deepseek": ("deepseek", {}),
    "mtp": ("mtp", {"num_key_value_heads": 4}),
}
# Experts with biases can only be dealt out whole.
EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "deepseek": ("deepseek", {"num_nextn_predict_layers": 1}),
    "switch": ("switch", {}),
}
NO_PAGED_BIAS = "refused: ALiBi does not run with continuous batching"
NO_PAGED_HEADS = (
    "refused: generate_batch() gives every process key and value heads of its own, in all layers: "
    "found tp_size {tp}, pp_size {pp} and {heads} heads. Sizes that work: tp_size {sizes} with "
    "pp_size 1."
)
NO_HEADS_IN_STAGES = "refused: Heads that predict further tokens need the embedding"
# How many key and value heads the paged cache may be cut into.
HEADS = {
    "gpt": 4,
    "llama": 2,
    "qwen": 2,
    "mqa": 1,
    "mixtral": 2,
    "deepseek": 1,
    "mtp": 4,
    "switch": 4,
}
# Sizes of tensor, pipeline and expert parallelism.
LAYOUTS = {
    "tp 2": (2, 1, 1, MODELS | SPARSE),
    "tp 4": (4, 1, 1, MODELS),
    "pp 2": (1, 2, 1, MODELS | SPARSE),
    "tp 2 x pp 2": (2, 2, 1, MODELS),
    "ep 2": (1, 1, 2, EXPERTS),
}


def build(tiny_model, folder: Path, models: dict[str, tuple[str, dict[str, Any]]]) -> None:
    """Save the models and what one process computes with them."""
    ids = torch.randint(1, 95, (2, 7))
    ids[1, :3] = 0
    options = {"attention_mask": (ids != 0).long(), "max_new_tokens": 6}
    for name, (preset, fields) in models.items():
        model = tiny_model(preset, vocab_size=95, **fields)
        heads = model.config.num_nextn_predict_layers > 0
        with torch.no_grad():
            outputs = model(ids, attention_mask=options["attention_mask"], output_mtp_logits=heads)
        greedy = model.generate(ids, do_sample=False, **options)
        torch.manual_seed(1234)
        sampling = model.generate(ids, do_sample=True, **options)
        model.save_pretrained(folder / name)
        expected = {"ids": ids, "logits": outputs.logits, "greedy": greedy, "sampling": sampling}
        if heads:
            expected["mtp"] = list(outputs.mtp_logits)
        torch.save(expected, folder / name / "expected.pt")


def run_cells(
    root: Path, folder: Path, sizes: tuple[int, int, int], models: list[str]
) -> dict[str, dict[str, str]]:
    tp_size, pp_size, ep_size = sizes
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(max(tp_size * pp_size, ep_size))]
    script = Path(__file__).with_name("parallel_cells.py")
    result = subprocess.run(
        [*command, str(script), str(root), str(folder), *map(str, sizes), *models],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    cells: dict[str, dict[str, str]] = json.loads((folder / "cells.json").read_text())
    return cells


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(tiny_model, tmp_path, pytestconfig, record_property, layout):
    *sizes, models = LAYOUTS[layout]
    build(tiny_model, tmp_path, models)
    cells = run_cells(pytestconfig.rootpath, tmp_path, tuple(sizes), list(models))
    if not COMBINES and min(sizes[:2]) > 1:
        for name in models:
            for cell in cells[name].values():
                assert cell.startswith("refused: This version of transformers has one kind"), cell
        return
    lines = [f"{layout:15} " + " ".join(f"{name:8}" for name in models)]
    for mode in cells[next(iter(models))]:
        row = [cells[name][mode].partition(":")[0] for name in models]
        lines.append(f"{mode:15} " + " ".join(f"{word:8}" for word in row))
    record_property("summary", "\n".join(line.rstrip() for line in lines))
    for name in models:
        for mode, cell in cells[name].items():
            assert cell.startswith(expected_cell(name, mode, *sizes)), (name, mode, cell)


def expected_cell(name: str, mode: str, tp_size: int, pp_size: int, ep_size: int) -> str:
    if name == "mtp" and pp_size > 1:
        return NO_HEADS_IN_STAGES
    if mode != "generate_batch":
        return "exact"
    if name == "alibi":
        return NO_PAGED_BIAS
    heads, tp_size = HEADS[name], max(tp_size, ep_size)
    if tp_size <= heads and pp_size == 1:
        return "exact"
    sizes = ", ".join(str(size) for size in (1, 2, 4) if size <= heads)
    found = 4 if name == "deepseek" else heads
    return NO_PAGED_HEADS.format(tp=tp_size, pp=pp_size, heads=found, sizes=sizes)


@pytest.mark.parametrize(
    ("preset", "sizes", "found"),
    [
        ("gpt", {"tp_size": 3}, "4 query heads.*Sizes that work: 1, 2, 4"),
        ("llama", {"tp_size": 8}, "4 query heads, 2 key.*Sizes that work: 1, 2, 4"),
        ("switch", {"tp_size": 2}, "experts are 48 wide and have biases, which .* work: 1\\."),
        ("mtp", {"pp_size": 2}, "need the embedding and the head .* num_nextn_predict_layers 2"),
    ],
)
def test_sizes_are_checked_before_weights_are_read(tiny_config, preset, sizes, found):
    config = tiny_config(preset)
    with torch.device("meta"):
        model = MTTForCausalLM(config)
    with pytest.raises(ValueError, match=found):
        MTTForCausalLM.maybe_distribute_model(model, DistributedConfig(**sizes), object())


@pytest.mark.parametrize(
    ("preset", "size", "found"),
    [
        ("mixtral", 3, "4 experts cannot be dealt out to 3 processes evenly.* work: 1, 2, 4"),
        ("llama", 2, "found 2 processes, and a model that has no experts"),
    ],
)
def test_experts_are_counted_before_weights_are_read(tiny_config, preset, size, found):
    with torch.device("meta"):
        model = MTTForCausalLM(tiny_config(preset))
    with pytest.raises(ValueError, match=found):
        MTTForCausalLM.maybe_distribute_model(model, expert_parallelism(size), object())
