"""Experts of ranks under global numbers, whichever module has them; wrong ways are caught."""

from __future__ import annotations

import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from mtt_convert import convert, diff, open_checkpoint
from mtt_convert import experts as experts_module
from mtt_convert.checkpoint import Shard
from mtt_convert.dtypes import DTYPES
from mtt_convert.errors import (
    CorruptError,
    IncompleteError,
    InconsistentError,
    LayoutError,
    UnsupportedError,
)
from mtt_convert.experts import GROUPED, SEQUENTIAL, TE_GROUPED, numbered, spelled
from mtt_convert.logits import compare_logits
from mtt_convert.tensors import LazyTensor, zeros
from tests.convert.surgery import copy_of, edited, megatron_modules

from .test_row_order import elements, stored

Golden = Callable[[str], Path]
LAYER = "decoder.layers.0.mlp"
ROUTER = f"{LAYER}.router.weight"
HIDDEN, ROWS, WIDTH = 4, 6, 3


def blank(*shape: int) -> LazyTensor:
    return zeros(DTYPES["float32"], shape)


def rank(ep: int, names: dict[str, tuple[int, ...]], count: int = 4) -> Shard:
    tensors = {ROUTER: blank(count, HIDDEN)}
    tensors |= {f"{LAYER}.experts.{name}": blank(*shape) for name, shape in names.items()}
    return Shard(f"rank {ep}", tensors, ep=ep)


