"""Train all weights on several processes, with accelerate and FSDP2.

accelerate launch --config_file examples/fsdp.yaml examples/train_fsdp.py out texts.txt trained

On CPUs: --num_processes 2 --mixed_precision no before the script, --cpu behind its arguments.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import modeling_mtt  # noqa: F401  registers MTT's classes: no remote code is run


def main() -> None:
    """Train on the paragraphs of a file, and save a folder that any one process loads."""
    parser = argparse.ArgumentParser(description="Train all weights with FSDP2.")
    parser.add_argument("model", help="a converted folder, or a repository on the Hub")
    parser.add_argument("file", type=Path, help="paragraphs with empty lines between them")
    parser.add_argument("output", help="a new folder")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()

    # The same as fsdp.yaml, so that torchrun can start the script, too.
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["MTTDecoderLayer"],
    )
    accelerator = Accelerator(cpu=args.cpu, fsdp_plugin=plugin)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model)
    length = model.config.max_position_embeddings
    paragraphs = args.file.read_text(encoding="utf-8").strip().split("\n\n")
    texts = [
        tokenizer(p + tokenizer.eos_token, truncation=True, max_length=length) for p in paragraphs
    ]
    for text in texts:  # all of it, the end too; what fills a batch up gets no label
        text["labels"] = text["input_ids"]
    collate = DataCollatorForSeq2Seq(tokenizer)
    batches = DataLoader(texts, args.batch_size, shuffle=True, collate_fn=collate)

    model, batches = accelerator.prepare(model, batches)
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=args.learning_rate))
    step = 0
    while step < args.steps:
        for batch in batches:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            accelerator.print(f"step {step}: loss {loss.item():.3f}")
            if step == args.steps:
                break

    state_dict = accelerator.get_state_dict(model)
    accelerator.unwrap_model(model).save_pretrained(
        args.output, is_main_process=accelerator.is_main_process, state_dict=state_dict
    )
    if accelerator.is_main_process:
        tokenizer.save_pretrained(args.output)
    accelerator.end_training()


if __name__ == "__main__":
    main()
