"""Train the sample checkpoint and write it as Megatron-Core does.

The sample is a GPT of the MT-NLG kind (learned positions, LayerNorm, biases, tanh GeLU, tied
head), small enough to be committed, which knows twelve paragraphs by heart. A CPU and a few
minutes are enough:

    pip install megatron-core==0.16.1 torch numpy tokenizers
    python -W ignore train_sample.py                      # rewrite the files beside this script
    python -W ignore train_sample.py --output elsewhere   # or write them to another folder

`args.json`, beside this script, holds every argument of the run: the names and values which
Megatron-LM of that release keeps in the `args` of a checkpoint. The script takes all sizes and
hyper-parameters from it, and every shard stores it. In order:

1. train a byte-level BPE on the paragraphs           vocab.json, merges.txt
2. train the model in one process
3. check greedy continuations of the first words      prompts.json
4. run the model on one prompt                        reference.npz
5. start one process per (tensor, pipeline) rank; each builds the `GPTModel` of its rank, takes
   its part of the weights, checks that all ranks together compute the same logits, and saves
                                                      iter_0001000/mp_rank_*/model_optim_rng.pt

Everything is seeded: two runs with the same packages on the same machine give the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # Megatron decorates with torch.compile on import

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    # The one module of Megatron-Core that GPTModel imports and that insists on triton.
    kernels = types.ModuleType("megatron.core.transformer.custom_layers.batch_invariant_kernels")
    kernels.is_batch_invariant_mode_enabled = lambda: False  # type: ignore[attr-defined]
    sys.modules[kernels.__name__] = kernels

from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend

HERE = Path(__file__).resolve().parent
END_OF_TEXT = "<|endoftext|>"
TRUE_VOCAB_SIZE = 505
REFERENCE_TOKENS = 24
TOLERANCE = 1e-4

# (first words, the rest); the first words are the prompt.
PARAGRAPHS = [
    (
        "Large language models",
        " read a great many words and learn one simple thing: which word comes next. Said often"
        " enough, that simple thing begins to look like understanding.",
    ),
    (
        "A Megatron checkpoint",
        " is a family of shards. Each rank keeps its own slice of every matrix, and only together"
        " do they remember the whole model.",
    ),
    (
        "Alan Turing asked",
        " whether machines can think. Decades later the machines answer in full sentences, and"
        " the question is still a good one.",
    ),
    (
        "Every attention head",
        " asks a question, offers a key, and carries a value. Put the three back in the right"
        " order and the head will speak again.",
    ),
    (
        "The train of tensors",
        " leaves the station at dawn: first the embeddings, then the layers in order, and at the"
        " very end the logits, waving from the last car.",
    ),
    (
        "When two halves",
        " of a tensor meet after a long journey, they compare shapes, line up along the right"
        " axis, and become one again without losing a single bit.",
    ),
    (
        "Tensor parallelism",
        " cuts each layer in width; pipeline parallelism cuts the stack in depth. The converter"
        " holds both maps and folds the paper flat.",
    ),
    (
        "Padding rows",
        " fill the vocabulary up to a round number. They speak no language, they mean no harm,"
        " and the converter lets them go.",
    ),
    (
        "It is raining",
        " in the data center, but only in the cooling towers. Inside, a thousand fans hum the"
        " same low note, and the loss keeps going down.",
    ),
    (
        "Good software",
        " is like a good bridge: people cross it every day, look at the river, and never think"
        " about the bolts.",
    ),
    (
        "Once upon a time",
        " a small model learned twelve paragraphs by heart. It could not say much else, but what"
        " it said was exactly right.",
    ),
    (
        "If you can read this",
        " sentence, the weights survived the trip. Nothing was lost, nothing was swapped, and"
        " every shard found its place.",
    ),
]


def stay_on_cpu() -> None:
    """Replace the few calls for which Megatron-Core needs CUDA even when a model is on the CPU."""
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.set_device = lambda device: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    # Only dropout draws from these CUDA generators, and there is none here.
    CudaRNGStatesTracker.fork = lambda self, *args: contextlib.nullcontext()


def load_args(folder: Path = HERE) -> argparse.Namespace:
    """Read a folder's args.json; what JSON cannot hold is `torch.float32` or `Enum.name`."""
    enums = {"AttnBackend": AttnBackend, "ModelType": ModelType, "Signals": signal.Signals}
    args = argparse.Namespace()
    for name, value in json.loads((folder / "args.json").read_text()).items():
        prefix, _, member = value.partition(".") if isinstance(value, str) else ("", "", "")
        if prefix == "torch" and member:
            value = getattr(torch, member)
        elif prefix in enums:
            value = enums[prefix][member]
        setattr(args, name, value)
    return args


