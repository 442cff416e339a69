"""Megatron-Core, from PyPI, loads checkpoints strictly and computes the reference logits with them.

Those that Megatron wrote, whole and damaged, show that the harness can tell; then those that mtt
wrote. All run in one launch of four processes on CPU, by `load_and_run.py`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtt_convert import convert
from tests.conftest import IN_CI
from tests.convert.families import natives, seq2seq_models
from tests.convert.surgery import Golden, copy_of, edited, edited_metadata, model_of

WORKER = Path(__file__).with_name("load_and_run.py")
TOLERANCE = 1e-4
Results = dict[str, dict[str, Any]]
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Layout:
    """Tensor, pipeline, virtual pipeline and expert sizes; experts are not divided."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1

    def __str__(self) -> str:
        name = f"tp{self.tp}pp{self.pp}" + (f"vpp{self.vpp}" if self.vpp > 1 else "")
        return name + (f"ep{self.ep}" if self.ep > 1 else "")


@dataclass(frozen=True)
class Case:
    """A golden checkpoint, loaded in a layout."""

    golden: str
    layout: Layout
    # The random state belongs to a layout; Megatron does not ask for it in another.
    left_over: tuple[str, ...] = ("rng_state",)

    def __str__(self) -> str:
        return f"{self.golden} in {self.layout}"


# Transformer Engine's norms have an extra state, which local layers do not ask for.
_OF_TE_NORMS = (
    "decoder.final_layernorm._extra_state",
    "decoder.layers.self_attention.q_layernorm._extra_state",
    "decoder.layers.self_attention.k_layernorm._extra_state",
)

_OF_T5_TE_NORMS = (
    "encoder.final_layernorm._extra_state",
    "decoder.final_layernorm._extra_state",
    "decoder.layers.pre_cross_attn_layernorm._extra_state",
)

GOLDENS = [
    Case("mcore/gpt/ref/torch", Layout()),
    Case("mcore/gpt/tp2pp2/torch", Layout(2, 2)),
    Case("mcore/gpt/tp2pp2vpp2/torch", Layout(2, 2, 2)),
    Case("mcore/llama/tp1pp2/torch", Layout(1, 2)),
    Case("mcore/llama/tp2pp2vpp2/torch", Layout(2, 2, 2)),
    Case("mcore/llama_6l/pp2_uneven/torch", Layout(1, 2)),
    Case("mcore/llama_6l/pp2_layout/torch", Layout(1, 2, 2)),
    Case("mcore/nemotron/tp2pp1/torch", Layout(2)),
    Case("mcore/qwen/tp2pp2/torch", Layout(2, 2)),
    Case("mcore/gpt/tp2pp2/torch_dist", Layout()),
    Case("mcore/gpt_bf16/tp2pp2/torch_dist", Layout(4)),
    Case("mcore/llama/tp2pp1/torch_dist", Layout(2, 2)),
    Case("mcore/llama_6l/pp2_uneven/torch_dist", Layout(2)),
    Case("mcore/nemotron/tp2pp1/torch_dist", Layout(1, 2)),
    Case("mcore/qwen/tp2pp2/torch_dist", Layout(2, 2, 2)),
    Case(
        "mcore-te/llama/tp2pp2/torch_dist",
        Layout(1, 2),
        ("rng_state", *_OF_TE_NORMS),
    ),
    Case("mcore/t5/tp2/torch", Layout(2)),
    Case("mcore-te/t5_te/tp2/torch_dist", Layout(4), ("rng_state", *_OF_T5_TE_NORMS)),
    Case("mcore/mixtral/ep2/torch", Layout(ep=2)),
    Case("mcore/mixtral/tp2ep2/torch_dist", Layout(1, 2, ep=2)),
    Case("mcore/mla/tp2pp1/torch_dist", Layout(2, ep=2)),
    Case("mcore/mtp/tp2pp2/torch", Layout(2, 2)),
]


@dataclass(frozen=True)
class Written:
    """What mtt converts, to which layout, and the one it is loaded in if that may be another.

    `through_hf`: by way of a Hugging Face folder, without padding of the vocabulary.
    """

    golden: str
    to: str
    layout: Layout = Layout()
    loaded_in: Layout | None = None
    transformer_impl: str = "local"
    pipeline_layout: str | None = None
    through_hf: bool = False

    def __str__(self) -> str:
        parts = [self.golden, "hf" if self.through_hf else "", f"{self.to} {self.layout}"]
        name = " to ".join(filter(None, parts))
        name += f" {self.transformer_impl}" if self.transformer_impl != "local" else ""
        name += f" {self.pipeline_layout}" if self.pipeline_layout else ""
        return name + (f", loaded in {self.loaded_in}" if self.loaded_in else "")

    def write(self, golden: Golden, folder: Path) -> Path:
        """Convert it."""
        source, options = golden(self.golden), {"tokenizer": "none"}
        if "legacy" in self.golden:  # its arguments do not say the true size
            options["overrides"] = {"vocab_size": NUM_TOKENS["legacy"]}
        if self.through_hf:
            convert(source, folder / "hf", **options)
            source, options = folder / "hf", {"tokenizer": "none"}
        convert(
            source,
            folder / "out",
            to=self.to,
            tp=self.layout.tp,
            pp=self.layout.pp,
            vpp=self.layout.vpp,
            **({"ep": self.layout.ep, "etp": 1} if self.layout.ep > 1 else {}),
            transformer_impl=self.transformer_impl,
            pipeline_model_parallel_layout=self.pipeline_layout,
            **options,
        )
        return folder / "out"


