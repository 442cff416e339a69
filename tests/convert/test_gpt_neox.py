"""GPT-NeoX's checkpoints: names by generation, summed biases, rows of its own order, arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mtt_convert
from mtt_convert.errors import CorruptError, IncompleteError, UnsupportedError, UsageError
from mtt_convert.logits import compare_logits
from tests.convert.derived import (
    copied,
    digest,
    edited,
    head_to_block,
    layer_files,
    read,
    resharded,
    split,
    whole_module,
    write,
)
from tests.convert.surgery import Golden, refused

NEOX = "legacy/gpt-neox-DERIVED-tp1"
LOGITS = "legacy/reference/neox_derived.npz"
LLAMA = "legacy/megatron-deepspeed-6acc370a-llama-tp2pp1"
LLAMA_LOGITS = "legacy/reference/llama.npz"
TAG = "global_step100"
STATES = "mp_rank_00_model_states.pt"
BIASES = ("attention.dense.bias", "mlp.dense_4h_to_h.bias")


@pytest.fixture
def root(golden: Golden, tmp_path: Path) -> Path:
    """A copy of the golden."""
    return copied(golden(NEOX), tmp_path / "root")


def _renamed(root: Path, *changes: tuple[str, str]) -> None:
    for path in layer_files(root / TAG).values():
        with edited(path) as state:
            for name in list(state):
                new = name
                for old, replacement in changes:
                    new = re.sub(old, replacement, new)
                state[new] = state.pop(name)


def _thirds(bias: torch.Tensor, tp: int) -> list[torch.Tensor]:
    """Parts that add up to a bias without rounding: all of it on the last rank, and noise."""
    noise = torch.full_like(bias, 0.5)
    return [noise, *[torch.zeros_like(bias)] * (tp - 2), bias - noise]


@pytest.mark.parametrize("tp", [2, 4])
def test_biases_of_ranks_are_added(tp: int, golden: Golden, tmp_path: Path) -> None:
    root = resharded(golden(NEOX), tmp_path / "root", tp, dict.fromkeys(BIASES, _thirds))
    mtt_convert.convert(root, tmp_path / "hf", tokenizer="none")
    assert compare_logits(tmp_path / "hf", golden(LOGITS)) < 1e-4
    assert mtt_convert.verify(tmp_path / "hf").problems == ()
    whole = read(golden(NEOX) / TAG / "layer_03-model_00-model_states.pt")[BIASES[0]]
    found = load_file(tmp_path / "hf/model.safetensors")["model.layers.1.self_attn.o_proj.bias"]
    assert torch.allclose(found, whole, atol=1e-6) and not torch.allclose(found, whole / tp)


def test_equal_parts_are_added_too(golden: Golden, tmp_path: Path) -> None:
    """Beside each other, attention and MLP are summed over ranks with their biases in them."""

    def halves(bias: torch.Tensor, tp: int) -> list[torch.Tensor]:
        return [bias / 2, bias / 2]

    root = resharded(golden(NEOX), tmp_path / "root", 2, dict.fromkeys(BIASES, halves))
    assert digest(root, tmp_path / "hf") == digest(golden(NEOX), tmp_path / "golden")


@pytest.mark.parametrize("copies", [True, False])
def test_biases_after_one_another(copies: bool, golden: Golden, tmp_path: Path) -> None:
    """Without gpt_j_residual equal biases are copies of one; others can only be parts."""
    one = copied(golden(NEOX), tmp_path / "one")
    with edited(one / TAG / STATES) as states:
        states["args"]["gpt_j_residual"] = False
    changes = {} if copies else dict.fromkeys(BIASES, _thirds)
    root = resharded(one, tmp_path / "root", 2, changes)
    mtt_convert.convert(one, tmp_path / "hf-one", tokenizer="none")
    mtt_convert.convert(root, tmp_path / "hf", tokenizer="none")
    found, expected = (
        load_file(tmp_path / name / "model.safetensors") for name in ("hf", "hf-one")
    )
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["use_parallel_residual"] is False


GENERATIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "GPT-NeoX since 2024-09": (("dense_h_to_4h", "linear1"), ("dense_4h_to_h", "linear2")),
    "GPT-NeoX, Transformer Engine layers": (
        ("query_key_value", "qkv"),
        ("attention.dense", "attention.proj"),
        (r"mlp\.dense_h_to_4h\.", "mlp.fc1_"),
        (r"mlp\.dense_4h_to_h\.", "mlp.fc2_"),
        (r"post_attention_layernorm\.", "mlp.layer_norm_"),
        (r"input_layernorm\.", "input_layernorm.norm."),
        (r"^norm\.", "norm.norm."),
    ),
    "GPT-NeoX (2021 to 2024)": ((r"^norm\.", ""),),
}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_generations_of_names(generation: str, golden: Golden, root: Path, tmp_path: Path) -> None:
    _renamed(root, *GENERATIONS[generation])
    assert digest(root, tmp_path / "hf") == digest(golden(NEOX), tmp_path / "golden")
    assert mtt_convert.open_checkpoint(root).generation == generation


@pytest.mark.parametrize("tp", [1, 2])
def test_without_a_pipeline(tp: int, golden: Golden, tmp_path: Path) -> None:
    """`sequential.N.*` in the ranks' own files."""
    source = golden(NEOX) if tp == 1 else resharded(golden(NEOX), tmp_path / "layers", tp)
    root = tmp_path / "root"
    for rank in range(tp):
        states = read(source / TAG / f"mp_rank_{rank:02d}_model_states.pt")
        states["module"] = {
            f"sequential.{module}.{name}": value
            for (module, owner), path in layer_files(source / TAG).items()
            if owner == rank
            for name, value in read(path).items()
        }
        write(states, root / TAG / f"mp_rank_{rank:02d}_model_states.pt")
    (root / "latest").write_text(TAG)
    assert digest(root, tmp_path / "hf") == digest(source, tmp_path / "golden")
    checkpoint = mtt_convert.open_checkpoint(root)
    assert (checkpoint.format, checkpoint.layout.tp) == ("deepspeed_module", tp)


