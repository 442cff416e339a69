"""Classes with experts: spellings, copies and types of their files, and Megatron's own logits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modeling_mtt import MTTForCausalLM
from mtt_convert import (
    CorruptError,
    IncompleteError,
    InconsistentError,
    UnsupportedError,
    UsageError,
    convert,
    from_megatron,
    open_checkpoint,
)
from mtt_convert.cli import main
from mtt_convert.families import FAMILIES
from mtt_convert.logits import compare_logits
from mtt_convert.parameters import expected
from tests.convert.families.natives import (
    CASES,
    WITH_EXPERTS,
    Case,
    experts,
    further_logits,
    model_class,
)
from tests.convert.families.published import PUBLISHED

WEIGHTS = "model.safetensors"
FURTHER = [case for case in CASES if case.further]
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the weights of a folder."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def bytes_of(folder: Path) -> bytes:
    return (folder / WEIGHTS).read_bytes()


# ---- published models


@pytest.mark.parametrize(
    ("config", "count"),
    PUBLISHED,
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_a_published_model_has_as_many_parameters_as_it_is_said_to(
    config: dict[str, Any], count: int
) -> None:
    """All that is in its files: layers for further tokens, and copies, too."""
    family = FAMILIES[config["model_type"]]
    a = family.architecture(config)
    assert (family.misfits(a), family.warnings(config)) == ((), ())
    shapes = expected(a)
    tables = 2 * a.padded_vocab_size * a.hidden_size * a.mtp_num_layers
    assert len(family.copies(a)) == 2 * a.mtp_num_layers
    assert sum(math.prod(shape) for shape in shapes.values()) + tables == count
    assert family.architecture(family.config(a)).forward_pass() == a.forward_pass()


# ---- experts in one tensor per layer


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_stacked_experts_are_the_same_model(family: str, tmp_path: Path) -> None:
    """Read in either spelling; written as published files are."""
    model = experts(family).save(tmp_path / "plain")
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    stacked = load_file(tmp_path / "stacked" / WEIGHTS)
    assert stacked["model.layers.1.mlp.experts.gate_up_proj"].ndim == 3
    for to in ("mtt", family):
        for source in ("plain", "stacked"):
            convert(tmp_path / source, tmp_path / f"{source}-{to}", model_type=to, tokenizer="none")
        assert bytes_of(tmp_path / f"stacked-{to}") == bytes_of(tmp_path / f"plain-{to}")
    assert bytes_of(tmp_path / f"stacked-{family}") == bytes_of(tmp_path / "plain")


def test_a_stack_without_the_head_of_a_model(tmp_path: Path) -> None:
    model = experts("qwen3_moe").model()
    model.model.save_pretrained(tmp_path / "base", save_original_format=False)
    rewrite(tmp_path / "base", lambda t: t.update({"lm_head.weight": model.lm_head.weight.data}))
    model.save_pretrained(tmp_path / "whole")
    convert(tmp_path / "base", tmp_path / "back", model_type="qwen3_moe", tokenizer="none")
    assert bytes_of(tmp_path / "back") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("shape", "found"),
    [((3, 24, 32), "[3, 24, 32]"), ((4, 23, 32), "[4, 23, 32]"), ((96, 32), "[96, 32]")],
)
def test_a_stack_of_another_shape(shape: tuple, found: str, tmp_path: Path) -> None:
    experts("qwen3_moe").model().save_pretrained(tmp_path, save_original_format=False)
    name = "model.layers.2.mlp.experts.gate_up_proj"
    rewrite(tmp_path, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    with pytest.raises(CorruptError) as caught:
        open_checkpoint(tmp_path)
    assert name in caught.value.message and caught.value.found == found


def test_experts_in_both_spellings(tmp_path: Path) -> None:
    model = experts("mixtral").save(tmp_path / "plain")
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    more = load_file(tmp_path / "stacked" / WEIGHTS)
    name = "model.layers.2.mlp.experts.down_proj"
    rewrite(tmp_path / "plain", lambda tensors: tensors.update({name: more[name]}))
    with pytest.raises(CorruptError) as caught:
        open_checkpoint(tmp_path / "plain")
    assert "block_sparse_moe.experts.0.w2.weight" in str(caught.value.found)


def test_an_expert_is_missing(tmp_path: Path) -> None:
    experts("qwen2_moe").save(tmp_path)
    rewrite(tmp_path, lambda t: t.pop("model.layers.3.mlp.experts.2.up_proj.weight"))
    with pytest.raises(IncompleteError) as caught:
        open_checkpoint(tmp_path)
    assert "layers.3.mlp.experts.2.up_proj.weight" in str(caught.value.expected)


# ---- element types


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_the_bias_of_experts_stays_float32(family: str, tmp_path: Path) -> None:
    """In a bfloat16 folder, and where a folder is cast to bfloat16."""
    experts(family).save(tmp_path / "float32")
    mixed = AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    mixed.save_pretrained(tmp_path / "mixed")
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    (tmp_path / "mixed" / "config.json").write_text(
        json.dumps({**config, "num_nextn_predict_layers": 0})
    )
    assert load_file(tmp_path / "mixed" / WEIGHTS)[BIAS].dtype == torch.float32
    convert(tmp_path / "mixed", tmp_path / "mtt", tokenizer="none")
    convert(tmp_path / "mtt", tmp_path / "back", model_type=family, tokenizer="none")
    options = {"model_type": family, "tokenizer": "none", "dtype": "bfloat16"}
    convert(tmp_path / "float32", tmp_path / "cast", **options)
    for folder in ("back", "cast"):
        assert bytes_of(tmp_path / folder) == bytes_of(tmp_path / "mixed")
        assert json.loads((tmp_path / folder / "config.json").read_text())["dtype"] == "bfloat16"
    options["dtype"] = "float32"
    convert(tmp_path / "mixed", tmp_path / "wide", **options)
    assert {t.dtype for t in load_file(tmp_path / "wide" / WEIGHTS).values()} == {torch.float32}


def test_fp8_needs_the_size_of_its_blocks(tmp_path: Path) -> None:
    """DeepSeek's files: blocks of float8 with a scale each, as config.json says."""
    folder = tmp_path / "fp8"
    experts("deepseek_v3").save(folder)
    name = "model.layers.0.mlp.up_proj.weight"

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(1, 1)

    rewrite(folder, quantise)
    with pytest.raises(UnsupportedError) as caught:
        open_checkpoint(folder)
    assert f"{name}_scale_inv" in str(caught.value.found)
    config = json.loads((folder / "config.json").read_text())
    method = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": method}))
    assert "1 weights are kept in 8 bits" in open_checkpoint(folder).warnings[0]
    convert(folder, tmp_path / "mtt", tokenizer="none")
    weights = load_file(tmp_path / "mtt" / WEIGHTS)
    kept = load_file(folder / WEIGHTS)[name]
    assert torch.equal(weights[name], kept.float().to(weights[name].dtype))


