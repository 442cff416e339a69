"""BERT, of Megatron-LM and of Megatron-Core, becomes transformers' own MegatronBert."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import mtt_convert
from mtt_convert import from_megatron, open_checkpoint
from mtt_convert.errors import (
    IncompleteError,
    MappingError,
    SourceError,
    UnsupportedError,
    UsageError,
)
from mtt_convert.logits import compare_logits
from tests.convert.derived import copied, digest, edited, head_to_block, read, write
from tests.convert.surgery import Golden, refused, run

BERT = "legacy/core_v0.12.0-bert-tp2pp1"
LOGITS = "legacy/reference/bert.npz"
CORE = "mcore/bert"
PRETRAINING, MASKED_LM = "MegatronBertForPreTraining", "MegatronBertForMaskedLM"
SAID = {"num_attention_heads": 4, "layernorm_epsilon": 1e-5, "bias_gelu_fusion": False}
SAID |= {"layernorm_zero_centered_gamma": False, "vocab_size": 497}


@pytest.fixture
def root(golden: Golden, tmp_path: Path) -> Path:
    """A copy of Megatron-LM's BERT, on two tensor-parallel ranks."""
    return copied(golden(BERT), tmp_path / "root")


def ranks(root: Path) -> list[Path]:
    return sorted(root.glob("iter_*/*/model_optim_rng.pt"))


def old_names(model: dict[str, Any]) -> None:
    """Those of v1.0 to v2.0."""
    language, head = model["language_model"], model["lm_head"]
    encoder = language.pop("encoder")
    language["transformer"] = {
        name.replace("self_attention", "attention").replace("_norm.", "_layernorm."): value
        for name, value in encoder.items()
        if not name.endswith("_extra_state")
    }
    for name in [name for name in head if name.startswith("norm.")]:
        head[name.replace("norm", "layernorm")] = head.pop(name)


# ---- what Megatron computed


def test_both_heads_of_megatron_lm(golden: Golden, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    assert run("convert", golden(BERT), out, "--model-type", "auto", "--tokenizer", "none")[0] == 0
    code, text, _ = run("verify", out, "--logits", golden(LOGITS))
    assert code == 0 and "logits: largest difference" in text
    assert compare_logits(out, golden(LOGITS)) < 1e-4
    assert compare_logits(golden(BERT), golden(LOGITS)) < 1e-4
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("megatron-bert", [PRETRAINING])
    assert config["type_vocab_size"] == 2 and config["vocab_size"] == 497
    assert not (out / "generation_config.json").exists() and not list(out.glob("*.py"))
    code, text, _ = run("diff", golden(BERT), out)
    assert code == 0 and "78 tensors are equal, 0 differ" in text


@pytest.mark.parametrize("changed", ["logits", "binary_logits"])
def test_both_heads_count(changed: str, golden: Golden, tmp_path: Path) -> None:
    with np.load(golden(LOGITS)) as arrays:
        found = dict(arrays)
    found[changed] = found[changed] + 0.5
    np.savez(tmp_path / "other.npz", **found)
    assert compare_logits(golden(BERT), tmp_path / "other.npz") == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("order", ["block", "element"])
def test_another_order_of_rows_shows(order: str, golden: Golden, tmp_path: Path) -> None:
    options = {"tokenizer": "none", "overrides": {"vocab_size": 497}, "qkv_order": order}
    mtt_convert.convert(golden(BERT), tmp_path / "hf", **options)
    assert compare_logits(tmp_path / "hf", golden(LOGITS)) > 0.1


@pytest.mark.parametrize("kind", ["both", "masked_lm"])
@pytest.mark.parametrize("name", ["torch", "torch_dist"])
def test_megatron_core(kind: str, name: str, golden: Golden, tmp_path: Path) -> None:
    """Written by Megatron-Core 0.16.1's local layers; without a binary head it has no types."""
    source, logits = golden(f"{CORE}/{kind}/{name}"), golden(f"{CORE}/{kind}/logits.npz")
    mtt_convert.convert(source, tmp_path / "hf", tokenizer="none")
    assert compare_logits(tmp_path / "hf", logits) < 1e-5
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == [PRETRAINING if kind == "both" else MASKED_LM]
    assert config["type_vocab_size"] == (2 if kind == "both" else 1)
    assert open_checkpoint(source).dialect == "core_bert"
    other = golden(f"{CORE}/{kind}/torch")
    assert mtt_convert.diff(source, other).differences == ()


def test_names_of_transformer_engine(golden: Golden, tmp_path: Path) -> None:
    source = golden(f"{CORE}/both/torch")
    root = copied(source, tmp_path / "root")
    names = {
        ".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
        ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
    }
    for path in ranks(root):
        with edited(path) as content:
            model = content["model"]
            for name in list(model):
                new = name
                for local, fused in names.items():
                    new = new.replace(local, fused)
                model[new] = model.pop(name)
    assert digest(root, tmp_path / "te", overrides={}) == digest(
        source, tmp_path / "local", overrides={}
    )


def test_in_memory(golden: Golden, tmp_path: Path) -> None:
    mtt_convert.convert(golden(BERT), tmp_path / "hf", tokenizer="none")
    direct = from_megatron(golden(BERT), tokenizer="none")
    saved = transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "hf")
    assert type(direct) is type(saved) is transformers.MegatronBertForPreTraining
    left, right = direct.state_dict(), saved.state_dict()
    assert left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)
    assert direct.cls.predictions.decoder.weight is direct.bert.embeddings.word_embeddings.weight
    assert from_megatron(golden(BERT), hidden_dropout_prob=0.25).config.hidden_dropout_prob == 0.25
    with pytest.raises(TypeError, match="gated_mlp"):
        from_megatron(golden(BERT), tokenizer="none", gated_mlp=True)
    with pytest.raises(UsageError, match="cannot be split"):
        from_megatron(golden(BERT), tokenizer="none", tp_size=2)


