"""Pipelines of transformers with the written folder."""

from __future__ import annotations

from transformers import AutoModelForCausalLM, pipeline


def test_text_generation(chat_folder, sample_texts):
    generator = pipeline("text-generation", model=str(chat_folder))
    texts = sample_texts[:2]
    generator.tokenizer.pad_token = generator.tokenizer.eos_token
    generator.tokenizer.padding_side = "left"
    found = generator(
        [text["prompt"] for text in texts], max_new_tokens=8, do_sample=False, batch_size=2
    )
    for (result,), text in zip(found, texts, strict=True):
        assert len(result["generated_text"]) > len(text["prompt"])
        assert text["text"].startswith(result["generated_text"])


def test_chat(chat_folder, sample_texts):
    generator = pipeline("text-generation", model=str(chat_folder))
    text = sample_texts[0]
    messages = [{"role": "user", "content": text["prompt"]}]
    (result,) = generator(messages, max_new_tokens=8, do_sample=False)
    *said, answer = result["generated_text"]
    assert said == messages
    assert answer["role"] == "assistant"
    assert answer["content"]
    assert text["text"].startswith(text["prompt"] + answer["content"])


def test_feature_extraction(chat_folder, sample_texts):
    extractor = pipeline("feature-extraction", model=str(chat_folder))
    features = extractor(sample_texts[0]["prompt"], return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(chat_folder)
    assert features.shape[2] == model.config.hidden_size


def test_classification_pipelines(chat_folder, sample_texts):
    """With heads that nobody trained: what is tested is that the tasks know the classes."""
    for task, key in [("text-classification", "score"), ("token-classification", "entity")]:
        classifier = pipeline(task, model=str(chat_folder), model_kwargs={"num_labels": 3})
        results = classifier(sample_texts[0]["prompt"])
        assert results
        assert all(key in result for result in results)
