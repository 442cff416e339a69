"""Megatron's window and transformers' are one apart: the masks of both, computed by their own code."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers.masking_utils import sliding_window_overlay

from mtt_convert.families import FAMILIES
from tests.convert.families.natives import case


@pytest.mark.parametrize("size", [1, 2, 5, 12, 40])
def test_the_same_tokens_are_seen(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of optional packages it does not find
        utils = pytest.importorskip("megatron.core.transformer.utils")
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *a, device=None, **k: ones(*a, **k))
    config = case("mistral", num_key_value_heads=2, sliding_window=size).config().to_dict()
    window = FAMILIES["mistral"].architecture(config).window_size
    hidden = utils.get_sliding_window_causal_mask(12, 12, window)
    queries, keys = torch.arange(12)[:, None], torch.arange(12)[None]
    seen = sliding_window_overlay(size)(0, 0, queries, keys) & (keys <= queries)
    assert torch.equal(~hidden, seen)
