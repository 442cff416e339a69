# Copyright 2026 The mtt authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""MTT model configuration."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field, fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from .plans_mtt import plans_of
from .validation_mtt import EXPERT_FIELDS, LATENT_FIELDS, check_architecture, divides

# Complete on purpose: transformers itself adds only the class being saved, and other runtimes ask
# for `AutoModel` whatever was saved.
AUTO_MAP = {
    "AutoConfig": "configuration_mtt.MTTConfig",
    "AutoModel": "modeling_mtt.MTTModel",
    "AutoModelForCausalLM": "modeling_mtt.MTTForCausalLM",
    "AutoModelForQuestionAnswering": "modeling_mtt.MTTForQuestionAnswering",
    "AutoModelForSequenceClassification": "modeling_mtt.MTTForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_mtt.MTTForTokenClassification",
}


@strict
class MTTConfig(PreTrainedConfig):
    r"""Configuration of an MTT decoder.

    The fields are the options of Megatron-LM's GPT that change its forward pass, under Hugging Face
    names. The defaults describe a GPT of 355 million parameters with the layout of Megatron-Turing
    NLG: learned positions, LayerNorm, biases everywhere, tied embeddings.

    Args:
        vocab_size (`int`, *optional*, defaults to 50257):
            Rows of the embedding and of the head. Megatron's padding rows are not part of it.
        hidden_size (`int`, *optional*, defaults to 1024):
            Width of the residual stream.
        intermediate_size (`int`, *optional*, defaults to 4096):
            Width of the MLP after activation, i.e. of each of gate and up in a gated MLP.
        num_hidden_layers (`int`, *optional*, defaults to 24):
            Number of decoder layers.
        num_attention_heads (`int`, *optional*, defaults to 16):
            Number of query heads.
        num_key_value_heads (`int`, *optional*):
            Number of key and value heads; must divide `num_attention_heads`. `None` means as many
            as query heads, 1 is multi-query attention.
        head_dim (`int`, *optional*):
            Width of one head. `None` means `hidden_size // num_attention_heads`; any other value
            is allowed.
        hidden_act (`str`, *optional*, defaults to `"gelu_pytorch_tanh"`):
            `"gelu"` (exact, with erf), `"gelu_pytorch_tanh"`, `"silu"` or `"relu2"` (ReLU squared).
        gated_mlp (`bool`, *optional*, defaults to `False`):
            Whether the MLP is `down(act(gate(x)) * up(x))` rather than `down(act(up(x)))`.
        norm_type (`str`, *optional*, defaults to `"layernorm"`):
            `"layernorm"` (weight and bias) or `"rmsnorm"` (weight only), for every norm there is.
        norm_eps (`float`, *optional*, defaults to 1e-5):
            Added to the variance, or to the mean square, before its root is taken.
        zero_centered_norm (`bool`, *optional*, defaults to `False`):
            Whether the stored norm weights are gamma - 1, as with Megatron's `apply_layernorm_1p`.
            Holds for every norm, those of queries and keys included: Megatron builds all alike.
        position_embedding_type (`str`, *optional*, defaults to `"learned"`):
            `"learned"` (a table added to the token embeddings), `"rope"`, `"alibi"` (scores that
            fall with distance, as in Bloom) or `"none"`.
        max_position_embeddings (`int`, *optional*, defaults to 1024):
            Rows of the learned table, or the sequence length in tokens the model was trained with.
        rope_parameters (`dict`, *optional*):
            Only with `position_embedding_type="rope"`: `rope_theta`, `rope_type`,
            `partial_rotary_factor` and whatever the rope type asks for. The rotated part comes
            first in a head.
        rope_interleave (`bool`, *optional*, defaults to `False`):
            Whether neighbouring values are rotated as a pair (GPT-J's layout, Megatron's
            `rotary_interleaved`) rather than one value of each half (GPT-NeoX's).
        sliding_window (`int`, *optional*):
            How many tokens a layer of type `"sliding_attention"` sees, the current one included:
            one more than the first number of Megatron's `window_size`.
        layer_types (`list[str]`, *optional*):
            `"full_attention"` or `"sliding_attention"` for each layer. `None` means that all slide
            where there is a `sliding_window`.
        attention_bias (`bool`, *optional*, defaults to `True`):
            Whether the query, key and value projections have a bias.
        attention_out_bias (`bool`, *optional*, defaults to `True`):
            Whether the output projection of attention has a bias.
        mlp_bias (`bool`, *optional*, defaults to `True`):
            Whether the projections of the MLP have a bias.
        use_qk_norm (`bool`, *optional*, defaults to `False`):
            Whether each head of queries and keys is normalised, over `head_dim`, before rotation.
        use_parallel_residual (`bool`, *optional*, defaults to `False`):
            Whether attention and MLP both start from the layer's input, `x + attn(norm(x)) +
            mlp(norm(x))`, as in GPT-NeoX.
        shared_layernorm (`bool`, *optional*, defaults to `False`):
            Only with `use_parallel_residual`: whether one norm feeds attention and MLP, as in
            Falcon 7B. There is no `post_attention_layernorm` then.
        apply_residual_connection_post_layernorm (`bool`, *optional*, defaults to `False`):
            Whether the residual stream is taken after the norms rather than before them.
        embedding_norm (`bool`, *optional*, defaults to `False`):
            Whether embeddings are normalised before the first layer, as in Bloom.
        embedding_multiplier (`float`, *optional*, defaults to 1.0):
            Multiplies embeddings, learned positions included.
        residual_multiplier (`float`, *optional*, defaults to 1.0):
            Multiplies what attention and MLP add to the residual stream.
        attention_multiplier (`float`, *optional*):
            Multiplies attention scores. `None` means `head_dim ** -0.5`.
        logits_scaling (`float`, *optional*, defaults to 1.0):
            Divides the logits.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`):
            Whether the head shares the weight of the token embeddings.
        attention_dropout (`float`, *optional*, defaults to 0.0):
            Probability of dropping an attention weight in training.
        hidden_dropout (`float`, *optional*, defaults to 0.0):
            Probability of dropping a value in training, after the embeddings and before each
            residual addition.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of freshly initialised weights.
        num_experts (`int`, *optional*):
            Experts of a sparse layer. `None` means that every MLP is dense, and that the fields
            from here to `router_aux_loss_coef` say nothing.
        num_experts_per_tok (`int`, *optional*, defaults to 2):
            How many experts a token goes through.
        moe_intermediate_size (`int`, *optional*):
            Width of an expert after activation. `None` means `intermediate_size`.
        mlp_layer_types (`list[str]`, *optional*):
            `"dense"` or `"sparse"` for each layer. `None` means that all are sparse.
        scoring_func (`str`, *optional*, defaults to `"softmax"`):
            `"softmax"` or `"sigmoid"`: what makes weights of the router's logits.
        norm_topk_prob (`bool`, *optional*, defaults to `True`):
            Whether the weights of the chosen experts are divided by their sum. With a softmax that
            is one over the chosen experts alone: Megatron's, without `moe_router_pre_softmax`.
        routed_scaling_factor (`float`, *optional*, defaults to 1.0):
            Multiplies the weights, after that.
        use_expert_bias (`bool`, *optional*, defaults to `False`):
            Only with a sigmoid: whether a bias per expert is added to choose, and not to weigh.
        n_group (`int`, *optional*):
            Groups of neighbouring experts. A token first chooses `topk_group` groups, by the sum of
            the best `num_experts_per_tok // topk_group` scores of each, then among their experts.
        topk_group (`int`, *optional*):
            How many groups are chosen.
        shared_expert_intermediate_size (`int`, *optional*):
            Width of an MLP that every token goes through beside the experts. `None`: there is none.
        use_shared_expert_gate (`bool`, *optional*, defaults to `False`):
            Whether its output is multiplied by the sigmoid of a projection of the token.
        output_router_logits (`bool`, *optional*, defaults to `False`):
            Whether the model returns the routers' logits and a loss that asks for balance.
        router_aux_loss_coef (`float`, *optional*, defaults to 0.001):
            The weight of that loss in the loss of `MTTForCausalLM`.
        kv_lora_rank (`int`, *optional*):
            Width of the latent that keys and values are made of: multi-latent attention, as in
            DeepSeek-V3. `None` means ordinary attention, and that the next four say nothing. With
            it `use_qk_norm` says whether latents are normalised, and the cache holds them alone.
        q_lora_rank (`int`, *optional*):
            Width of the latent that queries are made of. `None`: they are made of the token.
        qk_nope_head_dim (`int`, *optional*):
            Width of the part of a query and key head that is not rotated; it comes first.
        qk_rope_head_dim (`int`, *optional*):
            Width of the rotated part, which all key heads share. `head_dim` is the sum of both.
        v_head_dim (`int`, *optional*):
            Width of a value head.
        num_nextn_predict_layers (`int`, *optional*, defaults to 0):
            Heads that predict tokens after the next one, each a layer of its own: Megatron's
            multi-token prediction. 0 leaves out those that a checkpoint has.
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether the model returns keys and values for later calls.
        bos_token_id (`int`, *optional*, defaults to 50256):
            Beginning of a text.
        eos_token_id (`int` or `list[int]`, *optional*, defaults to 50256):
            End of a text.
        pad_token_id (`int`, *optional*):
            Padding.

    Raises:
        `StrictDataclassError`: a value has the wrong type, or contradicts another one.

    ```python
    >>> from modeling_mtt import MTTConfig, MTTForCausalLM

    >>> config = MTTConfig(hidden_size=256, num_attention_heads=4, num_hidden_layers=2)
    >>> model = MTTForCausalLM(config)
    ```
    """

    model_type = "mtt"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 50257
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: Literal["gelu", "gelu_pytorch_tanh", "silu", "relu2"] = "gelu_pytorch_tanh"
    gated_mlp: bool = False
    norm_type: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    zero_centered_norm: bool = False
    position_embedding_type: Literal["learned", "rope", "alibi", "none"] = "learned"
    max_position_embeddings: int = 1024
    # A factory, so that the class has no such attribute: see `rope_parameters_as_given`.
    rope_parameters: RopeParameters | dict | None = field(default_factory=lambda: None)
    rope_interleave: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    attention_bias: bool = True
    attention_out_bias: bool = True
    mlp_bias: bool = True
    use_qk_norm: bool = False
    use_parallel_residual: bool = False
    shared_layernorm: bool = False
    apply_residual_connection_post_layernorm: bool = False
    embedding_norm: bool = False
    embedding_multiplier: float | int = 1.0
    residual_multiplier: float | int = 1.0
    attention_multiplier: float | int | None = None
    logits_scaling: float | int = 1.0
    tie_word_embeddings: bool = True
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    initializer_range: float = 0.02
    num_experts: int | None = None
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    mlp_layer_types: list[str] | None = None
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: float | int = 1.0
    use_expert_bias: bool = False
    n_group: int | None = None
    topk_group: int | None = None
    shared_expert_intermediate_size: int | None = None
    use_shared_expert_gate: bool = False
    output_router_logits: bool = False
    router_aux_loss_coef: float | int = 0.001
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    num_nextn_predict_layers: int = 0
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.kv_lora_rank is not None and self.head_dim is None:
            self.head_dim = self.qk_head_dim
        fill_in_heads(self)
        if self.layer_types is None and self.sliding_window is not None:
            self.layer_types = ["sliding_attention"] * self.num_hidden_layers
        if self.num_experts is not None and self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size

        plans = plans_of(self)
        self.base_model_tp_plan, self.base_model_ep_plan, self.base_model_pp_plan = plans

        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        with rope_parameters_as_given(self):
            super().__post_init__(**kwargs)

    def __eq__(self, other: object) -> bool:
        # What a dataclass does, but that `rope_parameters` may be missing.
        return type(self) is type(other) and all(
            getattr(self, each.name, None) == getattr(other, each.name, None)
            for each in fields(self)
        )

    # What is stored spells `layer_types` out: vLLM looks up a layer's without asking for `None`.
    def to_dict(self) -> dict[str, Any]:
        """Return the fields, for `config.json`: those of experts, latents and heads where any."""
        stored = {**super().to_dict(), "layer_types": self.types_of_layers()}
        unused: tuple[str, ...] = ("base_model_ep_plan",)
        if self.num_experts is None:
            unused += ("num_experts", *EXPERT_FIELDS)
        if self.kv_lora_rank is None:
            unused += ("kv_lora_rank", *LATENT_FIELDS)
        if not self.num_nextn_predict_layers:
            unused += ("num_nextn_predict_layers",)
        return {name: value for name, value in stored.items() if name not in unused}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read the fields of a `config.json`."""
        num_layers = config_dict.get("num_hidden_layers", cls.num_hidden_layers)
        implied = _same_layers(num_layers, config_dict.get("sliding_window"))
        if config_dict.get("layer_types") == implied:
            # What follows from the other fields follows them when they are replaced.
            config_dict = {**config_dict, "layer_types": None}
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config.layer_types = config.types_of_layers()
        return loaded

    def types_of_layers(self) -> list[str]:
        """Return what the attention of each layer sees, `layer_types` or what follows from it."""
        if self.layer_types is not None:
            return self.layer_types
        return _same_layers(self.num_hidden_layers, self.sliding_window)

    def types_of_mlps(self) -> list[str]:
        """Return the kind of each layer's MLP, `mlp_layer_types` or what follows from others."""
        if self.mlp_layer_types is not None:
            return self.mlp_layer_types
        return ["dense" if self.num_experts is None else "sparse"] * self.num_hidden_layers

    # transformers tells by a value here that keys and values differ in width.
    @property
    def qk_head_dim(self) -> int | None:
        """Width of a query and key head of multi-latent attention, where the model has it."""
        if self.kv_lora_rank is None:
            return None
        return (self.qk_nope_head_dim or 0) + (self.qk_rope_head_dim or 0)

    @property
    def rotary_width(self) -> int | None:
        """Width of what rotations see of a head, of which they may turn a part."""
        return self.head_dim if self.kv_lora_rank is None else self.qk_rope_head_dim

    @property
    def logit_scale(self) -> float:
        """What vLLM, which has the head to itself, multiplies logits by."""
        return 1.0 / self.logits_scaling

    def validate_architecture(self) -> None:
        """Check what no single field shows; `@strict` calls it after construction."""
        check_architecture(self)


def fill_in_heads(config: Any) -> None:
    """Replace the `None` of `num_key_value_heads` and `head_dim` by what it stands for."""
    if config.num_key_value_heads is None:
        config.num_key_value_heads = config.num_attention_heads
    # Left at None where it does not come out even: `validate_architecture` says so.
    if config.head_dim is None and divides(config.num_attention_heads, config.hidden_size):
        config.head_dim = config.hidden_size // config.num_attention_heads


@contextmanager
def rope_parameters_as_given(config: Any) -> Iterator[None]:
    """Have the base class fill in the `rope_parameters` of a rotary model, and of no other.

    transformers takes every configuration with such an attribute for one of a rotary model.
    """
    given = config.rope_parameters
    config.rope_parameters = dict(given) if given is not None else None
    yield
    if config.position_embedding_type != "rope":
        config.rope_parameters = given
        if given is None:
            del config.rope_parameters


def _same_layers(num_layers: int, sliding_window: int | None) -> list[str]:
    return ["full_attention" if sliding_window is None else "sliding_attention"] * num_layers


__all__ = ["AUTO_MAP", "MTTConfig"]
