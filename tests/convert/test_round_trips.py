"""Any model to any layout in any format and back: the same bits, and the same files.

Models are drawn at random: their sizes, whether they have biases, gates, norms of queries, tied
heads. So are layouts. Weights are random numbers, padding rows included.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import mtt_convert
from mtt_convert import LayoutError
from mtt_convert.architecture import Architecture
from mtt_convert.checkpoint import Layout
from mtt_convert.dtypes import DTYPES
from mtt_convert.families import FAMILIES
from mtt_convert.layouts import plan_stages
from mtt_convert.parameters import expected
from mtt_convert.tensors import zeros

EXAMPLES = settings(max_examples=25)
WEIGHTS = "model.safetensors"


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    """A tiny model that Megatron-Core can compute."""
    groups = draw(st.sampled_from([1, 2, 4]))
    heads = groups * draw(st.sampled_from([1, 2, 4]))
    positions = draw(st.sampled_from(["learned_absolute", "rope", "none"]))
    activation, gated = draw(
        st.sampled_from(
            [("gelu", False), ("gelu_tanh", False), ("silu", True), ("squared_relu", False)]
        )
    )
    biases = draw(st.booleans())
    rows = draw(st.integers(5, 90))
    return Architecture(
        num_layers=draw(st.integers(1, 4)),
        hidden_size=draw(st.sampled_from([8, 12, 16])),
        ffn_hidden_size=draw(st.sampled_from([8, 16, 24])),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=draw(st.sampled_from([2, 4, 6])),
        padded_vocab_size=rows,
        vocab_size=rows,
        max_position_embeddings=draw(st.integers(1, 20)),
        position_embedding_type=positions,
        rotary_base=draw(st.sampled_from([10000.0, 5e5])) if positions == "rope" else 10000.0,
        normalization=draw(st.sampled_from(["LayerNorm", "RMSNorm"])),
        layernorm_epsilon=draw(st.sampled_from([1e-5, 1e-6])),
        layernorm_zero_centered_gamma=draw(st.booleans()),
        activation=activation,
        gated_linear_unit=gated,
        add_bias_linear=biases,
        add_qkv_bias=biases or draw(st.booleans()),
        qk_layernorm=draw(st.booleans()),
        untie_embeddings_and_output_weights=draw(st.booleans()),
    )


@dataclass(frozen=True)
class Options:
    """A Megatron target."""

    to: str
    tp: int
    pp: int
    vpp: int
    transformer_impl: str
    make_vocab_size_divisible_by: int = 4


def targets(architecture: Architecture) -> st.SearchStrategy[Options]:
    """Megatron targets that a model can have."""
    sizes = itertools.product((1, 2, 4), (1, 2, 3), (1, 2))
    layouts = [Layout(*size) for size in sizes if fits(architecture, Layout(*size))]
    return st.builds(
        lambda to, layout, impl: Options(to, layout.tp, layout.pp, layout.vpp, impl),
        st.sampled_from(["torch", "torch_dist"]),
        st.sampled_from(layouts),
        st.sampled_from(["transformer_engine", "local"]),
    )


def models_with_targets(num_targets: int) -> st.SearchStrategy:
    """A model, and a list of so many targets at most."""
    return architectures().flatmap(
        lambda a: st.tuples(st.just(a), st.lists(targets(a), min_size=1, max_size=num_targets))
    )


def fits(architecture: Architecture, layout: Layout) -> bool:
    try:
        plan_stages(architecture, layout)
    except LayoutError:
        return False
    return True


@pytest.fixture(scope="module")
def workplace() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="mtt-round-trips-"))
    yield folder
    shutil.rmtree(folder)


def fresh(workplace: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=workplace))


def random_model(architecture: Architecture, folder: Path, seed: int) -> Path:
    """A Hugging Face folder with random weights."""
    family = FAMILIES["mtt"]
    blank = {n: zeros(DTYPES["float32"], shape) for n, shape in expected(architecture).items()}
    shapes = {n: t.shape for n, t in family.rules(architecture).apply(blank, architecture).items()}
    random = np.random.default_rng(seed)
    folder.mkdir()
    save_file(
        {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    config = {"model_type": "mtt", **family.config(architecture), "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def convert(source: Path, target: Path, options: Options | None = None, **more: Any) -> Path:
    chosen: Mapping[str, Any] = vars(options) if options else {"to": "hf"}
    mtt_convert.convert(source, target, **chosen, **more)
    return target


def weight_files(root: Path) -> dict[str, bytes]:
    """All files that hold weights, with what else describes the model to Megatron."""
    skipped = ("mtt_manifest.json", "README.md")
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in skipped
    }


@EXAMPLES
@given(drawn=models_with_targets(1), seed=st.integers(0, 2**32))
def test_hugging_face_to_megatron_and_back(workplace, drawn, seed):
    architecture, (options,) = drawn
    root = fresh(workplace)
    model = random_model(architecture, root / "model", seed)
    direct = convert(model, root / "direct")
    megatron = convert(model, root / "megatron", options)
    back = convert(megatron, root / "back")
    expected_tensors, found = load_file(model / WEIGHTS), load_file(back / WEIGHTS)
    assert expected_tensors.keys() == found.keys()
    for name, tensor in expected_tensors.items():
        assert np.array_equal(tensor, found[name]), name
    assert weight_files(direct) == weight_files(back)
    assert not mtt_convert.verify(megatron).problems


@EXAMPLES
@given(drawn=models_with_targets(1), seed=st.integers(0, 2**32))
def test_megatron_to_hugging_face_and_back(workplace, drawn, seed):
    """In the same layout every file is the same, to the byte."""
    architecture, (options,) = drawn
    root = fresh(workplace)
    model = random_model(architecture, root / "model", seed)
    first = convert(model, root / "first", options)
    folder = convert(first, root / "hf", vocab_padding="keep")
    again = convert(folder, root / "again", options, vocab_padding="keep")
    assert weight_files(first) == weight_files(again)


@EXAMPLES
@given(drawn=models_with_targets(4), seed=st.integers(0, 2**32))
def test_a_chain_of_layouts_ends_where_it_began(workplace, drawn, seed):
    architecture, (first, *steps) = drawn
    root = fresh(workplace)
    start = convert(random_model(architecture, root / "model", seed), root / "start", first)
    current = start
    for number, step in enumerate((*steps, first)):
        current = convert(current, root / str(number), step, vocab_padding="keep")
    assert weight_files(start) == weight_files(current)
