"""Trainer and PEFT train an encoder-decoder as they do any other."""

from __future__ import annotations

import pytest
import torch
from peft import AutoPeftModelForSeq2SeqLM, LoraConfig, get_peft_model
from transformers import AutoModelForSeq2SeqLM, Seq2SeqTrainer, Seq2SeqTrainingArguments

from tests.modeling_mtt.seq2seq_models import SHAPES, native_t5, texts, tiny_seq2seq, written

pytestmark = pytest.mark.filterwarnings(
    # Renamed in transformers 5.23; PEFT and 5.17 know the old name only.
    "ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning",
)


def examples(model, number: int) -> list[dict[str, torch.Tensor]]:
    """Texts to be read, which count up, and written, which count down; as a collator makes them."""
    found = []
    for _ in range(number):
        input_ids = (torch.randint(2, 80, ()) + torch.arange(8)).remainder(94) + 2
        labels = input_ids.flip(0)
        labels = torch.cat((labels, torch.tensor([-100, -100])))
        read = model.prepare_decoder_input_ids_from_labels(labels[None])[0]
        found.append({"input_ids": input_ids, "labels": labels, "decoder_input_ids": read})
    return found


def close(found: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> None:
    """Of the largest gradient: sums are taken in another order. Key biases have none but errors."""
    tolerance = max(1e-4 * expected.abs().max().item(), floor)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def arguments(folder, **options) -> Seq2SeqTrainingArguments:
    return Seq2SeqTrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        lr_scheduler_type="constant",
        learning_rate=1e-2,
        max_steps=30,
        per_device_train_batch_size=8,
        **options,
    )


@pytest.mark.parametrize("preset", ["megatron", "t5"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer(tmp_path, preset, smoothing):
    """With gradient checkpointing; label smoothing takes the labels, and leaves what is read."""
    model = tiny_seq2seq(preset).train()
    trainer = Seq2SeqTrainer(
        model=model,
        args=arguments(
            tmp_path,
            bf16=True,
            gradient_checkpointing=True,
            label_smoothing_factor=smoothing,
            predict_with_generate=True,
            generation_max_length=6,
        ),
        train_dataset=examples(model, 8),
    )
    trainer.train()
    assert all(layer.gradient_checkpointing for layer in model.model.decoder.layers)
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == 30
    assert sum(found[-3:]) < 0.7 * sum(found[:3])
    predicted = trainer.predict(examples(model, 2))
    assert predicted.predictions.shape[0] == 2
    assert predicted.predictions[:, 6:].max() == 0  # padding


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("preset", SHAPES)
def test_gradient_checkpointing_changes_no_gradient(preset, reentrant):
    inputs, labels = texts(), written()
    gradients = []
    model = tiny_seq2seq(preset).train()
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            options = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        # A reentrant checkpoint wants inputs with a gradient.
        embeddings = model.model.shared(inputs["input_ids"])
        model(
            inputs_embeds=embeddings, attention_mask=inputs["attention_mask"], labels=labels
        ).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    floor = 1e-6 * max(gradient.abs().max().item() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient, floor)


def test_gradients_are_those_of_t5():
    model = tiny_seq2seq("t5")
    native = native_t5(model)
    inputs, labels = texts(), written()
    for each in (model, native):
        each(**inputs, labels=labels).loss.backward()
    ours, theirs = model.model, native
    for side in ("encoder", "decoder"):
        found = getattr(ours, side).relative_attention_bias.weight.grad
        block = getattr(theirs, side).block[0].layer[0].SelfAttention
        expected = block.relative_attention_bias.weight.grad
        close(found, expected)
    close(ours.shared.weight.grad, theirs.shared.weight.grad)


@pytest.mark.parametrize("preset", SHAPES)
def test_lora(tmp_path, preset):
    tiny_seq2seq(preset).save_pretrained(tmp_path / "base")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=4, target_modules=["q_proj", "v_proj", "down_proj"]
    )
    adapted = get_peft_model(model, config)
    inputs, labels = texts(), written()
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    found = []
    for _ in range(15):
        loss = adapted(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < 0.7 * found[0]
    names = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert any("cross_attn.q_proj.lora_A" in name for name in names)

    adapted.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = adapted.generate(**inputs, **options)
    merged = again.merge_and_unload()
    assert again.generate(**inputs, **options).tolist() == expected.tolist()
    assert merged.generate(**inputs, **options).tolist() == expected.tolist()


def test_dropout_is_for_training():
    model = tiny_seq2seq(hidden_dropout=0.5, attention_dropout=0.5)
    inputs = {**texts(), "decoder_input_ids": written()}
    with torch.no_grad():
        first, second = (model(**inputs).logits for _ in range(2))
        assert torch.equal(first, second)
        model.train()
        assert not torch.allclose(model(**inputs).logits, model(**inputs).logits)