_GPT, _LLAMA = "mcore/gpt/tp2pp2/torch_dist", "mcore/llama/tp2pp2vpp2/torch"
_SIX, _QWEN = "mcore/llama_6l/pp2_uneven/torch", "mcore/qwen/tp2pp2/torch"
_NEMOTRON = "mcore/nemotron/tp2pp1/torch"
_LEGACY_GPT, _LEGACY = "legacy/core_v0.12.0-gpt2-tp1pp2", "legacy/core_v0.12.0-llama-tp2pp2"
_T5, _T5_TE = "mcore/t5/tp2/torch", "mcore-te/t5_te/tp2/torch_dist"
_LEGACY_T5 = "legacy/core_v0.12.0-t5-tp1pp1"
_TE = "transformer_engine"
_ALL = [Layout(), Layout(2), Layout(1, 2), Layout(2, 2), Layout(2, 2, 2)]
WRITTEN = [
    *(Written(golden, "torch", layout) for golden in (_GPT, _LLAMA) for layout in _ALL),
    Written(_SIX, "torch", Layout(2, 2)),
    Written(_SIX, "torch", Layout(1, 2, 2), pipeline_layout="Et*2|t|t*2|tL"),
    Written(_QWEN, "torch"),
    Written(_QWEN, "torch", Layout(4)),
    Written(_QWEN, "torch", Layout(2, 2), through_hf=True),
    Written(_NEMOTRON, "torch", Layout(2, 2)),
    Written("mcore/gpt_bf16/tp2pp2/torch", "torch", Layout(1, 2)),
    Written(_LEGACY, "torch", Layout(2, 2)),
    Written(_LEGACY_GPT, "torch", Layout(2), through_hf=True),
    *(Written(golden, "torch_dist", Layout(2, 2), Layout()) for golden in (_GPT, _LLAMA)),
    *(Written(_GPT, "torch_dist", Layout(), layout) for layout in _ALL[1:]),
    *(Written(_LLAMA, "torch_dist", Layout(4), layout, _TE) for layout in _ALL[1:]),
    Written(_SIX, "torch_dist", Layout(1, 2, 2), Layout(2), pipeline_layout="Et*2|t|t*2|tL"),
    Written(_QWEN, "torch_dist", Layout(2, 2, 2), Layout(1, 2), _TE),
    Written(_QWEN, "torch_dist", Layout(1, 2), Layout(2, 2), through_hf=True),
    Written(_NEMOTRON, "torch_dist", Layout(2), Layout(2, 2)),
    Written("mcore/gpt_bf16/tp2pp2/torch", "torch_dist", Layout(2), Layout(1, 2)),
    Written(_LEGACY_GPT, "torch_dist", Layout(1, 2), Layout(2)),
    Written(_T5, "torch", Layout(4)),
    Written(_T5, "torch_dist", Layout(2), Layout(4), through_hf=True),
    Written(_T5_TE, "torch", Layout(2), through_hf=True),
    Written(_T5_TE, "torch_dist", Layout(4), Layout(1), _TE),
    Written(_LEGACY_T5, "torch", Layout(2), through_hf=True),
    Written(_LEGACY_T5, "torch_dist", Layout(1), Layout(4)),
    Written("mcore/mixtral/ep2/torch", "torch", Layout(2, 2, ep=2)),
    Written("mcore/mixtral/tp2ep2/torch_dist", "torch_dist", Layout(1, 2, ep=2), Layout(2, ep=2)),
    Written("mcore/moe_mixed/ep2/torch_dist", "torch", Layout(1, 2, ep=2)),
    Written("mcore/moe_mixed/singleton_ep2/torch_dist", "torch_dist", Layout(2, 2), Layout(ep=2)),
    Written("mcore/mla/tp2pp1/torch", "torch", Layout(2, 2, ep=2)),
    Written("mcore/mla/tp2pp1/torch_dist", "torch_dist", Layout(2, 2), Layout(1, 2, ep=2)),
    Written("mcore/mla/tp2pp1/torch", "torch_dist", Layout(2), through_hf=True),
    Written("mcore/mtp/tp2pp2/torch", "torch", Layout(1, 2)),
    Written("mcore/mtp/tp2pp2/torch", "torch_dist", Layout(2), Layout(2, 2)),
]
NATIVES = [case for case in natives.CASES if not case.beyond_megatron]
SEQ2SEQ = [model for model in seq2seq_models.MODELS if not model.needs_te]
NUM_TOKENS = {"mcore": 500, "mcore-te": 500, "legacy": 497}


