"""Trainer and PEFT train MTT models as they do any other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from tests.modeling_mtt.models import SHAPES

SPARSE = ("mixtral", "deepseek")

pytestmark = pytest.mark.filterwarnings(
    # Renamed in transformers 5.23; PEFT and 5.17 know the old name only.
    "ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning",
)


def examples(number: int, length: int = 12) -> list[dict[str, torch.Tensor]]:
    """Texts that count up from a random token; the first ones' last tokens are not trained on."""
    texts = []
    for index in range(number):
        input_ids = (torch.randint(1, 96, ()) + torch.arange(length)).remainder(95) + 1
        labels = input_ids.clone()
        labels[length - 2 * (index % 4) :] = -100
        texts.append({"input_ids": input_ids, "labels": labels})
    return texts


def arguments(folder, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        lr_scheduler_type="constant",
        **options,
    )


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("preset", SHAPES + SPARSE)
def test_trainer_with_bfloat16_and_gradient_checkpointing(tiny_model, tmp_path, preset):
    trainer = Trainer(
        model=tiny_model(preset).train(),
        args=arguments(
            tmp_path,
            bf16=True,
            gradient_checkpointing=True,
            max_steps=30,
            learning_rate=1e-2,
            per_device_train_batch_size=8,
        ),
        train_dataset=examples(8),
    )
    trainer.train()
    assert all(layer.gradient_checkpointing for layer in trainer.model.model.layers)
    found = losses(trainer)
    assert len(found) == 30
    assert sum(found[-3:]) < 0.5 * sum(found[:3])


@pytest.mark.parametrize("preset", SHAPES)
def test_accumulated_batches_are_one_big_batch(tiny_model, tmp_path, preset):
    """Every token counts the same, however many of them each small batch has."""
    texts = examples(8)
    weights, found = [], []
    initial = tiny_model(preset).state_dict()
    for size in (8, 2):
        model = tiny_model(preset).train()
        model.load_state_dict(initial)
        trainer = Trainer(
            model=model,
            args=arguments(
                tmp_path,
                max_steps=2,
                optim="sgd",
                learning_rate=0.1,
                max_grad_norm=0.0,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=8 // size,
                train_sampling_strategy="sequential",
            ),
            train_dataset=texts,
        )
        trainer.train()
        found.append(losses(trainer))
        weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5)
        assert name.endswith("bias") or not torch.equal(tensor, initial[name]), name


def test_num_items_in_batch_replaces_the_mean(tiny_model):
    model = tiny_model("gpt")
    text = examples(1)[0]
    input_ids, labels = text["input_ids"][None], text["labels"][None]
    with torch.no_grad():
        mean = model(input_ids, labels=labels).loss
        total = model(input_ids, labels=labels, num_items_in_batch=torch.tensor(22)).loss
    torch.testing.assert_close(total, mean * 11 / 22)


def test_label_smoothing_predicts_the_next_token(tiny_model, tmp_path):
    """Trainer shifts the labels of classes it knows for causal language models."""
    model = tiny_model("llama")
    input_ids = torch.randint(1, 96, (2, 8))
    trainer = Trainer(model=model, args=arguments(tmp_path, label_smoothing_factor=0.1))
    with torch.no_grad():
        found = trainer.compute_loss(model, {"input_ids": input_ids, "labels": input_ids})
        logits = model(input_ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(
        logits, input_ids[:, 1:].flatten(), label_smoothing=0.1
    )
    torch.testing.assert_close(found, expected)


def lora(target_modules: str | list[str]) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=target_modules)


def adapted(model: torch.nn.Module) -> set[str]:
    names = (name.split(".") for name, _ in model.named_parameters())
    return {parts[-4] for parts in names if "lora_A" in parts}


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("gpt", {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}),
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (
            "deepseek",
            {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
            | {"gate_proj", "up_proj", "down_proj"},
        ),
    ],
)
def test_lora_finds_every_linear_but_the_head(tiny_model, preset, expected):
    assert adapted(get_peft_model(tiny_model(preset), lora("all-linear"))) == expected


@pytest.mark.parametrize("preset", SHAPES)
def test_lora(tiny_model, tmp_path, preset):
    model = tiny_model(preset)
    model.save_pretrained(tmp_path / "model")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model = type(model).from_pretrained(tmp_path / "model")

    tuned = get_peft_model(model, lora(["q_proj", "v_proj", "up_proj", "down_proj"]))
    assert adapted(tuned) == {"q_proj", "v_proj", "up_proj", "down_proj"}
    trainer = Trainer(
        model=tuned,
        args=arguments(
            tmp_path / "run",
            gradient_checkpointing=True,
            max_steps=30,
            learning_rate=1e-2,
            per_device_train_batch_size=8,
        ),
        train_dataset=examples(8),
    )
    trainer.train()
    found = losses(trainer)
    assert sum(found[-3:]) < 0.7 * sum(found[:3])

    tuned.eval()
    input_ids = torch.randint(1, 96, (2, 8))
    with torch.no_grad():
        expected = tuned(input_ids).logits
        with tuned.disable_adapter():
            untuned = tuned(input_ids).logits
    assert (expected - untuned).abs().max() > 0.1

    tuned.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    merged = tuned.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(merged(input_ids).logits, expected, rtol=1e-4, atol=1e-4)
    changed = {n.split(".")[-2] for n, t in merged.state_dict().items() if not t.equal(before[n])}
    assert changed == {"q_proj", "v_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("preset", ["switch", "mixtral", "deepseek"])
def test_lora_on_experts(tiny_model, tmp_path, preset):
    """Experts are parameters, not layers: PEFT takes their names in `target_parameters`."""
    model = tiny_model(preset)
    model.save_pretrained(tmp_path / "model")
    model = type(model).from_pretrained(tmp_path / "model")
    inner = "gate_up_proj" if model.config.gated_mlp else "up_proj"
    config = lora(["o_proj"])
    config.target_parameters = [f"mlp.experts.{inner}", "mlp.experts.down_proj"]
    config.lora_dropout = 0.0
    tuned = get_peft_model(model, config)
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], 1e-2)
    batch = torch.stack([text["input_ids"] for text in examples(8)])
    found = []
    for _ in range(15):
        loss = tuned(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert sum(found[-3:]) < 0.9 * sum(found[:3])
    moved = {n for n, p in tuned.named_parameters() if "experts" in n and "lora_B" in n and p.any()}
    assert len(moved) == 2 * model.config.types_of_mlps().count("sparse")

    tuned.eval()
    with torch.no_grad():
        expected = tuned(batch).logits
    tuned.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    merged = tuned.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(again(batch).logits, expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(merged(batch).logits, expected, rtol=1e-3, atol=1e-3)
