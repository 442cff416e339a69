"""Megatron-LM's own old checkpoints: no arguments, flat names, old files, folders of optimizers."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

import mtt_convert
from mtt_convert.errors import IncompleteError, MappingError, UnsupportedError, UsageError
from mtt_convert.logits import compare_logits
from tests.convert.derived import (
    copied,
    digest,
    edited,
    head_to_block,
    head_to_element,
    read,
    write,
)
from tests.convert.surgery import Golden, refused, run

V26 = "legacy/v2.6-ckptver3-gpt2-tp1pp1"
V26_TP2PP2 = "legacy/v2.6-ckptver3-gpt2-tp2pp2"
OLD = "legacy/v1.0-ckptver0-RELEASE-oldserial-fp16-gpt2-tp1pp1"
OLD_LOGITS = "legacy/reference/gpt2_fp16rounded_weights.npz"
LLAMA = "legacy/core_v0.12.0-llama-tp2pp1"
FILE = "iter_0000100/mp_rank_00/model_optim_rng.pt"


@pytest.fixture
def root(golden: Golden, tmp_path: Path) -> Path:
    """A copy of a checkpoint of one rank."""
    return copied(golden(V26), tmp_path / "root")


def test_like_the_published_345m(golden: Golden, tmp_path: Path) -> None:
    """`release/`, half precision, no version, no arguments, a file of torch before 1.6."""
    root = copied(golden(OLD), tmp_path / "root")
    path = root / "release/mp_rank_00/model_optim_rng.pt"
    with edited(path, zipped=False) as content:
        del content["args"], content["iteration"]
    error = refused(root, tmp_path / "out", UsageError)
    assert "--set num_attention_heads=" in str(error.fix)
    config = tmp_path / "gpt2.json"
    config.write_text(
        json.dumps(
            {
                "num_attention_heads": 4,
                "layernorm_epsilon": 1e-5,
                "layernorm_zero_centered_gamma": False,
                "bias_gelu_fusion": False,
                "vocab_size": 497,
            }
        )
    )
    words = ["--config", config, "--tokenizer", "none"]
    code, _, err = run("convert", root, tmp_path / "hf", *words)
    assert code == 0, err
    assert compare_logits(tmp_path / "hf", golden(OLD_LOGITS)) < 1e-4
    code, out, _ = run("inspect", root, "--config", config)
    assert code == 0 and "no checkpoint_version: rows of query_key_value by block" in out


def test_a_copy_of_the_embedding_is_no_head_of_its_own(golden: Golden, tmp_path: Path) -> None:
    """`word_embeddings_for_head`, on the last stage, says so where no arguments do."""
    root = copied(golden(V26_TP2PP2), tmp_path / "root")
    for path in root.rglob("model_optim_rng.pt"):
        with edited(path) as content:
            del content["args"]
    said = {
        "num_attention_heads": 4,
        "layernorm_epsilon": 1e-5,
        "layernorm_zero_centered_gamma": False,
        "bias_gelu_fusion": False,
        "vocab_size": 497,
    }
    expected = digest(golden(V26_TP2PP2), tmp_path / "golden")
    assert digest(root, tmp_path / "hf", overrides=said) == expected
    untied = {**said, "untie_embeddings_and_output_weights": True}
    assert mtt_convert.open_checkpoint(
        root, overrides=untied
    ).architecture.untie_embeddings_and_output_weights


def test_flat_names_of_2019(golden: Golden, tmp_path: Path) -> None:
    """model/gpt2_modeling.py: no `language_model`, and everything in one dict."""
    root = copied(golden(OLD), tmp_path / "root")
    path = root / "release/mp_rank_00/model_optim_rng.pt"
    with edited(path, zipped=False) as content:
        model = content["model"]["language_model"]
        flat = {f"{n}.weight": t["weight"] for n, t in model["embedding"].items()}
        content["model"] = flat | {f"transformer.{n}": t for n, t in model["transformer"].items()}
    assert digest(root, tmp_path / "hf") == digest(golden(OLD), tmp_path / "golden")
    assert "2019" in mtt_convert.open_checkpoint(root).generation


def test_flat_embeddings(root: Path, golden: Golden, tmp_path: Path) -> None:
    with edited(root / FILE) as content:
        embedding = content["model"]["language_model"]["embedding"]
        content["model"]["language_model"]["embedding"] = {
            f"{name}.weight": value["weight"] for name, value in embedding.items()
        }
    assert digest(root, tmp_path / "hf") == digest(golden(V26), tmp_path / "golden")


def test_layers_of_transformer_engine(root: Path, golden: Golden, tmp_path: Path) -> None:
    """--transformer-impl transformer_engine within Megatron-LM's own stack."""
    names = {
        "input_layernorm.": "self_attention.layernorm_qkv.layer_norm_",
        "self_attention.query_key_value.": "self_attention.layernorm_qkv.",
        "self_attention.dense.": "self_attention.proj.",
        "post_attention_layernorm.": "layernorm_mlp.layer_norm_",
        "mlp.dense_h_to_4h.": "layernorm_mlp.fc1_",
        "mlp.dense_4h_to_h.": "layernorm_mlp.fc2_",
    }
    with edited(root / FILE) as content:
        encoder = content["model"]["language_model"]["encoder"]
        for name in list(encoder):
            new = name
            for old, replacement in names.items():
                new = new.replace(old, replacement)
            encoder[new] = encoder.pop(name)
        encoder["layers.0.layernorm_mlp._extra_state"] = None
    assert digest(root, tmp_path / "hf") == digest(golden(V26), tmp_path / "golden")
    assert "Transformer Engine" in mtt_convert.open_checkpoint(root).generation