@dataclass(frozen=True)
class Damage:
    """A copy of a golden with one change, and what Megatron says to it (None: other logits)."""

    name: str
    golden: str
    layout: Layout
    apply: Callable[[Path], None] = field(repr=False)
    says: str | None

    def __str__(self) -> str:
        return self.name


def _edit_rank(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        path = root / "iter_0000010" / "mp_rank_01" / "model_optim_rng.pt"
        with edited(path) as content:
            change(content)

    return apply


def _scale(content: dict[str, Any]) -> None:
    name = "decoder.layers.2.mlp.linear_fc2.weight"
    model_of(content, name)[name][0] *= 1.01


def _rename(content: dict[str, Any]) -> None:
    content["model"]["decoder.layers.2.mlp.fc2.weight"] = content["model"].pop(
        "decoder.layers.2.mlp.linear_fc2.weight"
    )


def _swap_ranks(root: Path) -> None:
    """Same names and shapes everywhere, but the halves are the other way round."""
    ranks = [root / "iter_0000010" / f"mp_rank_0{rank}" for rank in (0, 1)]
    ranks[0].rename(root / "mp_rank_00")
    ranks[1].rename(ranks[0])
    (root / "mp_rank_00").rename(ranks[1])


def _without(prefix: str) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        with edited_metadata(root) as metadata:
            for name in [name for name in metadata.state_dict_metadata if name.startswith(prefix)]:
                del metadata.state_dict_metadata[name]

    return apply


def _swap_chunks(root: Path) -> None:
    """Layers 0 and 1 of one tensor point to each other's bytes."""
    with edited_metadata(root) as metadata:
        places = [
            index
            for index in metadata.storage_data
            if index.fqn == "decoder.layers.mlp.linear_fc2.weight"
            and index.offset in (torch.Size([0, 0, 0]), torch.Size([1, 0, 0]))
        ]
        first, second = (metadata.storage_data[index] for index in places)
        metadata.storage_data.update(zip(places, (second, first), strict=True))


_TORCH, _TORCH_DIST = "mcore/nemotron/tp2pp1/torch", "mcore/nemotron/tp2pp1/torch_dist"
DAMAGES = [
    Damage("one row scaled by 1%", _TORCH, Layout(2), _edit_rank(_scale), None),
    Damage("ranks swapped", _TORCH, Layout(2), _swap_ranks, None),
    Damage("a tensor renamed", _TORCH, Layout(2), _edit_rank(_rename), "Missing key(s)"),
    Damage("layers swapped", _TORCH_DIST, Layout(), _swap_chunks, None),
    Damage(
        "a tensor gone",
        _TORCH_DIST,
        Layout(),
        _without("decoder.final_layernorm.bias"),
        "not in the checkpoint: ['decoder.final_layernorm.bias']",
    ),
    Damage(
        "an extra state gone",
        _TORCH_DIST,
        Layout(),
        _without("decoder.layers.mlp.linear_fc1._extra_state"),
        "not in the checkpoint: ['decoder.layers.mlp.linear_fc1._extra_state']",
    ),
]


def launch(cases: dict[str, dict[str, Any]], folder: Path) -> Results:
    """Run all cases with Megatron-Core on four processes."""
    (folder / "cases.json").write_text(json.dumps(cases))
    results = folder / "results.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "4", str(WORKER), str(folder / "cases.json"), str(results)]
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=900)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the workers too
            status = process.wait()
    assert status == 0, (folder / "log.txt").read_text()[-8000:]
    return json.loads(results.read_text())


