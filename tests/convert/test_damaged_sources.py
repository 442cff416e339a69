"""Checkpoints that are cut, incomplete, contradictory or of another kind are refused in words.

Each begins as a real checkpoint that converts; one thing about it is then wrong.
"""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import mtt_convert
from mtt_convert import (
    CorruptError,
    IncompleteError,
    InconsistentError,
    MappingError,
    MTTError,
    NotACheckpointError,
    SourceError,
    UnsupportedError,
    UsageError,
    open_checkpoint,
)
from tests.convert.surgery import (
    ITERATION,
    PLACEHOLDER,
    TORCH,
    TORCH_DIST,
    Golden,
    copy_of,
    edited,
    edited_metadata,
    model_of,
    named,
    number,
    plant_in,
    reduce,
    refused,
    run,
    set_arguments,
    shard,
    shards,
)

EMBEDDING = "embedding.word_embeddings.weight"
QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
NORM = "decoder.layers.0.input_layernorm.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
HEAD = "output_layer.weight"
TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture
def root(golden: Golden, tmp_path: Path) -> Path:
    """A copy of a `torch` checkpoint: TP2, PP2, VPP2, untied, RMSNorm."""
    return copy_of(golden, TORCH, tmp_path)


@pytest.fixture
def dist(golden: Golden, tmp_path: Path) -> Path:
    """A copy of a `torch_dist` checkpoint."""
    return copy_of(golden, TORCH_DIST, tmp_path)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where nothing may appear."""
    return tmp_path / "out"


def _assert_same(folder: Path, other: Path) -> None:
    result = mtt_convert.diff(folder, other)
    assert result.differences == () and result.num_equal == 39


@pytest.mark.parametrize("kind", [TORCH, TORCH_DIST], ids=["torch", "torch_dist"])
def test_the_copies_convert(kind: str, golden: Golden, tmp_path: Path, out: Path) -> None:
    """What the other tests break works before."""
    mtt_convert.convert(copy_of(golden, kind, tmp_path), out)
    _assert_same(out, golden(TORCH))


def test_an_edit_that_changes_nothing(root: Path, out: Path, golden: Golden) -> None:
    """Saving a shard again, as the tests here do, is no damage by itself."""
    for path in shards(root):
        with edited(path):
            pass
    mtt_convert.convert(root, out)
    _assert_same(out, golden(TORCH))


# Cut files

CUTS = 25


def _refused_at_every_cut(source: Path, path: Path, out: Path) -> None:
    size = path.stat().st_size
    ends = sorted({size - 1, size - 2, size - 22, *(size * k // CUTS for k in range(CUTS))})
    for end in reversed(ends):
        os.truncate(path, end)
        with pytest.raises(SourceError) as caught:
            mtt_convert.convert(source, out)
        assert not out.exists(), end
        assert path.name in str(caught.value)
    for end in (1, 0):
        os.truncate(path, end)
        refused(source, out, CorruptError, says=path.name)


@pytest.mark.parametrize(("tp", "pp"), [(0, 0), (1, 1)])
def test_a_cut_shard(tp: int, pp: int, root: Path, out: Path) -> None:
    _refused_at_every_cut(root, shard(root, tp, pp), out)


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp", "__3_1.distcp"])
def test_a_cut_file_of_torch_dist(name: str, dist: Path, out: Path) -> None:
    _refused_at_every_cut(dist, dist / ITERATION / name, out)


@pytest.mark.parametrize("name", ["metadata.json"])
def test_a_cut_json(name: str, dist: Path, out: Path) -> None:
    path = dist / ITERATION / name
    for end in range(path.stat().st_size - 2, -1, -5):
        os.truncate(path, end)
        refused(dist, out, CorruptError, says=name)


def test_a_file_that_ends_while_it_is_read(root: Path, out: Path) -> None:
    """Something still writes, or deletes, while the weights are read."""

    def cut(done: int, total: int) -> None:
        for path in shards(root):
            os.truncate(path, 5000)

    with pytest.raises(CorruptError, match="ended while it was read"):
        mtt_convert.convert(root, out, progress=cut)
    assert not out.exists()


def _positions(path: Path, count: int) -> list[int]:
    """Random positions in what is not tensor bytes: pickle, directory, headers."""
    data = path.read_bytes()
    size = len(data)
    begin = data.find(b"PK\x01\x02") if data[:2] == b"PK" else 0
    directory = range(begin, size)
    front = range(min(size, 40_000))
    random_numbers = random.Random(0)
    choice = [random_numbers.choice(directory) for _ in range(count // 2)]
    return choice + [random_numbers.choice(front) for _ in range(count - len(choice))]


@pytest.mark.parametrize(
    ("kind", "name", "count"),
    [
        (TORCH, "mp_rank_00_000/model_optim_rng.pt", 120),
        (TORCH_DIST, ".metadata", 120),
        (TORCH_DIST, "common.pt", 60),
    ],
)
def test_flipped_bytes(kind: str, name: str, count: int, golden: Golden, tmp_path: Path) -> None:
    """Any byte may be wrong: the answer is a checkpoint or an error in words, never a traceback."""
    source = copy_of(golden, kind, tmp_path)
    path = source / ITERATION / name
    original = path.read_bytes()
    flips = random.Random(1)
    for position in _positions(path, count):
        data = bytearray(original)
        data[position] ^= 1 << flips.randrange(8)
        path.write_bytes(data)
        try:
            open_checkpoint(source)
        except (SourceError, UsageError) as error:
            assert len(str(error)) < 4000
        except Exception as error:
            pytest.fail(f"byte {position}: {type(error).__name__}: {error}")


# What is missing


def test_a_missing_rank(root: Path, out: Path) -> None:
    shutil.rmtree(shard(root, 1, 0).parent)
    error = refused(root, out, IncompleteError)
    assert error.found == "3 of 4 ranks (TP2 x PP2)"
    assert error.expected == "mp_rank_01_000/model_optim_rng.pt"
    assert error.fix == "copy that file again"


@pytest.mark.parametrize(("tp", "pp"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_any_missing_rank_file(tp: int, pp: int, root: Path, out: Path) -> None:
    """The folder is there and its file is not, as after a broken copy."""
    shard(root, tp, pp).unlink()
    refused(root, out, IncompleteError, says=f"mp_rank_{tp:02d}_{pp:03d}/model_optim_rng.pt")


def test_a_missing_stage(root: Path, out: Path) -> None:
    for tp in (0, 1):
        shutil.rmtree(shard(root, tp, 1).parent)
    refused(root, out, IncompleteError, says="2 of 4 ranks")


def test_all_ranks_missing(root: Path, out: Path) -> None:
    for path in shards(root):
        shutil.rmtree(path.parent)
    refused(root, out, NotACheckpointError)


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_1.distcp", "__2_0.distcp"])
def test_a_missing_distcp(name: str, dist: Path, out: Path) -> None:
    (dist / ITERATION / name).unlink()
    error = refused(dist, out, IncompleteError)
    assert error.expected == name and error.fix == "copy that file again"


def test_a_missing_common(dist: Path, out: Path) -> None:
    (dist / ITERATION / "common.pt").unlink()
    error = refused(dist, out, IncompleteError)
    assert error.expected == "common.pt"


@pytest.mark.parametrize("name", [".metadata", "metadata.json"])
def test_missing_metadata(name: str, dist: Path, out: Path) -> None:
    (dist / ITERATION / name).unlink()
    refused(dist, out, SourceError)


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        (EMBEDDING, EMBEDDING),
        (QKV, QKV),
        (NORM, "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"),
    ],
)
def test_a_missing_parameter(name: str, canonical: str, root: Path, out: Path) -> None:
    for tp in (0, 1):
        with edited(shard(root, tp, 0)) as content:
            del model_of(content, name)[name]
    refused(root, out, IncompleteError, says=canonical)


@pytest.mark.parametrize("name", [EMBEDDING, QKV])
def test_a_parameter_missing_on_one_rank(name: str, root: Path, out: Path) -> None:
    with edited(shard(root, 1, 0)) as content:
        del model_of(content, name)[name]
    refused(root, out, IncompleteError, says="rank 1")


@pytest.mark.parametrize("name", [NORM, "decoder.layers.0.pre_mlp_layernorm.weight"])
def test_a_copied_parameter_missing_on_one_rank(name: str, root: Path, out: Path) -> None:
    """A norm that every rank must have stands on one only."""
    with edited(shard(root, 1, 0)) as content:
        del model_of(content, name)[name]
    refused(root, out, IncompleteError, says="rank 1")


def test_a_parameter_of_none(root: Path, out: Path) -> None:
    for tp in (0, 1):
        with edited(shard(root, tp, 1)) as content:
            model_of(content, FINAL_NORM)[FINAL_NORM] = None
    refused(root, out, IncompleteError, says="final_layernorm")


def test_a_layer_is_skipped(root: Path, out: Path) -> None:
    for tp in (0, 1):
        with edited(shard(root, tp, 0)) as content:
            chunk = content["model0"]
            for name in [name for name in chunk if ".layers.0." in name]:
                chunk[name.replace(".layers.0.", ".layers.1.")] = chunk.pop(name)
    refused(root, out, IncompleteError, says="skips layers")


def test_a_chunk_is_missing(root: Path, out: Path) -> None:
    with edited(shard(root)) as content:
        del content["model0"]
    refused(root, out, IncompleteError, says="model0")


@pytest.mark.parametrize("key", ["model0", "model1"])
def test_a_chunk_is_missing_on_all_ranks(key: str, root: Path, out: Path) -> None:
    """Then layers are missing, and the file alone may not show it."""
    for path in shards(root):
        with edited(path) as content:
            del content[key]
    refused(root, out, IncompleteError)


def test_a_chunk_is_missing_on_one_rank(root: Path, out: Path) -> None:
    with edited(shard(root, 0, 0)) as content:
        del content["model1"]
    refused(root, out, IncompleteError)


def test_no_model(root: Path, out: Path) -> None:
    with edited(shard(root)) as content:
        del content["model0"], content["model1"]
    refused(root, out, IncompleteError, says="no complete model")


def test_a_chunk_of_a_tensor_is_missing(dist: Path, out: Path) -> None:
    with edited_metadata(dist) as metadata:
        metadata.state_dict_metadata[EMBEDDING].chunks.pop()
    refused(dist, out, IncompleteError, says=EMBEDDING)


def test_a_tensor_of_torch_dist_is_missing(dist: Path, out: Path) -> None:
    with edited_metadata(dist) as metadata:
        del metadata.state_dict_metadata[FINAL_NORM]
    refused(dist, out, IncompleteError, says=FINAL_NORM)


# Which folder


@pytest.mark.parametrize(
    "text", ["", "abc", "10.5", "-10", "iter_0000010", "10\n20", "\uff11", "\xff"]
)
def test_a_tracker_without_a_number(text: str, root: Path, out: Path) -> None:
    (root / TRACKER).write_bytes(text.encode("latin1" if text == "\xff" else "utf-8"))
    error = refused(root, out, IncompleteError, says=TRACKER)
    assert error.fix and "--iteration 10" in error.fix
    mtt_convert.convert(root, out, iteration=10)


def test_a_tracker_that_names_a_missing_iteration(root: Path, out: Path) -> None:
    (root / TRACKER).write_text("2000\n")
    error = refused(root, out, IncompleteError, says="iter_0002000")
    assert error.found == "iterations 10"
    assert error.fix == "choose one with --iteration, e.g. --iteration 10"


def test_a_tracker_that_names_a_missing_release(root: Path, out: Path) -> None:
    (root / TRACKER).write_text("release")
    refused(root, out, IncompleteError, says="release")


def test_the_iteration_asked_for_is_missing(root: Path, out: Path) -> None:
    error = refused(root, out, IncompleteError, iteration=11)
    assert error.found == "iterations 10" and error.expected == "iter_0000011"


def test_several_iterations_and_no_tracker(root: Path, out: Path) -> None:
    shutil.copytree(root / ITERATION, root / "iter_0000020")
    (root / TRACKER).unlink()
    error = refused(root, out, UsageError)
    assert error.found == "iterations 10, 20"


def test_a_renamed_iteration(root: Path, out: Path) -> None:
    """The files say 10, the folder 20."""
    (root / ITERATION).rename(root / "iter_0000020")
    (root / TRACKER).write_text("20")
    error = refused(root, out, InconsistentError)
    assert (error.found, error.expected) == ("10", "20")


def test_a_renamed_iteration_of_torch_dist(dist: Path, out: Path) -> None:
    (dist / ITERATION).rename(dist / "iter_0000020")
    (dist / TRACKER).write_text("20")
    error = refused(dist, out, InconsistentError)
    assert (error.found, error.expected) == ("10", "20")


def test_an_empty_folder(tmp_path: Path, out: Path) -> None:
    (tmp_path / "empty").mkdir()
    error = refused(tmp_path / "empty", out, NotACheckpointError)
    assert error.found == "an empty folder"


def test_an_empty_iteration(root: Path, out: Path) -> None:
    shutil.rmtree(root / ITERATION)
    (root / ITERATION).mkdir()
    error = refused(root, out, NotACheckpointError)
    assert error.found == "an empty folder"


def test_nothing_at_all(tmp_path: Path, out: Path) -> None:
    refused(tmp_path / "nothing", out, NotACheckpointError, says="does not exist")


def test_a_file_instead_of_a_folder(root: Path, out: Path) -> None:
    error = refused(shard(root), out, NotACheckpointError, says="is a file")
    assert error.expected and error.fix


def test_a_rank_folder_instead_of_the_root(root: Path, out: Path) -> None:
    error = refused(shard(root).parent, out, NotACheckpointError)
    assert error.found == "model_optim_rng.pt"
    assert error.fix == "give the folder that was Megatron's --save"


def test_a_folder_of_something_else(tmp_path: Path, out: Path) -> None:
    (tmp_path / "x").mkdir()
    for k in range(20):
        (tmp_path / "x" / f"file{k:02d}").touch()
    error = refused(tmp_path / "x", out, NotACheckpointError)
    assert error.found and error.found.count(",") == 5


def test_an_adapter(tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_text("")
    refused(folder, out, UnsupportedError, says="adapter")


# Ranks that disagree


def test_another_iteration_on_one_rank(root: Path, out: Path) -> None:
    with edited(shard(root, 1, 1)) as content:
        content["iteration"] = 20
    error = refused(root, out, InconsistentError, says="iteration")
    assert error.found == "20 in mp_rank_01_001"
    assert error.expected == "10, as in mp_rank_00_000"


def test_another_version_on_one_rank(root: Path, out: Path) -> None:
    with edited(shard(root, 0, 1)) as content:
        content["checkpoint_version"] = 2.0
    refused(root, out, InconsistentError, says="checkpoint_version")


@pytest.mark.parametrize(
    ("argument", "value"),
    [("num_layers", 8), ("layernorm_epsilon", 1e-5), ("swiglu", False), ("rotary_base", 500000)],
)
def test_other_arguments_on_one_rank(argument: str, value: object, root: Path, out: Path) -> None:
    with edited(shard(root, 1, 0)) as content:
        assert getattr(content["args"], argument) != value
        setattr(content["args"], argument, value)
    error = refused(root, out, InconsistentError, says="mp_rank_01_000")
    assert "mp_rank_00_000" in str(error.expected)


def test_arguments_without_effect_may_differ(root: Path, out: Path, golden: Golden) -> None:
    """Ranks always differ in some: rank, seeds, addresses."""
    with edited(shard(root, 1, 0)) as content:
        content["args"].master_addr, content["args"].seed = "node17", 99
    mtt_convert.convert(root, out)
    _assert_same(out, golden(TORCH))


def test_a_refused_argument_on_the_last_rank_only(root: Path, out: Path) -> None:
    with edited(shard(root, 1, 1)) as content:
        content["args"].qk_l2_norm = True
    refused(root, out, SourceError, says="qk_l2_norm")


def _change_copy(root: Path, tp: int, pp: int, name: str) -> None:
    """The smallest change: the last bit of one element."""
    with edited(shard(root, tp, pp)) as content:
        model_of(content, name)[name].view(torch.int32)[-1] ^= 1


@pytest.mark.parametrize(("name", "pp"), [(NORM, 0), (FINAL_NORM, 1)])
def test_copies_that_differ(name: str, pp: int, root: Path, out: Path, golden: Golden) -> None:
    _change_copy(root, 1, pp, name)
    error = refused(root, out, InconsistentError)
    assert f"mp_rank_00_00{pp}" in str(error.found) and f"mp_rank_01_00{pp}" in str(error.found)
    assert "--replicated first" in str(error.fix)
    refused(root, out, InconsistentError, replicated="error")
    mtt_convert.convert(root, out, replicated="first")
    _assert_same(out, golden(TORCH))


def test_the_first_copy_differs(root: Path, out: Path, golden: Golden) -> None:
    """`first` takes rank 0's value, whichever is the odd one."""
    _change_copy(root, 0, 0, NORM)
    refused(root, out, InconsistentError)
    mtt_convert.convert(root, out, replicated="first")
    (difference,) = mtt_convert.diff(out, golden(TORCH)).differences
    assert difference.name == "model.layers.0.input_layernorm.weight"