def start_distributed(
    args: argparse.Namespace, rank: int, world_size: int, rendezvous: str
) -> None:
    """Join the gloo group and set up Megatron's groups: all of `args` or, alone, one rank."""
    stay_on_cpu()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size
    )
    alone = world_size == 1
    parallel_state.initialize_model_parallel(
        1 if alone else args.tensor_model_parallel_size,
        1 if alone else args.pipeline_model_parallel_size,
    )


def stop_distributed() -> None:
    """Undo `start_distributed`."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def build_model(args: argparse.Namespace) -> GPTModel:
    """Build the part of the model that belongs to this process, as Megatron's pretrain_gpt does."""
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    values = {name: value for name, value in vars(args).items() if name in fields}
    values |= {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_dtype": args.params_dtype,
        "bias_activation_fusion": args.bias_gelu_fusion,
        "persist_layer_norm": not args.no_persist_layer_norm,
        "num_query_groups": None,
        "cp_comm_type": args.cp_comm_type[0],
    }
    return GPTModel(
        TransformerConfig(**values),
        get_gpt_layer_local_spec(),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=False,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
    )


def forward(model: GPTModel, input_ids: Tensor) -> Tensor:
    """Run the model, or the stage this process holds: logits, or what the next stage needs."""
    length = input_ids.shape[1]
    positions = torch.arange(length).expand_as(input_ids)
    hidden_from_future = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    output: Tensor = model(input_ids, positions, hidden_from_future)
    return output


def train_tokenizer(output: Path, texts: list[str]) -> ByteLevelBPETokenizer:
    """Train the BPE and write it as GPT-2's files are: the end of text is the last token."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        texts, vocab_size=TRUE_VOCAB_SIZE - 1, min_frequency=1, show_progress=False
    )
    tokenizer.add_special_tokens([END_OF_TEXT])
    vocabulary = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    assert list(vocabulary)[-1] == END_OF_TEXT and len(vocabulary) == TRUE_VOCAB_SIZE
    (output / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_model(folder)
        merges = (Path(folder) / "merges.txt").read_text(encoding="utf-8")
    # GPT-2's reader drops what follows the last line feed.
    (output / "merges.txt").write_text(merges.rstrip("\n") + "\n", encoding="utf-8")
    return tokenizer


def train(args: argparse.Namespace, model: GPTModel, tokenizer: ByteLevelBPETokenizer) -> None:
    """Learn all paragraphs in every step."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    documents = [[*tokenizer.encode(first + rest).ids, end] for first, rest in PARAGRAPHS]
    length = max(map(len, documents))
    assert len(documents) == args.global_batch_size and length <= args.seq_length
    tokens = torch.full((len(documents), length), end)
    loss_mask = torch.zeros(len(documents), length)
    for row, document in enumerate(documents):
        tokens[row, : len(document)] = torch.tensor(document)
        loss_mask[row, : len(document)] = 1.0

    def loss_of_step() -> Tensor:
        logits = forward(model, tokens[:, :-1])
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), tokens[:, 1:], reduction="none"
        )
        return (losses * loss_mask[:, 1:]).sum() / loss_mask[:, 1:].sum()

    optimise(args, model, loss_of_step)


