"""The tables `arguments.py` reads by: which argument is of which kind, under which names.

Sources are paths in Megatron-LM at core_v0.16.1 unless another tag is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

Arguments = Mapping[str, object]
NOTHING: Arguments = MappingProxyType({})
OFF = (None, False, "", ())  # 0 equals False


@dataclass(frozen=True, slots=True)
class Neutral:
    """What an argument would do to the forward pass, and the values with which it does not."""

    meaning: str
    values: tuple[object, ...] = OFF


_HYBRID = "a hybrid of attention, Mamba and MLP layers"
_MOE, _QUANTISED = "mixture of experts", "weights kept in a quantised form"
_HETEROGENEOUS = "layers that differ from each other"
_LINEAR_ATTENTION = "layers of linear or sparse attention"
_MODELOPT = "a model changed by NVIDIA ModelOpt; modelopt_state, not the arguments, says how"
_HYPER, _EXTRA_HEADS = "several residual streams", "extra heads for speculative decoding"

NEUTRAL: Mapping[str, Neutral] = {
    # model kinds
    "export_num_eagle_layers": Neutral(_EXTRA_HEADS),
    "export_num_medusa_heads": Neutral(_EXTRA_HEADS),
    "export_num_mtp": Neutral(_EXTRA_HEADS),
    "export_offline_model": Neutral("a model without its decoder layers"),
    "heterogeneous_block_specs": Neutral(_HETEROGENEOUS),
    "heterogeneous_layers_config_encoded_json": Neutral(_HETEROGENEOUS),
    "heterogeneous_layers_config_path": Neutral(_HETEROGENEOUS),
    "hybrid_attention_ratio": Neutral(_HYBRID),
    "hybrid_layer_pattern": Neutral(_HYBRID),
    "hybrid_mlp_ratio": Neutral(_HYBRID),
    "hybrid_override_pattern": Neutral(_HYBRID),
    "is_hybrid_model": Neutral(_HYBRID),
    "modelopt_enabled": Neutral(_MODELOPT),
    "num_attention_heads_kv": Neutral("EPFL's Megatron-LLM, with other rows and names", (None,)),
    # Layers shared by layer numbers; all are distinct when it equals num_layers.
    # (Source: ParallelTransformer, megatron/model/transformer.py of September 2020.)
    "num_unique_layers": Neutral("layers used more than once"),
    "pos_emb": Neutral("GPT-NeoX, whose arguments have other names", (None,)),
    "retro_add_retriever": Neutral("RETRO's retrieval encoder"),
    # Megatron-Core's BERT is built of its own layers with `--spec local` (pretrain_bert.py).
    "spec": Neutral("layers built by the user's own code", (*OFF, ("local",))),
    "vision_pretraining": Neutral("a vision model"),
    # With a YAML file the model's arguments stand in a nested namespace (yaml_arguments.py).
    "yaml_cfg": Neutral("a model described by a YAML file that is not in the checkpoint"),
    # attention
    "attention_output_gate": Neutral("a gate on the attention output"),
    "experimental_attention_variant": Neutral(_LINEAR_ATTENTION),
    "export_qk_l2_norm": Neutral("Llama 4's norm without weights on queries and keys"),
    "head_wise_attn_gate": Neutral("a gate on each head's output"),
    "linear_attention_freq": Neutral(_LINEAR_ATTENTION),
    "linear_attention_type": Neutral(_LINEAR_ATTENTION),
    "qk_l2_norm": Neutral("Llama 4's norm without weights on queries and keys"),
    "softmax_scale": Neutral("attention scores scaled by another number", (None,)),
    "softmax_type": Neutral("a softmax with an offset or a learned sink", (None, "vanilla")),
    # positions
    "enable_gpt_oss": Neutral("GPT-OSS's attention sinks, windows and YaRN positions"),
    "mrope_interleaved": Neutral("multimodal rotary positions"),
    "mrope_section": Neutral("multimodal rotary positions"),
    "no_rope_freq": Neutral("layers without rotary positions among layers with them"),
    "rotary_base_per_layer": Neutral("a rotary base for each layer"),
    # MLP
    "activation_func_clamp_value": Neutral("a clamped activation", (None,)),
    "dense_grouped_gemm": Neutral("gate and up interleaved in blocks of 32 rows"),
    # Attention and MLP go through other code (FPDT_FFN), which nothing here was compared with.
    "ds_sequence_parallel_fpdt": Neutral("Megatron-DeepSpeed's fully pipelined transformer"),
    "glu_activation": Neutral("BigScience's gated MLP, whose second half is the gate"),
    "glu_linear_offset": Neutral("an offset in the gated MLP"),
    "mlp_type": Neutral("Megatron-DeepSpeed's residual experts", (None, "standard")),
    "num_experts_switch": Neutral(_MOE),
    "num_moe_experts": Neutral(_MOE),
    "quick_geglu": Neutral("an MLP gated by x * sigmoid(1.702 x)"),
    "use_grouped_gemm_for_dense_mlp": Neutral("gate and up interleaved in blocks of 32 rows"),
    # norms and residuals
    "apply_residual_connection_post_layernorm": Neutral("residuals taken after the norm"),
    "enable_hyper_connections": Neutral(_HYPER),
    "enable_mhc_connections": Neutral(_HYPER),
    # Multiplies embeddings, attention scores and logits (language_model_embedding.py,
    # language_module.py, transformer_config.py at core_v0.17); all mup_* do nothing without it.
    "use_mup": Neutral("muP's factors on embeddings, scores and logits"),
    # weights that are not plain numbers
    "compression_training": Neutral("DeepSpeed's pruning and quantisation"),
    "export_quant_cfg": Neutral(_QUANTISED, (*OFF, "None")),
    "export_real_quant_cfg": Neutral(_QUANTISED, (*OFF, "None")),
    "fp4_param": Neutral(_QUANTISED),
    "fp4_param_gather": Neutral(_QUANTISED),
}

# Matrix products in few bits while training. The stored weights are params_dtype, or FP8 with their
# scales (see formats/float8.py); computing with them in params_dtype is what the rounding
# approximated.
LOW_PRECISION: Mapping[str, str] = {
    "export_kv_cache_quant": "a quantised key/value cache",
    "fp4": "matrix products in FP4",
    "fp8": "matrix products in FP8",
    "fp8_e4m3": "matrix products in FP8",
    "fp8_hybrid": "matrix products in FP8",
    "fp8_param": "weights kept in FP8 between steps",
    "fp8_param_gather": "weights kept in FP8 between steps",
    "kitchen_config_file": "matrix products quantised by Kitchen",
    "kitchen_recipe_number": "matrix products quantised by Kitchen",
    "quant_recipe": "matrix products quantised by a recipe",
    "te_precision_config_file": "matrix products in a precision of their own",
    "use_kitchen": "matrix products quantised by Kitchen",
    "use_kitchen_attention": "attention computed by Kitchen",
}

SETTINGS: Mapping[str, type] = {
    **dict.fromkeys(
        "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels "
        "num_key_value_heads padded_vocab_size vocab_size max_position_embeddings "
        "encoder_num_layers decoder_num_layers relative_attention_num_buckets "
        "relative_attention_max_distance "
        "moe_ffn_hidden_size moe_router_topk moe_router_num_groups moe_router_group_topk "
        "moe_router_topk_limited_devices moe_shared_expert_intermediate_size "
        "q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim "
        "original_max_position_embeddings mtp_num_layers".split(),
        int,
    ),
    **dict.fromkeys(
        "layernorm_epsilon rotary_base rotary_percent rope_theta rope_scaling_factor "
        "rotary_seq_len_interpolation_factor attention_dropout hidden_dropout "
        "init_method_std moe_router_topk_scaling_factor rotary_scaling_factor beta_fast beta_slow "
        "mscale mscale_all_dim".split(),
        float,
    ),
    **dict.fromkeys(
        "group_query_attention add_position_embedding use_rotary_position_embeddings "
        "use_rope_scaling layernorm_zero_centered_gamma swiglu squared_relu "
        "openai_gelu onnx_safe "
        "bias_gelu_fusion use_te_activation_func use_transformer_engine_op_fuser add_bias_linear "
        "add_qkv_bias qk_layernorm untie_embeddings_and_output_weights fp16 bf16 "
        "use_legacy_models use_mcore_models rotary_interleaved embed_layernorm use_bnb_optimizer "
        "gpt_j_residual bert_binary_head multi_latent_attention moe_router_pre_softmax "
        "moe_router_enable_expert_bias moe_shared_expert_gate mtp_use_repeated_layer "
        "mla_down_proj_fusion".split(),
        bool,
    ),
    **dict.fromkeys(
        "normalization transformer_impl tokenizer_type moe_router_score_function rope_type".split(),
        str,
    ),
    "num_experts": object,
    "moe_layer_freq": object,
    "position_embedding_type": object,
    "window_size": object,
    "window_attn_skip_freq": object,
    "params_dtype": object,
}
NEEDED = (
    "num_layers hidden_size num_attention_heads max_position_embeddings padded_vocab_size "
    "layernorm_epsilon".split()
)
# Names of core_v0.4 to v0.15, the second one also before; on the right those of the other releases.
RENAMED: Mapping[str, str] = {
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
}
# Megatron-DeepSpeed's names: read from checkpoints, but users say Megatron-LM's.
FOREIGN = ("num_key_value_heads", "rope_theta")
# Hugging Face's names, for a suggestion.
_TRANSFORMERS = {
    "num_query_groups": "num_key_value_heads",
    "num_attention_heads": "n_head",
    "num_layers": "num_hidden_layers n_layer",
    "hidden_size": "n_embd d_model",
    "ffn_hidden_size": "intermediate_size n_inner",
    "kv_channels": "head_dim",
    "max_position_embeddings": "n_positions",
    "rotary_base": "rope_theta",
    "rotary_percent": "partial_rotary_factor",
    "rotary_interleaved": "rope_interleave",
    "window_size": "sliding_window",
    "window_attn_skip_freq": "layer_types",
    "use_rope_scaling": "rope_scaling rope_parameters",
    "layernorm_epsilon": "rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps",
    "normalization": "norm_type",
    "swiglu, squared_relu or bias_gelu_fusion": "hidden_act activation_function gated_mlp",
    "add_bias_linear": "mlp_bias",
    "add_qkv_bias": "attention_bias",
    "qk_layernorm": "use_qk_norm",
    "untie_embeddings_and_output_weights": "tie_word_embeddings",
    "layernorm_zero_centered_gamma": "zero_centered_norm",
    "init_method_std": "initializer_range",
    "embed_layernorm": "embedding_norm",
    "gpt_j_residual": "use_parallel_residual",
    "params_dtype": "dtype torch_dtype",
    "num_experts": "num_local_experts n_routed_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_layer_freq": "mlp_layer_types first_k_dense_replace decoder_sparse_step mlp_only_layers",
    "moe_router_score_function": "scoring_func",
    "moe_router_pre_softmax": "norm_topk_prob",
    "moe_router_topk_scaling_factor": "routed_scaling_factor",
    "moe_router_enable_expert_bias": "use_expert_bias",
    "moe_router_num_groups": "n_group",
    "moe_router_group_topk": "topk_group",
    "moe_shared_expert_intermediate_size": "shared_expert_intermediate_size n_shared_experts",
    "moe_shared_expert_gate": "use_shared_expert_gate",
    "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim",
    "mtp_num_layers": "num_nextn_predict_layers",
}
SUGGESTIONS = {theirs: ours for ours, names in _TRANSFORMERS.items() for theirs in names.split()}
# How position_embedding_type is written: by Megatron-LM, and by BigScience's enum.
POSITIONS = {
    **{name: name for name in ("learned_absolute", "rope", "alibi", "relative", "none")},
    "PositionEmbeddingType.rotary": "rope",
    "PositionEmbeddingType.absolute": "learned_absolute",
    "PositionEmbeddingType.alibi": "alibi",
    "<megatron.enums.PositionEmbeddingType(3)>": "alibi",
    "<megatron.enums.PositionEmbeddingType(1)>": "rope",
    "<megatron.enums.PositionEmbeddingType(2)>": "learned_absolute",
}