def test_copies_of_another_type(root: Path, out: Path) -> None:
    with edited(shard(root, 1, 0)) as content:
        chunk = model_of(content, NORM)
        chunk[NORM] = chunk[NORM].bfloat16()
    error = refused(root, out, InconsistentError)
    assert error.found == "bfloat16 [64] and float32 [64]"
    refused(root, out, InconsistentError, replicated="first")


def _tie(root: Path) -> None:
    """The same model with a tied output layer: the last stage holds a copy of the embedding."""
    set_arguments(root, untie_embeddings_and_output_weights=False)
    for tp in (0, 1):
        with edited(shard(root, tp, 0)) as content:
            embedding = model_of(content, EMBEDDING)[EMBEDDING]
        with edited(shard(root, tp, 1)) as content:
            model_of(content, HEAD)[HEAD] = embedding


def test_a_tied_copy(root: Path, out: Path) -> None:
    _tie(root)
    result = mtt_convert.convert(root, out)
    assert result.conversion.config["tie_word_embeddings"] is True
    assert result.conversion.plan.num_tensors == 38


def test_a_tied_copy_that_differs(root: Path, out: Path) -> None:
    _tie(root)
    _change_copy(root, 0, 1, HEAD)
    error = refused(root, out, InconsistentError, says="tied output layer")
    assert "mp_rank_00_000" in str(error.found) and "001" in str(error.found)
    with pytest.raises(InconsistentError, match="tied output layer"):
        mtt_convert.convert(root, out, replicated="first")
    own = {"untie_embeddings_and_output_weights": True}
    assert mtt_convert.convert(root, out, overrides=own).conversion.plan.num_tensors == 39