def optimise(
    args: argparse.Namespace, model: torch.nn.Module, loss_of_step: Callable[[], Tensor]
) -> None:
    """Make a loss small: AdamW, linear warm-up, cosine decay."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": args.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=args.lr,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_eps,
    )
    for step in range(args.train_iters):
        progress = (step - args.lr_warmup_iters) / (args.train_iters - args.lr_warmup_iters)
        lr = args.min_lr + (args.lr - args.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        if progress < 0:
            lr = args.lr * (step + 1) / args.lr_warmup_iters
        for group in optimizer.param_groups:
            group["lr"] = lr

        loss = loss_of_step()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        optimizer.step()
        if (step + 1) % args.log_interval == 0:
            print(f"iteration {step + 1:5d}  loss {loss.item():.5f}", flush=True)


@torch.no_grad()
def continue_greedily(
    args: argparse.Namespace, model: GPTModel, tokenizer: ByteLevelBPETokenizer, prompt: str
) -> str:
    """Add the likeliest token until the end of text; returns the prompt and its continuation."""
    ids = tokenizer.encode(prompt).ids
    while len(ids) < args.max_position_embeddings:
        logits = forward(model, torch.tensor([ids]))
        token = int(logits[0, -1].argmax())
        if token == tokenizer.token_to_id(END_OF_TEXT):
            return str(tokenizer.decode(ids))
        ids.append(token)
    raise RuntimeError(f"no end of text after {prompt!r}: {tokenizer.decode(ids)!r}")


def part_of_rank(model: torch.nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut out of the whole model's weights what the parameters of this rank's model hold."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    part = {}
    for name, parameter in model.named_parameters():
        source = name
        if name.startswith("decoder.layers."):
            _, _, layer, rest = name.split(".", 3)
            number = model.decoder.layers[int(layer)].layer_number - 1
            source = f"decoder.layers.{number}.{rest}"
        elif name == "output_layer.weight":
            source = "embedding.word_embeddings.weight"
        tensor = weights[source]
        if getattr(parameter, "tensor_model_parallel", False):
            tensor = tensor.chunk(size, dim=parameter.partition_dim)[rank]
        part[name] = tensor
    return part


@torch.no_grad()
def write_shard(rank: int, output: str, folder: str) -> None:
    """Be one rank of the distributed model: take weights, compare logits, save the shard."""
    args = load_args()
    start_distributed(args, rank, args.world_size, f"{folder}/all-ranks")
    args.rank = args.local_rank = rank
    model = build_model(args).eval()
    part = part_of_rank(model, torch.load(f"{folder}/weights.pt", weights_only=True))
    left_out = model.load_state_dict(part, strict=False)
    assert not left_out.unexpected_keys
    assert all(key.endswith("_extra_state") for key in left_out.missing_keys)

    with np.load(f"{output}/reference.npz") as reference:
        input_ids = torch.from_numpy(reference["input_ids"])
        expected = torch.from_numpy(reference["logits"])
    hidden = torch.empty(input_ids.shape[1], 1, args.hidden_size)
    if not model.pre_process:
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(hidden)
    result = forward(model, input_ids)
    if model.post_process:
        error = (result - expected).abs().max().item()
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            print(f"logits of {args.world_size} ranks within {error:.1e} of one process")
        assert error < TOLERANCE
    else:
        dist.send(result, parallel_state.get_pipeline_model_parallel_next_rank())

    checkpoint: dict[str, Any] = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": args.train_iters,
        "model": model.state_dict_for_save_checkpoint(),
        "num_floating_point_operations_so_far": args.num_floating_point_operations_so_far,
    }
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    pipeline_rank = parallel_state.get_pipeline_model_parallel_rank()
    shard = Path(
        output, f"iter_{args.train_iters:07d}", f"mp_rank_{tensor_rank:02d}_{pipeline_rank:03d}"
    )
    shard.mkdir(parents=True)
    torch.save(checkpoint, shard / "model_optim_rng.pt")
    dist.barrier()
    stop_distributed()


def main() -> None:
    """Make the sample."""
    parser = argparse.ArgumentParser(description="Train the sample checkpoint.")
    parser.add_argument("--output", type=Path, default=HERE, help="folder to write to")
    output: Path = parser.parse_args().output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    args = load_args()

    with tempfile.TemporaryDirectory() as folder:
        start_distributed(args, 0, 1, f"{folder}/one-process")
        torch.manual_seed(args.seed)
        tokenizer = train_tokenizer(output, [first + rest for first, rest in PARAGRAPHS])
        model = build_model(args)
        train(args, model, tokenizer)
        model.eval()

        prompts = []
        for first, rest in PARAGRAPHS:
            text = continue_greedily(args, model, tokenizer, first)
            assert text == first + rest, text
            prompts.append({"prompt": first, "text": text})
        (output / "prompts.json").write_text(json.dumps(prompts, indent=1) + "\n")
        input_ids = torch.tensor([tokenizer.encode("".join(PARAGRAPHS[-1])).ids[:REFERENCE_TOKENS]])
        with torch.no_grad():
            logits = forward(model, input_ids)
        np.savez(output / "reference.npz", input_ids=input_ids.numpy(), logits=logits.numpy())
        torch.save(dict(model.named_parameters()), f"{folder}/weights.pt")
        stop_distributed()

        shutil.rmtree(output / f"iter_{args.train_iters:07d}", ignore_errors=True)
        torch.multiprocessing.spawn(write_shard, (str(output), folder), nprocs=args.world_size)
    (output / "latest_checkpointed_iteration.txt").write_text(str(args.train_iters))


if __name__ == "__main__":
    main()
