"""What vLLM's and SGLang's Transformers backends ask of a model, without either of them.

The sources are vllm/model_executor/models/transformers/ of vLLM, its documentation on writing a
custom model (docs/models/supported_models.md), and python/sglang/srt/models/transformers.py.
"""

from __future__ import annotations

import re
import sys
import types
from importlib.metadata import entry_points

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import modeling_mtt
from modeling_mtt import AUTO_MAP, MTTForCausalLM, MTTModel
from tests.modeling_mtt.models import PRESETS

# Any other is replicated in silence by vLLM, and refused by SGLang.
STYLES = {"colwise", "colwise_rep", "rowwise", "rowwise_rep", "replicate"}
# Narrow, and whole on every process of ours too.
REPLICATED = {"shared_expert_gate", "q_a_proj", "kv_a_proj_with_mqa", "eh_proj"}


class Missing(nn.Identity):
    """As vLLM's and SGLang's `PPMissingLayer`."""

    def forward(self, *args, **kwargs):
        return args[0] if args else next(iter(kwargs.values()))


class Engine:
    """The part of a server that holds the model: attention, the pipeline's cuts, the head."""

    def __init__(self, folder, monkeypatch, stages=1):
        self.config = AutoConfig.from_pretrained(folder)
        full = MTTForCausalLM.from_pretrained(folder)
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", self.attention)
        self.config._attn_implementation = "vllm"
        self.stages = []
        for stage in range(stages):
            model = AutoModel.from_config(self.config)
            ignored = re.compile("|".join(model._keys_to_ignore_on_load_unexpected))
            weights = full.model.state_dict()
            model.load_state_dict({k: v for k, v in weights.items() if not ignored.search(k)})
            self.stages.append(self.cut(model.eval(), stage, stages))
        self.lm_head = full.lm_head
        self.seen = []

    def cut(self, model, stage, stages):
        """Put an identity where another stage holds the module, by the order of the plan."""
        names = list(model._pp_plan)
        lists = [n for n in names if isinstance(getattr(model, n), nn.ModuleList)]
        assert lists == ["layers"]
        before = names[: names.index("layers")]
        last = stage == stages - 1
        for name in before:
            if stage > 0 and not (last and self.config.tie_word_embeddings):
                setattr(model, name, Missing())
        for name in names[len(before) + 1 :]:
            if not last:
                setattr(model, name, Missing())
        per_stage = self.config.num_hidden_layers // stages
        for index in range(self.config.num_hidden_layers):
            if min(index // per_stage, stages - 1) != stage:
                model.layers[index] = Missing()
        return model

    def attention(self, module, query, key, value, mask, scaling=None, **kwargs):
        """Causal attention over the one sequence there is, in the shapes vLLM works with."""
        window = kwargs["attention_instances"][module.layer_idx]
        self.seen.append(module.layer_idx)
        length = query.shape[-2]
        flat = [t.transpose(1, 2).reshape(length, -1) for t in (query, key, value)]
        query, key, value = (
            t.view(length, -1, module.head_dim).transpose(0, 1).float() for t in flat
        )
        groups = query.shape[0] // key.shape[0]
        key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        allowed = (distance >= 0) & (distance < (window or length))
        scores = (query @ key.transpose(1, 2)) * scaling
        weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
        return (weights @ value).transpose(0, 1).reshape(length, -1), None

    @torch.no_grad()
    def logits(self, ids):
        instances = {}
        for layer in range(self.config.num_hidden_layers):
            # Subscripted wherever the attribute exists.
            sliding = self.config.layer_types[layer] == "sliding_attention"
            instances[layer] = self.config.sliding_window if sliding else None
        states = None
        for stage in self.stages:
            outputs = stage(
                input_ids=ids[None] if states is None else None,
                inputs_embeds=None if states is None else states[None],
                use_cache=False,
                position_ids=torch.arange(len(ids))[None],
                attention_instances=instances,
                return_dict=False,
            )
            states = outputs[0][0]
        return self.lm_head(states) * getattr(self.config, "logit_scale", 1.0)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in ("bloom", "switch")])