def test_an_output_layer_that_arguments_deny(root: Path, out: Path) -> None:
    """Saying tied of an untied model must not drop its output layer."""
    set_arguments(root, untie_embeddings_and_output_weights=False)
    refused(root, out, InconsistentError, says="tied output layer")


def test_a_rank_of_another_split(root: Path, out: Path) -> None:
    """Rank 1 of a run with TP4: half as many rows."""
    with edited(shard(root, 1, 0)) as content:
        for key in ("model0", "model1"):
            for name, value in content[key].items():
                if isinstance(value, torch.Tensor) and value.ndim == 2:
                    content[key][name] = value[: len(value) // 2].clone()
    refused(root, out, InconsistentError, says="ranks disagree about")


def test_ranks_that_the_arguments_do_not_have(root: Path, out: Path) -> None:
    shutil.copytree(shard(root, 1, 0).parent, root / ITERATION / "mp_rank_02_000")
    error = refused(root, out, InconsistentError, says="mp_rank_02_000")
    assert error.fix == "separate the files of the two runs"


@pytest.mark.parametrize("pp", [0, 1])
def test_one_rank_copied_over_another(pp: int, root: Path, out: Path) -> None:
    """A slip of a copy script: every rank stores its number, so it shows."""
    shutil.copyfile(shard(root, 0, pp), shard(root, 1, pp))
    refused(root, out, InconsistentError)


def test_stages_in_each_other_s_place(root: Path, out: Path) -> None:
    """The layers would come in another order, and nothing else would tell."""
    for tp in (0, 1):
        first, second = shard(root, tp, 0).parent, shard(root, tp, 1).parent
        first.rename(root / "first")
        second.rename(first)
        (root / "first").rename(second)
    refused(root, out, SourceError)


# Too much


def test_an_unknown_parameter(root: Path, out: Path) -> None:
    for tp in (0, 1):
        with edited(shard(root, tp, 0)) as content:
            content["model0"]["decoder.layers.0.mlp.gate.weight"] = torch.ones(4)
    error = refused(root, out, MappingError, says="decoder.layers.0.mlp.gate.weight")
    assert error.expected


def test_a_parameter_that_the_model_does_not_have(root: Path, out: Path) -> None:
    """Known to Megatron, but not part of what the arguments describe: a bias."""
    for tp in (0, 1):
        with edited(shard(root, tp, 0)) as content:
            content["model0"]["decoder.layers.0.self_attention.linear_proj.bias"] = torch.ones(64)
    refused(root, out, MappingError, says="linear_proj.bias")


def test_an_unknown_parameter_of_torch_dist(dist: Path, out: Path) -> None:
    name = "decoder.layers.mlp.gate.weight"
    with edited_metadata(dist) as metadata:
        _rename(metadata, "decoder.layers.self_attention.linear_proj.weight", name, keep=True)
        for index, info in metadata.storage_data.items():
            if index.fqn == name:
                place = dist / ITERATION / info.relative_path
                shutil.copy(place, place.with_name(f"more{place.name}"))
                metadata.storage_data[index] = dataclasses.replace(
                    info, relative_path=f"more{place.name}"
                )
    refused(dist, out, MappingError, says="mlp.gate.weight")


def test_two_parameters_in_one_place(dist: Path, out: Path) -> None:
    old = "decoder.layers.self_attention.linear_proj.weight"
    with edited_metadata(dist) as metadata:
        _rename(metadata, old, "decoder.layers.mlp.gate.weight", keep=True)
    refused(dist, out, CorruptError, says="two chunks in the same bytes")


def _rename(metadata: Any, old: str, new: str, *, keep: bool = False) -> None:
    entries, places = metadata.state_dict_metadata, metadata.storage_data
    entries[new] = entries[old] if keep else entries.pop(old)
    for index in [index for index in places if index.fqn == old]:
        places[type(index)(new, index.offset)] = places[index]


def _extra(content: dict[str, Any]) -> None:
    content["ema"] = {"shadow": [torch.ones(3)]}


def test_tensors_under_an_unknown_key(root: Path, out: Path, golden: Golden) -> None:
    with edited(shard(root, 1, 1)) as content:
        _extra(content)
    error = refused(root, out, MappingError, says="'ema'")
    assert error.found == "ema" and "--skip-key ema" in str(error.fix)
    result = mtt_convert.convert(root, out, skip_keys=["ema"])
    assert result.conversion.checkpoint.dropped["skipped"] == ("ema",)
    _assert_same(out, golden(TORCH))


def test_plain_values_under_unknown_keys(root: Path, out: Path, golden: Golden) -> None:
    """No tensors, no question."""
    with edited(shard(root, 1, 1)) as content:
        content["notes"] = {"who": "me", "when": (1, 2.5, None)}
    mtt_convert.convert(root, out)
    _assert_same(out, golden(TORCH))


@pytest.mark.parametrize("key", ["model", "model0", "model1", QKV, EMBEDDING])
def test_skip_key_drops_no_model_tensor(key: str, root: Path, out: Path, golden: Golden) -> None:
    try:
        mtt_convert.convert(root, out, skip_keys=[key])
    except MTTError:
        assert not out.exists()
    else:
        _assert_same(out, golden(TORCH))


@pytest.mark.parametrize("name", [EMBEDDING, FINAL_NORM, HEAD])
def test_skip_key_drops_no_model_tensor_of_torch_dist(name: str, dist: Path, out: Path) -> None:
    with pytest.raises((IncompleteError, UsageError)):
        mtt_convert.convert(dist, out, skip_keys=[name])
    code, _, err = run("convert", dist, out, "--skip-key", name)
    assert code in (2, 3) and name in err
    assert not out.exists()


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.self_attention.q_layernorm.weight",
        "decoder.layers.mlp.gate.weight",
        "embedding.position_embeddings.weight",
    ],
)
def test_skip_key_makes_no_other_model(name: str, dist: Path, out: Path) -> None:
    """What stands among the layers is part of the model, whatever the arguments say."""
    with edited_metadata(dist) as metadata:
        _rename(metadata, "decoder.layers.self_attention.linear_proj.weight", name, keep=True)
    with pytest.raises(MTTError):
        mtt_convert.convert(dist, out, skip_keys=[name])
    assert not out.exists()