# ---- generations, layouts, and what checkpoints leave out


@pytest.mark.parametrize("zipped", [True, False])
def test_like_v1(zipped: bool, root: Path, golden: Golden, tmp_path: Path) -> None:
    """Its names, its order of rows on each rank, its file."""
    for path in ranks(root):
        with edited(path, zipped=zipped) as content:
            del content["checkpoint_version"]
            old_names(content["model"])
            layers = content["model"]["language_model"]["transformer"]
            for name, value in layers.items():
                if "query_key_value" in name:
                    layers[name] = head_to_block(value, 2, 2)
            for name in ("bert_binary_head", "tensor_model_parallel_size", "norm_epsilon"):
                vars(content["args"]).pop(name, None)
            content["args"].model_parallel_size, content["args"].layernorm_epsilon = 2, 1e-5
    assert digest(root, tmp_path / "hf") == digest(golden(BERT), tmp_path / "golden")
    assert "v1.0 to v2.0" in open_checkpoint(root).generation


def test_like_v2(root: Path, golden: Golden, tmp_path: Path) -> None:
    for path in ranks(root):
        with edited(path) as content:
            head, encoder = content["model"]["lm_head"], content["model"]["language_model"]
            layers = encoder["encoder"]
            for group in (head, layers):
                for name in [name for name in group if "norm." in name]:
                    group[name.replace("norm.", "layernorm.")] = group.pop(name)
    assert digest(root, tmp_path / "hf") == digest(golden(BERT), tmp_path / "golden")


def test_pipeline(root: Path, golden: Golden, tmp_path: Path) -> None:
    """Two stages: the second has the heads, the pooler, and a copy of the embedding."""
    target = tmp_path / "pp2"
    for rank, path in enumerate(ranks(root)):
        for stage in (0, 1):
            content = read(path)
            model, language = content["model"], content["model"]["language_model"]
            content["args"].pipeline_model_parallel_size = 2
            content["args"].rank = 2 * stage + rank
            layers = language["encoder"]
            language["encoder"] = {}
            for name, value in layers.items():
                hit = name.split(".")
                if hit[0] == "layers" and int(hit[1]) // 2 == stage:
                    hit[1] = str(int(hit[1]) % 2)
                    language["encoder"][".".join(hit)] = value
                elif hit[0] != "layers" and stage == 1:
                    language["encoder"][name] = value
            if stage == 0:
                del model["lm_head"], model["binary_head"], language["pooler"]
            else:
                words = language.pop("embedding")["word_embeddings"]
                model["word_embeddings_for_head"] = {k: v.clone() for k, v in words.items()}
            write(content, target / f"iter_0000100/mp_rank_{rank:02d}_{stage:03d}/{path.name}")
    shutil.copy(golden(BERT) / "latest_checkpointed_iteration.txt", target)
    assert digest(target, tmp_path / "hf") == digest(golden(BERT), tmp_path / "golden")
    assert str(open_checkpoint(target).layout) == "TP2 x PP2"


