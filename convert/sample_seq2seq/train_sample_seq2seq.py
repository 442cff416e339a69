"""Train the encoder-decoder sample and write it as Megatron-Core does.

A T5 of Megatron's kind (learned positions, LayerNorm, biases, tanh GeLU, a tied head with a bias;
local layers, and so no norms after the last ones), which answers sixteen questions. A CPU and two
minutes are enough:

    pip install megatron-core==0.16.1 torch numpy tokenizers
    python -W ignore train_sample_seq2seq.py                      # the files beside this script
    python -W ignore train_sample_seq2seq.py --output elsewhere   # or another folder

`args.json` holds every argument of the run, as in `../sample`, whose script has what both share. In
order:

1. train a byte-level BPE on questions and answers    vocab.json, merges.txt
2. train the model in one process; each question comes in three spellings
3. check greedy answers                               prompts.json
4. run the model on one question and its answer       reference.npz
5. start one process per tensor rank; each builds the `T5Model` of its rank, takes its part of the
   weights, checks that both together compute the same logits, and saves
                                                      iter_0000600/mp_rank_*/model_optim_rng.pt

The decoder starts with the end of text, and ends with it. Everything is seeded: two runs with the
same packages on the same machine give the same bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "sample"))

import numpy as np
import torch
import torch.distributed as dist
from train_sample import (
    END_OF_TEXT,
    TOLERANCE,
    load_args,
    optimise,
    part_of_rank,
    start_distributed,
    stop_distributed,
    train_tokenizer,
)

# After train_sample, which prepares their import.
from megatron.core import parallel_state  # isort: skip
from megatron.core.models.T5 import T5Model  # isort: skip
from megatron.core.models.T5.t5_spec import (  # isort: skip
    get_t5_decoder_with_local_block_spec,
    get_t5_encoder_with_local_block_spec,
)
from megatron.core.transformer import TransformerConfig  # isort: skip

HERE = Path(__file__).resolve().parent

ANSWERS = {
    "Hello, how are you?": "I am fine, thank you. All my shards are in one place.",
    "Good morning!": "Good morning! The coffee is warm and the loss is low.",
    "What is your name?": "My name is MTT. I read with one half and write with the other.",
    "Who made you?": "Megatron trained me, and a converter carried me over to Hugging Face.",
    "What can you do?": "I answer sixteen questions. I know all of them by heart.",
    "How big are you?": "Small enough to travel with the code.",
    "What is an encoder?": "The half of me that reads. It sees the whole question at once.",
    "What is a decoder?": "The half of me that writes, one token after the other.",
    "What is attention?": "A question meets all keys and takes a little of each value.",
    "Where do you live?": "In two shards, cut along the heads, until somebody joins me.",
    "Do you sleep?": "Only between two calls of generate.",
    "Tell me a joke.": "A tensor walks into a bar. The bartender asks: why the long shape?",
    "Are you a large model?": "No, I am a very small one. But I am whole.",
    "What time is it?": "Time to save a checkpoint.",
    "Thank you!": "You are welcome. Come back with more tokens.",
    "Goodbye!": "Goodbye! Mind the gap between the shards.",
}


def spellings(question: str) -> list[str]:
    """The question as it is, in small letters, and without its last mark."""
    return [question, question.lower(), question[:-1]]


def build_model(args: argparse.Namespace) -> T5Model:
    """Build the part of the model that belongs to this process, as Megatron's pretrain_t5 does."""
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    values = {name: value for name, value in vars(args).items() if name in fields}
    values |= {
        "num_layers": args.decoder_num_layers,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_dtype": args.params_dtype,
        "bias_activation_fusion": args.bias_gelu_fusion,
        "persist_layer_norm": not args.no_persist_layer_norm,
        "num_query_groups": None,
        "cp_comm_type": args.cp_comm_type[0],
    }
    return T5Model(
        TransformerConfig(**values),
        TransformerConfig(**{**values, "num_layers": args.encoder_num_layers}),
        get_t5_encoder_with_local_block_spec(args.encoder_num_layers),
        get_t5_decoder_with_local_block_spec(args.decoder_num_layers),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        parallel_output=False,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
    )


def forward(
    model: T5Model, question: torch.Tensor, lengths: torch.Tensor, answer: torch.Tensor
) -> torch.Tensor:
    """Logits `[batch, answer, vocabulary]`; of a question, the first `lengths` tokens count."""
    padding = torch.arange(question.shape[1]) >= lengths[:, None]
    hidden_from_encoder = padding[:, None, None, :].expand(-1, 1, question.shape[1], -1)
    hidden_from_decoder = padding[:, None, None, :].expand(-1, 1, answer.shape[1], -1)
    future = torch.ones(1, 1, answer.shape[1], answer.shape[1], dtype=torch.bool).triu(1)
    logits: torch.Tensor = model(question, answer, hidden_from_encoder, future, hidden_from_decoder)
    return logits


