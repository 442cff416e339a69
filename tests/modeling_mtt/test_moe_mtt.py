"""Routers against Megatron-Core's own, every way to compute experts, their names on disk."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from modeling_mtt import MTTConfig, MTTForCausalLM
from modeling_mtt.moe_mtt import MTTMoE, MTTRouter, balance_loss

IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


ROUTERS = {
    "softmax over the chosen": {},
    "softmax over all": {"norm_topk_prob": False},
    "scaled": {"routed_scaling_factor": 2.5},
    "softmax over the chosen of groups": {"n_group": 4, "topk_group": 2},
    "softmax over all, groups": {"n_group": 4, "topk_group": 1, "norm_topk_prob": False},
    "sigmoid": {"scoring_func": "sigmoid"},
    "sigmoid, one expert": {
        "scoring_func": "sigmoid",
        "num_experts_per_tok": 1,
        "norm_topk_prob": False,
    },
    "DeepSeek-V3": {
        "scoring_func": "sigmoid",
        "use_expert_bias": True,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
    },
    "groups scored by their best": {
        "scoring_func": "sigmoid",
        "use_expert_bias": True,
        "n_group": 8,
        "topk_group": 4,
    },
}


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_is_megatrons(name):
    routing = pytest.importorskip("megatron.core.transformer.moe.moe_utils")
    options = {"num_experts": 16, "num_experts_per_tok": 4, **ROUTERS[name]}
    config = MTTConfig(hidden_size=32, num_attention_heads=4, mlp_bias=False, **options)
    router = MTTRouter(config)
    torch.nn.init.normal_(router.weight, std=0.3)
    if config.use_expert_bias:
        router.e_score_correction_bias.normal_(std=0.2)
    states = torch.randn(64, 32)
    with torch.no_grad():
        logits, weights, chosen = router(states)
    close(logits, states @ router.weight.T)
    expected, _ = routing.topk_routing_with_score_function(
        logits,
        config.num_experts_per_tok,
        use_pre_softmax=not config.norm_topk_prob,
        num_groups=config.n_group,
        group_topk=config.topk_group,
        scaling_factor=config.routed_scaling_factor,
        score_function=config.scoring_func,
        expert_bias=router.e_score_correction_bias,
    )
    close(torch.zeros(64, 16).scatter(1, chosen, weights), expected)


def test_a_router_computes_in_float32():
    config = MTTConfig(hidden_size=32, num_attention_heads=4, num_experts=8)
    router = MTTRouter(config)
    torch.nn.init.normal_(router.weight)
    states = torch.randn(5, 32).bfloat16()
    logits, weights, _ = router.bfloat16()(states)
    assert logits.dtype == weights.dtype == torch.float32
    close(logits, states.float() @ router.weight.float().T)


def expert_by_expert(moe: MTTMoE, states: torch.Tensor) -> torch.Tensor:
    """Spelt out, token by token."""
    experts, act = moe.experts, moe.experts.act_fn
    rows = []
    for row, weights, chosen in zip(states, *moe.gate(states)[1:], strict=True):
        output = torch.zeros_like(row)
        for weight, number in zip(weights, chosen.tolist(), strict=True):
            if experts.has_gate:
                inner = experts.gate_up_proj[number] @ row
                if experts.has_bias:
                    inner = inner + experts.gate_up_proj_bias[number]
                gate, up = inner.chunk(2)
                inner = act(gate) * up
            else:
                inner = experts.up_proj[number] @ row
                if experts.has_bias:
                    inner = inner + experts.up_proj_bias[number]
                inner = act(inner)
            result = experts.down_proj[number] @ inner
            if experts.has_bias:
                result = result + experts.down_proj_bias[number]
            output = output + weight * result
        rows.append(output)
    return torch.stack(rows)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("gated_mlp", [True, False])
@pytest.mark.parametrize("mlp_bias", [True, False])
def test_experts(tiny_model, implementation, gated_mlp, mlp_bias):
    model = tiny_model("switch", gated_mlp=gated_mlp, mlp_bias=mlp_bias, num_experts_per_tok=2)
    assert model.config._experts_implementation == "grouped_mm"  # no loop over experts by default
    model.set_experts_implementation(implementation)
    moe, states = model.model.layers[1].mlp, torch.randn(3, 5, 32)
    with torch.no_grad():
        expected = expert_by_expert(moe, states.flatten(0, 1))
        close(moe(states).flatten(0, 1), expected)


def test_a_shared_expert_and_its_gate(tiny_model):
    moe, states = tiny_model("mixtral").model.layers[0].mlp, torch.randn(2, 5, 32)
    with torch.no_grad():
        together = moe(states)
        shared = moe.shared_experts(states) * torch.sigmoid(
            states @ moe.shared_expert_gate.weight.T
        )
        assert shared.abs().max() > 0.1
        moe.shared_experts = None
        close(together - moe(states), shared)


@pytest.mark.parametrize("gated_mlp", [True, False])
def test_experts_are_one_by_one_on_disk(tiny_model, tmp_path, gated_mlp):
    model = tiny_model("switch", gated_mlp=gated_mlp)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = {name for name in file.keys() if ".0.mlp." in name}  # noqa: SIM118
    inner = ("gate_proj", "up_proj") if gated_mlp else ("up_proj",)
    prefix = "model.layers.0.mlp"
    assert names == {f"{prefix}.gate.weight"} | {
        f"{prefix}.experts.{number}.{part}.{kind}"
        for number in range(4)
        for part in (*inner, "down_proj")
        for kind in ("weight", "bias")
    }

    again = MTTForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert again.state_dict()[name].equal(tensor), name
    again.save_pretrained(tmp_path / "again")
    first, second = (path.read_bytes() for path in sorted(tmp_path.rglob("*.safetensors")))
    assert first == second


def test_experts_may_be_together_on_disk(tiny_model, tmp_path):
    """As `save_original_format=False` writes them."""
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(tmp_path / "model.safetensors")
    again = MTTForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert again.state_dict()[name].equal(tensor), name


def test_a_missing_expert_is_noticed(tiny_model, tmp_path):
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.2.down_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError):
        MTTForCausalLM.from_pretrained(tmp_path)


def test_the_bias_stays_in_float32(tiny_model, tmp_path):
    model = tiny_model("deepseek")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    bias = model.state_dict()[name].clone()
    assert bias.abs().max() > 0 and bias.dtype == torch.float32
    model.save_pretrained(tmp_path)
    again = MTTForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.state_dict()[name].equal(bias)
    assert again.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_that_asks_for_balance(tiny_model, masked):
    model = tiny_model("mixtral", router_aux_loss_coef=0.25)
    ids = torch.randint(1, 96, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"attention_mask": mask} if masked else {}
    with torch.no_grad():
        plain = model(ids, labels=ids, **options)
        outputs = model(ids, labels=ids, output_router_logits=True, **options)
    assert plain.aux_loss is None and plain.router_logits is None
    assert [tuple(logits.shape) for logits in outputs.router_logits] == [(18, 4)] * 3
    expected = load_balancing_loss_func(outputs.router_logits, 4, 2, mask if masked else None)
    close(outputs.aux_loss, expected)
    close(outputs.loss, plain.loss + 0.25 * expected)

    model.config.output_router_logits = True
    with torch.no_grad():
        close(model(ids, labels=ids, **options).loss, outputs.loss)


def test_only_sparse_layers_route(tiny_model):
    ids = torch.randint(1, 96, (1, 4))
    with torch.no_grad():
        outputs = tiny_model("deepseek")(ids, output_router_logits=True)
        assert len(outputs.router_logits) == 2
        assert tiny_model("llama")(ids, output_router_logits=True).aux_loss is None


def test_balanced_experts_cost_one():
    logits = torch.eye(4).repeat(3, 1) * 50
    close(balance_loss((logits, logits), 1, None), torch.tensor(1.0))
    close(balance_loss((logits[:1],), 1, None), torch.tensor(4.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": None, "n_group": 2}, "n_group (2) goes with num_experts: set that, or"),
        ({"num_experts": None, "scoring_func": "sigmoid"}, "scoring_func (sigmoid) goes with"),
        ({"num_experts": 0}, "num_experts (0) must be at least 1."),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok (9) is more than num_experts (8)."),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size (0) must be at least 1."),
        ({"routed_scaling_factor": 0.0}, "routed_scaling_factor (0.0) must be greater than 0."),
        ({"router_aux_loss_coef": -1.0}, "router_aux_loss_coef (-1.0) must not be less than 0."),
        ({"mlp_layer_types": ["sparse"]}, "mlp_layer_types"),
        ({"use_expert_bias": True}, "use_expert_bias goes with scoring_func 'sigmoid', not"),
        (
            {"scoring_func": "sigmoid", "num_experts_per_tok": 1},
            "would make the weight of a token's only expert 1, whatever its sigmoid says",
        ),
        ({"use_shared_expert_gate": True}, "goes with shared_expert_intermediate_size"),
        (
            {"shared_expert_intermediate_size": 8, "mlp_bias": True},
            "mlp_bias and shared_expert_intermediate_size do not go together",
        ),
        ({"n_group": 4}, "n_group (4) and topk_group (None) need each other."),
        ({"n_group": 3, "topk_group": 1}, "num_experts (8) is not a multiple of n_group (3)."),
        ({"n_group": 4, "topk_group": 5}, "topk_group (5) must be between 1 and n_group (4)."),
        (
            {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3},
            "num_experts_per_tok (3) must be between topk_group (1) and the 2 experts of so many",
        ),
    ],
)
def test_what_does_not_go_together(options, message):
    with pytest.raises(StrictDataclassError) as raised:
        MTTConfig(**{"num_experts": 8, "mlp_bias": False, "num_hidden_layers": 2, **options})
    assert message in str(raised.value)
