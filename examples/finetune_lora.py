"""Fine-tune a converted model with LoRA and Trainer.

python examples/finetune_lora.py out texts.txt adapter
"""

import argparse
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

import modeling_mtt  # noqa: F401  registers MTT's classes: no remote code is run


def main() -> None:
    """Train an adapter on the paragraphs of a file, and save it."""
    parser = argparse.ArgumentParser(description="Fine-tune a converted model with LoRA.")
    parser.add_argument("model", help="a converted folder, or a repository on the Hub")
    parser.add_argument("file", type=Path, help="paragraphs with empty lines between them")
    parser.add_argument("output", help="a folder for the adapter")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=4)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model)
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(model, lora)

    length = model.config.max_position_embeddings
    paragraphs = args.file.read_text(encoding="utf-8").strip().split("\n\n")
    texts = [
        tokenizer(p + tokenizer.eos_token, truncation=True, max_length=length) for p in paragraphs
    ]
    for text in texts:  # all of it, the end too; what fills a batch up gets no label
        text["labels"] = text["input_ids"]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output,
            max_steps=args.steps,
            learning_rate=args.learning_rate,
            per_device_train_batch_size=args.batch_size,
            logging_steps=max(1, args.steps // 10),
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=texts,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    trainer.save_model(args.output)


if __name__ == "__main__":
    main()