@pytest.mark.parametrize(
    ("version", "order"), [(None, "block"), (0, "block"), (1, "element"), (1.0, "element")]
)
@pytest.mark.parametrize("names", ["attention", "self_attention"])
def test_names_and_versions_are_independent(
    version: float | None, order: str, names: str, root: Path, golden: Golden, tmp_path: Path
) -> None:
    with edited(root / FILE) as content:
        content["checkpoint_version"] = version
        if version is None:
            del content["checkpoint_version"]
        model = content["model"]["language_model"]
        encoder = model.pop("encoder")
        for name, value in list(encoder.items()):
            if "query_key_value" in name:
                is_block = order == "block"
                encoder[name] = (
                    head_to_block(value, 4, 4) if is_block else head_to_element(value, 4)
                )
            encoder[name.replace("self_attention", names)] = encoder.pop(name)
        model["transformer"] = encoder
    assert digest(root, tmp_path / "hf") == digest(golden(V26), tmp_path / "golden")


def test_rows_are_put_right_on_each_rank(golden: Golden, tmp_path: Path) -> None:
    """Blocks are a rank's own: right joined after, not before."""
    root = copied(golden(V26_TP2PP2), tmp_path / "root")
    for path in sorted(root.glob("iter_*/*/*.pt")):
        with edited(path) as content:
            del content["checkpoint_version"]
            encoder = content["model"]["language_model"]["encoder"]
            for name, value in encoder.items():
                if "query_key_value" in name:
                    encoder[name] = head_to_block(value, 2, 2)
    assert digest(root, tmp_path / "hf") == digest(golden(V26_TP2PP2), tmp_path / "golden")


def test_groups_in_blocks(golden: Golden, tmp_path: Path) -> None:
    """--qkv-order block of a model with groups; one per rank is the same either way."""
    llama = golden(LLAMA)
    expected = digest(llama, tmp_path / "golden")
    assert digest(llama, tmp_path / "block", qkv_order="block") == expected
    refused(llama, tmp_path / "out", UsageError, qkv_order="element", says="query groups")