def test_two_models_in_one_file(root: Path, out: Path) -> None:
    """`model` and `model0` are one chunk: which of them counts?"""
    with edited(shard(root)) as content:
        content["model"] = dict(content["model0"])
    refused(root, out, SourceError, says="model")


def test_one_parameter_under_two_spellings(root: Path, out: Path) -> None:
    """Nested and dotted names of one tensor: which of them counts?"""
    for tp in (0, 1):
        with edited(shard(root, tp, 0)) as content:
            chunk = model_of(content, NORM)
            chunk["decoder"] = {"layers.0": {"input_layernorm": {"weight": torch.ones(64)}}}
    refused(root, out, MappingError, says=NORM)


@pytest.mark.parametrize("digits", ["00", "\u0660"], ids=["two zeros", "another script"])
def test_one_layer_under_two_numbers(digits: str, root: Path, out: Path) -> None:
    for tp in (0, 1):
        with edited(shard(root, tp, 0)) as content:
            chunk = model_of(content, NORM)
            chunk[NORM.replace(".0.", f".{digits}.")] = torch.ones(64)
    refused(root, out, SourceError)


def test_a_layer_number_without_end(root: Path, out: Path) -> None:
    for tp in (0, 1):
        with edited(shard(root, tp, 0)) as content:
            chunk = model_of(content, NORM)
            chunk[NORM.replace(".0.", "." + "9" * 5000 + ".")] = torch.ones(64)
    refused(root, out, SourceError)


