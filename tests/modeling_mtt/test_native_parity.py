"""MTT against models of transformers that compute the same: same weights, same logits and text."""

from __future__ import annotations

import typing
from typing import Any

import pytest
import torch
from transformers import GemmaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P

from modeling_mtt import MTTConfig
from modeling_mtt.modeling_mtt import build_norm
from tests.modeling_mtt.oracles import (
    HEADER,
    LARGEST_DIFFERENCE,
    ORACLES,
    ROPE_PARAMETERS,
    SIZES,
    TABLE,
    Oracle,
    difference,
    prompt,
)


@pytest.mark.parametrize("oracle", ORACLES, ids=lambda oracle: oracle.name)
def test_logits(oracle: Oracle):
    assert difference(oracle) <= LARGEST_DIFFERENCE


@pytest.mark.parametrize("oracle", ORACLES, ids=lambda oracle: oracle.name)
def test_text(oracle: Oracle):
    torch.manual_seed(0)
    native, model = oracle.build()
    input_ids, attention_mask = prompt(oracle.prompt_length, "left")
    options: dict[str, Any] = {
        "attention_mask": attention_mask,
        "max_new_tokens": 12,
        "do_sample": False,
    }
    for cache in ("dynamic", "static"):
        options["cache_implementation"] = cache
        expected = native.generate(input_ids, **options)
        assert model.generate(input_ids, **options).tolist() == expected.tolist(), cache


def test_every_rope_type_has_oracles():
    assert set(ROPE_PARAMETERS) == {"default", *ROPE_INIT_FUNCTIONS}


def test_every_option_has_an_oracle():
    proven = SIZES.keys() | {name for oracle in ORACLES for name in oracle.options}
    no_matter_of_logits = {
        "attention_dropout",
        "bos_token_id",
        "hidden_dropout",
        "initializer_range",
        "num_nextn_predict_layers",
        "output_router_logits",
        "pad_token_id",
        "router_aux_loss_coef",
        "use_cache",
    }
    fields = set(MTTConfig.__annotations__)
    assert fields - proven == no_matter_of_logits

    for name in ("hidden_act", "norm_type", "position_embedding_type", "scoring_func"):
        default = getattr(MTTConfig, name)
        used = {oracle.options.get(name, default) for oracle in ORACLES}
        assert used >= set(typing.get_args(MTTConfig.__annotations__[name])), name


def test_the_table_has_these_oracles():
    document = TABLE.read_text()
    assert document.startswith(HEADER)
    rows = [row.strip("|").split("|") for row in document[len(HEADER) :].splitlines()]
    listed = [(option.strip(), native.strip(" `")) for option, native, _ in rows]
    assert listed == [(oracle.option, oracle.native) for oracle in ORACLES], "run `make oracles`"
    assert all(float(figure) <= LARGEST_DIFFERENCE for *_, figure in rows)


def norm_pair(native: torch.nn.Module, **options: Any) -> torch.nn.Module:
    norm = build_norm(MTTConfig(zero_centered_norm=True, **options), 32)
    assert torch.count_nonzero(norm.weight) == 0
    with torch.no_grad():
        for parameter in native.parameters():
            parameter.normal_(std=0.3)
    norm.load_state_dict(native.state_dict())
    return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_centered_rmsnorm_is_gemmas(dtype):
    assert GemmaConfig().rms_norm_eps == 1e-6
    native = GemmaRMSNorm(32, eps=1e-6)
    norm = norm_pair(native, norm_type="rmsnorm", norm_eps=1e-6)
    states = torch.randn(5, 32, dtype=dtype)
    torch.testing.assert_close(norm.to(dtype)(states), native.to(dtype)(states), rtol=0, atol=0)


def test_zero_centered_layernorm_is_nemotrons_and_finer_in_low_precision():
    native = NemotronLayerNorm1P(32)
    norm = norm_pair(native)
    states = torch.randn(64, 32)
    torch.testing.assert_close(norm(states), native(states), rtol=0, atol=0)

    norm, native = norm.bfloat16(), native.bfloat16()
    states = states.bfloat16()
    found, native_found = norm(states), native(states)
    expected = native.double()(states.double())
    assert (found - expected).abs().mean() < 0.8 * (native_found - expected).abs().mean()
