"""What BLOOM and Falcon have of their own: published folders, variants, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FalconConfig, FalconForCausalLM

from modeling_mtt import MTTForCausalLM
from mtt_convert import convert, diff, open_checkpoint
from mtt_convert.errors import UnsupportedError
from mtt_convert.families import FAMILIES
from mtt_convert.logits import compare_logits
from tests.convert.families.natives import FALCON, case
from tests.convert.surgery import Golden, run

BIGSCIENCE = "legacy/bigscience-8387ae17-bloom-tp2pp1"
LOGITS = "legacy/reference/bloom.npz"


def test_a_checkpoint_of_bigscience(golden: Golden, tmp_path: Path) -> None:
    """Its GELU is exact, as on a CPU; with that by tanh, as of BLOOM, the class is exact."""
    source, options = golden(BIGSCIENCE), ["--tokenizer", "none", "--set", "vocab_size=497"]
    code, _, err = run("convert", source, tmp_path / "no", *options, "--model-type", "bloom")
    assert code == 2 and "activation = gelu\n" in err and "--model-type mtt" in err
    options += ["--set", "bias_gelu_fusion=True"]
    for name in ("bloom", "mtt"):
        code, _, err = run("convert", source, tmp_path / name, *options, "--model-type", name)
        assert code == 0, err
    config = json.loads((tmp_path / "bloom" / "config.json").read_text())
    assert config["architectures"] == ["BloomForCausalLM"] and config["seq_length"] == 32
    assert diff(tmp_path / "bloom", tmp_path / "mtt").differences == ()
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "bloom")
    ours = MTTForCausalLM.from_pretrained(tmp_path / "mtt")
    ids = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, native(ids).logits, rtol=0, atol=3e-5)
    assert compare_logits(tmp_path / "bloom", golden(LOGITS)) < 3e-2
    code, out, _ = run("inspect", source, "--set", "bias_gelu_fusion=True")
    assert "exactly a    bloom" in out


def test_names_and_fields_of_the_published_folders(tmp_path: Path) -> None:
    """No `transformer.` before names, `n_embed`, and what BigScience's training left behind."""
    native = case("bloom").save(tmp_path / "bloom")
    path = tmp_path / "bloom" / "model.safetensors"
    save_file(
        {name.removeprefix("transformer."): t for name, t in load_file(path).items()},
        path,
        {"format": "pt"},
    )
    config = json.loads((tmp_path / "bloom" / "config.json").read_text())
    config["n_embed"] = config.pop("hidden_size")
    config["num_attention_heads"] = config.pop("n_head")
    config |= {"seq_length": 512, "offset_alibi": 100, "n_inner": None, "skip_bias_add": True}
    config |= {"masked_softmax_fusion": True, "skip_bias_add_qkv": False, "unk_token_id": 0}
    (tmp_path / "bloom" / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(tmp_path / "bloom")
    assert checkpoint.warnings == () and checkpoint.architecture.max_position_embeddings == 512
    convert(tmp_path / "bloom", tmp_path / "mtt", tokenizer="none")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = MTTForCausalLM.from_pretrained(tmp_path / "mtt")(ids).logits
        torch.testing.assert_close(logits, native(ids).logits, rtol=0, atol=1e-5)
    config["num_hidden_layers"] = 5
    (tmp_path / "bloom" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="twice, with two values"):
        open_checkpoint(tmp_path / "bloom")


def test_output_biases_that_slow_but_exact_leaves_out(tmp_path: Path) -> None:
    """transformers adds none then, so that it is another model."""
    odd = case("bloom", slow_but_exact=True, pretraining_tp=2)
    native = odd.save(tmp_path / "bloom")
    with pytest.raises(UnsupportedError) as caught:
        open_checkpoint(tmp_path / "bloom")
    assert "slow_but_exact = True, pretraining_tp = 2" in str(caught.value.found)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert (native(ids).logits - case("bloom").model()(ids).logits).abs().max() > 0.1


@pytest.mark.parametrize("family", ["bloom", "falcon"])
def test_a_wrong_order_of_rows_shows(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All queries, keys and values one after another, where each head has its three."""
    from dataclasses import replace

    from mtt_convert.mapping import RuleTable
    from mtt_convert.ops import Chain, ConcatQKV, SplitQKV

    options = {} if family == "bloom" else {"multi_query": False, "bias": True}
    native = case(family, **options).save(tmp_path / "native")
    table = FAMILIES[family].rules(open_checkpoint(tmp_path / "native").architecture)
    wrong = RuleTable(
        *(
            replace(r, op=Chain((SplitQKV(), ConcatQKV()))) if "query_key_value" in r.target else r
            for r in table.rules
        )
    )
    monkeypatch.setitem(FAMILIES, family, replace(FAMILIES[family], rules=lambda a: wrong))
    convert(tmp_path / "native", tmp_path / "mtt", tokenizer="none")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = MTTForCausalLM.from_pretrained(tmp_path / "mtt")(ids).logits
        assert (logits - native(ids).logits).abs().max() > 1e-2


def falcon(**options: Any) -> dict[str, Any]:
    return {**FalconConfig(**FALCON).to_dict(), **options}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"alibi": True}, "alibi = True"),
        ({"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn = False"),
        ({"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn = 2"),
        (
            {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 3},
            "num_ln_in_parallel_attn = 3",
        ),
        ({"multi_query": False, "num_kv_heads": 2}, "num_kv_heads = 2"),
        ({"apply_residual_connection_post_layernorm": True}, "post_layernorm = True"),
        ({"activation": "tanh"}, "activation = 'tanh'"),
    ],
    ids=str,
)
def test_falcons_that_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        FAMILIES["falcon"].architecture(falcon(**options))
    assert named in str(caught.value.found)


@pytest.mark.parametrize(
    "options",
    [
        {"new_decoder_architecture": True, "parallel_attn": False},
        {"multi_query": False, "num_kv_heads": 2},
        {"num_ln_in_parallel_attn": 2},
    ],
    ids=str,
)
def test_and_that_the_class_cannot_run(options: dict[str, Any]) -> None:
    model = FalconForCausalLM(FalconConfig(**falcon(**options)))
    with pytest.raises((AttributeError, RuntimeError)), torch.no_grad():
        model(torch.arange(8)[None])


@pytest.mark.parametrize(
    ("options", "groups", "norms"),
    [
        ({}, 1, "one"),
        ({"num_kv_heads": 4}, 1, "one"),  # not looked at
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, 2, "two"),
        (
            {
                "new_decoder_architecture": True,
                "num_kv_heads": 2,
                "num_ln_in_parallel_attn": 1,
            },
            2,
            "one",
        ),
        ({"parallel_attn": False}, 1, "sequential"),
        ({"parallel_attn": False, "num_ln_in_parallel_attn": 2}, 1, "sequential"),
        ({"multi_query": False, "bias": True}, 4, "one"),
    ],
    ids=str,
)
def test_layers_of_falcon(options: dict[str, Any], groups: int, norms: str) -> None:
    a = FAMILIES["falcon"].architecture(falcon(**options))
    found = (a.parallel_residual, a.shared_layernorm)
    assert found == {"one": (True, True), "two": (True, False), "sequential": (False, False)}[norms]
    assert a.num_query_groups == groups


def test_groups_one_after_the_other_are_no_falcon(tmp_path: Path) -> None:
    architecture = FAMILIES["falcon"].architecture(falcon(parallel_attn=False))
    from dataclasses import replace

    grouped = replace(architecture, num_query_groups=2)
    assert "query groups without parallel residuals" in FAMILIES["falcon"].misfits(grouped)


def test_a_tied_head_that_was_saved_too(tmp_path: Path) -> None:
    """As in tiiuae's falcon-7b."""
    case("falcon").save(tmp_path / "falcon")
    path = tmp_path / "falcon" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"].clone()
    save_file(tensors, path, {"format": "pt"})
    convert(tmp_path / "falcon", tmp_path / "mtt", tokenizer="none")
    assert "lm_head.weight" not in load_file(tmp_path / "mtt" / "model.safetensors")
    config = json.loads((tmp_path / "mtt" / "config.json").read_text())
    assert config["shared_layernorm"] and config["use_parallel_residual"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "mtt").config.num_key_value_heads == 1
    code, out, _ = run("inspect", tmp_path / "falcon")
    assert code == 0 and "tied copy" in out
