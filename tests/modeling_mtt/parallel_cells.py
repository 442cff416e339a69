"""What each process of `test_parallel_matrix.py` runs: every model in every mode.

    torchrun parallel_cells.py ROOT FOLDER TP PP EP MODEL...

A cell is `exact` if all processes compute what one process computed, or the message it was
refused with. The first process writes the cells to FOLDER/cells.json.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

root, folder, tp_size, pp_size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
ep_size = int(sys.argv[5])
sys.path.insert(0, root)

from transformers import AutoModelForCausalLM, GenerationConfig  # noqa: E402
from transformers.distributed import DistributedConfig  # noqa: E402
from transformers.generation import ContinuousBatchingConfig  # noqa: E402
from transformers.utils import logging  # noqa: E402

import modeling_mtt  # noqa: E402

warnings.simplefilter("ignore")
logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=timedelta(seconds=60))


def forward(model, expected):
    ids = expected["ids"]
    with torch.no_grad():
        further = {"output_mtp_logits": True} if "mtp" in expected else {}
        outputs = model(ids, attention_mask=(ids != 0).long(), **further)
    wanted = [expected["logits"], *expected.get("mtp", [])]
    for logits, correct in zip(
        [outputs.logits, *(getattr(outputs, "mtp_logits", None) or [])], wanted, strict=True
    ):
        difference = (logits - correct).abs().max().item()
        if difference >= 2e-5 * correct.abs().max().item():
            return f"wrong by {difference}"
    return True


def _generate(model, expected, key, **options):
    ids = expected["ids"]
    found = model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=6, **options)
    return torch.equal(found, expected[key]) or f"wrong: {found.tolist()}"


def greedy(model, expected):
    return _generate(model, expected, "greedy", do_sample=False)


def sampling(model, expected):
    # Only the first process has the seed of the one process.
    torch.manual_seed(1234 + dist.get_rank())
    return _generate(model, expected, "sampling", do_sample=True)


def heads(model, expected):
    """Text of which the model's own heads made drafts."""
    if "mtp" not in expected:
        return True
    row = expected["ids"][:1]
    options = {"max_new_tokens": 6, "do_sample": False, "use_mtp": True}
    found = model.generate(row, attention_mask=torch.ones_like(row), **options)
    return torch.equal(found, expected["greedy"][:1]) or f"wrong: {found.tolist()}"


def static(model, expected):
    return _generate(model, expected, "greedy", do_sample=False, cache_implementation="static")


def batch(model, expected):
    requests = [row[row != 0].tolist() for row in expected["ids"]]
    results = model.generate_batch(
        requests,
        generation_config=GenerationConfig(
            max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=32, block_size=4, max_batch_tokens=16, use_cuda_graph=False
        ),
        progress_bar=False,
    )
    found = {tuple(result.prompt_ids): result.generated_tokens for result in results.values()}
    wanted = {
        tuple(r): row[-6:].tolist() for r, row in zip(requests, expected["greedy"], strict=True)
    }
    return found == wanted or f"wrong: {found}"


def save(model, expected):
    again = folder / expected["name"] / f"saved-{tp_size}-{pp_size}-{ep_size}"
    model.save_pretrained(again)
    dist.barrier()
    for path in (folder / expected["name"]).glob("*"):
        if path.suffix in (".json", ".safetensors") and (
            (again / path.name).read_bytes() != path.read_bytes()
        ):
            return f"wrong: {path.name} differs"
    return True


MODES = {
    "forward": forward,
    "greedy": greedy,
    "sampling": sampling,
    "use_mtp": heads,
    "static cache": static,
    "generate_batch": batch,
    "save": save,
}


def cell(mode, *arguments):
    try:
        found = mode(*arguments)
        found = "exact" if found is True else found
    except ValueError as error:
        found = f"refused: {error}"
    except Exception as error:
        found = f"failed: {type(error).__name__}: {error}"
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    return everywhere[0] if len(set(everywhere)) == 1 else f"ranks disagree: {everywhere}"


def load(name):
    if ep_size > 1:
        options = {"distributed_config": modeling_mtt.expert_parallelism(ep_size)}
    elif name == "qwen" and pp_size == 1:
        options = {"tp_plan": "auto"}
    else:
        options = {"distributed_config": DistributedConfig(tp_size=tp_size, pp_size=pp_size)}
    models.append(AutoModelForCausalLM.from_pretrained(folder / name, **options))
    return True


cells: dict[str, dict[str, str]] = {}
for name in sys.argv[6:]:
    models: list = []
    loaded = cell(load, name)
    expected = torch.load(folder / name / "expected.pt")
    cells[name] = {
        mode: cell(function, models[0], {**expected, "name": name}) if models else loaded
        for mode, function in MODES.items()
    }
if dist.get_rank() == 0:
    (folder / "cells.json").write_text(json.dumps(cells, indent=2))
dist.barrier()
sys.stdout.flush()
os._exit(0)
