"""Estimates held against models that ran: weights and KV cache to the byte, the rest roughly."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.distributed import DistributedConfig

from modeling_mtt import MTTConfig, MTTForCausalLM
from modeling_mtt.parallel_mtt import tensor_parallel_sizes
from mtt_convert.architecture import Architecture
from mtt_convert.checkpoint import Layout
from mtt_convert.commands.estimate import _from_config
from mtt_convert.commands.ranks import launch
from mtt_convert.estimate import (
    Model,
    Placement,
    activation_bytes,
    bytes_read_per_token,
    kv_cache_bytes,
    num_local_parameters,
    placements,
)
from mtt_convert.layouts import plan_stages
from mtt_convert.preset_files import num_parameters
from mtt_convert.presets import PRESETS
from tests.convert.families.natives import CASES, model_class

from .measured_memory import measure
from .surgery import run
from .test_public import modules_after

SAMPLE = Path(__file__).parents[2] / "convert" / "sample"
COMBINES = hasattr(DistributedConfig, "dp_size")  # transformers 5.23
# How far activations may be from what was allocated; gloo's buffers live for different times.
FACTOR, FACTOR_ON_RANKS = 1.3, 1.6
LLAMA = {
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "gated_mlp": True,
    "intermediate_size": 704,
    "norm_type": "rmsnorm",
    "position_embedding_type": "rope",
    "attention_bias": False,
    "attention_out_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
BLOOM = {"position_embedding_type": "alibi", "embedding_norm": True}
WINDOWS = {
    "position_embedding_type": "none",
    "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


@dataclass(frozen=True)
class Case:
    """A small model and what it is asked."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    length: int = 192
    batch: int = 2
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.name}-{self.dtype}-{self.batch}x{self.length}"

    def save(self, folder: Path) -> Model:
        """Write a model of random weights; what the estimate thinks it is."""
        fields = {
            "vocab_size": 501,
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "max_position_embeddings": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": self.dtype,
            **self.fields,
        }
        config = MTTConfig(**fields)
        MTTForCausalLM(config).to(getattr(torch, self.dtype)).save_pretrained(folder)
        return _from_config(json.loads((folder / "config.json").read_text()), str(folder), "auto")


MOE = {
    **LLAMA,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 192,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "shared_expert_intermediate_size": 128,
}
MLA = {
    **MOE,
    "num_key_value_heads": None,
    "kv_lora_rank": 64,
    "q_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "use_qk_norm": True,
    "rope_interleave": True,
}
ALONE = [
    Case("experts", MOE),
    Case("experts", {**MOE, "mlp_layer_types": None}, dtype="bfloat16"),
    Case("latents", MLA),
    Case("further-tokens", {**LLAMA, "num_nextn_predict_layers": 1}),
    Case("gpt"),
    Case("gpt", dtype="bfloat16"),
    Case("gpt", length=500, batch=1),
    Case("gpt", length=48, batch=8, dtype="bfloat16"),
    Case("llama", LLAMA),
    Case("llama", LLAMA, dtype="bfloat16"),
    Case("bloom", BLOOM),
    Case("bloom", BLOOM, length=400, batch=1, dtype="bfloat16"),
    Case("windows", WINDOWS),
    Case("large-vocabulary", {"vocab_size": 30001}, length=32, batch=4, dtype="bfloat16"),
]


@pytest.mark.parametrize("case", ALONE, ids=str)
def test_one_process_holds_what_was_estimated(case: Case, tmp_path: Path) -> None:
    model = case.save(tmp_path)
    options = {"folder": str(tmp_path), "tp": 1, "pp": 1, "length": case.length}
    found = measure({**options, "batch": case.batch})
    layout = Layout()
    (stage,) = plan_stages(model.architecture, layout)
    sizes = (case.length, case.batch)
    assert found["weights"] == num_local_parameters(model, layout, stage) * model.itemsize
    assert found["kv_cache"] == kv_cache_bytes(model, layout, stage, *sizes)
    estimated = activation_bytes(model, layout, stage, *sizes)
    if case.name == "latents":
        # On a CPU PyTorch has no kernel for values narrower than keys, and makes all scores.
        estimated += 2 * case.batch * 8 * case.length**2 * model.itemsize
    assert 1 / FACTOR <= found["activations"] / estimated <= FACTOR


