"""What a configuration accepts, refuses and stores."""

from __future__ import annotations

import copy
import json
import re

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

import modeling_mtt
from modeling_mtt import AUTO_MAP, MTTConfig
from tests.modeling_mtt.models import PRESETS


def test_exports_are_sorted_and_complete():
    # Constants first, as ruff has it.
    assert modeling_mtt.__all__ == sorted(modeling_mtt.__all__, key=lambda n: (not n.isupper(), n))
    for name in modeling_mtt.__all__:
        assert hasattr(modeling_mtt, name)


def test_defaults_describe_a_gpt():
    config = MTTConfig()
    assert config.model_type == "mtt"
    assert config.num_key_value_heads == config.num_attention_heads == 16
    assert config.head_dim == 64
    # transformers takes a configuration that has them for one of a rotary model.
    assert not hasattr(config, "rope_parameters")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"hidden_size": 33},
            "hidden_size (33) is not a multiple of num_attention_heads (4): set head_dim.",
        ),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads (4) is not a multiple of num_key_value_heads (3).",
        ),
        ({"num_attention_heads": 0}, "num_attention_heads (0) must be at least 1."),
        ({"num_hidden_layers": 0}, "num_hidden_layers (0) must be at least 1."),
        ({"head_dim": 0}, "head_dim (0) must be at least 1."),
        ({"hidden_dropout": 1.5}, "hidden_dropout (1.5) is a probability, between 0 and 1."),
        ({"norm_eps": 0.0}, "norm_eps (0.0) must be greater than 0."),
        (
            {"norm_type": "batchnorm"},
            "'norm_type' expected one of ('layernorm', 'rmsnorm'), got batchnorm",
        ),
        (
            {"hidden_act": "tanh"},
            "'hidden_act' expected one of ('gelu', 'gelu_pytorch_tanh', 'silu', 'relu2'), got tanh",
        ),
        (
            {"position_embedding_type": "relative"},
            "expected one of ('learned', 'rope', 'alibi', 'none')",
        ),
        ({"gated_mlp": "yes"}, "'gated_mlp' expected bool, got str"),
        (
            {"rope_parameters": {"rope_theta": 1e4}},
            "go with position_embedding_type 'rope', not 'learned': drop them or set the type.",
        ),
        (
            {
                "position_embedding_type": "rope",
                "rope_parameters": {"partial_rotary_factor": 1.25},
            },
            "partial_rotary_factor (1.25) must be in (0, 1].",
        ),
        (
            {
                "position_embedding_type": "rope",
                "rope_parameters": {"partial_rotary_factor": 0.1},
            },
            "head_dim (8) times partial_rotary_factor (0.1) makes 0 values to rotate: "
            "expected 2 to 8.",
        ),
        (
            {"position_embedding_type": "rope", "head_dim": 3},
            "head_dim (3) times partial_rotary_factor (1.0) makes 4 values to rotate: "
            "expected 2 to 3.",
        ),
        (
            {"position_embedding_type": "rope", "rope_parameters": {"rope_type": "su"}},
            "rope_type (su) of rope_parameters must be one of ['default', 'linear',",
        ),
        (
            {"rope_interleave": True},
            "rope_interleave goes with position_embedding_type 'rope', not 'learned'",
        ),
        (
            {"position_embedding_type": "alibi", "rope_parameters": {"rope_theta": 1e4}},
            "go with position_embedding_type 'rope', not 'alibi': drop them or set the type.",
        ),
        (
            {"position_embedding_type": "alibi", "sliding_window": 8},
            "sliding_window (8) and position_embedding_type 'alibi' do not go together",
        ),
        ({"sliding_window": 0}, "sliding_window (0) must be at least 1."),
        (
            {"layer_types": ["sliding_attention"] * 24},
            "sliding_window (None) and layer_types (['sliding_attention',",
        ),
        (
            {"sliding_window": 8, "layer_types": ["full_attention"] * 24},
            "do not agree: layers that slide need a window, and a window needs layers that slide.",
        ),
        (
            {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3},
            "layer_types has 3 entries: expected one for each of num_hidden_layers (24).",
        ),
        (
            {"sliding_window": 8, "layer_types": ["chunked_attention"] * 24},
            "layer_types has ['chunked_attention']: expected 'full_attention' and",
        ),
        ({"shared_layernorm": True}, "shared_layernorm goes with use_parallel_residual"),
        (
            {
                "use_parallel_residual": True,
                "apply_residual_connection_post_layernorm": True,
            },
            "use_parallel_residual and apply_residual_connection_post_layernorm do not go together",
        ),
        ({"embedding_multiplier": 0.0}, "embedding_multiplier (0.0) must be greater than 0."),
        ({"residual_multiplier": -1.0}, "residual_multiplier (-1.0) must be greater than 0."),
        ({"attention_multiplier": 0.0}, "attention_multiplier (0.0) must be greater than 0."),
        ({"logits_scaling": 0.0}, "logits_scaling (0.0) must be greater than 0."),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(StrictDataclassError, match=re.escape(message)):
        MTTConfig(**{"hidden_size": 32, "num_attention_heads": 4, **options})


