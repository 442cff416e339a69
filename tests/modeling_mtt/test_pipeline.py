"""Pipelines of transformers with the written folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import mtt_convert

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "convert" / "sample"
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