def test_an_order_is_only_for_megatron(golden: Golden, root: Path, tmp_path: Path) -> None:
    mtt_convert.convert(root, tmp_path / "hf", tokenizer="none")
    with pytest.raises(UsageError, match="only for a Megatron source"):
        mtt_convert.open_checkpoint(tmp_path / "hf", qkv_order="block")
    with pytest.raises(UsageError, match="unknown order"):
        mtt_convert.open_checkpoint(root, qkv_order="rows")
    code, _, err = run("inspect", root, "--qkv-order", "rows")
    assert code == 2 and "invalid choice" in err


def _split_optimizer(root: Path, source: Path) -> None:
    """What the distributed optimizer of 2022-03 to 2023-05 left: model_rng.pt and optim.pt."""
    for folder in sorted((source / "iter_0000100").iterdir()):
        content = read(folder / "model_optim_rng.pt")
        content.pop("optimizer", None)
        target = root / "iter_0000100" / folder.name
        write(content, target / "model_rng.pt")
        for rank in (0, 1):
            state = {"optimizer": torch.zeros(4)}
            write(state, target.with_name(f"{folder.name}_{rank:03d}") / "optim.pt")
    shutil.copy(source / "latest_checkpointed_iteration.txt", root)


@pytest.mark.parametrize("name", [V26, V26_TP2PP2])
def test_folders_with_nothing_but_an_optimizer(name: str, golden: Golden, tmp_path: Path) -> None:
    """`mp_rank_00_000` is data rank 0's optimizer there, and no pipeline stage."""
    root = tmp_path / "root"
    _split_optimizer(root, golden(name))
    assert digest(root, tmp_path / "hf") == digest(golden(name), tmp_path / "golden")
    evidence = mtt_convert.open_checkpoint(root).evidence
    assert any("model_rng.pt" in line for line in evidence)


@pytest.mark.parametrize("name", [V26, V26_TP2PP2])
def test_copies_of_data_parallel_ranks(name: str, golden: Golden, tmp_path: Path) -> None:
    """For some days in 2022-05 each data-parallel rank wrote its model."""
    root = tmp_path / "root"
    for folder in sorted((golden(name) / "iter_0000100").iterdir()):
        content = read(folder / "model_optim_rng.pt")
        for rank in (0, 1):
            target = root / "iter_0000100" / f"{folder.name}_{rank:03d}"
            write(content, target / "model_rng.pt")
    shutil.copy(golden(name) / "latest_checkpointed_iteration.txt", root)
    assert digest(root, tmp_path / "hf") == digest(golden(name), tmp_path / "golden")


def test_a_missing_rank_beside_optimizers(golden: Golden, tmp_path: Path) -> None:
    root = tmp_path / "root"
    _split_optimizer(root, golden(V26_TP2PP2))
    (root / "iter_0000100/mp_rank_01_001/model_rng.pt").unlink()
    refused(root, tmp_path / "out", IncompleteError, says="mp_rank_01_001")


def test_two_spellings_of_one_parameter(root: Path, tmp_path: Path) -> None:
    with edited(root / FILE) as content:
        encoder = content["model"]["language_model"]["encoder"]
        encoder["layers.0.input_norm.weight"] = encoder["layers.0.input_layernorm.weight"]
    refused(root, tmp_path / "out", MappingError, says="several sources")


@pytest.mark.parametrize("value", [[3], "3.0", -1, float("nan"), float("inf"), 2**62])
def test_a_version_that_is_none(value: object, root: Path, tmp_path: Path) -> None:
    with edited(root / FILE) as content:
        content["checkpoint_version"] = value
    refused(root, tmp_path / "out", says="checkpoint_version")


def test_heads_that_ranks_cannot_share(golden: Golden, tmp_path: Path) -> None:
    root = copied(golden("legacy/v1.0-ckptver0-gpt2-tp2pp1"), tmp_path / "root")
    for path in root.glob("iter_*/*/*.pt"):
        with edited(path) as content:
            args: Any = content["args"]
            assert isinstance(args, Namespace)
            args.num_attention_heads = 1
    refused(root, tmp_path / "out", UnsupportedError, says="divided among the ranks")
