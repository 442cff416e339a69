"""The folder of a preset in `hub_configs/`: configuration, card, Megatron's launch arguments.

Everything is written from `presets.py`: committed files equal what this module makes, and a test
says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from .card import Rows, table
from .checkpoint import Layout
from .documents import config_json, generation_config
from .dtypes import DTYPES
from .families import FAMILIES
from .megatron_args import (
    Target,
    launch_flags,
    layout_arguments,
    model_arguments,
    quoted_flags,
)
from .parameters import expected
from .plan import document
from .presets import BLOOM_ROWS, GPT2_TOKENS, PRESETS, Preset

_PAD_TO = 128


def preset_config(preset: Preset) -> dict[str, object]:
    """The fields of `config.json` that describe the model."""
    return FAMILIES["mtt"].config(preset.architecture)


def num_parameters(preset: Preset) -> int:
    """Parameters of the model, the tied head counted once."""
    return sum(map(math.prod, expected(preset.architecture).values()))


def preset_files(name: str) -> dict[str, bytes]:
    """Name -> content of every file in the preset's folder."""
    preset = PRESETS[name]
    family = FAMILIES["mtt"]
    return {
        "README.md": _card(name, preset),
        "config.json": config_json(family, preset_config(preset), preset.dtype, preset.tokens),
        "generation_config.json": document(generation_config(preset.tokens)),
        "megatron_args.sh": _launch_script(name, preset),
    }


def index_table() -> str:
    """The table of `hub_configs/README.md`: a line for each preset."""
    lines = ["| preset | parameters | weights |", "|---|---|---|"]
    for name, preset in PRESETS.items():
        lines.append(f"| [`{name}`]({name}) | {num_parameters(preset):,} | {preset.weights} |")
    return "\n".join(lines) + "\n"


def _launch_script(name: str, preset: Preset) -> bytes:
    flags = _bloom_flags(preset) if preset.bloom else _megatron_flags(preset)
    body = "\n".join(f"    {flag}" for flag in flags)
    trainer = (
        "BigScience's Megatron-DeepSpeed builds"
        if preset.bloom
        else "Megatron-LM core_v0.16 builds"
    )
    world = preset.tp * preset.pp
    text = f"""\
# The arguments with which {trainer} {preset.title},
# in the layout it had: {Layout(preset.tp, preset.pp, preset.vpp)}, {world} GPUs for one replica.
#
#     source hub_configs/{name}/megatron_args.sh
#     torchrun ... pretrain_gpt.py "${{MEGATRON_ARGS[@]}}" --data-path ...
#
# What they leave to you is the training: batch, learning rate, data, checkpoints.
MEGATRON_ARGS=(
{body}
)
"""
    return text.encode()


def _megatron_flags(preset: Preset) -> list[str]:
    layout = Layout(preset.tp, preset.pp, preset.vpp)
    target = Target("torch_dist", layout, "transformer_engine", _PAD_TO)
    padded = target.padded_vocab_size(preset.vocab_size)
    architecture = replace(preset.architecture, padded_vocab_size=padded)
    args = {
        **model_arguments(architecture),
        **layout_arguments(architecture, target, 0),
        "params_dtype": DTYPES[preset.dtype],
        "fp16": preset.dtype == "float16",
        "bf16": preset.dtype == "bfloat16",
        "seq_length": preset.seq_length,
    }
    flags = quoted_flags(launch_flags(args))
    return [
        *flags,
        "--tokenizer-type GPT2BPETokenizer --vocab-file gpt2-vocab.json "
        "--merge-file gpt2-merges.txt",
    ]


def _bloom_flags(preset: Preset) -> list[str]:
    """Flags of BigScience's tree; Megatron-LM has neither ALiBi nor the norm."""
    values: Mapping[str, object] = {
        "num-layers": preset.num_layers,
        "hidden-size": preset.hidden_size,
        "num-attention-heads": preset.num_attention_heads,
        "seq-length": preset.seq_length,
        "max-position-embeddings": preset.seq_length,
        "position-embedding-type": "alibi",
        "init-method-std": preset.init_method_std,
        "pad-vocab-size-to": BLOOM_ROWS,
        "tensor-model-parallel-size": preset.tp,
        "pipeline-model-parallel-size": preset.pp,
        "tokenizer-type": "PretrainedFromHF",
        "tokenizer-name-or-path": "bigscience/tokenizer",
    }
    flags = [f"--{flag} {value}" for flag, value in values.items()]
    if preset.pp > 1:
        flags.append("--pp-partition-method 'type:transformer|embedding'")
    return [*flags, "--embed-layernorm", "--bf16" if preset.dtype == "bfloat16" else "--fp16"]


def _card(name: str, preset: Preset) -> bytes:
    a = preset.architecture
    count = num_parameters(preset)
    rows: Rows = [
        ("Parameters", f"{count:,}"),
        ("Published as", preset.published),
        ("Layers", a.num_layers),
        ("Hidden size", a.hidden_size),
        ("MLP size", a.ffn_hidden_size),
        ("Attention heads", f"{a.num_attention_heads} of {a.kv_channels}"),
        ("Positions", f"{'ALiBi' if preset.bloom else 'learned'}, {preset.seq_length}"),
        ("Vocabulary", f"{preset.vocab_size:,}"),
        ("Layout in training", Layout(preset.tp, preset.pp, preset.vpp)),
        ("Element type", preset.dtype),
    ]
    sources = "\n".join(
        f"- {'' if s.seen else '*Not verified.* '}{s.says} ({s.where})." for s in preset.sources
    )
    tokens = (
        ""
        if preset.vocab_size != GPT2_TOKENS
        else (
            f"The {GPT2_TOKENS:,} tokens are those of GPT-2's byte-level BPE; Megatron pads their "
            "table.\n\n"
        )
    )
    notes = "".join(
        f"{note}\n\n"
        for note in (*((preset.difference,) if preset.difference else ()), *preset.notes)
    )
    license = f"license: {preset.license}\n" if preset.license else ""
    convert = (
        "BLOOM's own checkpoints are converted from BigScience's format."
        if preset.bloom
        else f"`mtt convert CKPT OUT --config {name}` takes from here what a checkpoint of this "
        "model does not say."
    )
    text = f"""\
---
{license}library_name: transformers
pipeline_tag: text-generation
tags:
- mtt
- megatron
---

# {preset.title}

A configuration without weights. {preset.weights}

{table(rows)}

{tokens}{notes}{convert}

```python
import modeling_mtt
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.from_pretrained("hub_configs/{name}")
model = AutoModelForCausalLM.from_config(config)  # random weights, {preset.published} of them
```

`mtt estimate {name} --gpus 8 --gpu-memory 80GB` says on which GPUs it runs. `megatron_args.sh` has
the arguments to train it with.

## Sources

What was held against the source's own text, or a stored copy of it; the rest is marked.

{sources}
"""
    return text.encode()