@pytest.fixture(scope="module")
def results(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What Megatron-Core makes of every checkpoint of this module."""
    try:
        version("megatron-core")
    except PackageNotFoundError:
        message = "megatron-core is not installed; it is in the extra `megatron`"
        pytest.fail(message, pytrace=False) if IN_CI else pytest.skip(message)
    cases: dict[str, dict[str, Any]] = {}
    for case in GOLDENS:
        cases[str(case)] = job(golden, case.golden, golden(case.golden), case.layout)
        cases[str(case)]["left_over"] = case.left_over
    for damage in DAMAGES:
        folder = copy_of(golden, damage.golden, tmp_path_factory.mktemp("damaged"))
        damage.apply(folder)
        cases[damage.name] = job(golden, damage.golden, folder, damage.layout)
        cases[damage.name]["left_over"] = ["rng_state"]
    for native in NATIVES:
        cases[str(native)] = native_job(native, tmp_path_factory.mktemp("native"))
    for model in SEQ2SEQ:
        cases[str(model)] = seq2seq_job(model, tmp_path_factory.mktemp("seq2seq"))
    for written in WRITTEN:
        folder = written.write(golden, tmp_path_factory.mktemp("written"))
        layout = written.loaded_in or written.layout
        cases[str(written)] = job(golden, written.golden, folder, layout)
        if written.transformer_impl == _TE:
            is_t5 = written.golden == _T5_TE
            cases[str(written)]["left_over"] = _OF_T5_TE_NORMS if is_t5 else _OF_TE_NORMS
    return launch(cases, tmp_path_factory.mktemp("megatron"))


def tolerance(golden: str) -> float:
    """What one model computes differs by this over layouts; a T5 without final norms has large
    logits."""
    return 4 * TOLERANCE if "t5" in golden else TOLERANCE


def native_job(case: natives.Case, folder: Path) -> dict[str, Any]:
    """A random model of transformers', written for Megatron, beside its own logits."""
    model = case.save(folder / "hf")
    input_ids = torch.randint(model.config.vocab_size, (2, 24))
    with torch.no_grad():
        logits = model(input_ids).logits
    further = natives.further_logits(case, folder / "hf", input_ids) if case.further else []
    named = {f"mtp{number}_logits": one for number, one in enumerate(further)}
    np.savez(folder / "logits.npz", input_ids=input_ids, logits=logits, **named)
    ep = {"ep": 2, "etp": 1} if case.family in natives.WITH_EXPERTS else {}
    options = {"to": "torch", "tp": 2, "pp": 2, "transformer_impl": "local", **ep}
    convert(folder / "hf", folder / "out", **options)
    return {
        "checkpoint": str(folder / "out"),
        "tp": 2,
        "pp": 2,
        "vpp": 1,
        "ep": ep.get("ep", 1),
        "logits": str(folder / "logits.npz"),
        "num_tokens": model.config.vocab_size,
        "left_over": [],
    }


def seq2seq_job(model: seq2seq_models.Model, folder: Path) -> dict[str, Any]:
    """A random encoder-decoder of ours, written for Megatron, beside its own logits."""
    config = model.save(folder / "hf").config
    convert(folder / "hf", folder / "out", to="torch", tp=2, transformer_impl="local")
    return {
        "checkpoint": str(folder / "out"),
        "tp": 2,
        "pp": 1,
        "vpp": 1,
        "logits": str(folder / "hf" / "logits.npz"),
        "num_tokens": config.vocab_size,
        "left_over": [],
        "final_layernorm": config.final_norm,
    }


def job(golden: Golden, name: str, checkpoint: Path, layout: Layout) -> dict[str, Any]:
    """A case as `load_and_run.py` takes it."""
    kind, model = name.split("/")[:2]
    own = f"{kind}/{model}/logits" if model == "t5_te" else f"mcore/{model}/logits"
    logits = f"legacy/reference/{model.split('-')[1]}" if kind == "legacy" else own
    return {
        "checkpoint": str(checkpoint),
        "tp": layout.tp,
        "pp": layout.pp,
        "vpp": layout.vpp,
        "ep": layout.ep,
        "logits": str(golden(f"{logits}.npz")),
        "num_tokens": NUM_TOKENS[kind],
        "left_over": [],
        "final_layernorm": name != _T5,
    }


@pytest.mark.parametrize("case", GOLDENS, ids=str)
def test_megatron_loads_its_own(case: Case, results: Results) -> None:
    result = results[str(case)]
    assert "error" not in result, result["error"]
    assert result["difference"] < tolerance(case.golden)


@pytest.mark.parametrize("written", WRITTEN, ids=str)
def test_megatron_loads_what_mtt_writes(written: Written, results: Results) -> None:
    result = results[str(written)]
    assert "error" not in result, result["error"]
    assert result["difference"] < tolerance(written.golden)


@pytest.mark.parametrize("native", NATIVES, ids=str)
def test_megatron_computes_what_transformers_does(native: natives.Case, results: Results) -> None:
    result = results[str(native)]
    assert "error" not in result, result["error"]
    assert result["difference"] < TOLERANCE


@pytest.mark.parametrize("model", SEQ2SEQ, ids=str)
def test_megatron_computes_what_our_encoder_decoder_does(
    model: seq2seq_models.Model, results: Results
) -> None:
    result = results[str(model)]
    assert "error" not in result, result["error"]
    assert result["difference"] < TOLERANCE


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
def test_damage_shows(damage: Damage, results: Results) -> None:
    result = results[damage.name]
    if damage.says is None:
        assert result["difference"] > 10 * TOLERANCE
    else:
        assert damage.says in result["error"]