def test_one_parameter_under_two_names(root: Path, out: Path) -> None:
    """The local and the TransformerEngine name of one norm."""
    for tp in (0, 1):
        with edited(shard(root, tp, 0)) as content:
            chunk = model_of(content, NORM)
            chunk["decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"] = torch.ones(64)
    refused(root, out, MappingError)


def test_a_model_that_is_no_dict(root: Path, out: Path) -> None:
    with edited(shard(root)) as content:
        content["model1"] = list(content["model1"].values())
    refused(root, out, SourceError)


def test_a_value_that_is_no_tensor(root: Path, out: Path) -> None:
    with edited(shard(root)) as content:
        content["model0"][QKV] = 3.5
    refused(root, out, CorruptError, says=QKV)


def test_a_parameter_of_another_shape(root: Path, out: Path) -> None:
    """Both ranks agree, the arguments do not."""
    for tp in (0, 1):
        with edited(shard(root, tp, 0)) as content:
            chunk = model_of(content, QKV)
            chunk[QKV] = chunk[QKV][:-8].clone()
    error = refused(root, out, CorruptError, says="linear_qkv.weight")
    assert (error.found, error.expected) == ("[80, 64]", "[96, 64]")


@pytest.mark.parametrize("shape", [(), (1,), (0, 64), (48,), (48, 64, 1), (64, 48)], ids=str)
def test_a_parameter_of_odd_shape(shape: tuple[int, ...], root: Path, out: Path) -> None:
    for tp in (0, 1):
        with edited(shard(root, tp, 0)) as content:
            model_of(content, QKV)[QKV] = torch.zeros(shape)
    refused(root, out, SourceError, says="linear_qkv.weight")