# ---- LLaMA's options


def _as_neox(
    golden: Path, target: Path, style: str, tp: int, groups_as_blocks: bool = True
) -> Path:
    """Megatron-DeepSpeed's llama golden as GPT-NeoX would have saved it."""
    args: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "max_position_embeddings": 32,
        "pos_emb": "rotary",
        "norm": "rmsnorm",
        "rms_norm_epsilon": 1e-6,
        "activation": "silu" if style == "w1" else "swiglu",
        "no_weight_tying": True,
        "model_parallel_size": tp,
    }
    modules = {1: 0, 2: 2, 3: 3, 4: 4, 5: 5, 6: 7, 7: 8}
    for module, number in modules.items():
        states: list[dict[str, torch.Tensor]] = [{} for _ in range(tp)]
        for name, value in whole_module(golden / TAG, module).items():
            name = name.replace("self_attention", "attention").replace("lm_head", "final_linear")
            name = "norm.weight" if name == "weight" else name
            name = re.sub(r"(norm)\.weight", r"\1.scale", name)
            name = name.replace("dense_4h_to_h", "w2" if style == "w1" else "linear2")
            if "dense_h_to_4h" not in name:
                for state, part in zip(states, split(name, value, tp), strict=True):
                    in_blocks = "query_key_value" in name and groups_as_blocks
                    state[name] = head_to_block(part, 4 // tp, 2 // tp) if in_blocks else part
                continue
            gates, ups = (half.chunk(tp) for half in value.chunk(2))
            for state, gate, up in zip(states, gates, ups, strict=True):
                if style == "w1":
                    state |= {"mlp.w1.weight": gate.clone(), "mlp.w3.weight": up.clone()}
                else:
                    state["mlp.linear1.weight"] = torch.cat([up, gate])
        for rank, state in enumerate(states):
            write(state, target / TAG / f"layer_{number:02d}-model_{rank:02d}-model_states.pt")
    for rank in range(tp):
        saved = {"module": None, "iteration": 100, "mp_world_size": tp, "args": args}
        write(saved, target / TAG / f"mp_rank_{rank:02d}_model_states.pt")
    (target / "latest").write_text(TAG)
    return target


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("style", ["w1", "linear1"])
def test_llama(style: str, tp: int, golden: Golden, tmp_path: Path) -> None:
    """Groups as blocks, [up | gate], `scale`: the same bytes as from Megatron-DeepSpeed."""
    root = _as_neox(golden(LLAMA), tmp_path / "root", style, tp)
    assert digest(root, tmp_path / "hf") == digest(golden(LLAMA), tmp_path / "golden")
    assert compare_logits(tmp_path / "hf", golden(LLAMA_LOGITS)) < 1e-4


def test_groups_by_head_are_another_model(golden: Golden, tmp_path: Path) -> None:
    """Rows in the order of Megatron's groups: wrong as GPT-NeoX's, right when said so."""
    root = _as_neox(golden(LLAMA), tmp_path / "root", "linear1", 1, groups_as_blocks=False)
    mtt_convert.convert(root, tmp_path / "wrong", tokenizer="none")
    assert compare_logits(tmp_path / "wrong", golden(LLAMA_LOGITS)) > 1e-2
    mtt_convert.convert(root, tmp_path / "right", tokenizer="none", qkv_order="head")
    assert compare_logits(tmp_path / "right", golden(LLAMA_LOGITS)) < 1e-4
    refused(root, tmp_path / "out", UsageError, qkv_order="element", says="without query groups")


# ---- arguments


EIGHT = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "make_vocab_size_divisible_by": 128,
    "padded_vocab_size": 512,
    "tokenizer_type": "HFTokenizer",
    "model_parallel_size": 1,
}
CONFIG = """{
  # as people write them
  "rotary-pct": 0.25, "gpt_j_residual": true, "pos_emb": "rotary", "no_weight_tying": True,
  "norm": "layernorm", "optimizer": {"type": "Adam", "params": {"lr": 0.97e-4,}},
}"""


def _with_eight_arguments(root: Path) -> None:
    """What GPT-NeoX itself stores; the golden has more."""
    with edited(root / TAG / STATES) as states:
        states["args"] = dict(EIGHT)


