"""Tiny random models of transformers' own classes, and what is asked of each family."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2: dict[str, Any] = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BLOOM: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "n_layer": 4,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FALCON = {**SIZES, "ffn_hidden_size": 48}
del FALCON["intermediate_size"]
OWN_SIZES = {"gpt2": GPT2, "bloom": BLOOM, "falcon": FALCON}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "nemotron": "NemotronForCausalLM",
    "bloom": "BloomForCausalLM",
    "falcon": "FalconForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
}
WITH_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "glm4_moe")
# Without a counterpart in MTT.
NO_DECODERS = {"megatron-bert": "MegatronBertForPreTraining"}


@dataclass(frozen=True)
class Case:
    """A configuration of a family.

    Attributes:
        family: its `model_type`.
        options: fields of the class's configuration.
        further: layers that predict further tokens, which the class itself never saves.
    """

    family: str
    options: dict[str, Any] = field(default_factory=dict)
    further: int = 0

    def __str__(self) -> str:
        shown = [
            f"{k}={v['rope_type'] if isinstance(v, dict) else v}"
            for k, v in self.options.items()
            if EXPERT_SIZES.get(self.family, {}).get(k) != v
        ]
        return "-".join([self.family, *shown, *(["further"] * self.further)])

    def config(self) -> Any:
        sizes = OWN_SIZES.get(self.family, SIZES)
        return model_class(self.family).config_class(**{**sizes, **self.options})

    @property
    def beyond_megatron(self) -> str | None:
        """What no argument of Megatron-Core describes: a gate with GELU, parallel residuals."""
        if self.family == "llama" and "hidden_act" in self.options:
            return "gated_linear_unit"
        if self.family == "gpt_neox" and self.config().use_parallel_residual:
            return "parallel_residual"
        if self.family == "falcon" and self.config().parallel_attn:
            return "parallel_residual"
        if self.family == "bloom":
            return "position_embedding_type = alibi"
        return None

    def model(self) -> Any:
        """A model with random weights that all matter, norms and biases included."""
        torch.manual_seed(0)
        model = model_class(self.family)(self.config()).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.normal_(std=0.3)
        return model

    def save(self, folder: Path, **options: Any) -> Any:
        model = self.model()
        model.save_pretrained(folder, **options)
        if self.family in ("deepseek_v3", "glm4_moe"):
            _save_further(self, folder)
        return model


def _save_further(case: Case, folder: Path) -> None:
    """Layers after the last one, under the names that published checkpoints have."""
    config = json.loads((folder / "config.json").read_text())
    config["num_nextn_predict_layers"] = case.further
    (folder / "config.json").write_text(json.dumps(config))
    if not case.further:
        return
    file = folder / "model.safetensors"
    tensors = load_file(file)
    first = config["num_hidden_layers"]
    longer = {**case.options, "num_hidden_layers": first + case.further}
    replace(case, options=longer, further=0).save(folder / "longer")
    layers = load_file(folder / "longer" / "model.safetensors")
    for number in range(first, first + case.further):
        layer = f"model.layers.{number}."
        tensors |= {name: tensor for name, tensor in layers.items() if name.startswith(layer)}
        hidden = config["hidden_size"]
        tensors[f"{layer}eh_proj.weight"] = torch.randn(hidden, 2 * hidden) * 0.3
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            tensors[f"{layer}{norm}.weight"] = torch.randn(hidden) * 0.3
        embedding = tensors["model.embed_tokens.weight"]
        tensors[f"{layer}embed_tokens.weight"] = embedding.clone()
        tensors[f"{layer}shared_head.head.weight"] = tensors.get(
            "lm_head.weight", embedding
        ).clone()
    save_file(tensors, file, metadata={"format": "pt"})
    for path in (folder / "longer").iterdir():
        path.unlink()
    (folder / "longer").rmdir()


def further_logits(case: Case, folder: Path, input_ids: torch.Tensor) -> list[torch.Tensor]:
    """What transformers computes of layers for further tokens; nothing where it cannot yet.

    The k-th has logits for all tokens that have k + 1 after them.
    """
    layers = transformers.modeling_layers
    if not hasattr(getattr(layers, "MtpModel", None), "forward_layer"):
        return []
    native_class = model_class(case.family)
    with pytest.MonkeyPatch.context() as patch:  # the class knows its published sizes only
        numbers = "|".join(str(case.config().num_hidden_layers + k) for k in range(case.further))
        pattern = [rf"model\.layers\.({numbers})\..*"]
        patch.setattr(native_class, "_keys_to_ignore_on_load_unexpected", pattern)
        native = native_class.from_pretrained(folder).eval()
        heads = layers.MtpModel.from_pretrained(native).eval()
    found = []
    with torch.no_grad():
        states = native.model(input_ids).last_hidden_state
        for number in range(case.further):
            length = input_ids.shape[1] - number - 1
            positions, following = torch.arange(length)[None], input_ids[:, number + 1 :]
            states = heads.forward_layer(
                number, states[:, :length], positions, None, input_ids=following
            )
            found.append(heads._project_to_logits(states))
    return found


def model_class(family: str) -> Any:
    return getattr(transformers, {**CLASSES, **NO_DECODERS}[family])


def case(family: str, further: int = 0, **options: Any) -> Case:
    return Case(family, options, further)


def experts(family: str, **options: Any) -> Case:
    """A case of a class with experts, small where nothing else is said."""
    return case(family, **{**EXPERT_SIZES[family], **options})


def windows(**options: Any) -> dict[str, Any]:
    return {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 5, **options}


_ROUTED: dict[str, Any] = {
    "moe_intermediate_size": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
}
EXPERT_SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "qwen2_moe": {
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 20,
    },
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "head_dim": 12,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
    },
    "deepseek_v3": {
        **_ROUTED,
        "num_key_value_heads": 4,
        "q_lora_rank": 20,
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 12,
        "n_group": 4,
        "topk_group": 2,
    },
    "glm4_moe": {**_ROUTED, "num_key_value_heads": 2},
}
TYPES = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
CASES = [
    case("llama", num_key_value_heads=2),
    case("llama", num_key_value_heads=1, head_dim=12, tie_word_embeddings=True),
    case("llama", attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3),
    case("llama", rope_parameters=LINEAR, hidden_act="gelu"),
    case("llama", hidden_act="gelu_new", rms_norm_eps=1e-4),
    case("mistral", num_key_value_heads=2, sliding_window=None),
    case("mistral", num_key_value_heads=2, sliding_window=5, head_dim=16),
    case("mistral", num_key_value_heads=4, sliding_window=1, tie_word_embeddings=True),
    case("qwen2", num_key_value_heads=2),
    case("qwen2", num_key_value_heads=4, tie_word_embeddings=True, head_dim=12),
    case("qwen2", max_window_layers=2, **windows()),
    case("qwen2", layer_types=TYPES, **windows()),
    case("qwen2", max_window_layers=0, **windows(rope_parameters=LLAMA3)),
    case("qwen3", num_key_value_heads=2, head_dim=12),
    case("qwen3", tie_word_embeddings=True, num_key_value_heads=1, head_dim=8),
    case("qwen3", max_window_layers=1, head_dim=8, **windows()),
    case("gpt2"),
    case("gpt2", n_inner=48, activation_function="gelu", tie_word_embeddings=False),
    case("gpt2", activation_function="gelu_fast", reorder_and_upcast_attn=True),
    case("gpt_neox"),
    case("gpt_neox", use_parallel_residual=False, tie_word_embeddings=True),
    case(
        "gpt_neox",
        hidden_act="gelu_fast",
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.8},
    ),
    case("nemotron", num_key_value_heads=2),
    case("nemotron", num_key_value_heads=4, attention_bias=True, mlp_bias=True, norm_eps=1e-4),
    case(
        "nemotron",
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.25},
    ),
    case("nemotron", num_key_value_heads=2, partial_rotary_factor=1.0),
    case("gpt_neox", use_parallel_residual=False, hidden_act="gelu_new"),
    case("bloom"),
    case("bloom", n_head=6, hidden_size=36, tie_word_embeddings=False, pretraining_tp=2),
    case("bloom", layer_norm_epsilon=1e-3, slow_but_exact=True),
    # Falcon 7B, 40B, 11B, and the oldest without ALiBi.
    case("falcon"),
    case("falcon", new_decoder_architecture=True, num_kv_heads=2),
    case("falcon", new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1),
    case("falcon", new_decoder_architecture=True, num_kv_heads=4, tie_word_embeddings=False),
    case("falcon", multi_query=False, parallel_attn=False, bias=True),
    case("falcon", parallel_attn=False, activation="gelu_new", rope_parameters=LINEAR),
    case("falcon", multi_query=False, bias=True, tie_word_embeddings=False),
    experts("mixtral"),
    experts(
        "mixtral",
        num_local_experts=6,
        num_experts_per_tok=3,
        sliding_window=5,
        head_dim=16,
        tie_word_embeddings=True,
        rope_parameters=LINEAR,
    ),
    experts("qwen2_moe"),
    experts("qwen2_moe", norm_topk_prob=True, mlp_only_layers=[0, 2], head_dim=12),
    experts(
        "qwen2_moe",
        decoder_sparse_step=2,
        qkv_bias=False,
        tie_word_embeddings=True,
        max_window_layers=3,
        **windows(),
    ),
    experts("qwen3_moe"),
    experts("qwen3_moe", norm_topk_prob=True, decoder_sparse_step=2, **windows()),
    experts("qwen3_moe", mlp_only_layers=[3], tie_word_embeddings=True, num_key_value_heads=1),
    experts("deepseek_v3"),
    experts("deepseek_v3", q_lora_rank=None, n_group=1, topk_group=1, rope_parameters=YARN),
    experts(
        "deepseek_v3",
        num_experts_per_tok=1,
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
        n_group=2,
        topk_group=2,
        n_shared_experts=2,
        first_k_dense_replace=0,
        tie_word_embeddings=True,
    ),
    experts("deepseek_v3", further=2),
    experts("glm4_moe", use_qk_norm=True),
    experts(
        "glm4_moe",
        attention_bias=True,
        head_dim=16,
        partial_rotary_factor=1.0,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=2,
        routed_scaling_factor=2.5,
        tie_word_embeddings=True,
    ),
    experts("glm4_moe", further=1),
]
