"""Multi-latent attention: scales of YaRN, what the cache holds, what is refused."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.generation import ContinuousBatchingConfig

from modeling_mtt import MTTConfig
from modeling_mtt.positions_mtt import MTTRotaryEmbedding, latent_score_scale

LATENTS = {
    "num_attention_heads": 4,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 12,
    "attention_bias": False,
    "position_embedding_type": "rope",
}


def yarn(**options) -> MTTConfig:
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        **options,
    }
    return MTTConfig(**LATENTS, rope_parameters=rope)


@pytest.mark.parametrize(
    ("mscale", "all_dim"), [(1.0, 0.0), (0.707, 0.0), (0.0, 1.0), (1.0, 1.0), (0.7, 1.3)]
)
def test_yarn_is_megatrons(monkeypatch, mscale, all_dim):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    module = pytest.importorskip("megatron.core.models.common.embeddings.yarn_rotary_pos_embedding")
    config = yarn(mscale=mscale, mscale_all_dim=all_dim)
    theirs = module.YarnRotaryEmbedding(
        6,
        rotary_base=10000.0,
        use_cpu_initialization=True,
        scaling_factor=8.0,
        original_max_position_embeddings=32,
        beta_fast=32.0,
        beta_slow=1.0,
        mscale=mscale,
        mscale_all_dim=all_dim,
    )
    angles, scaling = theirs(20)
    ours = MTTRotaryEmbedding(config)
    cos, _ = ours(torch.zeros(1), torch.arange(20)[None])
    torch.testing.assert_close(cos[0], angles[:, 0, 0].cos() * scaling, rtol=1e-5, atol=1e-6)

    expected = module._yarn_get_mscale(8.0, all_dim) ** 2 / 16**0.5
    assert latent_score_scale(config) == pytest.approx(expected, rel=1e-6)


def test_a_given_factor_wins():
    ours = MTTRotaryEmbedding(yarn(mscale=0.7, mscale_all_dim=1.3, attention_factor=1.5))
    assert ours.attention_scaling == 1.5
    assert latent_score_scale(MTTConfig(**LATENTS)) == 16**-0.5


def test_attention_multiplier_replaces_the_scale(tiny_model):
    layer = tiny_model("deepseek", attention_multiplier=0.3).model.layers[0]
    assert layer.self_attn.scaling == 0.3


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_the_cache_holds_latents_alone(tiny_model, kind):
    model = tiny_model("deepseek")
    config = model.config
    options = {"max_cache_len": 9} if kind is StaticCache else {}
    cache = kind(config=config, **options)
    ids = torch.randint(1, 96, (2, 7))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    for layer in cache.layers:
        assert layer.keys.shape[1:2] + layer.keys.shape[3:] == (1, config.kv_lora_rank)
        assert layer.values.shape[1:2] + layer.values.shape[3:] == (1, config.qk_rope_head_dim)


@pytest.mark.parametrize("q_lora_rank", [None, 20])
@pytest.mark.parametrize("use_qk_norm", [False, True])
def test_latents_are_normed_where_configured(tiny_model, q_lora_rank, use_qk_norm):
    model = tiny_model("deepseek", q_lora_rank=q_lora_rank, use_qk_norm=use_qk_norm)
    names = {
        name.split("self_attn.")[1] for name in model.state_dict() if "layers.0.self_attn" in name
    }
    expected = {"kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    expected |= {"q_proj"} if q_lora_rank is None else {"q_a_proj", "q_b_proj"}
    if use_qk_norm:
        expected |= {"kv_a_layernorm"} | ({"q_a_layernorm"} if q_lora_rank else set())
    assert names == {f"{name}.weight" for name in expected}
    ids = torch.randint(1, 96, (1, 6))
    with torch.no_grad():
        whole = model(ids).logits
        cache = DynamicCache(config=model.config)
        parts = [model(each, past_key_values=cache).logits for each in ids.split(2, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_continuous_batching(tiny_model):
    """Its cache holds heads that are all as wide: keys whole, values padded."""
    model = tiny_model("deepseek")
    requests = [torch.randint(1, 96, (length,)).tolist() for length in (5, 9, 3)]
    results = model.generate_batch(
        requests,
        generation_config=GenerationConfig(
            max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=32, block_size=4, max_batch_tokens=16, use_cuda_graph=False
        ),
        progress_bar=False,
    )
    found = {tuple(result.prompt_ids): result.generated_tokens for result in results.values()}
    for request in requests:
        ids = torch.tensor([request])
        text = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )
        assert found[tuple(request)] == text[0, len(request) :].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_lora_rank": None}, "qk_nope_head_dim (10) goes with kv_lora_rank: set that, or drop"),
        ({"v_head_dim": None}, "v_head_dim (None) must be at least 1 with multi-latent attention"),
        ({"q_lora_rank": 0}, "q_lora_rank (0) must be at least 1 with multi-latent attention"),
        ({"head_dim": 8}, "head_dim (8) must be qk_nope_head_dim (10) and qk_rope_head_dim (6)"),
        ({"num_key_value_heads": 2}, "num_key_value_heads (2) must be num_attention_heads (4)"),
        ({"position_embedding_type": "learned"}, "goes with position_embedding_type 'rope', not"),
        ({"sliding_window": 4}, "sliding_window (4) and kv_lora_rank do not go together"),
        ({"attention_bias": True}, "attention_bias and kv_lora_rank do not go together"),
        (
            {"qk_rope_head_dim": 1},
            "qk_rope_head_dim (1) times partial_rotary_factor (1.0) makes 2 values to rotate",
        ),
    ],
)
def test_what_does_not_go_together(options, message):
    with pytest.raises(StrictDataclassError) as raised:
        MTTConfig(**{**LATENTS, **options})
    assert message in str(raised.value)
