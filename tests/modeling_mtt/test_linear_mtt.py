"""oneDNN computes what `nn.Linear` does, and only where nobody would notice."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modeling_mtt import MTTForCausalLM, linear_mtt
from modeling_mtt.linear_mtt import build_linear, project

ONEDNN = linear_mtt._ONEDNN

pytestmark = pytest.mark.skipif(ONEDNN is None, reason="this PyTorch has no MKL or no oneDNN")


@pytest.fixture
def calls(monkeypatch):
    """How often oneDNN was called."""
    seen = []

    def counting(*arguments):
        seen.append(arguments)
        return ONEDNN(*arguments)

    monkeypatch.setattr(linear_mtt, "_ONEDNN", counting)
    monkeypatch.setattr(linear_mtt, "SMALLEST_FOR_ONEDNN", 64)
    monkeypatch.setattr(linear_mtt, "SMALLEST_ON_ONE_THREAD", 64)
    return seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16,), (1, 1, 16), (2, 3, 16), (40, 16)])
def test_the_product_is_the_same(calls, shape, bias):
    linear, states = nn.Linear(16, 24, bias=bias), torch.randn(*shape)
    strided = torch.randn(*shape[:-1], 32)[..., ::2]
    with torch.no_grad():
        for each in (states, strided):
            torch.testing.assert_close(project(linear, each), linear(each))
    assert len(calls) == 2


def with_hook(linear):
    linear.register_forward_hook(lambda module, arguments, output: output + 1)


def with_own_forward(linear):
    forward = linear.forward
    linear.forward = lambda states: forward(states) + 1


@pytest.mark.parametrize(
    "change",
    [
        with_hook,
        with_own_forward,
        lambda linear: linear.to(torch.bfloat16),
        lambda linear: setattr(linear, "weight", nn.Parameter(linear.weight[:3, :16])),
    ],
    ids=["hook", "forward", "bfloat16", "small"],
)
def test_what_is_no_plain_layer_is_called(calls, change):
    linear = nn.Linear(16, 24, bias=False)
    change(linear)
    states = torch.randn(2, 16, dtype=linear.weight.dtype)
    with torch.no_grad():
        assert torch.equal(project(linear, states), linear(states))
    assert not calls


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning")
def test_where_something_watches(calls):
    linear, states = nn.Linear(16, 24), torch.randn(2, 16)
    project(linear, states).sum().backward()
    assert linear.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert project(linear, states).dtype == torch.bfloat16
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        project(linear, states)
    with torch.no_grad(), torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        project(linear, states)
    assert counter.get_total_flops() == 2 * 2 * 16 * 24
    assert not calls


@pytest.fixture
def compiled():
    torch.compiler.reset()
    yield torch.compile(project, backend="aot_eager", fullgraph=True)
    torch.compiler.reset()


@pytest.mark.parametrize("bias", [True, False])
def test_compiled_code_calls_it_too(calls, compiled, bias):
    linear = nn.Linear(16, 24, bias=bias)
    with torch.no_grad():
        for states in (torch.randn(2, 16), torch.randn(2, 32)[:, ::2], torch.randn(3, 1, 16)):
            torch.testing.assert_close(compiled(linear, states), linear(states))
    assert len(calls) == 3


@pytest.mark.parametrize(
    "change",
    [
        with_hook,
        with_own_forward,
        lambda linear: linear.to(torch.bfloat16),
        lambda linear: setattr(linear, "weight", nn.Parameter(linear.weight[:3, :16])),
        lambda linear: setattr(linear, "bias", nn.Parameter(torch.arange(48.0)[::2])),
    ],
    ids=["hook", "forward", "bfloat16", "small", "strided bias"],
)
def test_compiled_code_calls_what_is_no_plain_layer(calls, compiled, change):
    linear = nn.Linear(16, 24, bias=False)
    change(linear)
    states = torch.randn(2, 16, dtype=linear.weight.dtype)
    with torch.no_grad():
        assert torch.equal(compiled(linear, states), linear(states))
    assert not calls


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning")
def test_where_something_watches_compiled_code(calls, compiled):
    linear, states = nn.Linear(16, 24), torch.randn(2, 16)
    compiled(linear, states).sum().backward()
    assert linear.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(linear, states).dtype == torch.bfloat16
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        compiled(linear, states)
    assert not calls


@torch.no_grad()
def test_compiled_forward_derivatives_and_vmap():
    linear, states = nn.Linear(512, 512), torch.randn(2, 512)
    torch.compiler.reset()
    mapped = torch.compile(torch.func.vmap(lambda x: project(linear, x)), backend="aot_eager")
    torch.testing.assert_close(mapped(states), linear(states))

    def derive(x):
        return torch.func.jvp(lambda y: project(linear, y), (x,), (torch.ones_like(x),))[1]

    found = torch.compile(derive, backend="aot_eager")(states)
    torch.testing.assert_close(found, torch.ones_like(states) @ linear.weight.T)
    torch.compiler.reset()


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_needs_nothing_of_ours(calls, strict):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 24)

        def forward(self, states):
            return project(self.linear, states)

    with torch.no_grad():
        program = torch.export.export(Layer(), (torch.randn(2, 16),), strict=strict)
    assert "mtt" not in str(program.graph)


def with_bias(values):
    return lambda linear: setattr(linear, "bias", nn.Parameter(values))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize(
    "change",
    [
        with_bias(torch.arange(48.0)[::2]),
        with_bias(torch.ones(1).expand(24)),
        with_bias(torch.ones(1)),
        lambda linear: setattr(linear, "weight", nn.Parameter(linear.weight.to_sparse_csr())),
    ],
    ids=["strided", "expanded", "one for all", "sparse weight"],
)
def test_values_that_lie_elsewhere_are_found(calls, change):
    linear, states = nn.Linear(16, 24), torch.randn(2, 16)
    change(linear)
    with torch.no_grad():
        torch.testing.assert_close(project(linear, states), linear(states))
    assert not calls


@torch.no_grad()
def test_an_input_of_the_wrong_width_is_named(calls):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        project(nn.Linear(16, 24), torch.randn(2, 15))


@torch.no_grad()
def test_forward_derivatives_and_vmap_reach_the_layer(calls):
    linear, states = nn.Linear(16, 24), torch.randn(2, 16)
    _, found = torch.func.jvp(lambda x: project(linear, x), (states,), (torch.ones(2, 16),))
    _, expected = torch.func.jvp(linear, (states,), (torch.ones(2, 16),))
    assert expected.any() and torch.equal(found, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(states, torch.ones(2, 16))
        unpacked = torch.autograd.forward_ad.unpack_dual(project(linear, dual))
        assert torch.equal(unpacked.tangent, expected)
    mapped = torch.func.vmap(lambda x: project(linear, x))(states)
    torch.testing.assert_close(mapped, linear(states))
    assert not calls


@torch.no_grad()
def test_a_function_mode_sees_the_product(calls):
    class Seeing(torch.overrides.TorchFunctionMode):
        seen = ()

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.seen = (*self.seen, function)
            return function(*args, **(kwargs or {}))

    linear, states = nn.Linear(16, 24), torch.randn(2, 16)
    with Seeing() as mode:
        project(linear, states)
    assert nn.functional.linear in mode.seen and not calls


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_are_used(tiny_model, calls):
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    input_ids = torch.randint(1, 96, (1, 5))
    with torch.no_grad():
        plain = model(input_ids).logits
        num_plain = len(calls)
        adapted = peft.get_peft_model(model, config)(input_ids).logits
    assert num_plain == 3 * 7 + 1
    assert len(calls) == num_plain + 3 * 5 + 1
    assert not torch.allclose(plain, adapted)


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_without_values_is_a_layer(bias):
    built, plain = build_linear(3, 5, bias), nn.Linear(3, 5, bias=bias)
    assert type(built) is nn.Linear and repr(built) == repr(plain)
    built.load_state_dict(plain.state_dict())
    states = torch.randn(2, 3)
    assert torch.equal(built(states), plain(states))


def test_a_new_model_has_the_values_of_its_initialisation(tiny_config):
    model = MTTForCausalLM(tiny_config("gpt", initializer_range=0.02))
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            assert 0.015 < parameter.std() < 0.025, name
        if name.endswith("proj.bias"):
            assert not parameter.any(), name