# ---- layers that predict further tokens


@pytest.mark.parametrize("case", FURTHER, ids=str)
def test_copies_may_be_missing_but_not_differ(case: Case, tmp_path: Path) -> None:
    case.save(tmp_path / "source")
    whole = bytes_of(tmp_path / "source")
    copies = [
        name
        for name in load_file(tmp_path / "source" / WEIGHTS)
        if name.endswith((".embed_tokens.weight", ".shared_head.head.weight"))
        and ".layers." in name
    ]
    assert len(copies) == 2 * case.further
    assert set(open_checkpoint(tmp_path / "source").dropped["copies"]) == set(copies)
    rewrite(tmp_path / "source", lambda tensors: [tensors.pop(name) for name in copies])
    convert(tmp_path / "source", tmp_path / "back", model_type=case.family, tokenizer="none")
    assert bytes_of(tmp_path / "back") == whole
    for name in copies:
        case.save(tmp_path / "source")
        rewrite(tmp_path / "source", lambda tensors, name=name: tensors[name][3, 3].add_(1))
        with pytest.raises(InconsistentError) as caught:
            convert(tmp_path / "source", tmp_path / "other", tokenizer="none", replicated="first")
        assert name in caught.value.message
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("case", FURTHER, ids=str)
def test_they_are_left_out_on_request(case: Case, tmp_path: Path) -> None:
    """Copies that differ are then nobody's business."""
    case.save(tmp_path / "source")
    replace(case, further=0).save(tmp_path / "without")
    name = "model.layers.4.embed_tokens.weight"
    rewrite(tmp_path / "source", lambda tensors: tensors[name].add_(1))
    for to in (case.family, "mtt"):
        options = {"model_type": to, "tokenizer": "none"}
        result = convert(tmp_path / "source", tmp_path / to, drop_mtp=True, **options)
        assert f"{case.further} layer" in result.conversion.warnings[-1]
        convert(tmp_path / "without", tmp_path / f"{to}-without", **options)
        assert bytes_of(tmp_path / to) == bytes_of(tmp_path / f"{to}-without")
        configs = [(tmp_path / f / "config.json").read_text() for f in (to, f"{to}-without")]
        assert configs[0] == configs[1]
    assert from_megatron(tmp_path / "source", drop_mtp=True, tokenizer="none").model.mtp is None
    replace(case, further=0).save(tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "same", model_type=case.family, drop_mtp=True)