def test_head_dim_may_differ_from_its_share():
    config = MTTConfig(hidden_size=33, num_attention_heads=4, head_dim=10)
    assert config.head_dim == 10


def test_rope_parameters_are_completed_and_left_alone():
    mine = {"partial_rotary_factor": 0.5}
    config = MTTConfig(position_embedding_type="rope", rope_parameters=mine)
    assert mine == {"partial_rotary_factor": 0.5}
    assert config.rope_parameters == {
        "rope_theta": 10000.0,
        "rope_type": "default",
        "partial_rotary_factor": 0.5,
    }


def test_a_window_is_for_every_layer_unless_said_otherwise():
    assert MTTConfig(num_hidden_layers=2).layer_types is None
    config = MTTConfig(num_hidden_layers=2, sliding_window=8)
    assert config.layer_types == ["sliding_attention", "sliding_attention"]


def test_vllm_is_told_how_logits_are_scaled():
    config = MTTConfig(logits_scaling=4.0)
    assert config.logit_scale == 0.25
    assert "logit_scale" not in config.to_dict()


def test_configurations_of_before_keep_their_meaning(tiny_config, tmp_path):
    """Without the fields that came later, a model is what it was."""
    config = tiny_config("llama")
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    later = {
        "rope_interleave": False,
        "sliding_window": None,
        "layer_types": ["full_attention"] * 3,
        "use_parallel_residual": False,
        "shared_layernorm": False,
        "apply_residual_connection_post_layernorm": False,
        "embedding_norm": False,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": None,
        "logits_scaling": 1.0,
    }
    assert {name: stored.pop(name) for name in later} == later
    path.write_text(json.dumps(stored))
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize("preset", PRESETS)
def test_round_trip(tiny_config, tmp_path, preset):
    config = tiny_config(preset)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["auto_map"] == AUTO_MAP
    assert not [name for name in stored if name.endswith("_plan")]

    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MTTConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert copy.deepcopy(config).to_dict() == config.to_dict()


def test_plans_name_only_what_is_there(tiny_config):
    attention = {f"layers.*.self_attn.{name}_proj" for name in "qkvo"}
    ungated = attention | {"layers.*.mlp.up_proj", "layers.*.mlp.down_proj"}
    norms = {"layers.*.self_attn.q_norm", "layers.*.self_attn.k_norm"}
    expected = {
        "gpt": ungated,
        "llama": ungated | {"layers.*.mlp.gate_proj"},
        "nemotron": ungated | norms,
        "bloom": ungated,
    }
    for preset, names in expected.items():
        config = tiny_config(preset)
        # transformers 5.17 adds the embedding to every plan.
        assert set(config.base_model_tp_plan) - {"embed_tokens"} == names
        assert ("embed_positions" in config.base_model_pp_plan) == (preset == "gpt")
        assert ("embed_norm" in config.base_model_pp_plan) == (preset == "bloom")


@pytest.mark.parametrize("kind", ["learned", "rope"])
def test_equal_configurations_are_equal(kind):
    config = MTTConfig(position_embedding_type=kind)
    assert config == MTTConfig(position_embedding_type=kind)
    assert config == copy.deepcopy(config)
    assert config != MTTConfig(position_embedding_type=kind, num_hidden_layers=3)
    assert config != MTTConfig(position_embedding_type="none")


def test_a_window_set_later_is_every_layers():
    """As in Mistral, whose configuration has no `layer_types`."""
    config = MTTConfig(num_hidden_layers=2)
    config.sliding_window = 8
    config.validate()
    again = MTTConfig.from_dict(config.to_dict())
    assert again.layer_types == ["sliding_attention"] * 2


def test_fields_replaced_on_loading_change_the_layers(tmp_path):
    """What is stored spells the layers out, and follows the fields they followed from."""
    MTTConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    window = MTTConfig.from_pretrained(tmp_path, sliding_window=8)
    assert window.layer_types == ["sliding_attention"] * 2
    window.validate()
    more = MTTConfig.from_pretrained(tmp_path, num_hidden_layers=3)
    assert more.layer_types == ["full_attention"] * 3


def test_stored_layers_must_be_as_many_as_there_are(tmp_path):
    """All alike or not."""
    fields = {**MTTConfig(num_hidden_layers=2).to_dict(), "layer_types": ["full_attention"] * 3}
    with pytest.raises(StrictDataclassError, match="layer_types has 3 entries"):
        MTTConfig.from_dict(fields)
