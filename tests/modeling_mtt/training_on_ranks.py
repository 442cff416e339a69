"""What each process of `test_training_on_ranks.py` runs: a few steps, and a save.

torchrun training_on_ranks.py ROOT FOLDER
"""

from __future__ import annotations

import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, sys.argv[1])

from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

import modeling_mtt  # noqa: F401

warnings.simplefilter("ignore")
logging.disable_progress_bar()
torch.set_num_threads(1)
folder = Path(sys.argv[2])
rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def train(model, ids, backward):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        backward(model(ids, labels=ids).loss)
        optimizer.step()
    return model.eval()


def load(name, **sizes):
    config = DistributedConfig(**sizes)
    return AutoModelForCausalLM.from_pretrained(folder / name, distributed_config=config)


dist.init_process_group("gloo", timeout=timedelta(seconds=60))
for name in ["gpt", "llama", "mqa"]:
    ids = torch.load(folder / name / "ids.pt")
    part = ids.chunk(num_ranks)[rank]
    model = train(load(name, fsdp_size=num_ranks), part, torch.Tensor.backward)
    model.save_pretrained(folder / name / "fsdp")

    # Each process has the whole batch; in "mqa" both also share the one key and value head.
    model = train(load(name, tp_size=num_ranks), ids, torch.Tensor.backward)
    model.save_pretrained(folder / name / "tp")

from accelerate import Accelerator, FullyShardedDataParallelPlugin  # noqa: E402

plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2,
    auto_wrap_policy="transformer_based_wrap",
    transformer_cls_names_to_wrap=["MTTDecoderLayer"],
)
accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
for name in ["gpt", "llama"]:
    ids = torch.load(folder / name / "ids.pt")
    model = accelerator.prepare(AutoModelForCausalLM.from_pretrained(folder / name))
    train(model, ids.chunk(num_ranks)[rank], accelerator.backward)
    accelerator.unwrap_model(model).save_pretrained(
        folder / name / "accelerate",
        is_main_process=accelerator.is_main_process,
        state_dict=accelerator.get_state_dict(model),
    )
dist.barrier()
os._exit(0)