SPELLINGS: dict[str, list[dict[str, tuple[int, ...]]]] = {
    "SequentialMLP": [
        {f"local_experts.{k}.linear_fc{n}.weight": () for k in range(2) for n in (1, 2)}
    ]
    * 2,
    "TEGroupedMLP": [{f"linear_fc{n}.weight{k}": () for k in range(2) for n in (1, 2)}] * 2,
    "GroupedMLP": [{"weight1": (HIDDEN, 2 * ROWS), "weight2": (2 * WIDTH, HIDDEN)}] * 2,
    "stacked": [
        {
            "experts.linear_fc1.weight": (4, ROWS, HIDDEN),
            "experts.linear_fc2.weight": (4, HIDDEN, WIDTH),
        }
    ],
    "singleton": [{f"experts.{e}.linear_fc{n}.weight": () for e in range(4) for n in (1, 2)}],
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_module_has_the_same_experts(spelling: str) -> None:
    shards = numbered([rank(ep, names) for ep, names in enumerate(SPELLINGS[spelling])])
    found = [name for shard in shards for name in shard.tensors if name != ROUTER]
    assert sorted(found) == sorted(
        f"{LAYER}.experts.{e}.linear_fc{n}.weight" for e in range(4) for n in (1, 2)
    )
    assert f"{LAYER}.experts.3.linear_fc1.weight" in shards[-1].tensors


def test_layers_without_experts_are_left_alone() -> None:
    shard = Shard("file", {f"{LAYER}.linear_fc1.weight": blank(2, 2)})
    assert numbered([shard]) == (shard,)


def test_the_shape_of_grouped_experts_lies(tmp_path: Path) -> None:
    """What a rank multiplies is [experts, hidden, rows], whatever the matrix is called."""
    true = np.arange(2 * HIDDEN * ROWS, dtype=np.float32).reshape(2, HIDDEN, ROWS)
    matrix = stored(tmp_path, "weight1", true.reshape(HIDDEN, 2 * ROWS))
    shard = Shard("file", {ROUTER: blank(2, HIDDEN), f"{LAYER}.experts.weight1": matrix})
    tensors = numbered([shard])[0].tensors
    for number in range(2):
        expert = tensors[f"{LAYER}.experts.{number}.linear_fc1.weight"]
        assert np.array_equal(elements(expert), true[number].T)
        as_it_looks = true.reshape(HIDDEN, 2 * ROWS)[:, number * ROWS : (number + 1) * ROWS].T
        assert not np.array_equal(elements(expert), as_it_looks)


@pytest.mark.parametrize("module", [SEQUENTIAL, TE_GROUPED, GROUPED])
def test_spelling_is_undone(module: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((4, 2, ROWS, HIDDEN)).astype(np.float32)
    names = {
        f"{LAYER}.experts.{e}.linear_fc{n}.weight": stored(tmp_path, f"{e}{n}", values[e, n - 1])
        for e in (2, 3)
        for n in (1, 2)
    }
    entries = spelled(names, module, first=2)
    other = Shard("rank 0", {ROUTER: blank(4, HIDDEN)}, ep=0)
    back = numbered([other, Shard("rank 1", {ROUTER: blank(4, HIDDEN), **entries}, ep=1)])[1]
    assert back.tensors.keys() - {ROUTER} == names.keys()
    for name, tensor in names.items():
        assert np.array_equal(elements(back.tensors[name]), elements(tensor))


@pytest.mark.parametrize(
    ("shards", "error", "words"),
    [
        (
            [rank(0, {"local_experts.0.linear_fc1.weight": ()})],
            IncompleteError,
            "linear_fc1.weight of 1 experts",
        ),
        (
            [rank(0, {"linear_fc1.weight1": (), "linear_fc1.weight2": ()}, count=2)],
            IncompleteError,
            "numbers 1 to 2",
        ),
        ([rank(0, {}, count=3), rank(1, {"weight1": (4, 4)}, count=3)], InconsistentError, "2"),
        ([rank(0, {"weight1": (4, 7)})], CorruptError, "cannot be divided into experts"),
        ([rank(0, {"weight2": (4,)})], CorruptError, "cannot be divided into experts"),
        ([rank(0, {"gate.weight": (4, 4)})], CorruptError, "no part of an expert"),
        (
            [Shard("file", {f"{LAYER}.experts.weight1": blank(4, 4)})],
            IncompleteError,
            "router.weight is missing",
        ),
    ],
)
def test_experts_that_are_not_whole(
    shards: list[Shard], error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as caught:
        numbered(shards)
    assert words in str(caught.value)


def test_experts_of_swapped_ranks_are_another_model(
    golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names and shapes are those of the right one; only Megatron's logits tell."""
    source = golden("mcore/mixtral/ep2/torch")
    right = experts_module.numbered

    def swapped(shards: list[Shard]) -> tuple[Shard, ...]:
        return right([replace(shard, ep=1 - shard.ep) for shard in shards])

    monkeypatch.setattr(experts_module, "numbered", swapped)
    convert(source, tmp_path / "out", tokenizer="none")
    assert compare_logits(tmp_path / "out", golden("mcore/mixtral/logits.npz")) > 1e-2


def test_a_grouped_matrix_as_it_looks_is_another_model(
    golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_it_looks(name: str, tensor: LazyTensor, kind: str, count: int) -> list[LazyTensor]:
        axis = 1 if kind == "weight1" else 0
        return [part.permute(1, 0) for part in tensor.chunk(count, axis)]

    monkeypatch.setattr(experts_module, "_apart", as_it_looks)
    convert(golden("mcore/mixtral_bf16/grouped_ep2/torch"), tmp_path / "out", tokenizer="none")
    assert compare_logits(tmp_path / "out", golden("mcore/mixtral_bf16/logits.npz")) > 1e-2


SOURCES = {
    "mcore/mixtral/tp2ep2/torch": (1, 2, 4),
    "mcore-te/moe_mixed/ep2/torch_dist": (1, 4),
    "mcore/mla/tp2pp1/torch": (2,),
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
def test_any_layout_holds_the_same_bits(
    name: str, impl: str, golden: Golden, tmp_path: Path
) -> None:
    """Expert ranks, their own tensor parallelism, pipelines with and without virtual stages."""
    layouts = [
        {"tp": tp, "ep": ep, "etp": etp, "pp": pp, "vpp": vpp}
        for ep in SOURCES[name]
        for tp, etp in ((1, None), (2, 1), (2, None))
        for pp, vpp in ((1, None), (2, None), (2, 2))
    ]
    for number, (to, layout) in enumerate(product(("torch", "torch_dist"), layouts)):
        if (number + len(impl)) % 8:
            continue  # an eighth of them, another one for each spec
        target = tmp_path / "out"
        convert(golden(name), target, to=to, transformer_impl=impl, **layout)
        assert diff(golden(name), target).differences == (), (to, layout)
        shutil.rmtree(target)


def test_stages_of_which_one_begins_with_experts(golden: Golden, tmp_path: Path) -> None:
    """Layer 0 of a rank is dense or has experts; without other norms only that tells the spec."""
    source = copy_of(golden, "mcore/mla/tp2pp1/torch", tmp_path)
    for path in source.rglob("model_optim_rng.pt"):
        with edited(path) as content:
            content["args"].qk_layernorm = False
            model = content["model"]
            for name in [name for name in model if re.search(r"\.(q|kv)_layernorm\.", name)]:
                del model[name]
    target = tmp_path / "out"
    convert(source, target, to="torch", transformer_impl="local", pp=2)
    assert open_checkpoint(target).dialect == "core_local"
    assert diff(source, target).differences == ()


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
def test_every_module_is_written_and_read(
    impl: str, grouped: bool, golden: Golden, tmp_path: Path
) -> None:
    source = copy_of(golden, "mcore/mixtral/ep2/torch", tmp_path)
    for path in source.rglob("model_optim_rng.pt"):
        with edited(path) as content:
            content["args"].moe_grouped_gemm = grouped
    target = tmp_path / "out"
    convert(source, target, to="torch", transformer_impl=impl, tp=2, ep=2)
    assert diff(source, target).differences == ()
    names = {name for shard in _raw(target) for name in shard.tensors}
    wanted = "local_experts.0." if not grouped else "weight1" if impl == "local" else "weight0"
    assert any(wanted in name for name in names)


def _raw(folder: Path) -> tuple[Shard, ...]:
    from mtt_convert import formats

    reader, place = formats.find(str(folder), None)
    return reader.open_folder(place, frozenset()).shards


def test_ranks_that_write_with_narrow_experts(golden: Golden, tmp_path: Path) -> None:
    """TP 2, EP 2, ETP 1: two ranks hold everything, and Megatron writes no other files."""
    target = tmp_path / "out"
    convert(golden("mcore/mixtral/tp2ep2/torch"), target, to="torch", tp=2, ep=2, etp=1)
    folders = sorted(path.parent.name for path in target.rglob("*.pt"))
    assert folders == ["mp_rank_00_000", "mp_rank_01_001"]
    checkpoint = open_checkpoint(target)
    assert str(checkpoint.layout) == "TP2 x PP1 x EP2 x ETP1"
    assert diff(golden("mcore/mixtral/tp2ep2/torch"), target).differences == ()


@pytest.mark.parametrize("folder", ["mp_rank_00_001", "mp_rank_01_000"])
def test_a_missing_rank_is_named(folder: str, golden: Golden, tmp_path: Path) -> None:
    source = copy_of(golden, "mcore/mixtral/tp2ep2/torch", tmp_path)
    shutil.rmtree(next(source.rglob(folder)))
    with pytest.raises(IncompleteError) as caught:
        open_checkpoint(source)
    assert f"{folder}/model_optim_rng.pt" in str(caught.value)
    assert "3 of 4 ranks" in str(caught.value)


def test_a_missing_rank_of_an_incomplete_grid(golden: Golden, tmp_path: Path) -> None:
    target = tmp_path / "out"
    convert(golden("mcore/mixtral/tp2ep2/torch"), target, to="torch", tp=2, pp=2, ep=4, etp=1)
    shutil.rmtree(next(target.rglob("mp_rank_01_001_003")))
    with pytest.raises(IncompleteError, match="a file of expert rank 3 at pipeline rank 1"):
        open_checkpoint(target)


def test_two_numbers_of_a_folder_are_told_by_the_arguments(golden: Golden, tmp_path: Path) -> None:
    """mp_rank_00_001 is expert rank 1 or pipeline rank 1."""
    by_experts, by_stages = tmp_path / "experts", tmp_path / "stages"
    source = golden("mcore/mixtral/ep2/torch")
    convert(source, by_experts, to="torch", ep=2)
    convert(source, by_stages, to="torch", pp=2)
    for root, layout in ((by_experts, "TP1 x PP1 x EP2"), (by_stages, "TP1 x PP2")):
        assert sorted(p.name for p in root.glob("*/mp_rank_*")) == [
            "mp_rank_00_000",
            "mp_rank_00_001",
        ]
        assert str(open_checkpoint(root).layout) == layout
        assert diff(source, root).differences == ()


def test_wider_experts_than_layers_need_a_format_without_ranks(
    golden: Golden, tmp_path: Path
) -> None:
    source = golden("mcore/mixtral/ep2/torch")
    with pytest.raises(LayoutError, match="would write the same file"):
        convert(source, tmp_path / "torch", to="torch", tp=1, ep=2, etp=2)
    convert(source, tmp_path / "dist", to="torch_dist", tp=1, ep=2, etp=2)
    assert diff(source, tmp_path / "dist").differences == ()
    assert open_checkpoint(tmp_path / "dist").args["world_size"] == 4


def test_the_bias_of_experts_stays_in_float32(golden: Golden, tmp_path: Path) -> None:
    """Whatever the others are cast to, in Megatron's checkpoints and Hugging Face's folders."""
    source = golden("mcore/moe_mixed/ep2/torch")
    for to in ("torch", "torch_dist", "hf"):
        convert(source, tmp_path / to, to=to, dtype="bfloat16", tokenizer="none")
        tensors = open_checkpoint(tmp_path / to).tensors
        kinds = {
            name.endswith(".expert_bias"): tensor.dtype.name for name, tensor in tensors.items()
        }
        assert kinds == {True: "float32", False: "bfloat16"}, to


def test_a_newer_name_of_the_layer_for_further_tokens(golden: Golden, tmp_path: Path) -> None:
    """core_v0.18 calls it `mtp_model_layer` in `torch` checkpoints."""
    source = copy_of(golden, "mcore/mtp/tp2pp2/torch", tmp_path)
    for path in source.rglob("mp_rank_*_001/model_optim_rng.pt"):
        with edited(path) as content:
            model = content["model"]
            for name in [name for name in model if ".transformer_layer." in name]:
                newer = name.replace(".transformer_layer.", ".mtp_model_layer.")
                model[newer] = model.pop(name)
    assert diff(golden("mcore/mtp/tp2pp2/torch"), source).differences == ()


def test_copies_of_the_embedding_for_further_tokens_are_compared(
    golden: Golden, tmp_path: Path
) -> None:
    """The last stage looks tokens up again, and must have the same table."""
    source = copy_of(golden, "mcore/mtp/tp2pp2/torch", tmp_path)
    with edited(next(source.rglob("mp_rank_01_001/model_optim_rng.pt"))) as content:
        content["model"]["embedding.word_embeddings.weight"][3, 5] += 1
    with pytest.raises(InconsistentError, match=r"copies of embedding.word_embeddings.weight"):
        convert(source, tmp_path / "out", tokenizer="none")


def test_dense_weights_that_differ_between_expert_ranks(golden: Golden, tmp_path: Path) -> None:
    source = copy_of(golden, "mcore/mixtral/ep2/torch", tmp_path)
    name = "decoder.layers.1.mlp.router.weight"
    with edited(next(source.rglob("mp_rank_00_001/model_optim_rng.pt"))) as content:
        content["model"][name][0, 0] += 1
    with pytest.raises(InconsistentError, match=f"copies of {name}"):
        convert(source, tmp_path / "out", tokenizer="none")


def test_swapped_files_of_expert_ranks(golden: Golden, tmp_path: Path) -> None:
    source = copy_of(golden, "mcore/mixtral/ep2/torch", tmp_path)
    first, second = sorted(source.rglob("mp_rank_*"))
    first.rename(source / "first")
    second.rename(first)
    (source / "first").rename(second)
    with pytest.raises(InconsistentError, match="holds the file of another rank"):
        open_checkpoint(source)


def test_experts_that_are_older_than_megatron_core_are_named(
    golden: Golden, tmp_path: Path
) -> None:
    source = copy_of(golden, "mcore/mixtral/ep2/torch", tmp_path)
    for path in source.rglob("model_optim_rng.pt"):
        with edited(path) as content:
            model = content["model"]
            for name in [name for name in model if ".experts.local_experts." in name]:
                model[name.replace(".experts.local_experts.", ".local_experts.")] = model.pop(name)
    with pytest.raises(UnsupportedError, match="experts from before Megatron-Core"):
        open_checkpoint(source)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", ["torch_dcp", "fsdp_dtensor"])
def test_experts_of_fsdp(kind: str, golden: Golden, tmp_path: Path) -> None:
    """Saved by torch itself under the names of handle_experts_in_state_dict and, for Megatron-FSDP,
    handle_swiglu_in_state_dict (core/transformer/fsdp_dtensor_checkpoint.py, 0.16.1)."""
    source = golden("mcore-te/mixtral/grouped_ep2/torch")
    entries: dict[str, object] = {"iteration": 10, "checkpoint_version": 3.0}
    for rank, path in enumerate(sorted(source.rglob("model_optim_rng.pt"))):
        with megatron_modules():
            content = torch.load(path, weights_only=False)
        args = {n: v for n, v in vars(content["args"]).items() if is_plain(v)}
        entries["args"] = Namespace(**args)
        for name, tensor in content["model"].items():
            if name.endswith("_extra_state"):
                continue
            if hit := re.fullmatch(r"(.+\.experts\.linear_fc[12]\.weight)(\d+)", name):
                name = f"{hit[1]}{int(hit[2]) + 2 * rank}"
            if kind == "torch_dcp":
                entries[f"model.{name}"] = tensor.clone()
            elif "linear_fc1.weight" in name:
                gate, up = tensor.chunk(2)
                entries |= {f"model.module.{name}_w": gate.clone()}
                entries |= {f"model.module.{name}_v": up.clone()}
            else:
                entries[f"model.module.{name}"] = tensor.clone()
    folder = tmp_path / "out" / "iter_0000010"
    folder.mkdir(parents=True)
    (tmp_path / "out" / "latest_checkpointed_iteration.txt").write_text("10")
    dcp.save(entries, checkpoint_id=folder, no_dist=True)
    assert open_checkpoint(tmp_path / "out").format == kind
    assert diff(source, tmp_path / "out").differences == ()


def is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list))


def test_experts_with_biases_go_to_hugging_face_only(golden: Golden, tmp_path: Path) -> None:
    """Megatron-Core's router has a bias then, since 0.15, and these checkpoints have none."""
    source = copy_of(golden, "mcore/mixtral/ep2/torch", tmp_path)
    for path in source.rglob("model_optim_rng.pt"):
        with edited(path) as content:
            content["args"].add_bias_linear = True
            model = content["model"]
            for name in [n for n in model if n.endswith(("fc1.weight", "fc2.weight"))]:
                model[name.replace("weight", "bias")] = torch.randn(len(model[name]))
            for name in [n for n in model if n.endswith(("qkv.weight", "proj.weight"))]:
                model[name.replace("weight", "bias")] = torch.randn(len(model[name]))
    # Both ranks have the same attention.
    ranks = sorted(source.rglob("model_optim_rng.pt"))
    with edited(ranks[0]) as first, edited(ranks[1]) as second:
        for name, tensor in first["model"].items():
            if ".self_attention." in name and name.endswith(".bias"):
                second["model"][name] = tensor
    convert(source, tmp_path / "hf", tokenizer="none")
    assert diff(source, tmp_path / "hf").differences == ()
    with pytest.raises(UnsupportedError, match="router has a bias"):
        convert(tmp_path / "hf", tmp_path / "torch", to="torch", tokenizer="none")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mlp.router.bias", "a router with a bias"),
        ("self_attention.linear_qkv_down_proj.weight", "one down projection"),
        ("mlp.deepspeed_moe.gate.wg.weight", "from before Megatron-Core"),
    ],
)
def test_layers_that_are_refused_by_name(
    name: str, kind: str, golden: Golden, tmp_path: Path
) -> None:
    source = copy_of(golden, "mcore/mixtral/ep2/torch", tmp_path)
    for path in source.rglob("model_optim_rng.pt"):
        with edited(path) as content:
            content["model"][f"decoder.layers.1.{name}"] = torch.zeros(4, 4)
    with pytest.raises(UnsupportedError, match=kind) as caught:
        open_checkpoint(source)
    assert name in str(caught.value.found)


def test_arguments_that_deny_experts(golden: Golden, tmp_path: Path) -> None:
    """What is there instead of what is missing says that files are not."""
    with pytest.raises(IncompleteError, match="6 of 27 parameters are missing") as caught:
        open_checkpoint(golden("mcore/moe_mixed/ep2/torch"), overrides={"num_experts": None})
    assert "36 of another model: decoder.layers.1.mlp.router.weight" in str(caught.value.found)
    assert "--set" in str(caught.value.fix)


def test_experts_without_arguments(golden: Golden, tmp_path: Path) -> None:
    source = copy_of(golden, "mcore/moe_mixed/ep2/torch", tmp_path)
    shutil.rmtree(next(source.rglob("mp_rank_00_001")))
    path = next(source.rglob("model_optim_rng.pt"))
    path.parent.rename(path.parents[1] / "mp_rank_00")
    with edited(next(source.rglob("model_optim_rng.pt"))) as content:
        del content["args"]
        model = content["model"]
        for name in [name for name in model if "router" in name]:
            model[name] = model[name][:2]
    with pytest.raises(UnsupportedError, match="shapes alone do not say") as caught:
        open_checkpoint(source)
    assert "mixture of experts" in str(caught.value.found)