@pytest.mark.parametrize("rows", [33, 511])
def test_a_gated_matrix_that_cannot_be_halved(rows: int, root: Path, out: Path) -> None:
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    for tp in (0, 1):
        with edited(shard(root, tp, 0)) as content:
            model_of(content, name)[name] = torch.zeros(rows, 64)
    refused(root, out, SourceError, says="linear_fc1.weight")


# Refused by name


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("softmax_type", "off-by-one"),
        ("softmax_scale", 0.5),
        ("attention_output_gate", True),
        ("no_rope_freq", [1, 0, 1, 0]),
        ("window_size", (128, 128)),
        ("qk_l2_norm", True),
        ("num_experts", [8, 8]),
        ("glu_linear_offset", 1.0),
        ("activation_func_clamp_value", 7.0),
        ("apply_residual_connection_post_layernorm", True),
        ("heterogeneous_layers_config_path", "x.json"),
        ("spec", ["my.module", "layers"]),
        ("fp4_param_gather", True),
        ("rope_type", "yarn"),
        ("use_mup", True),
    ],
)
@pytest.mark.parametrize("kind", [TORCH, TORCH_DIST], ids=["torch", "torch_dist"])
def test_arguments_that_change_the_model(
    argument: str, value: object, kind: str, golden: Golden, tmp_path: Path, out: Path
) -> None:
    source = copy_of(golden, kind, tmp_path)
    set_arguments(source, **{argument: value})
    error = refused(source, out, UnsupportedError)
    assert str(error.found).startswith(f"{argument} = ")
    assert f"{argument} = " in str(error.expected)
    assert f"--set {argument}=" in str(error.fix)