def test_a_class_without_them_says_how_to_go_on(
    golden: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(UsageError) as caught:
        convert(golden("mcore/mtp/tp2pp2/torch"), tmp_path / "out", model_type="llama")
    assert caught.value.found == "mtp_num_layers = 1"
    assert "--drop-mtp" in str(caught.value.fix)
    folders = [str(golden("mcore/mtp/tp2pp2/torch")), str(tmp_path / "out")]
    code = main(
        ["convert", *folders, "--drop-mtp", "--model-type", "llama", "--set", "vocab_size=500"]
    )
    assert code == 0
    again = ["convert", *folders, "--drop-mtp", "--dry-run", "--set", "vocab_size=500"]
    assert main(again) == 0
    plan = capsys.readouterr().out
    assert "model.layers.3." in plan and "mtp.layers" not in plan
    logits = golden("mcore/mtp/logits.npz")
    assert compare_logits(tmp_path / "out", logits) < 1e-4
    model = from_megatron(folders[0], drop_mtp=True, tokenizer="none")
    assert model.model.mtp is None


def test_layers_that_are_announced_and_not_there(tmp_path: Path) -> None:
    """transformers' save_pretrained leaves them out, and their number in config.json."""
    model = experts("glm4_moe").model()
    model.save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    config["num_nextn_predict_layers"] = 1
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(tmp_path / "source").architecture.mtp_num_layers == 0
    convert(tmp_path / "source", tmp_path / "back", model_type="glm4_moe", tokenizer="none")
    assert bytes_of(tmp_path / "back") == bytes_of(tmp_path / "source")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize("part", ["eh_proj", "shared_head.norm", "mlp.experts.0.up_proj"])
def test_a_part_of_them_is_missing(part: str, tmp_path: Path) -> None:
    FURTHER[0].save(tmp_path)
    name = f"model.layers.5.{part}.weight"
    rewrite(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(IncompleteError) as caught:
        open_checkpoint(tmp_path)
    assert name in str(caught.value.expected)


@pytest.mark.parametrize("case", FURTHER, ids=str)
def test_they_predict_what_transformers_predicts(case: Case, tmp_path: Path) -> None:
    """Each layer is given what the one before it gives, and the next token."""
    case.save(tmp_path / "source")
    ids = torch.arange(24)[None] * 7 % 97
    expected = further_logits(case, tmp_path / "source", ids)
    if not expected:
        pytest.skip("this transformers does not compute them")
    convert(tmp_path / "source", tmp_path / "mtt", tokenizer="none")
    model = MTTForCausalLM.from_pretrained(tmp_path / "mtt").eval()
    with torch.no_grad():
        found = model(ids, output_mtp_logits=True).mtp_logits
    assert len(found) == len(expected) == case.further
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.std() > 0.1
        torch.testing.assert_close(ours[:, : theirs.shape[1]], theirs, rtol=0, atol=1e-5)


# ---- Megatron's logits


@pytest.mark.parametrize(
    "path",
    [
        "mcore/mixtral/ep2/torch",
        "mcore/mixtral/tp2ep2/torch_dist",
        "mcore/mixtral_bf16/grouped_ep2/torch",
        "mcore-te/mixtral/grouped_ep2/torch",
    ],
)
def test_mixtral_computes_what_megatron_computes(path: str, golden: Any, tmp_path: Path) -> None:
    overrides = {"vocab_size": 500}
    options = {"overrides": overrides, "model_type": "auto", "tokenizer": "none"}
    result = convert(golden(path), tmp_path / "native", **options)
    assert result.conversion.model_type == "mixtral"
    logits = golden(f"mcore/{path.split('/')[1]}/logits.npz")
    assert compare_logits(tmp_path / "native", logits) < 1e-4


@pytest.mark.parametrize(
    ("path", "family", "found", "nearest"),
    [
        ("moe_mixed/ep2/torch", "glm4_moe", "moe_shared_expert_intermediate_size = 64", {}),
        (
            "mla/tp2pp1/torch",
            "deepseek_v3",
            "rms_norm_eps = 1e-05",
            {"layernorm_epsilon": 1e-6},
        ),
    ],
)
def test_classes_with_one_more_number_compute_what_megatron_computes(
    path: str, family: str, found: str, nearest: dict, golden: Any, tmp_path: Path
) -> None:
    """A shared MLP as wide as no number of experts, an epsilon the class lacks: refused by name.

    With both given to the modules, the class computes what Megatron did.
    """
    checkpoint = open_checkpoint(golden(f"mcore/{path}"), overrides={"vocab_size": 500})
    a, table = checkpoint.architecture, FAMILIES[family]
    with pytest.raises(UsageError) as caught:
        convert(golden(f"mcore/{path}"), tmp_path / "native", model_type=family)
    assert found in str(caught.value.found)
    if family == "glm4_moe":
        assert "no multiple of moe_ffn_hidden_size = 48" in str(caught.value.found)
    config = table.config(replace(a, moe_shared_expert_intermediate_size=48, **nearest))
    model = model_class(family)(model_class(family).config_class(**config)).eval()
    for name, module in list(model.named_modules()):
        if name.endswith("shared_experts"):
            model.set_submodule(name, type(module)(model.config, intermediate_size=64))
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = a.layernorm_epsilon
    # These classes and MTT's have the same names.
    convert(golden(f"mcore/{path}"), tmp_path / "mtt", overrides={"vocab_size": 500})
    tensors = load_file(tmp_path / "mtt" / WEIGHTS)
    assert tensors.keys() == table.rules(a).apply(checkpoint.tensors, a).keys()
    model.load_state_dict(stacked(tensors))
    with np.load(golden(f"mcore/{path.split('/')[0]}/logits.npz")) as reference:
        ids, expected = reference["input_ids"], reference["logits"][..., :500]
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(logits - expected).max() < 1e-4


def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts in one tensor per layer, as in memory."""
    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in {name.partition(".experts.")[0] for name in tensors if ".experts." in name}:
        parts: dict[str, list[torch.Tensor]] = {"gate_proj": [], "up_proj": [], "down_proj": []}
        for kind, rows in parts.items():
            while (name := f"{layer}.experts.{len(rows)}.{kind}.weight") in tensors:
                rows.append(tensors[name])
        gate, up, down = (torch.stack(rows) for rows in parts.values())
        found[f"{layer}.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        found[f"{layer}.experts.down_proj"] = down
    return found
