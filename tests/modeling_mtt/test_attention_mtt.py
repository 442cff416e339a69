"""Every attention implementation computes what eager attention does of each sequence alone.

FlashAttention needs a GPU: `flash_stand_in` takes its place, which checks how it is called.
"""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_mtt import attention_mtt
from modeling_mtt.attention_mtt import TORCH_VARLEN, positions_of_packed
from tests.modeling_mtt import flash_stand_in

HUB_KERNEL = "kernels-community/flash-attn2"
STAND_INS = {
    "flash_attention_2": flash_stand_in.Flash2,
    "flash_attention_3": flash_stand_in.Flash3,
    "flash_attention_4": flash_stand_in.Flash4,
    HUB_KERNEL: flash_stand_in.Flash2,
    TORCH_VARLEN: flash_stand_in.TorchVarlen,
}
IMPLEMENTATIONS = ["eager", "sdpa", "flex_attention", *STAND_INS]
# Learned positions; grouped heads, rotations; all of that, and layers with a sliding window.
PRESETS = ["gpt", "llama", "qwen2", "deepseek"]
LENGTHS = (9, 5)


def with_parameters(model, dtype):
    """As loaded with this dtype: inverse frequencies stay as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


class Case:
    """A model with an implementation, and the same with eager attention in float32."""

    def __init__(self, model, implementation, stand_in):
        self.calls = stand_in.calls if stand_in else []
        self.tolerance = 2e-2 if stand_in else 1e-4
        # What both can hold, so that only the arithmetic differs.
        self.reference = with_parameters(with_parameters(model, torch.half), torch.float)
        self.reference.set_attn_implementation("eager")
        self.model = type(model)(copy.deepcopy(model.config)).eval()
        self.model.load_state_dict(model.state_dict())
        if stand_in:
            with_parameters(self.model, torch.half)
        self.model.config._attn_implementation = implementation
        self.texts = [torch.randint(1, 96, (length,)) for length in LENGTHS]

    @torch.no_grad()
    def alone(self):
        return [self.reference(text[None], use_cache=False).logits[0] for text in self.texts]

    def close(self, found, expected):
        torch.testing.assert_close(
            found.float(), expected, rtol=self.tolerance, atol=self.tolerance
        )

    def padded(self, side):
        length = max(LENGTHS)
        rows, masks = [], []
        for text in self.texts:
            padding = (length - len(text), 0) if side == "left" else (0, length - len(text))
            rows.append(torch.nn.functional.pad(text, padding))
            masks.append(torch.nn.functional.pad(torch.ones_like(text), padding))
        return {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks)}


@pytest.fixture
def case(tiny_model, monkeypatch):
    def build(preset, implementation):
        stand_in = None
        if implementation in STAND_INS:
            stand_in = STAND_INS[implementation]()
        if implementation == TORCH_VARLEN:
            monkeypatch.setattr(attention_mtt, "varlen_attn", stand_in.varlen_attn)
        elif stand_in:
            functions = (stand_in.flash_attn_func, stand_in.flash_attn_varlen_func, None)
            helpers = (flash_utils._pad_input, flash_utils._unpad_input)
            monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *a, **k: functions + helpers)
            monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
        if implementation == HUB_KERNEL:
            # As transformers' load_and_register_attn_kernel does.
            attention, masks = ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS
            monkeypatch.setitem(attention._global_mapping, HUB_KERNEL, flash_attention_forward)
            monkeypatch.setitem(masks._global_mapping, HUB_KERNEL, flash_attention_mask)
        return Case(tiny_model(preset, head_dim=16), implementation, stand_in)

    # Compiled, flex attention takes seconds for each shape: `test_flex_attention_agrees`.
    with torch.compiler.set_stance("force_eager"):
        yield build


pytestmark = pytest.mark.filterwarnings(
    "ignore:flex_attention called without torch.compile:UserWarning",
    "ignore:.*should not be instantiated:DeprecationWarning",
)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding(case, preset, implementation, side):
    this = case(preset, implementation)
    batch = this.padded(side)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = this.model(**batch, position_ids=positions).logits
    for row, mask, expected in zip(logits, batch["attention_mask"], this.alone(), strict=True):
        this.close(row[mask.bool()], expected)
    if implementation in STAND_INS:
        assert set(this.calls) == {"packed"}


@pytest.mark.parametrize("told_by", ["position_ids", "cu_seq_lens", "both"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_sequences(case, preset, implementation, told_by):
    this = case(preset, implementation)
    told = {}
    if told_by != "cu_seq_lens":
        told["position_ids"] = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    if told_by != "position_ids":
        ends = torch.tensor([0, LENGTHS[0], sum(LENGTHS)], dtype=torch.int32)
        told |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        told |= {"max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS)}
    with torch.no_grad():
        logits = this.model(torch.cat(this.texts)[None], **told).logits[0]
    this.close(logits, torch.cat(this.alone()))
    if implementation in STAND_INS:
        assert set(this.calls) == {"packed"}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_generation(case, preset, implementation, cache):
    """Token by token, the logits are those of the whole text."""
    this = case(preset, implementation)
    batch = this.padded("left")
    options = {"max_new_tokens": 6, "do_sample": False, "disable_compile": True}
    found = this.model.generate(
        **batch,
        **options,
        cache_implementation=cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    generated = found.sequences[:, max(LENGTHS) :]
    for row, text in enumerate(this.texts):
        whole = torch.cat((text, generated[row]))[None]
        with torch.no_grad():
            expected = this.reference(whole, use_cache=False).logits[0, len(text) - 1 : -1]
        this.close(torch.stack([step[row] for step in found.logits]), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_continuous_batching(case, implementation):
    this = case("llama", implementation)
    prompts = [text.tolist() for text in this.texts]
    options = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=16, block_size=8, max_batch_tokens=64)

    def generate():
        return this.model.generate_batch(
            prompts, generation_config=options, continuous_batching_config=small
        )

    if implementation in ("flex_attention", TORCH_VARLEN):
        with pytest.raises(ValueError, match=implementation):
            generate()
        return
    results = sorted(generate().values(), key=lambda result: -len(result.prompt_ids))
    for text, result in zip(this.texts, results, strict=True):
        whole = torch.cat((text, torch.tensor(result.generated_tokens)))
        with torch.no_grad():
            logits = this.reference(whole[None], use_cache=False).logits[0, len(text) - 1 : -1]
        best = logits.max(-1).values
        chosen = logits.gather(-1, whole[len(text) :, None])[:, 0]
        this.close(chosen, best)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_alibi_is_computed_or_refused_by_name(case, implementation):
    this = case("bloom", implementation)
    batch = this.padded("left")
    if implementation in STAND_INS:
        with pytest.raises(ValueError, match=f"found attention implementation '{implementation}'"):
            this.model(**batch)
        return
    with torch.no_grad():
        logits = this.model(**batch).logits
    for row, mask, expected in zip(logits, batch["attention_mask"], this.alone(), strict=True):
        this.close(row[mask.bool()], expected)


def test_a_wrong_window_would_be_seen(case):
    """What the tolerance of half precision lets pass is less than one key more or less."""
    this = case("qwen2", "flash_attention_2")
    for layer in this.model.model.layers:
        if layer.self_attn.sliding_window:
            layer.self_attn.sliding_window += 1
    with torch.no_grad():
        logits = this.model(this.texts[0][None]).logits[0]
    with pytest.raises(AssertionError, match="not close"):
        this.close(logits, this.alone()[0])


def test_old_torch_varlen(case, monkeypatch):
    this = case("llama", TORCH_VARLEN)
    old = flash_stand_in.OldTorchVarlen()
    monkeypatch.setattr(attention_mtt, "varlen_attn", old.varlen_attn)
    with torch.no_grad():
        this.close(this.model(this.texts[0][None]).logits[0], this.alone()[0])
    this = case("qwen2", TORCH_VARLEN)
    monkeypatch.setattr(attention_mtt, "varlen_attn", old.varlen_attn)
    with pytest.raises(ValueError, match="has no window_size"):
        this.model(this.texts[0][None])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.float(), "found torch.float32, expected torch.float16"),
        (lambda model: setattr_all(model, "attention_dropout", 0.5), "found attention_dropout 0.5"),
        (lambda model: None, "found cpu, expected a CUDA device"),
    ],
)
def test_what_torch_varlen_cannot_do(tiny_model, change, message):
    model = tiny_model("gpt", head_dim=16).half().train()
    model.set_attn_implementation(TORCH_VARLEN)
    change(model)
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([[1, 2, 3]]))


def setattr_all(model, name, value):
    for layer in model.model.layers:
        setattr(layer.self_attn, name, value)


@pytest.mark.parametrize("requested", ["flash_attention_2", "flash_attention_3"])
def test_torch_stands_in_for_a_missing_package(tiny_model, monkeypatch, requested):
    model = tiny_model("llama")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model.set_attn_implementation(requested)
    assert model.config._attn_implementation == TORCH_VARLEN
    monkeypatch.setattr(attention_mtt, "is_kernels_available", lambda: True)
    assert attention_mtt.available_implementation(requested) == requested


def test_without_a_gpu_nothing_stands_in(tiny_model):
    with pytest.raises(ImportError, match="FlashAttention2 has been toggled on"):
        tiny_model("llama").set_attn_implementation("flash_attention_2")


def test_positions_of_packed_sequences():
    ends = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    assert positions_of_packed(ends, 7).tolist() == [[0, 1, 2, 0, 1, 0, 1]]