def test_configs_beside_the_ranks(root: Path, golden: Golden, tmp_path: Path) -> None:
    _with_eight_arguments(root)
    (root / TAG / "configs").mkdir()
    (root / TAG / "configs/20B.yml").write_text(CONFIG)
    (root / TAG / "configs/local_setup.yml").write_text("save: checkpoints\n")
    result = mtt_convert.convert(root, tmp_path / "hf", tokenizer="none")
    assert result.conversion.warnings and "names no tokenizer" not in result.conversion.warnings[0]
    assert compare_logits(tmp_path / "hf", golden(LOGITS)) < 1e-4
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["max_position_embeddings"] == 32


def test_what_nothing_says_is_asked_for(root: Path, golden: Golden, tmp_path: Path) -> None:
    _with_eight_arguments(root)
    error = refused(root, tmp_path / "out", UsageError)
    for name in ("rotary_percent", "gpt_j_residual", "layernorm_epsilon", "bias_gelu_fusion"):
        assert f"--set {name}=" in str(error.fix)
    said = {"rotary_percent": 0.25, "gpt_j_residual": True, "layernorm_epsilon": 1e-5}
    said |= {"bias_gelu_fusion": False, "position_embedding_type": "rope", "rotary_base": 10000}
    mtt_convert.convert(root, tmp_path / "hf", tokenizer="none", overrides=said)
    assert compare_logits(tmp_path / "hf", golden(LOGITS)) < 1e-4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gpt_j_tied": True}, "gpt_j_tied = True"),
        ({"use_mup": True}, "use_mup = True"),
        ({"moe_num_experts": 4}, "moe_num_experts = 4"),
        ({"pos_emb": "sinusoidal"}, "pos_emb = sinusoidal"),
        ({"norm": "scalenorm"}, "norm = scalenorm"),
        ({"activation": "mish"}, "activation = mish"),
        ({"attention_config": [[["global"], 2], [["gmlp"], 2]]}, "attention_config = gmlp"),
        ({"use_qk_layernorm": True}, "use_qk_layernorm = True"),
        ({"output_layer_parallelism": "row"}, "output_layer_parallelism = row"),
    ],
)
def test_what_mtt_cannot_represent(change: dict, says: str, root: Path, tmp_path: Path) -> None:
    with edited(root / TAG / STATES) as states:
        states["args"] |= change
    refused(root, tmp_path / "out", UnsupportedError, says=says)


@pytest.mark.parametrize(
    ("change", "field", "expected"),
    [
        ({"bias_gelu_fusion": True}, "hidden_act", "gelu_pytorch_tanh"),
        ({"onnx_safe": True}, "hidden_act", "gelu"),
        ({"gpt_j_residual": False}, "use_parallel_residual", False),
        ({"layernorm_epsilon": 1e-6}, "norm_eps", 1e-6),
        ({"pos_emb": "alibi"}, "position_embedding_type", "alibi"),
        ({"seq_length": 64}, "max_position_embeddings", 64),
        ({"attention_config": [[["flash"], 4]], "sliding_window_width": 7}, "sliding_window", 8),
    ],
)
def test_what_arguments_say(
    change: dict, field: str, expected: object, root: Path, tmp_path: Path
) -> None:
    with edited(root / TAG / STATES) as states:
        states["args"] |= change
    mtt_convert.convert(root, tmp_path / "hf", tokenizer="none")
    assert json.loads((tmp_path / "hf/config.json").read_text())[field] == expected


def test_norms_show_in_shapes_and_positions_do_not(golden: Golden, tmp_path: Path) -> None:
    root = _as_neox(golden(LLAMA), tmp_path / "root", "linear1", 2)
    for rank in (0, 1):
        with edited(root / TAG / f"mp_rank_{rank:02d}_model_states.pt") as states:
            del states["args"]["norm"], states["args"]["pos_emb"]
    refused(root, tmp_path / "out", UsageError, says="--set position_embedding_type=rope")
    said = {"position_embedding_type": "rope", "vocab_size": 497}
    expected = digest(golden(LLAMA), tmp_path / "golden")
    assert digest(root, tmp_path / "hf", overrides=said) == expected


@pytest.mark.parametrize(
    "content", ["{", "a: [1", "!!python/object/apply:os.system [ls]", "a: !!bool b"]
)
def test_a_damaged_config(content: str, root: Path, tmp_path: Path) -> None:
    (root / TAG / "configs").mkdir()
    (root / TAG / "configs/x.yml").write_text(content)
    refused(root, tmp_path / "out", CorruptError, says="x.yml")


def test_names_without_numbers_among_numbered_ones(tmp_path: Path, root: Path) -> None:
    module: dict[str, Callable | torch.Tensor] = {
        "sequential.0.word_embeddings.weight": torch.ones(2, 2)
    }
    states = read(root / TAG / STATES)
    other = tmp_path / "other"
    for extra, error in (("weight", CorruptError), ("sequential.1.weight", IncompleteError)):
        states["module"] = {**module, extra: torch.ones(2)}
        write(states, other / STATES)
        refused(other, tmp_path / "out", error)