@pytest.mark.skipif(not COMBINES, reason="transformers < 5.23 divides tables differently")
@pytest.mark.parametrize(
    ("case", "tp", "pp"),
    [
        (Case("gpt"), 2, 2),
        (Case("llama", {**LLAMA, "num_key_value_heads": 1}), 2, 1),  # a head for two processes
        (Case("experts", MOE), 2, 1),
        (Case("gpt", {"embedding_norm": True}), 1, 4),  # stages that are neither first nor last
    ],
    ids=str,
)
def test_every_process_holds_what_was_estimated(
    case: Case, tp: int, pp: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = case.save(tmp_path)
    options = {"folder": str(tmp_path), "tp": tp, "pp": pp, "length": case.length}
    ranks = launch("measured_memory:measure_all", {**options, "batch": case.batch}, tp * pp)
    layout = Layout(tp, pp)
    sizes = (case.length, case.batch)
    for stage in plan_stages(model.architecture, layout):
        of_stage = ranks[stage.pp * tp : (stage.pp + 1) * tp]
        # Of uneven parts the estimate is the larger.
        weights = max(rank["weights"] for rank in of_stage)
        assert weights == num_local_parameters(model, layout, stage) * model.itemsize
        cache = kv_cache_bytes(model, layout, stage, *sizes)
        assert {rank["kv_cache"] for rank in of_stage} == {cache}
        estimated = activation_bytes(model, layout, stage, *sizes)
        for rank in of_stage:
            ratio = rank["activations"] / estimated
            assert 1 / FACTOR_ON_RANKS <= ratio <= FACTOR_ON_RANKS, (stage, rank)


@pytest.mark.parametrize("native", CASES, ids=str)
def test_classes_of_transformers_are_counted_too(native: Any) -> None:
    config = native.config()
    with torch.device("meta"):
        model = model_class(native.family)(config)
    stored = model.state_dict()
    buffers = [values for name, values in model.named_buffers() if name in stored]
    count = sum(values.numel() for values in (*model.parameters(), *buffers))
    fields = config.to_dict()
    if fields.get("num_nextn_predict_layers"):
        fields["num_nextn_predict_layers"] = 0  # these classes leave out such layers
    assert _from_config(fields, "folder", "auto").num_parameters == count


# ---- arithmetic


def gpt(**fields: Any) -> Model:
    numbers = {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 256,
        "num_attention_heads": 8,
        "num_query_groups": 8,
        "kv_channels": 8,
        "padded_vocab_size": 128,
        "max_position_embeddings": 32,
        "layernorm_epsilon": 1e-5,
    }
    return Model(Architecture(**{**numbers, **fields}), "bfloat16")


def place(model: Model, num_gpus: int, **sizes: int) -> tuple[Placement, ...]:
    return placements(
        model,
        num_gpus=num_gpus,
        **{
            "gpu_memory": 10**12,
            "gpu_bandwidth": 10**12,
            "sequence_length": 32,
            "batch_size": 1,
            **sizes,
        },
    )


def test_layouts_divide_model_and_gpus() -> None:
    found = {(p.layout.tp, p.layout.pp) for p in place(gpt(), 12)}
    # 12 GPUs, 8 heads and 4 layers: no 3, no 8 (12 / 8 replicas), at most 12 in all.
    assert found == {(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)}


@pytest.mark.parametrize("name", PRESETS)
def test_every_layout_is_one_the_model_class_accepts(name: str) -> None:
    preset = PRESETS[name]
    sizes = tensor_parallel_sizes(
        MTTConfig.from_pretrained(SAMPLE.parents[1] / "hub_configs" / name)
    )
    model = Model(preset.architecture, preset.dtype)
    assert {p.layout.tp for p in place(model, 64)} <= set(sizes)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_counted_as_their_cards_say(name: str) -> None:
    folder = SAMPLE.parents[1] / "hub_configs" / name
    config = json.loads((folder / "config.json").read_text())
    assert _from_config(config, name, "auto").num_parameters == num_parameters(PRESETS[name])


def test_tensor_parallelism_divides_the_floor_and_stages_do_not() -> None:
    seconds = {(p.layout.tp, p.layout.pp): p.seconds_per_token for p in place(gpt(), 4)}
    assert seconds[4, 1] < seconds[2, 1] < seconds[1, 1]
    assert seconds[1, 4] == pytest.approx(seconds[1, 1], rel=0.01)


def test_the_floor_is_every_weight_read_once() -> None:
    model, layout = gpt(), Layout()
    (stage,) = plan_stages(model.architecture, layout)
    positions = 32 * 64
    cache = kv_cache_bytes(model, layout, stage, 32, 1)
    read = bytes_read_per_token(model, layout, stage, 32, 1)
    assert read == (model.num_parameters - positions) * 2 + cache
    assert place(model, 1)[0].seconds_per_token == read / 10**12
    untied = gpt(untie_embeddings_and_output_weights=True)
    # The embedding of a model with a head of its own is looked up, not read.
    assert bytes_read_per_token(untied, layout, stage, 32, 1) == read


# FasterTransformer's guide, MT-NLG 530B in float16 on A100 80GB: prompt, answer, batch -> seconds.
PUBLISHED = {
    (16, 1): {(20, 8, 1): 0.565, (20, 8, 256): 3.341, (60, 20, 1): 1.379, (128, 8, 64): 4.002},
    (32, 1): {(20, 8, 1): 0.431, (20, 8, 256): 2.483, (60, 20, 1): 1.037, (128, 8, 64): 3.114},
    (8, 3): {(20, 8, 1): 0.842, (20, 8, 256): 3.140, (60, 20, 1): 2.085, (128, 8, 64): 3.578},
}


@pytest.mark.parametrize("layout", PUBLISHED, ids=str)
def test_no_published_latency_is_below_the_floor(layout: tuple[int, int]) -> None:
    """And the fastest of them are within a factor of three of it: the floor says something."""
    tp, pp = layout
    model = Model(PRESETS["mt-nlg-530b"].architecture, "float16")
    for (prompt, answer, batch), seconds in PUBLISHED[layout].items():
        found = place(
            model,
            tp * pp,
            sequence_length=prompt + answer,
            batch_size=batch,
            gpu_bandwidth=2_039_000_000_000,
        )
        (here,) = [p for p in found if (p.layout.tp, p.layout.pp) == layout]
        floor = answer * here.seconds_per_token
        assert floor < seconds
        if batch == 1:
            assert seconds < 3.5 * floor


def test_no_torch_is_needed() -> None:
    code = "import sys; from mtt_convert.cli import main; main(sys.argv[1:])"
    arguments = ("estimate", "mt-nlg-530b", "--gpus", "16", "--gpu-memory", "80GB")
    assert not modules_after(code, *arguments) & {"torch", "transformers", "huggingface_hub"}


# ---- the command


@pytest.mark.parametrize(("num_gpus", "best"), [(16, 16), (32, 32), (64, 64)])
def test_mt_nlg_fits_on_two_machines(num_gpus: int, best: int) -> None:
    code, out, err = run("estimate", "mt-nlg-530b", "--gpus", num_gpus, "--gpu-memory", "80GB")
    assert code == 0, err
    assert "mt-nlg-530b: 529,581,506,560 parameters in bfloat16" in out
    assert f"best:   TP{best} x PP1 x EP1" in out
    assert f"torchrun --nnodes {num_gpus // 8} --nproc-per-node 8 " in out
    assert f"-m mtt_convert generate CKPT --tp {best} --pp 1 " in out
    assert f"vllm serve OUT --tensor-parallel-size {best} --pipeline-parallel-size 1 " in out
    assert "TP8 x PP1 x EP1" in out
    assert "too much" in out
    assert f"TP{best} spans machines" in err


def test_what_does_not_fit_says_what_would() -> None:
    code, out, err = run("estimate", "mt-nlg-530b", "--gpus", 8, "--gpu-memory", "80GB")
    assert (code, out) == (2, "")
    assert err.startswith("error: mt-nlg-530b does not fit on 8 GPUs of 80.00 GB\n")
    assert "fix:      --gpus 16: TP16 x PP1 takes" in err


def llama_7b(folder: Path) -> Path:
    """A folder with a configuration and no weights."""
    config = {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_json_of_a_folder_without_weights(tmp_path: Path) -> None:
    folder = llama_7b(tmp_path)
    options = ["--gpus", "1", "--gpu-memory", "24GB", "--sequence-length", "4096", "--json"]
    code, out, err = run("estimate", folder, *options, "--gpu-bandwidth", "1TB/s")
    assert code == 0, err
    body = json.loads(out)
    assert (body["command"], body["status"], body["parameters"]) == ("estimate", "ok", 6738415616)
    (placement,) = body["placements"]
    assert placement["weights"] == 2 * 6738415616
    assert placement["kv_cache"] == 2 * 32 * 4096 * 4096 * 2
    assert placement["fits"] is True
    assert {name: placement[name] for name in ("tp", "pp", "ep", "gpus")} == {
        "tp": 1,
        "pp": 1,
        "ep": 1,
        "gpus": 1,
    }
    assert placement["seconds_per_token"] == pytest.approx(0.0154, rel=0.02)
    assert body["commands"]["mtt"].startswith(f"mtt generate {folder} --tp 1 --pp 1 ")
    wide = run("estimate", folder, *options, "--dtype", "float32")
    assert (wide[0], json.loads(wide[1])["code"]) == (2, "layout")


def test_a_megatron_checkpoint_without_its_padding() -> None:
    code, out, err = run("estimate", SAMPLE, "--gpus", 2, "--gpu-memory", "1GB", "--json")
    assert code == 0, err
    body = json.loads(out)
    assert body["dtype"] == "float32"
    assert body["parameters"] == 241024 - 64 * 512 + 64 * body_rows()
    assert body["placements"][0]["tp"] == 2


def body_rows() -> int:
    """Rows that the sample's arguments call tokens."""
    from mtt_convert import open_checkpoint

    architecture = open_checkpoint(SAMPLE).architecture
    return architecture.vocab_size or architecture.padded_vocab_size


def test_bloom_has_no_command_for_vllm() -> None:
    code, out, err = run("estimate", "bloom-7b1", "--gpus", 1, "--gpu-memory", "80GB")
    assert code == 0, err
    assert "vLLM:   vLLM's attention takes no ALiBi" in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["mt-nlg-540b"], "neither a path nor a preset"),
        (["mt-nlg-530b", "--gpus", "0"], "an impossible --gpus"),
        (["mt-nlg-530b", "--batch-size", "0"], "an impossible --batch-size"),
        (["mt-nlg-530b", "--gpu-memory", "much"], "'much' is no size"),
        (["mt-nlg-530b", "--gpu-memory", "80"], "fix:      --gpu-memory 80GB"),
        (["mt-nlg-530"], "fix:      mt-nlg-530b"),
        (["mt-nlg-530b", "--gpu-bandwidth", "fast"], "'fast' is no size"),
        (["mt-nlg-530b", "--sequence-length", "4096"], "no positions for such a sequence"),
        (["mt-nlg-530b", "--gpus", "1000000000"], "too many GPUs"),
        ([""], "MODEL is empty"),
        (["mt-nlg-530b", "--set", "num_layers=3"], "--set: only for a Megatron checkpoint"),
        (["mt-nlg-530b", "--qkv-order", "block"], "--qkv-order: only for a Megatron checkpoint"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_estimated(options: list[str], said: str) -> None:
    defaults = ["--gpus", "8", "--gpu-memory", "80GB"]
    given = [*options, *(defaults[:2] if "--gpus" not in options else [])]
    given += defaults[2:] if "--gpu-memory" not in options else []
    code, out, err = run("estimate", *given)
    assert (code, out) == (2, ""), err
    assert said in err
