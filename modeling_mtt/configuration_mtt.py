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

from dataclasses import field, fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

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
    # Plans name everything an MTT model may have; each config keeps what its model does have.
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "embed_positions": (["position_ids"], ["inputs_embeds"]),
        "embed_norm": (["inputs_embeds"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

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
    # A factory, so that the class has no such attribute: see `__post_init__`.
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
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        # Left at None where it does not come out even: `validate_architecture` says so.
        if self.head_dim is None and _divides(self.num_attention_heads, self.hidden_size):
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None and self.sliding_window is not None:
            self.layer_types = ["sliding_attention"] * self.num_hidden_layers

        absent = set()
        if not self.gated_mlp:
            absent |= {"layers.*.mlp.gate_proj"}
        if not self.use_qk_norm:
            absent |= {"layers.*.self_attn.q_norm", "layers.*.self_attn.k_norm"}
        if self.position_embedding_type != "learned":
            absent |= {"embed_positions"}
        if not self.embedding_norm:
            absent |= {"embed_norm"}
        # transformers warns about rules that match nothing.
        self.base_model_tp_plan = _without(absent, self.base_model_tp_plan)
        self.base_model_pp_plan = _without(absent, self.base_model_pp_plan)

        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        given = self.rope_parameters
        self.rope_parameters = dict(given) if given is not None else None
        super().__post_init__(**kwargs)
        # transformers takes every configuration with such an attribute for one of a rotary model,
        # and the base class fills it in.
        if self.position_embedding_type != "rope":
            self.rope_parameters = given
            if given is None:
                del self.rope_parameters

    def __eq__(self, other: object) -> bool:
        # What a dataclass does, but that `rope_parameters` may be missing.
        return type(self) is type(other) and all(
            getattr(self, each.name, None) == getattr(other, each.name, None)
            for each in fields(self)
        )

    # What is stored spells `layer_types` out: vLLM looks up a layer's without asking for `None`.
    def to_dict(self) -> dict[str, Any]:
        """Return the fields, for `config.json`."""
        return {**super().to_dict(), "layer_types": self.types_of_layers()}

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

    @property
    def logit_scale(self) -> float:
        """What vLLM, which has the head to itself, multiplies logits by."""
        return 1.0 / self.logits_scaling

    def validate_architecture(self) -> None:
        """Check what no single field shows; `@strict` calls it after construction."""
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1.")
        for name in ("attention_dropout", "hidden_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) is a probability, between 0 and 1."
                )
        for name in (
            "norm_eps",
            "embedding_multiplier",
            "residual_multiplier",
            "attention_multiplier",
            "logits_scaling",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} ({value}) must be greater than 0.")

        if self.head_dim is None:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                f"({self.num_attention_heads}): set head_dim."
            )
        if self.head_dim < 1:
            raise ValueError(f"head_dim ({self.head_dim}) must be at least 1.")
        if not _divides(self.num_key_value_heads, self.num_attention_heads):
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})."
            )

        self._validate_positions()
        self._validate_layers()
        self._validate_residuals()

    def _validate_positions(self) -> None:
        kind = self.position_embedding_type
        if kind == "rope":
            self._validate_rotated_part()
        elif hasattr(self, "rope_parameters"):
            raise ValueError(
                f"rope_parameters ({self.rope_parameters}) go with position_embedding_type 'rope', "
                f"not '{kind}': drop them or set the type."
            )
        elif self.rope_interleave:
            raise ValueError(
                f"rope_interleave goes with position_embedding_type 'rope', not '{kind}': drop it "
                "or set the type."
            )
        if kind == "alibi" and self.sliding_window is not None:
            raise ValueError(
                f"sliding_window ({self.sliding_window}) and position_embedding_type 'alibi' do "
                "not go together: drop one of them."
            )

    def _validate_rotated_part(self) -> None:
        assert self.rope_parameters is not None and self.head_dim is not None
        rope_type = self.rope_parameters.get("rope_type")
        if rope_type != "default" and rope_type not in ROPE_INIT_FUNCTIONS:
            raise ValueError(
                f"rope_type ({rope_type}) of rope_parameters must be one of "
                f"{['default', *ROPE_INIT_FUNCTIONS]}."
            )
        factor = self.rope_parameters.get("partial_rotary_factor", 1.0)
        if not 0 < factor <= 1:
            raise ValueError(f"partial_rotary_factor ({factor}) must be in (0, 1].")
        # One frequency turns two values, so that an odd part is rounded up.
        rotated = 2 * ((int(self.head_dim * factor) + 1) // 2)
        if not 0 < rotated <= self.head_dim:
            raise ValueError(
                f"head_dim ({self.head_dim}) times partial_rotary_factor ({factor}) makes "
                f"{rotated} values to rotate: expected 2 to {self.head_dim}."
            )

    def _validate_layers(self) -> None:
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window ({self.sliding_window}) must be at least 1.")
        if self.layer_types is None:
            return
        types = self.layer_types
        unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
        if unknown:
            raise ValueError(
                f"layer_types has {unknown}: expected 'full_attention' and 'sliding_attention'."
            )
        if len(types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(types)} entries: expected one for each of "
                f"num_hidden_layers ({self.num_hidden_layers})."
            )
        if ("sliding_attention" in types) != (self.sliding_window is not None):
            raise ValueError(
                f"sliding_window ({self.sliding_window}) and layer_types ({types}) do not agree: "
                "layers that slide need a window, and a window needs layers that slide."
            )

    def _validate_residuals(self) -> None:
        if self.shared_layernorm and not self.use_parallel_residual:
            raise ValueError(
                "shared_layernorm goes with use_parallel_residual: one norm cannot feed attention "
                "and an MLP that comes after it."
            )
        if self.use_parallel_residual and self.apply_residual_connection_post_layernorm:
            raise ValueError(
                "use_parallel_residual and apply_residual_connection_post_layernorm do not go "
                "together: drop one of them."
            )


def _without(absent: set[str], plan: dict[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in plan.items() if name not in absent}


def _divides(divisor: int | None, number: int) -> bool:
    return divisor is not None and divisor > 0 and number % divisor == 0


def _same_layers(num_layers: int, sliding_window: int | None) -> list[str]:
    return ["full_attention" if sliding_window is None else "sliding_attention"] * num_layers


__all__ = ["AUTO_MAP", "MTTConfig"]