def test_the_base_model_in_a_server(tiny_model, tmp_path, monkeypatch, preset, stages):
    model = tiny_model(preset, logits_scaling=2.0)
    model.save_pretrained(tmp_path)
    engine = Engine(tmp_path, monkeypatch, stages)
    ids = torch.randint(1, 96, (9,))
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    torch.testing.assert_close(engine.logits(ids), expected, rtol=1e-4, atol=1e-4)
    assert engine.seen == list(range(model.config.num_hidden_layers))


def test_alibi_is_refused_by_name(tiny_model, tmp_path, monkeypatch):
    tiny_model("bloom").save_pretrained(tmp_path)
    engine = Engine(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"ALiBi adds a bias .* found attention implementation"):
        engine.logits(torch.tensor([1, 2, 3]))


@pytest.mark.parametrize(
    ("preset", "options", "found"),
    [
        ("switch", {}, "found hidden_act 'gelu_pytorch_tanh' and gated_mlp False, expected 'silu'"),
        ("deepseek", {"topk_group": 4}, "groups of experts scored by their best 1, expected"),
        ("deepseek", {"use_expert_bias": False}, "by their best 2, without DeepSeek-V3's bias"),
    ],
)
def test_experts_that_a_server_would_compute_otherwise_are_refused(
    tiny_config, monkeypatch, preset, options, found
):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", Engine.attention)
    config = tiny_config(preset, **options)
    config._attn_implementation = "vllm"
    with pytest.raises(ValueError, match=found):
        MTTModel(config)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_linear_has_a_style_that_servers_know(tiny_model, preset):
    model = tiny_model(preset).model
    plan = model.config.base_model_tp_plan
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert linears
    for name in linears:
        styles = [style for rule, style in plan.items() if re.match(rule, name)]
        if name.rpartition(".")[2] in REPLICATED:
            assert styles in ([], ["mla_kv_a_proj"]), name
        else:
            assert len(styles) == 1, name
            assert styles[0] in STYLES, name
    # A rule for anything else changes nothing in vLLM.
    others = {rule for rule in plan if rule.rpartition(".")[2] not in {"q_norm", "k_norm"}}
    others -= {rule for rule in plan if "experts" in rule or rule.endswith("kv_a_proj_with_mqa")}
    assert {plan[rule] for rule in others - {"embed_tokens"}} <= STYLES


@pytest.mark.parametrize("preset", PRESETS)
def test_names_and_flags(tiny_model, tmp_path, preset):
    model = tiny_model(preset)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert AUTO_MAP["AutoModel"] == config.auto_map["AutoModel"]
    assert MTTModel.is_backend_compatible()
    assert MTTForCausalLM.is_backend_compatible()
    assert config.get_text_config() is config
    for name in [
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "num_hidden_layers",
        "vocab_size",
        "tie_word_embeddings",
    ]:
        assert getattr(config, name) is not None, name
    assert len(config.layer_types) == config.num_hidden_layers
    # A module that is not causal would make vLLM take the model for an encoder.
    assert all(getattr(module, "is_causal", True) for module in model.modules())
    names = {name.removeprefix("model.") for name, _ in model.named_parameters()}
    assert set(dict(model.model.named_parameters())) == names - {"lm_head.weight"}


@pytest.mark.parametrize("preset", PRESETS)
def test_norms_are_told_apart(tiny_model, preset):
    """A class named `...RMSNorm` is replaced; one built with zeros adds 1 to its weight."""
    for module in tiny_model(preset).modules():
        if type(module).__name__.endswith("RMSNorm"):
            assert module.variance_epsilon > 0
            zero = "ZeroCentered" in type(module).__name__
            assert bool((type(module)(1).weight == 0).all()) == zero


def test_vllm_finds_the_plugin(monkeypatch):
    (plugin,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "mtt"]
    register = plugin.load()
    assert register is modeling_mtt.register_with_vllm

    registered = {}
    registry = types.SimpleNamespace(
        get_supported_archs=registered.keys, register_model=registered.__setitem__
    )
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(ModelRegistry=registry))
    for _ in range(2):
        register()
    module = "vllm.model_executor.models.transformers"
    assert registered == {
        "MTTForCausalLM": f"{module}:TransformersForCausalLM",
        "MTTForSequenceClassification": f"{module}:TransformersForSequenceClassification",
    }