def test_arguments_with_an_object_for_a_value(root: Path, out: Path) -> None:
    """A class that was not loaded cannot be compared with the neutral value."""
    body = reduce(named("megatron.core.transformer.enums", "AttnBackend"), number(1))
    for path in shards(root):
        plant_in(path, lambda content: setattr(content["args"], "softmax_type", PLACEHOLDER), body)
    refused(root, out, UnsupportedError, says="softmax_type")


def test_several_arguments_are_named_at_once(root: Path, out: Path) -> None:
    set_arguments(root, qk_l2_norm=True, use_mup=True)
    error = refused(root, out, UnsupportedError)
    assert "qk_l2_norm" in str(error.found) and "use_mup" in str(error.found)


@pytest.mark.parametrize("value", ["yarn", "relative", "mrope"])
def test_positions_that_mtt_does_not_know(value: str, root: Path, out: Path) -> None:
    set_arguments(root, position_embedding_type=value)
    refused(root, out, UnsupportedError, says=f"position_embedding_type = '{value}'")


@pytest.mark.parametrize(
    "dtype",
    ["uint8", "int8", "int32", "bool", "float8_e4m3fn", "float8_e5m2"],
)
def test_weights_that_are_no_plain_numbers(dtype: str, root: Path, out: Path) -> None:
    for tp in (0, 1):
        with edited(shard(root, tp, 0)) as content:
            chunk = model_of(content, QKV)
            chunk[QKV] = chunk[QKV].to(getattr(torch, dtype))
    error = refused(root, out, UnsupportedError, says=QKV)
    assert dtype in str(error.found)
    assert "float32, bfloat16 or float16" in str(error.expected)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "float8_e4m3fn"])
def test_weights_of_torch_dist_that_are_no_plain_numbers(dtype: str, dist: Path, out: Path) -> None:
    with edited_metadata(dist) as metadata:
        places = metadata.storage_data
        for index in places:
            if index.fqn == EMBEDDING:
                place = places[index]
                path = dist / ITERATION / f"new{index.offset[0]}.distcp"
                size = next(
                    c.sizes
                    for c in metadata.state_dict_metadata[EMBEDDING].chunks
                    if c.offsets == index.offset
                )
                torch.save(torch.zeros(size).to(getattr(torch, dtype)), path)
                place.relative_path, place.offset = path.name, 0
                place.length = path.stat().st_size
    error = refused(dist, out, UnsupportedError, says=EMBEDDING)
    assert dtype in str(error.found)


