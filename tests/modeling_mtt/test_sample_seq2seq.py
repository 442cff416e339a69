"""The encoder-decoder sample, from Megatron-Core's shards to answers, with and without our code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import mtt_convert
from modeling_mtt import SEQ2SEQ_AUTO_MAP

SAMPLE = Path(__file__).resolve().parents[2] / "convert" / "sample_seq2seq"
ANSWERS = json.loads((SAMPLE / "prompts.json").read_text())

# README's five lines, where only the code beside the weights is to be had; what runs is saved.
SCRIPT = """
import json, sys

sys.modules["modeling_mtt"] = None  # an import fails, wherever it is installed
d, again = sys.argv[1:]

from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.models.auto import modeling_auto

tokenizer = AutoTokenizer.from_pretrained(d, trust_remote_code=True)
model = AutoModelForSeq2SeqLM.from_pretrained(d, trust_remote_code=True)
inputs = tokenizer("Hello, how are you?", return_tensors="pt")
text = tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True)

assert type(model).__module__.startswith("transformers_modules."), type(model)
names = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()
assert type(model).__name__ in names
base = AutoModel.from_pretrained(d, trust_remote_code=True)
assert type(base).__name__ == "MTTSeq2SeqModel"
model.save_pretrained(again)
model = AutoModelForSeq2SeqLM.from_pretrained(again, trust_remote_code=True)
ids = model.generate(**inputs, max_new_tokens=40)[0]
assert tokenizer.decode(ids, skip_special_tokens=True) == text
print(json.dumps(text))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sample") / "hf"
    mtt_convert.convert(SAMPLE, folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_question_is_answered(folder, dtype):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=dtype)
    assert len(ANSWERS) == 16
    for each in ANSWERS:
        inputs = tokenizer(each["prompt"], return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=60)[0]
        assert tokenizer.decode(ids, skip_special_tokens=True) == each["text"]


def test_questions_of_a_batch_are_answered(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    questions = [each["prompt"].lower() for each in ANSWERS]
    inputs = tokenizer(questions, return_tensors="pt", padding=True)
    texts = tokenizer.batch_decode(
        model.generate(**inputs, max_new_tokens=60, num_beams=2), skip_special_tokens=True
    )
    assert texts == [each["text"] for each in ANSWERS]


def test_logits_are_megatrons(folder):
    reference = np.load(SAMPLE / "reference.npz")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    inputs = {
        name: torch.from_numpy(reference[name]) for name in ("input_ids", "decoder_input_ids")
    }
    with torch.no_grad():
        logits = model(**inputs).logits
    difference = np.abs(logits.numpy() - reference["logits"][..., : logits.shape[-1]]).max()
    assert difference < 4e-4


def test_the_code_beside_the_weights_is_enough(folder, run_python, tmp_path):
    printed = run_python(SCRIPT, str(folder), str(tmp_path / "again")).stdout
    assert json.loads(printed.splitlines()[-1]) == ANSWERS[0]["text"]
    for saved in (folder, tmp_path / "again"):
        config = json.loads((saved / "config.json").read_text())
        assert config["auto_map"] == SEQ2SEQ_AUTO_MAP
        files = {path.stem for path in saved.glob("*.py")}
        assert {reference.split(".")[0] for reference in SEQ2SEQ_AUTO_MAP.values()} <= files
        assert "__init__" not in files


def test_the_sample_is_small():
    size = sum(path.stat().st_size for path in SAMPLE.rglob("*") if path.is_file())
    assert size < 1e6
