"""The small files of a Hugging Face folder: configuration, code, card.

Written without importing transformers; `modeling_mtt` is found but not imported.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping

from . import sources
from .architecture import Architecture
from .argument_tables import NOTHING
from .checkpoint import Checkpoint
from .errors import MTTError
from .families import Family
from .plan import document
from .tokenizer import Tokenizer
from .version import __version__


def config_json(
    family: Family,
    fields: Mapping[str, object],
    dtype: str,
    tokens: Mapping[str, object],
) -> bytes:
    """`config.json`: the model's fields, its classes, and where their code stands."""
    config = {
        "architectures": [family.causal_lm],
        **({"auto_map": dict(family.auto_map)} if family.auto_map else {}),
        "model_type": family.name,
        **fields,
        **tokens,
        "dtype": dtype,
        "use_cache": True,
    }
    return document(config)


def special_tokens(
    tokenizer: Tokenizer, config: Mapping[str, object] = NOTHING
) -> dict[str, object]:
    """The special tokens as configurations spell them.

    Args:
        tokenizer: says which there are.
        config: `config.json` of the source, if it had one; what it says counts.
    """
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return {name: config.get(name, value) for name, value in tokens.items()}


def generation_config(tokens: Mapping[str, object]) -> dict[str, object]:
    """`generation_config.json`: the special tokens generation needs.

    Texts are padded with their end where there is no token for it.
    """
    ids = dict(tokens)
    if ids["pad_token_id"] is None and isinstance(ids["eos_token_id"], int):
        ids["pad_token_id"] = ids["eos_token_id"]
    return {name: value for name, value in ids.items() if value is not None}


def generation_json(checkpoint: Checkpoint, tokens: Mapping[str, object]) -> bytes:
    """`generation_config.json`: that of the source as it is, if it has one.

    Raises:
        SourceError: it cannot be read.
    """
    path = os.path.join(checkpoint.folder, "generation_config.json")
    if not checkpoint.config or not sources.is_file(path):
        return document(generation_config(tokens))
    return sources.read(path)


def modeling_files(family: Family) -> dict[str, bytes]:
    """The modules of a family's code that travel with the weights.

    Raises:
        MTTError: their package is not installed beside this one.
    """
    if family.code is None:
        return {}
    spec = importlib.util.find_spec(family.code)
    if spec is None or not spec.submodule_search_locations:
        raise MTTError(
            f"the package {family.code} is missing", fix="install modeling-mtt again: it has both"
        )
    folder = spec.submodule_search_locations[0]
    files = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".py") and not name.startswith("__"):
            with open(os.path.join(folder, name), "rb") as file:
                files[name] = file.read()
    return files


def source_facts(checkpoint: Checkpoint) -> dict[str, object]:
    """Where the weights came from, for the manifest and the card."""
    return {
        "name": os.path.basename(checkpoint.folder),
        "format": checkpoint.format,
        "dialect": checkpoint.dialect,
        "layout": str(checkpoint.layout),
        "iteration": checkpoint.iteration,
        "converted_by": f"mtt {__version__}",
    }


def model_card(
    checkpoint: Checkpoint,
    family: Family,
    architecture: Architecture,
    num_parameters: int,
    dtype: str,
) -> bytes:
    """`README.md`: what the model is, where it came from, how to load it."""
    a, facts = architecture, source_facts(checkpoint)
    samples = checkpoint.args.get("consumed_train_samples")
    length = checkpoint.args.get("seq_length")
    from_megatron = not checkpoint.config
    rows = [
        ("Parameters", f"{num_parameters:,}"),
        ("Layers", a.num_layers),
        ("Hidden size", a.hidden_size),
        ("MLP size", f"{a.ffn_hidden_size}{', gated' if a.gated_linear_unit else ''}"),
        ("Attention heads", f"{a.num_attention_heads} of {a.kv_channels}"),
        ("Key/value heads", a.num_query_groups),
        ("Activation", a.activation),
        ("Norm", a.normalization),
        ("Positions", f"{a.position_embedding_type}, {a.max_position_embeddings}"),
        ("Vocabulary", a.vocab_size or a.padded_vocab_size),
        ("Element type", dtype),
    ]
    if from_megatron:
        rows.append(("Source", f"Megatron {facts['format']}, {facts['layout']}"))
        rows.append(("Iteration", facts["iteration"] or "release"))
    else:
        rows.append(("Source", f"Hugging Face {facts['dialect']}"))
    if isinstance(samples, int) and isinstance(length, int) and samples:
        rows.append(("Tokens seen", f"{samples * length:,}"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    tags = ["mtt", *(["megatron"] if from_megatron else [])] if family.code else ["megatron"]
    if not from_megatron and not family.code:
        tags = [family.name]
    source = "a Megatron checkpoint" if from_megatron else f"a {facts['dialect']} folder"
    text = f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags:
{chr(10).join(f"- {tag}" for tag in tags)}
---

# {"Megatron-Turing model" if family.code else family.causal_lm}

| | |
|---|---|
{table}

Converted from {source} by {facts["converted_by"]}; `mtt_manifest.json` has a hash
of every tensor, and `mtt verify` compares them with the files.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(path{", trust_remote_code=True" * bool(family.code)})
tokenizer = AutoTokenizer.from_pretrained(path)
```
{_CODE_NOTE if family.code else ""}
## License

To be filled in by whoever publishes this model.
"""
    return text.encode()


_CODE_NOTE = """
With `pip install modeling-mtt` and `import modeling_mtt`, `trust_remote_code` is not needed.
"""