def test_weights_of_mixed_types(root: Path, out: Path) -> None:
    """One rank in another type than the other."""
    with edited(shard(root, 1, 0)) as content:
        chunk = model_of(content, QKV)
        chunk[QKV] = chunk[QKV].half()
    refused(root, out, InconsistentError, says="linear_qkv.weight")


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        ({"zero_pp_rank_0_mp_rank_00_model_states.pt": ""}, "ZeRO stage 3"),
        ({"layer_3_expert_0_mp_rank_00_model_states.pt": ""}, "mixture of experts"),
        ({".zmetadata": ""}, "zarr"),
        ({"model.safetensors": ""}, "without a config.json"),
        ({"model_config.yaml": "", "mp_rank_00": None}, "archive of NeMo, unpacked"),
        ({"model_config.yaml": "", "model_weights.ckpt": ""}, "archive of NeMo, unpacked"),
    ],
)
def test_formats_known_by_name_only(
    names: dict[str, str | None], kind: str, tmp_path: Path, out: Path
) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    for name, content in names.items():
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_text(content)
    refused(folder, out, UnsupportedError, says=kind)


def test_distributed_files_without_metadata(tmp_path: Path, out: Path) -> None:
    """FSDP's checkpoints have nothing else that says what they are."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x/__0_0.distcp").write_bytes(b"")
    error = refused(tmp_path / "x", out, IncompleteError)
    assert error.expected == ".metadata"


def test_empty_files_are_told_how_much_is_expected(root: Path, out: Path) -> None:
    os.truncate(shard(root), 0)
    error = refused(root, out, CorruptError)
    assert (error.found, error.expected) == ("0 bytes", "at least 1")


def test_a_version_that_is_no_number(root: Path, out: Path) -> None:
    with edited(shard(root)) as content:
        content["checkpoint_version"] = float("nan")
    refused(root, out, CorruptError, says="no readable checkpoint_version")


def test_sizes_of_arrays_that_are_none(golden: Golden, tmp_path: Path, out: Path) -> None:
    root = shutil.copytree(golden("mcore/tiny/core_0.15/zarr"), tmp_path / "zarr")
    path = next(root.rglob(".zarray"))
    path.write_text(path.read_text().replace('"shape": [', '"shape": [-1,'))
    refused(root, out, CorruptError, says=".zarray is inconsistent")


def test_another_sharded_backend(dist: Path, out: Path) -> None:
    path = dist / ITERATION / "metadata.json"
    path.write_text(path.read_text().replace("torch_dist", "zarr"))
    error = refused(dist, out, UnsupportedError)
    assert (error.found, error.expected) == ("zarr", "torch_dist")


# Reading what the system will not give


def test_a_file_that_cannot_be_opened(
    root: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions: simulated, since the tests may run as root."""
    real = os.open

    def denied(file: Any, *args: Any, **kwargs: Any) -> Any:
        if str(file).endswith("mp_rank_01_000/model_optim_rng.pt"):
            raise PermissionError(13, "Permission denied", str(file))
        return real(file, *args, **kwargs)

    monkeypatch.setattr(os, "open", denied)
    refused(root, out, SourceError, says="cannot be read")


def test_a_disk_that_fails_while_it_is_read(
    root: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fails)
    refused(root, out, SourceError, says="Input/output error")


def test_a_folder_in_the_place_of_a_file(root: Path, out: Path) -> None:
    shard(root, 1, 1).unlink()
    shard(root, 1, 1).mkdir()
    refused(root, out, IncompleteError)


def test_links_are_followed(root: Path, out: Path, tmp_path: Path, golden: Golden) -> None:
    """Hub caches and shared file systems are made of them."""
    for k, path in enumerate(shards(root)):
        path.rename(tmp_path / f"blob{k}")
        path.symlink_to(tmp_path / f"blob{k}")
    (tmp_path / "link").symlink_to(root)
    mtt_convert.convert(tmp_path / "link", out)
    _assert_same(out, golden(TORCH))


def test_a_link_that_leads_nowhere(root: Path, out: Path, tmp_path: Path) -> None:
    shard(root, 1, 1).unlink()
    shard(root, 1, 1).symlink_to(tmp_path / "nowhere")
    refused(root, out, IncompleteError, says="mp_rank_01_001")


@pytest.mark.parametrize("command", ["inspect", "diff", "convert --dry-run"])
def test_every_command_refuses_in_the_same_shape(command: str, root: Path, tmp_path: Path) -> None:
    os.truncate(shard(root), 100)
    name, *options = command.split()
    other = [] if name == "inspect" else [root if name == "diff" else tmp_path / "out"]
    code, out, err = run(name, root, *other, *options)
    assert (code, out) == (3, "")
    assert err.startswith(f"error: {shard(root)} is truncated or damaged\n  found:    100 bytes")