def test_like_the_published_345m(root: Path, golden: Golden, tmp_path: Path) -> None:
    """`release/`, half precision, no version, no arguments, a file of torch before 1.6."""
    release = tmp_path / "release_root"
    for rank, path in enumerate(ranks(root)):
        content = read(path)
        old_names(content["model"])
        layers = content["model"]["language_model"]["transformer"]
        for name, value in layers.items():
            if "query_key_value" in name:
                layers[name] = head_to_block(value, 2, 2)
        half = {"model": _half(content["model"])}
        write(half, release / f"release/mp_rank_{rank:02d}/model_optim_rng.pt", zipped=False)
    (release / "latest_checkpointed_iteration.txt").write_text("release")
    error = refused(release, tmp_path / "out", UsageError)
    for name in ("num_attention_heads", "layernorm_epsilon", "bias_gelu_fusion"):
        assert f"--set {name}=" in str(error.fix)
    assert "position_embedding_type" not in str(error.fix)
    words = [word for name, value in SAID.items() for word in ("--set", f"{name}={value}")]
    code, _, err = run("convert", release, tmp_path / "hf", "--tokenizer", "none", *words)
    assert code == 0, err
    mtt_convert.convert(golden(BERT), tmp_path / "fp16", tokenizer="none", dtype="float16")
    first, second = (tmp_path / name / "model.safetensors" for name in ("hf", "fp16"))
    assert first.read_bytes() == second.read_bytes()
    assert compare_logits(tmp_path / "hf", golden(LOGITS)) < 0.1
    tanh = {**SAID, "openai_gelu": True}
    assert open_checkpoint(release, overrides=tanh).architecture.lm_head_activation == "gelu_tanh"


def _half(model: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _half(value)
        if isinstance(value, dict)
        else value.half()
        if isinstance(value, torch.Tensor)
        else value
        for name, value in model.items()
    }


def test_without_a_binary_head(root: Path, golden: Golden, tmp_path: Path) -> None:
    """No pooler and no types of tokens: the class gets a table of one type, of zeros."""
    for path in ranks(root):
        with edited(path) as content:
            content["args"].bert_binary_head = False
            del content["model"]["binary_head"], content["model"]["language_model"]["pooler"]
            del content["model"]["language_model"]["embedding"]["tokentype_embeddings"]
    mtt_convert.convert(root, tmp_path / "hf", tokenizer="none")
    assert mtt_convert.diff(root, tmp_path / "hf").differences == ()
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "hf")
    assert type(model) is transformers.MegatronBertForMaskedLM
    assert not model.bert.embeddings.token_type_embeddings.weight.any()
    both = from_megatron(golden(BERT), tokenizer="none")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        both.bert.embeddings.token_type_embeddings.weight.zero_()
        torch.testing.assert_close(model(ids).logits, both(ids).prediction_logits)
    assert mtt_convert.verify(tmp_path / "hf").problems == ()


def test_heads_that_are_missing(root: Path, tmp_path: Path) -> None:
    for path in ranks(root):
        with edited(path) as content:
            del content["model"]["binary_head"], content["model"]["language_model"]["pooler"]
    refused(root, tmp_path / "out", IncompleteError, says="4 of 62")
    said = {"bert_binary_head": False}
    mtt_convert.convert(root, tmp_path / "hf", tokenizer="none", overrides=said)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["architectures"], config["type_vocab_size"]) == ([MASKED_LM], 2)


