"""Orders of rows on one rank: taken apart and put together as arithmetic on row numbers says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mtt_convert.architecture import Architecture
from mtt_convert.checkpoint import Shard
from mtt_convert.dtypes import DTYPES
from mtt_convert.reading import FileReader, stream
from mtt_convert.row_order import gate_first, in_head_order
from mtt_convert.tensors import MEAN, SUM, SUM_OF_PARTS, LazyTensor, combined, concat

QKV = "decoder.layers.0.self_attention.linear_qkv.{}"
FC1 = "decoder.layers.0.mlp.linear_fc1.{}"


def architecture(heads: int, groups: int, channels: int = 2) -> Architecture:
    return Architecture(
        num_layers=1,
        hidden_size=3,
        ffn_hidden_size=4,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=channels,
        padded_vocab_size=8,
        max_position_embeddings=8,
        layernorm_epsilon=1e-5,
        activation="silu",
        gated_linear_unit=True,
    )


def stored(folder: Path, name: str, values: np.ndarray) -> LazyTensor:
    path = folder / name
    path.write_bytes(values.astype(np.float32).tobytes())
    return LazyTensor.in_file(DTYPES["float32"], values.shape, str(path), 0)


def elements(tensor: LazyTensor) -> np.ndarray:
    with FileReader() as reader:
        data = b"".join(bytes(window) for window in stream(tensor, reader))
    return np.frombuffer(data, np.float32).reshape(tensor.shape)


def head_rows(heads: int, groups: int, channels: int, first: int = 0) -> np.ndarray:
    """Row numbers by head: queries of a group, its key, its value."""
    count = (heads + 2 * groups) * channels
    return first + np.arange(count).reshape(groups, heads // groups + 2, channels)


def in_order(rows: np.ndarray, order: str) -> np.ndarray:
    """The same rows in another order, by numpy alone."""
    per_group = rows.shape[1] - 2
    if order == "element":
        return rows.transpose(0, 2, 1).ravel()
    queries, keys, values = rows[:, :per_group], rows[:, -2], rows[:, -1]
    if order == "paired":
        return np.concatenate([queries.ravel(), rows[:, -2:].ravel()])
    return np.concatenate([part.ravel() for part in (queries, keys, values)])


@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    ("order", "heads", "groups"),
    [("block", 4, 4), ("block", 4, 2), ("element", 4, 4), ("paired", 8, 2), ("head", 4, 2)],
)
def test_rows_of_each_rank(
    order: str, heads: int, groups: int, tp: int, joined: bool, kind: str, tmp_path: Path
) -> None:
    """Whether ranks are apart, or one after another in one tensor already."""
    name, model = QKV.format(kind), architecture(heads, groups)
    size = (heads + 2 * groups) * 2 // tp
    wanted, parts = [], []
    for rank in range(tp):
        rows = head_rows(heads // tp, groups // tp, 2, rank * size)
        wanted.append(rows.ravel())
        mixed = rows.ravel() if order == "head" else in_order(rows, order)
        values = mixed[:, None] * 10 + np.arange(3) if kind == "weight" else mixed
        parts.append(stored(tmp_path, str(rank), values))
    tensors = [concat(parts)] if joined else parts
    held = {name: [Shard("file", {name: tensor}, tp=n) for n, tensor in enumerate(tensors)]}
    found = in_head_order(held, order, model, tp, len(tensors))[name]
    numbers = np.concatenate([elements(shard.tensors[name]) for shard in found])
    if kind == "weight":
        assert (numbers % 10 == np.arange(3)).all()
        numbers = numbers[:, 0] // 10
    assert (numbers == np.concatenate(wanted)).all()


@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("order", ["block", "element", "paired", "head"])
def test_keys_and_values_of_cross_attention(
    order: str, tp: int, joined: bool, kind: str, tmp_path: Path
) -> None:
    """[g, (key, value), d] from all keys and all values, or from pairs of channels."""
    name, groups = f"decoder.layers.0.cross_attention.linear_kv.{kind}", 4 // tp
    parts, wanted = [], []
    for rank in range(tp):
        rows = rank * 16 + np.arange(groups * 2 * 2).reshape(groups, 2, 2)
        wanted.append(rows.ravel())
        axes = {"block": (1, 0, 2), "element": (0, 2, 1)}.get(order, (0, 1, 2))
        mixed = rows.transpose(axes).ravel()
        values = mixed[:, None] * 10 + np.arange(3) if kind == "weight" else mixed
        parts.append(stored(tmp_path, str(rank), values))
    tensors = [concat(parts)] if joined else parts
    held = {name: [Shard("file", {name: tensor}, tp=n) for n, tensor in enumerate(tensors)]}
    found = in_head_order(held, order, architecture(4, 4), tp, len(tensors))[name]
    numbers = np.concatenate([elements(shard.tensors[name]) for shard in found])
    if kind == "weight":
        assert (numbers % 10 == np.arange(3)).all()
        numbers = numbers[:, 0] // 10
    assert (numbers == np.concatenate(wanted)).all()


@pytest.mark.parametrize("joined", [False, True])
def test_gates_come_first(joined: bool, tmp_path: Path) -> None:
    name = FC1.format("weight")
    parts = [
        stored(tmp_path, str(rank), (rank * 100 + np.arange(4))[:, None] * np.ones(3))
        for rank in (0, 1)
    ]
    tensors = [concat(parts)] if joined else parts
    held = {name: [Shard("file", {name: tensor}, tp=n) for n, tensor in enumerate(tensors)]}
    found = gate_first(held, architecture(2, 2), 2, len(tensors))[name]
    rows = np.concatenate([elements(shard.tensors[name]) for shard in found])[:, 0]
    assert rows.tolist() == [2, 3, 0, 1, 102, 103, 100, 101]


def test_other_tensors_stay(tmp_path: Path) -> None:
    name = "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
    held = {name: [Shard("file", {name: stored(tmp_path, "x", np.arange(16))})]}
    assert in_head_order(dict(held), "block", architecture(2, 2), 1, 1) == held
    assert gate_first(dict(held), architecture(2, 2), 1, 1) == held


# ---- sums and means


def test_sums_and_means_are_windows_like_any_other(tmp_path: Path) -> None:
    """Larger than a window, cut and turned: element by element what numpy computes."""
    values = np.random.default_rng(0).normal(size=(3, 1100, 700)).astype(np.float32)
    parts = [stored(tmp_path, str(k), value) for k, value in enumerate(values)]
    exact = values.astype(np.float64)
    mean, total = combined(parts, MEAN), combined(parts, SUM)
    assert (elements(mean) == (exact.sum(0) / 3).astype(np.float32)).all()
    assert (elements(total) == exact.sum(0).astype(np.float32)).all()
    turned = total.permute(1, 0).narrow(0, 5, 600)
    assert (elements(turned) == exact.sum(0).astype(np.float32).T[5:605]).all()
    assert mean.pieces[0].paths == tuple(str(tmp_path / str(k)) for k in range(3))


def test_copies_are_not_parts(tmp_path: Path) -> None:
    values = np.arange(600_000, dtype=np.float32)
    last = values.copy()
    last[-1] += 1
    a, b, c = (stored(tmp_path, str(k), v) for k, v in enumerate((values, values, last)))
    assert (elements(combined([a, b], SUM_OF_PARTS)) == values).all()
    assert (elements(combined([a, c], SUM_OF_PARTS)) == values + last).all()
    assert (elements(combined([a, b], SUM)) == 2 * values).all()


@pytest.mark.parametrize("value", [np.nan, -0.0, np.inf, 1e-45])
def test_the_mean_of_copies_is_the_copy(value: float, tmp_path: Path) -> None:
    bits = np.array([value], np.float32)
    parts = [stored(tmp_path, str(k), bits) for k in range(3)]
    assert elements(combined(parts, MEAN)).tobytes() == bits.tobytes()
