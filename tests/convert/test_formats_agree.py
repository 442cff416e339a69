"""One table, model x format x layout -> one hash: how a model was saved leaves no trace.

Every dense checkpoint that Megatron-Core wrote for these tests is in it, with the logits that
Megatron computed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file

from mtt_convert import convert, diff, open_checkpoint
from mtt_convert.errors import IncompleteError, InconsistentError, UnsupportedError
from mtt_convert.logits import compare_logits
from tests.convert.surgery import copy_of, edited_metadata

Golden = Callable[[str], Path]


class Row(NamedTuple):
    """A checkpoint: its model, how it was saved, and the type to compare it in."""

    model: str
    format: str
    layout: str
    path: str
    dtype: str = "auto"

    def __str__(self) -> str:
        return self.path


def core(path: str, dtype: str = "auto") -> Row:
    _, model, layout, format = path.split("/")
    return Row(model, format, layout, path, dtype)


def tiny(path: str, format: str, dtype: str = "auto") -> Row:
    model = "tiny" if dtype == "auto" else f"tiny in {dtype}"
    return Row(model, format, path.split("/")[0], f"mcore/tiny/{path}", dtype)


TABLE = [
    core("mcore/gpt/ref/torch"),
    core("mcore/gpt/distopt_tp2pp1/torch"),
    core("mcore/gpt/tp2pp2/torch"),
    core("mcore/gpt/tp2pp2/torch_dist"),
    core("mcore/gpt/tp2pp2vpp2/torch"),
    core("mcore-te/gpt/tp2pp2/torch"),
    core("mcore/gpt_bf16/tp2pp2/torch"),
    core("mcore/gpt_bf16/tp2pp2/torch_dist"),
    core("mcore/llama/fsdp2_dp2/torch_dcp"),
    core("mcore/llama/tp1pp2/torch"),
    core("mcore/llama/tp2pp1/torch_dist"),
    core("mcore/llama/tp2pp2vpp2/torch"),
    core("mcore/llama/tp2pp2vpp2/torch_dist"),
    core("mcore-te/llama/tp2pp2/torch"),
    core("mcore-te/llama/tp2pp2/torch_dist"),
    core("mcore/llama_bf16/mfsdp_dp2/fsdp_dtensor", "bfloat16"),
    core("mcore/llama_bf16/tp2pp2/torch_dist", "bfloat16"),
    core("mcore/llama_6l/pp2_layout/torch"),
    core("mcore/llama_6l/pp2_uneven/torch"),
    core("mcore/llama_6l/pp2_uneven/torch_dist"),
    core("mcore/qwen/tp2pp2/torch"),
    core("mcore/qwen/tp2pp2/torch_dist"),
    core("mcore/nemotron/tp2pp1/torch"),
    core("mcore/nemotron/tp2pp1/torch_dist"),
    tiny("core_0.16/singleton", "torch_dist"),
    tiny("core_0.15/torch_dist", "torch_dist"),
    tiny("core_0.15/zarr", "zarr"),
    tiny("core_0.16/singleton", "torch_dist", "bfloat16"),
    tiny("core_0.15/zarr_bf16", "zarr", "bfloat16"),
]
# test_goldens.py runs the others.
NEW = [
    row
    for row in TABLE
    if row.model.startswith("tiny") or row.format in ("torch_dcp", "fsdp_dtensor")
]
MODELS = sorted({row.model for row in TABLE})


@pytest.fixture(scope="module")
def converted(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Row], Path]:
    """Each row converted once."""

    @cache
    def run(row: Row) -> Path:
        target = tmp_path_factory.mktemp("out") / "hf"
        convert(golden(row.path), target, tokenizer="none", dtype=row.dtype)
        return target

    return run


@pytest.mark.parametrize("model", MODELS)
def test_every_format_and_layout_gives_one_hash(model: str, converted: Callable) -> None:
    hashes = {
        (row.format, row.layout): hashlib.sha256(
            (converted(row) / "model.safetensors").read_bytes()
        ).hexdigest()
        for row in TABLE
        if row.model == model
    }
    assert len(set(hashes.values())) == 1, hashes


@pytest.mark.parametrize("row", [row for row in NEW if "tiny in" not in row.model], ids=str)
def test_logits_are_those_of_megatron(row: Row, golden: Golden, converted: Callable) -> None:
    logits = "/".join([*row.path.split("/")[:2], "logits.npz"]).replace("mcore-te", "mcore")
    assert compare_logits(converted(row), golden(logits)) < 1e-4


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_inspect_names_the_format_and_why(row: Row, golden: Golden) -> None:
    checkpoint = open_checkpoint(golden(row.path))
    evidence = "; ".join(checkpoint.evidence)
    assert checkpoint.format == row.format
    assert "names like decoder.final_layernorm." in evidence
    assert checkpoint.generation.startswith("Megatron-Core")
    why = {
        "torch": "mp_rank_",
        "torch_dist": "torch_dist backend; layers are ",
        "zarr": "zarr backend; layers are stacked",
        "torch_dcp": "without metadata.json and common.pt; names begin with model.,",
        "fsdp_dtensor": "names begin with model.module., as Megatron-FSDP saves them",
    }
    assert why[row.format] in evidence
    assert ("layers are numbered" in evidence) == ("singleton" in row.path)
    assert ("gate and up of the MLP are apart" in evidence) == ("singleton" in row.path)


class TestHalves:
    """`weight_w` and `weight_v` are one tensor, or none."""

    @pytest.fixture
    def root(self, golden: Golden, tmp_path: Path) -> Path:
        return copy_of(golden, "mcore/tiny/core_0.16/singleton", tmp_path)

    def test_one_missing(self, root: Path) -> None:
        with edited_metadata(root) as metadata:
            del metadata.state_dict_metadata["decoder.layers.1.mlp.linear_fc1.weight_v"]
        with pytest.raises(IncompleteError, match=r"layers.1.mlp.linear_fc1.weight is incomplete"):
            open_checkpoint(root)

    def test_of_two_sizes(self, root: Path) -> None:
        with edited_metadata(root) as metadata:
            entries = metadata.state_dict_metadata
            fc2 = entries.pop("decoder.layers.1.mlp.linear_fc2.weight")
            entries["decoder.layers.1.mlp.linear_fc1.weight_v"] = fc2
            stored = metadata.storage_data
            for index in list(stored):
                if index.fqn == "decoder.layers.1.mlp.linear_fc2.weight":
                    other = dataclasses.replace(
                        index, fqn=index.fqn.replace("2.weight", "1.weight_v")
                    )
                    stored[other] = stored[index]
        with pytest.raises(InconsistentError, match="do not fit together"):
            open_checkpoint(root)

    def test_the_gate_comes_first(self, golden: Golden, converted: Callable) -> None:
        from safetensors.torch import load_file

        row = tiny("core_0.16/singleton", "torch_dist")
        whole = load_file(golden("mcore/tiny/reference_megatron.safetensors"))
        gate, up = whole["decoder.layers.1.mlp.linear_fc1.weight"].chunk(2)
        ours = load_file(converted(row) / "model.safetensors")
        assert ours["model.layers.1.mlp.gate_proj.weight"].equal(gate)
        assert ours["model.layers.1.mlp.up_proj.weight"].equal(up)


def test_zarr_chunks_reach_beyond_an_array(golden: Golden, tmp_path: Path) -> None:
    """Chunks at the edges are of full size too, and what is behind an edge is no weight."""
    row = tiny("core_0.15/zarr", "zarr")
    root = copy_of(golden, row.path, tmp_path)
    (folder,) = root.glob("*/decoder.layers.mlp.linear_fc2.weight")
    whole = load_file(golden("mcore/tiny/reference_megatron.safetensors"))
    layers = np.stack([whole[f"decoder.layers.{n}.mlp.linear_fc2.weight"] for n in range(2)])
    for path in folder.glob("[0-9]*"):
        path.unlink()
    chunk = (1, 10, 10)
    grid = [-(-size // part) for size, part in zip(layers.shape, chunk, strict=True)]
    for index in np.ndindex(*grid):
        low = [number * part for number, part in zip(index, chunk, strict=True)]
        inside = layers[tuple(slice(a, a + part) for a, part in zip(low, chunk, strict=True))]
        beyond = [(0, part - size) for size, part in zip(inside.shape, chunk, strict=True)]
        data = np.pad(inside, beyond, constant_values=np.nan).tobytes()
        (folder / ".".join(map(str, index))).write_bytes(data)
    array = json.loads((folder / ".zarray").read_text())
    (folder / ".zarray").write_text(json.dumps(array | {"chunks": chunk}))
    assert diff(root, golden(row.path)).differences == ()


def test_a_torch_dist_checkpoint_without_its_metadata_is_incomplete(
    golden: Golden, tmp_path: Path
) -> None:
    root = copy_of(golden, "mcore/tiny/core_0.15/torch_dist", tmp_path)
    (root / "iter_0000010" / ".metadata").unlink()
    with pytest.raises(IncompleteError, match="begins with a dot"):
        open_checkpoint(root)


def test_a_torch_dist_checkpoint_with_nothing_but_chunks_is_named(
    golden: Golden, tmp_path: Path
) -> None:
    root = copy_of(golden, "mcore/tiny/core_0.15/torch_dist", tmp_path)
    for name in ("common.pt", "metadata.json"):
        (root / "iter_0000010" / name).unlink()
    with pytest.raises(UnsupportedError, match="none of Megatron's"):
        open_checkpoint(root)