def test_parts_of_a_head(root: Path, tmp_path: Path) -> None:
    for path in ranks(root):
        with edited(path) as content:
            del content["model"]["lm_head"]["dense.bias"]
    refused(root, tmp_path / "out", IncompleteError, says="lm_head.dense.bias")
    for path in ranks(root):
        with edited(path) as content:
            content["model"]["lm_head"]["dense.bias"] = torch.ones(64)
            content["model"]["lm_head"]["bias2"] = torch.ones(64)
    refused(root, tmp_path / "out", MappingError, says="lm_head.bias2")


# ---- what the class cannot say


def test_two_kinds_of_gelu(root: Path, golden: Golden, tmp_path: Path) -> None:
    """Fused biases make the MLPs' GELU one by tanh; the head's stays exact."""
    fused = {"bias_gelu_fusion": True}
    error = refused(root, tmp_path / "out", UsageError, overrides=fused, says="exact GELU in")
    assert "--set openai_gelu=True" in str(error.fix)
    both = {**fused, "openai_gelu": True}
    mtt_convert.convert(root, tmp_path / "hf", overrides=both, tokenizer="none")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["hidden_act"] == "gelu_pytorch_tanh"
    assert 1e-4 < compare_logits(tmp_path / "hf", golden(LOGITS)) < 0.1
    core = open_checkpoint(golden(f"{CORE}/both/torch"), overrides=both).architecture
    assert (core.activation, core.lm_head_activation) == ("gelu_tanh", "gelu_tanh")
    core = open_checkpoint(golden(f"{CORE}/both/torch"), overrides=fused).architecture
    assert (core.activation, core.lm_head_activation) == ("gelu_tanh", "gelu")


@pytest.mark.parametrize(
    ("name", "gelu"), [(BERT, "gelu_tanh"), (f"{CORE}/both/torch", "gelu")], ids=["legacy", "core"]
)
def test_a_trained_openai_gelu(name: str, gelu: str, golden: Golden, tmp_path: Path) -> None:
    """Megatron-LM's own MLPs and head do as it says, Megatron-Core's do not look at it."""
    root = copied(golden(name), tmp_path / "root")
    for path in ranks(root):
        with edited(path) as content:
            content["args"].openai_gelu = True
    a = open_checkpoint(root).architecture
    assert (a.activation, a.lm_head_activation) == (gelu, gelu)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"apply_residual_connection_post_layernorm": True}, "residuals taken after the norm"),
        ({"apply_layernorm_1p": True}, "layernorm_zero_centered_gamma"),
        ({"qk_layernorm": True}, "are missing"),
    ],
)
def test_other_berts(overrides: dict[str, Any], says: str, golden: Golden, tmp_path: Path) -> None:
    error = refused(golden(BERT), tmp_path / "out", SourceError, overrides=overrides)
    assert says in f"{error} {error.found}"


def test_no_decoder(golden: Golden, tmp_path: Path) -> None:
    """It does not generate, is no GPT, and is not written as a Megatron checkpoint."""
    mtt_convert.convert(golden(BERT), tmp_path / "hf", tokenizer="none")
    for to in ("torch", "torch_dist"):
        for source in (golden(BERT), tmp_path / "hf"):
            code, _, err = run("convert", source, tmp_path / "m", "--to", to)
            assert code == 3 and "does not write it" in err
    for source in (golden(BERT), tmp_path / "hf"):
        code, _, err = run("estimate", source, "--gpus", 1, "--gpu-memory", "80GB")
        assert code == 3 and "a BERT" in err
    code, _, err = run("convert", golden(BERT), tmp_path / "l", "--model-type", "llama")
    assert code == 2 and "kind = bert" in err and "--model-type megatron-bert" in err
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "once", "upon"]))
    words = ["--prompt", "once", "--tokenizer", vocab]
    for source in (golden(BERT), tmp_path / "hf"):
        code, _, err = run("generate", source, *words)
        assert code == 2 and "does not continue texts" in err


# ---- folders of Hugging Face


