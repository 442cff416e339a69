"""What mtt does not model is refused by its name, with the numbers of its layers."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mtt_convert import open_checkpoint
from mtt_convert.errors import UnsupportedError
from tests.convert.surgery import (
    TORCH,
    TORCH_DIST,
    Golden,
    copy_of,
    edited,
    edited_metadata,
    refused,
    set_arguments,
    shards,
)

LLAMA = "mcore/llama/tp1pp2/torch"
SINGLETON = "mcore/tiny/core_0.16/singleton"


def rename(root: Path, change: Callable[[str, int, int], str]) -> None:
    """New names for the parameters of every rank: `change(name, stage, chunk)`."""
    for path in shards(root):
        stage = int(path.parent.name[-3:])
        with edited(path) as content:
            for chunk in (0, 1):
                model = content[f"model{chunk}"]
                content[f"model{chunk}"] = {
                    change(name, stage, chunk): value for name, value in model.items()
                }


def mamba(name: str) -> str:
    return name.replace("self_attention.linear_qkv.", "mixer.in_proj.").replace(
        "self_attention.linear_proj.", "mixer.out_proj."
    )


@pytest.fixture
def root(golden: Golden, tmp_path: Path) -> Path:
    """TP2, PP2, two virtual chunks of one layer each: layers 0 and 2, then 1 and 3."""
    return copy_of(golden, TORCH, tmp_path)


def test_mamba_layers_of_ranks(root: Path, tmp_path: Path) -> None:
    """Numbered as the whole model numbers them, whatever the files do."""

    def change(name: str, stage: int, chunk: int) -> str:
        return name if (stage, chunk) == (1, 0) else mamba(name)

    rename(root, change)
    error = refused(root, tmp_path / "out", UnsupportedError, says="Mamba layers")
    assert error.found == "layers 0, 2, 3: decoder.layers.0.mixer.in_proj.weight"
    set_arguments(root, hybrid_override_pattern="M*M-")
    error = refused(root, tmp_path / "out", UnsupportedError)
    assert str(error.found).endswith("weight; hybrid_override_pattern = 'M*M-'")


def renamed_metadata(root: Path, change: Callable[[str], str]) -> None:
    with edited_metadata(root) as metadata:
        state = metadata.state_dict_metadata
        metadata.state_dict_metadata = {change(name): value for name, value in state.items()}
        storage: dict[Any, Any] = {}
        for index, value in metadata.storage_data.items():
            storage[type(index)(change(index.fqn), index.offset, index.index)] = value
        metadata.storage_data = storage


def test_a_distributed_checkpoint(golden: Golden, tmp_path: Path) -> None:
    root = copy_of(golden, TORCH_DIST, tmp_path)
    renamed_metadata(root, mamba)
    error = refused(root, tmp_path / "out", UnsupportedError, says="Mamba layers")
    assert error.found == "layers 0, 1, 2, 3: decoder.layers.0.mixer.in_proj.layer_norm_weight"


def test_a_distributed_checkpoint_with_numbered_layers(golden: Golden, tmp_path: Path) -> None:
    root = copy_of(golden, SINGLETON, tmp_path)
    (metadata,) = root.rglob(".metadata")
    names = list(pickle.loads(metadata.read_bytes()).state_dict_metadata)
    assert any(name.startswith("decoder.layers.1.") for name in names)
    target = root / "iter_0000010"
    if metadata.parent != target:
        metadata.parent.rename(target)
        (root / "latest_checkpointed_iteration.txt").write_text("10")
    renamed_metadata(root, lambda name: mamba(name) if ".layers.1." in name else name)
    error = refused(root, tmp_path / "out", UnsupportedError, says="Mamba layers")
    assert str(error.found).startswith("layer 1: decoder.layers.1.mixer.in_proj.")


LAYER = "decoder.layers.0."
CASES = [
    (f"{LAYER}mixer.A_log", "Mamba layers"),
    (f"{LAYER}mixer.D", "Mamba layers"),
    (f"{LAYER}self_attention.A_log", "layers of linear attention"),
    (f"{LAYER}self_attention.in_proj.weight", "layers of linear attention"),
    (f"{LAYER}self_attention.core_attention.indexer.linear_wk.weight", "sparse attention"),
    (f"{LAYER}self_attention.core_attention.softmax_offset", "attention with learned sinks"),
    (f"{LAYER}mlp_hyper_connection.alpha_pre", "several residual streams"),
    (f"{LAYER}self_attention.linear_proj.adapter.linear_in.weight", "adapters"),
    (f"{LAYER}self_attention.linear_qkv.weight_quantizer._amax", "ModelOpt"),
    (f"{LAYER}cross_attention.attn.linear_q.weight", "RETRO"),
    (f"{LAYER}mlp.fc1_latent_proj.weight", "experts in a latent space"),
]
WHOLE = [
    ("decoder.final_norm.weight", "a hybrid of layers"),
    ("vision_model.decoder.layers.0.mlp.linear_fc1.weight", "a vision or audio model"),
    ("vision_projection.encoder.linear_fc1.weight", "a vision or audio model"),
    ("query_model.language_model.embedding.word_embeddings.weight", "two encoders"),
    ("shared_model.projection_enc.weight", "two encoders"),
    ("ict_head.weight", "two encoders"),
    ("classification_head.weight", "a head that classifies"),
    ("multichoice_head.bias", "a head that classifies"),
    ("class_token", "a vision or audio model"),
    ("backbone.cls_token", "a vision or audio model"),
    ("language_model.retriever.layers.0.input_norm.weight", "RETRO"),
    ("language_model.encoder.layers.6.retriever.layers.0.input_norm.weight", "RETRO"),
    ("medusa_heads.0.0.linear.weight", "speculative decoding"),
]


@pytest.mark.parametrize(("name", "says"), CASES, ids=lambda value: str(value))
def test_parts_of_layers(name: str, says: str, root: Path, tmp_path: Path) -> None:
    for path in shards(root):
        if path.parent.name.endswith("_001"):
            with edited(path) as content:
                content["model1"][name] = torch.ones(2, 2)
    error = refused(root, tmp_path / "out", UnsupportedError, says=says)
    assert error.found == f"layer 3: {name.replace('.0.', '.3.', 1)}"


@pytest.mark.parametrize(("name", "says"), WHOLE, ids=lambda value: str(value))
def test_other_models(name: str, says: str, root: Path, tmp_path: Path) -> None:
    with edited(shards(root)[0]) as content:
        content["model0"][name] = torch.ones(2, 2)
    error = refused(root, tmp_path / "out", UnsupportedError, says=says)
    assert name in str(error.found)


def test_many_layers_are_counted(root: Path, tmp_path: Path) -> None:
    with edited(shards(root)[0]) as content:
        for layer in range(40):
            content["model0"][f"decoder.layers.{layer}.mixer.D"] = torch.ones(2)
    error = refused(root, tmp_path / "out", UnsupportedError)
    assert "layers 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 28 more" in str(error.found)


# ---- folders of Hugging Face


@pytest.mark.parametrize(
    ("model_type", "names", "says"),
    [
        ("nemotron_h", ["backbone.layers.{}.mixer.A_log"], "Mamba layers: layers 0, 2: backbone."),
        ("bamba", ["model.layers.{}.mamba.conv1d.weight"], "Mamba layers: layers 0, 2: model."),
        ("jamba", ["model.layers.{}.mamba.in_proj.weight"], "Mamba layers: layers 0, 2: model."),
        (
            "qwen3_next",
            ["model.layers.{}.linear_attn.in_proj_qkvz.weight"],
            "layers of linear attention: layers 0, 2: model.",
        ),
        ("gpt_oss", ["model.layers.{}.self_attn.sinks"], "learned sinks: layers 0, 2: model."),
        ("llama4", ["model.layers.{}.self_attn.q_proj.weight"], "'llama4'"),
    ],
)
def test_folders(model_type: str, names: list[str], says: str, tmp_path: Path) -> None:
    folder = tmp_path / model_type
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    tensors = {name.format(layer): torch.ones(2, 2) for name in names for layer in (0, 2)}
    tensors["model.norm.weight"] = torch.ones(2)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedError, match="this kind of model") as caught:
        open_checkpoint(folder)
    assert f"model_type = {model_type!r}" in str(caught.value.found)
    assert says in str(caught.value.found)