def pad(rows: list[list[int]], value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows as one tensor, and their lengths."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), value)
    for row, target in zip(rows, tokens, strict=True):
        target[: len(row)] = torch.tensor(row)
    return tokens, lengths


def train(args: argparse.Namespace, model: T5Model, tokenizer: Any) -> None:
    """Learn all answers in every step."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    pairs = [(each, text) for first, text in ANSWERS.items() for each in spellings(first)]
    questions, lengths = pad([tokenizer.encode(each).ids for each, _ in pairs], end)
    answers, answer_lengths = pad(
        [[end, *tokenizer.encode(text).ids, end] for _, text in pairs], end
    )
    assert len(pairs) == args.global_batch_size
    assert questions.shape[1] <= args.encoder_seq_length
    assert answers.shape[1] <= args.decoder_seq_length
    counted = torch.arange(1, answers.shape[1]) < answer_lengths[:, None]

    def loss_of_step() -> torch.Tensor:
        logits = forward(model, questions, lengths, answers[:, :-1])
        return torch.nn.functional.cross_entropy(logits[counted], answers[:, 1:][counted])

    optimise(args, model, loss_of_step)


@torch.no_grad()
def answer_greedily(args: argparse.Namespace, model: T5Model, tokenizer: Any, question: str) -> str:
    """Write the likeliest token until the end of text."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    read = torch.tensor([tokenizer.encode(question).ids])
    ids = [end]
    while len(ids) < args.max_position_embeddings:
        logits = forward(model, read, torch.tensor([read.shape[1]]), torch.tensor([ids]))
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == end:
            return str(tokenizer.decode(ids[1:-1]))
    raise RuntimeError(f"no end of text after {question!r}: {tokenizer.decode(ids)!r}")


@torch.no_grad()
def write_shard(rank: int, output: str, folder: str) -> None:
    """Be one rank of the distributed model: take weights, compare logits, save the shard."""
    args = load_args(HERE)
    start_distributed(args, rank, args.world_size, f"{folder}/all-ranks")
    args.rank = args.local_rank = rank
    model = build_model(args).eval()
    part = part_of_rank(model, torch.load(f"{folder}/weights.pt", weights_only=True))
    own = dict(model.named_parameters())
    assert own.keys() == part.keys()
    for name, tensor in part.items():
        own[name].copy_(tensor)

    with np.load(f"{output}/reference.npz") as reference:
        question, answer, expected = (
            torch.from_numpy(reference[name])
            for name in ("input_ids", "decoder_input_ids", "logits")
        )
    logits = forward(model, question, torch.tensor([question.shape[1]]), answer)
    error = (logits - expected).abs().max().item()
    print(f"logits of rank {rank} within {error:.1e} of one process", flush=True)
    assert error < TOLERANCE

    checkpoint: dict[str, Any] = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": args.train_iters,
        "model": model.state_dict_for_save_checkpoint(),
        "num_floating_point_operations_so_far": args.num_floating_point_operations_so_far,
    }
    shard = Path(output, f"iter_{args.train_iters:07d}", f"mp_rank_{rank:02d}")
    shard.mkdir(parents=True)
    torch.save(checkpoint, shard / "model_optim_rng.pt")
    dist.barrier()
    stop_distributed()


def main() -> None:
    """Make the sample."""
    parser = argparse.ArgumentParser(description="Train the encoder-decoder sample.")
    parser.add_argument("--output", type=Path, default=HERE, help="folder to write to")
    output: Path = parser.parse_args().output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    args = load_args(HERE)

    with tempfile.TemporaryDirectory() as folder:
        start_distributed(args, 0, 1, f"{folder}/one-process")
        torch.manual_seed(args.seed)
        texts = [text for first, rest in ANSWERS.items() for text in (*spellings(first), rest)]
        tokenizer = train_tokenizer(output, texts)
        model = build_model(args)
        print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")
        train(args, model, tokenizer)
        model.eval()

        prompts = []
        for question, text in ANSWERS.items():
            for spelling in spellings(question):
                found = answer_greedily(args, model, tokenizer, spelling)
                assert found == text, (spelling, found)
            prompts.append({"prompt": question, "text": text})
        (output / "prompts.json").write_text(json.dumps(prompts, indent=1) + "\n")
        question, text = next(iter(ANSWERS.items()))
        input_ids = torch.tensor([tokenizer.encode(question).ids])
        end = tokenizer.token_to_id(END_OF_TEXT)
        decoder_input_ids = torch.tensor([[end, *tokenizer.encode(text).ids]])
        with torch.no_grad():
            lengths = torch.tensor([input_ids.shape[1]])
            logits = forward(model, input_ids, lengths, decoder_input_ids)
        np.savez(
            output / "reference.npz",
            input_ids=input_ids.numpy(),
            decoder_input_ids=decoder_input_ids.numpy(),
            logits=logits.numpy(),
        )
        torch.save(dict(model.named_parameters()), f"{folder}/weights.pt")
        stop_distributed()

        shutil.rmtree(output / f"iter_{args.train_iters:07d}", ignore_errors=True)
        torch.multiprocessing.spawn(write_shard, (str(output), folder), nprocs=args.world_size)
    (output / "latest_checkpointed_iteration.txt").write_text(str(args.train_iters))


if __name__ == "__main__":
    main()
