"""Pipelines, and weights that Accelerate spreads over a machine's memories."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import mtt_convert

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "convert" / "sample"
SHAPES = ("gpt", "llama", "nemotron")
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample, converted, with a chat template that says only what the user says."""
    folder = tmp_path_factory.mktemp("sample") / "hf"
    mtt_convert.convert(SAMPLE, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def sample_texts() -> list[dict[str, str]]:
    return json.loads((SAMPLE / "prompts.json").read_text())


def test_text_generation(folder):
    generator = pipeline("text-generation", model=str(folder))
    texts = sample_texts()[:2]
    generator.tokenizer.pad_token = generator.tokenizer.eos_token
    generator.tokenizer.padding_side = "left"
    found = generator(
        [text["prompt"] for text in texts], max_new_tokens=8, do_sample=False, batch_size=2
    )
    for (result,), text in zip(found, texts, strict=True):
        assert len(result["generated_text"]) > len(text["prompt"])
        assert text["text"].startswith(result["generated_text"])


def test_chat(folder):
    generator = pipeline("text-generation", model=str(folder))
    text = sample_texts()[0]
    messages = [{"role": "user", "content": text["prompt"]}]
    (result,) = generator(messages, max_new_tokens=8, do_sample=False)
    *said, answer = result["generated_text"]
    assert said == messages
    assert answer["role"] == "assistant"
    assert answer["content"]
    assert text["text"].startswith(text["prompt"] + answer["content"])


def test_feature_extraction(folder):
    extractor = pipeline("feature-extraction", model=str(folder))
    features = extractor(sample_texts()[0]["prompt"], return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert features.shape[2] == model.config.hidden_size


def test_classification_pipelines(folder, tmp_path):
    """With heads that nobody trained: what is tested is that the tasks know the classes."""
    for task, key in [("text-classification", "score"), ("token-classification", "entity")]:
        classifier = pipeline(task, model=str(folder), model_kwargs={"num_labels": 3})
        results = classifier(sample_texts()[0]["prompt"])
        assert results
        assert all(key in result for result in results)


@pytest.mark.parametrize("preset", SHAPES)
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_device_map(tiny_model, tmp_path, preset, place):
    model = tiny_model(preset)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    options = {}
    if place == "disk":  # room for a layer at a time
        options = {"max_memory": {"cpu": 40_000}, "offload_folder": tmp_path / "offload"}
    spread = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto", **options)
    if place == "disk":
        assert "disk" in spread.hf_device_map.values()
        assert spread.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    input_ids = torch.randint(1, 96, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(spread(input_ids).logits, model(input_ids).logits)
    options = {"attention_mask": torch.ones_like(input_ids), "max_new_tokens": 4}
    found = spread.generate(input_ids, do_sample=False, **options)
    assert found.tolist() == model.generate(input_ids, do_sample=False, **options).tolist()
