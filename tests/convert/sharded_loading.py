"""What each process of `test_sharding.py` runs.

    torchrun sharded_loading.py TP PP FACTS CHECKPOINT FOLDER...

Loads each checkpoint straight from its shards, and the folder it was converted to with
transformers; fails if they differ. FACTS gets what was read, in bytes, by process.
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
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

import modeling_mtt  # noqa: F401
import mtt_convert
from mtt_convert.reading import FileReader

warnings.simplefilter("ignore")
logging.disable_progress_bar()
torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
tp_size, pp_size = int(sys.argv[1]), int(sys.argv[2])
num_bytes = 0


read_into = FileReader.read_into


def count_and_read(reader: FileReader, path: str, offset: int, out: memoryview) -> None:
    global num_bytes
    num_bytes += len(out)
    read_into(reader, path, offset, out)


FileReader.read_into = count_and_read


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def share(model: torch.nn.Module) -> int:
    """Bytes this process holds, a tied head once."""
    tensors = {local(p).data_ptr(): local(p) for p in model.parameters()}
    return sum(tensor.nbytes for tensor in tensors.values())


facts = {}
for checkpoint, folder in zip(sys.argv[4::2], sys.argv[5::2], strict=True):
    num_bytes = 0
    found = mtt_convert.from_megatron(checkpoint, tp_size=tp_size, pp_size=pp_size)
    num_read = num_bytes
    config = DistributedConfig(tp_size=tp_size, pp_size=pp_size)
    is_t5 = AutoConfig.from_pretrained(folder).is_encoder_decoder
    auto_class = AutoModelForSeq2SeqLM if is_t5 else AutoModelForCausalLM
    wanted = auto_class.from_pretrained(folder, distributed_config=config)
    assert type(found) is type(wanted)
    theirs = wanted.state_dict()
    assert found.state_dict().keys() == theirs.keys()
    for name, tensor in found.state_dict().items():
        assert torch.equal(local(tensor), local(theirs[name])), name
        assert tensor.dtype == theirs[name].dtype, name
        assert getattr(tensor, "placements", None) == getattr(theirs[name], "placements", None)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "pad_token_id": 0}
    options |= {"decoder_start_token_id": 1} if is_t5 else {}
    texts = [model.generate(ids, do_sample=False, **options) for model in (found, wanted)]
    assert torch.equal(*texts)
    replicas = mtt_convert.open_checkpoint(checkpoint).replicas
    replicated = sum(group.tensors[0].num_bytes for group in replicas)
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (num_read, share(found) + replicated))
    facts[checkpoint] = {"ranks": everywhere, "text": texts[0].tolist()}
if dist.get_rank() == 0:
    Path(sys.argv[3]).write_text(json.dumps(facts))
dist.barrier()
os._exit(0)
