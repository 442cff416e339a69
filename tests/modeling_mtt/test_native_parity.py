"""MTT against models of transformers that compute the same: same weights, same logits and text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    GemmaConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    PersimmonConfig,
    PersimmonForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P

from modeling_mtt import MTTConfig, MTTForCausalLM
from modeling_mtt.modeling_mtt import build_norm

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
NO_BIAS: dict[str, Any] = {
    "attention_bias": False,
    "attention_out_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
GATED_RMSNORM: dict[str, Any] = {
    "hidden_act": "silu",
    "gated_mlp": True,
    "norm_type": "rmsnorm",
    "position_embedding_type": "rope",
}


def compare(native, state_dict: dict[str, torch.Tensor], prompt_length: int = 9, **options: Any):
    """Load `state_dict` into an MTT model of these options and compare it with `native`."""
    model = MTTForCausalLM(MTTConfig(**{**SIZES, **TOKENS, **options})).eval()
    missing, unexpected = model.load_state_dict(state_dict, strict=False)
    assert not unexpected
    assert missing in ([], ["lm_head.weight"])
    model.tie_weights()

    input_ids = torch.randint(1, 96, (2, prompt_length))
    attention_mask = torch.ones_like(input_ids)
    with torch.no_grad():
        expected = native(input_ids, attention_mask=attention_mask).logits
        logits = model(input_ids, attention_mask=attention_mask).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    options = {"attention_mask": attention_mask, "max_new_tokens": 12, "do_sample": False}
    torch.testing.assert_close(
        model.generate(input_ids, **options), native.generate(input_ids, **options)
    )


@pytest.mark.parametrize("num_key_value_heads", [4, 2, 1])
def test_llama(randomise, num_key_value_heads):
    options = {"num_key_value_heads": num_key_value_heads}
    native = randomise(LlamaForCausalLM(LlamaConfig(**SIZES, **TOKENS, **options)))
    options |= {"norm_eps": native.config.rms_norm_eps}
    compare(native, native.state_dict(), **GATED_RMSNORM, **NO_BIAS, **options)


def test_llama_with_biases_and_a_head_size_of_its_own(randomise):
    options = {"head_dim": 10, "attention_bias": True, "mlp_bias": True}
    options |= {"tie_word_embeddings": True}
    native = randomise(LlamaForCausalLM(LlamaConfig(**SIZES, **TOKENS, **options)))
    options |= {"norm_eps": native.config.rms_norm_eps}
    compare(native, native.state_dict(), **GATED_RMSNORM, **options)


@pytest.mark.parametrize(
    "rope_parameters",
    [
        {"rope_type": "default", "rope_theta": 500.0},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        {
            "rope_type": "longrope",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 3.0, 4.0],
        },
    ],
    ids=lambda parameters: parameters["rope_type"],
)
def test_rope_types(randomise, rope_parameters):
    rope_parameters = {"rope_theta": 10000.0, **rope_parameters}
    config = LlamaConfig(**SIZES, **TOKENS, rope_parameters=dict(rope_parameters))
    native = randomise(LlamaForCausalLM(config))
    compare(
        native,
        native.state_dict(),
        # Beyond what was trained, where dynamic and longrope change their frequencies.
        prompt_length=70 if rope_parameters["rope_type"] == "dynamic" else 12,
        rope_parameters=rope_parameters,
        norm_eps=config.rms_norm_eps,
        **GATED_RMSNORM,
        **NO_BIAS,
    )


@pytest.mark.parametrize(
    ("native_act", "hidden_act"), [("gelu_new", "gelu_pytorch_tanh"), ("gelu", "gelu")]
)
def test_gpt2(randomise, native_act, hidden_act):
    config = GPT2Config(
        vocab_size=96,
        n_embd=32,
        n_inner=48,
        n_layer=3,
        n_head=4,
        n_positions=64,
        activation_function=native_act,
        **TOKENS,
    )
    native = randomise(GPT2LMHeadModel(config))

    renamed = {
        "attn.c_proj": "self_attn.o_proj",
        "mlp.c_fc": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
    }
    state_dict = {
        "model.embed_tokens.weight": native.transformer.wte.weight,
        "model.embed_positions.weight": native.transformer.wpe.weight,
        "model.norm.weight": native.transformer.ln_f.weight,
        "model.norm.bias": native.transformer.ln_f.bias,
    }
    for layer, block in enumerate(native.transformer.h):
        for name, parameter in block.named_parameters():
            module, kind = name.rsplit(".", 1)
            # GPT-2 keeps its matrices as [in, out].
            parameter = parameter.T if parameter.dim() == 2 else parameter
            if module == "attn.c_attn":
                for part, chunk in zip("qkv", parameter.chunk(3), strict=True):
                    state_dict[f"model.layers.{layer}.self_attn.{part}_proj.{kind}"] = chunk
            else:
                state_dict[f"model.layers.{layer}.{renamed[module]}.{kind}"] = parameter
    compare(native, state_dict, hidden_act=hidden_act)


def test_nemotron(randomise):
    options: dict[str, Any] = {"num_key_value_heads": 2}
    native = randomise(NemotronForCausalLM(NemotronConfig(**SIZES, **TOKENS, **options)))
    compare(
        native,
        native.state_dict(),
        hidden_act="relu2",
        zero_centered_norm=True,
        position_embedding_type="rope",
        rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        **NO_BIAS,
        **options,
    )


def test_qwen3(randomise):
    options = {"num_key_value_heads": 2, "head_dim": 12}
    native = randomise(Qwen3ForCausalLM(Qwen3Config(**SIZES, **TOKENS, **options)))
    options |= {"norm_eps": native.config.rms_norm_eps, "use_qk_norm": True}
    compare(native, native.state_dict(), **GATED_RMSNORM, **NO_BIAS, **options)


def test_persimmon(randomise):
    """Query and key LayerNorm with biases, relu2, partial rotation; one matrix for q, k and v."""
    native = randomise(PersimmonForCausalLM(PersimmonConfig(**SIZES, **TOKENS, hidden_act="relu2")))
    renamed = {
        "self_attn.dense": "self_attn.o_proj",
        "self_attn.q_layernorm": "self_attn.q_norm",
        "self_attn.k_layernorm": "self_attn.k_norm",
        "mlp.dense_h_to_4h": "mlp.up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
        "final_layernorm": "norm",
    }
    state_dict = {}
    for name, tensor in native.state_dict().items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        if "query_key_value" in name:
            heads = tensor.unflatten(0, (4, 3, 8))
            for part, head in zip("qkv", heads.unbind(1), strict=True):
                state_dict[name.replace("query_key_value", f"{part}_proj")] = head.flatten(0, 1)
        else:
            state_dict[name] = tensor
    compare(
        native,
        state_dict,
        hidden_act="relu2",
        use_qk_norm=True,
        position_embedding_type="rope",
        rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        tie_word_embeddings=False,
    )


def test_stablelm(randomise):
    config = StableLmConfig(**SIZES, **TOKENS, num_key_value_heads=2, use_qkv_bias=True)
    native = randomise(StableLmForCausalLM(config))
    options = {
        **NO_BIAS,
        **GATED_RMSNORM,
        "num_key_value_heads": 2,
        "norm_type": "layernorm",
        "attention_bias": True,
        "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    }
    compare(native, native.state_dict(), **options)


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