def native(folder: Path, name: str, **options: Any) -> Any:
    config = transformers.MegatronBertConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        **options,
    )
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", [PRETRAINING, MASKED_LM])
def test_a_folder_and_back(name: str, tmp_path: Path) -> None:
    native(tmp_path / "a", name, hidden_act="gelu_new", type_vocab_size=3)
    mtt_convert.convert(tmp_path / "a", tmp_path / "b", tokenizer="none")
    first, second = (tmp_path / f / "model.safetensors" for f in "ab")
    assert load_file(first).keys() == load_file(second).keys()
    assert mtt_convert.diff(tmp_path / "a", tmp_path / "b").differences == ()
    assert first.read_bytes() == second.read_bytes()
    a = open_checkpoint(tmp_path / "a").architecture
    assert a.forward_pass() == open_checkpoint(tmp_path / "b").architecture.forward_pass()
    assert (a.kind, a.activation, a.num_tokentypes) == ("bert", "gelu_tanh", 3)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("MegatronBertForCausalLM", {"is_decoder": True}, "MegatronBertForCausalLM"),
        ("MegatronBertModel", {}, "the heads it was trained with"),
        ("MegatronBertForSequenceClassification", {}, "architectures"),
        (MASKED_LM, {"is_decoder": True}, "a decoder made of a BERT"),
        (MASKED_LM, {"tie_word_embeddings": False}, "a table of its own"),
        (PRETRAINING, {"hidden_act": "relu"}, "hidden_act"),
    ],
)
def test_other_classes(name: str, options: dict[str, Any], says: str, tmp_path: Path) -> None:
    native(tmp_path / "a", name, **options)
    with pytest.raises(UnsupportedError) as caught:
        open_checkpoint(tmp_path / "a")
    assert says in f"{caught.value} {caught.value.found}"


# ---- its card and its tokenizer


@pytest.mark.parametrize("kind", ["both", "masked_lm"])
def test_the_card(kind: str, golden: Golden, tmp_path: Path) -> None:
    vocab = tmp_path / "vocab.txt"
    words = "the capital of france is paris .".split()
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    source = golden(f"{CORE}/{kind}/torch")
    mtt_convert.convert(source, tmp_path / "hf", tokenizer=str(vocab))
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "pipeline_tag: fill-mask" in card and "vllm" not in card
    name = PRETRAINING if kind == "both" else MASKED_LM
    assert f"# {name}\n" in card
    code = card.split("```python\n")[1].split("```")[0]
    printed: list[object] = []
    exec(code.replace("FOLDER", str(tmp_path / "hf")), {"print": printed.append})
    assert len(printed) == 1 and isinstance(printed[0], str)


@pytest.mark.parametrize("model_type", ["mtt", "megatron-bert", "auto"])
def test_mtt_has_no_class_of_its_own(model_type: str, golden: Golden, tmp_path: Path) -> None:
    options = {"tokenizer": "none", "model_type": model_type}
    conversion = mtt_convert.convert(golden(BERT), tmp_path / "hf", **options).conversion
    assert conversion.model_type == "megatron-bert"
    said = [text for text in conversion.warnings if "--model-type megatron-bert" in text]
    assert len(said) == (model_type == "mtt")


def test_inspect(golden: Golden) -> None:
    code, out, _ = run("inspect", golden(BERT))
    assert code == 0
    assert "bert, 2 token types, predicts masked tokens and the second text" in out
    assert "exactly a    megatron-bert" in out
    code, out, _ = run("inspect", golden(f"{CORE}/masked_lm/torch_dist"), "--json")
    facts = json.loads(out)
    assert facts["architecture"]["kind"] == "bert" and facts["exact_model_types"] == [
        "megatron-bert"
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokentype_ids", np.full((2, 32), 2)),
        ("attention_mask", np.ones((2, 8), np.int64)),
        ("binary_logits", np.zeros((2, 3), np.float32)),
        ("input_ids", np.full((2, 32), 497)),
    ],
)
def test_references_that_do_not_fit(
    name: str, value: np.ndarray, golden: Golden, tmp_path: Path
) -> None:
    with np.load(golden(LOGITS)) as arrays:
        np.savez(tmp_path / "bad.npz", **{**arrays, name: value})
    with pytest.raises(SourceError, match="does not fit"):
        compare_logits(golden(BERT), tmp_path / "bad.npz")
