"""The small files of a Hugging Face folder: configuration, code, card.

Written without importing transformers; `modeling_mtt` is found but not imported.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping

from .checkpoint import Checkpoint
from .errors import MTTError
from .families import Family
from .plan import document
from .tokenizer import Tokenizer
from .version import __version__


def config_json(
    family: Family, fields: Mapping[str, object], dtype: str, tokenizer: Tokenizer
) -> bytes:
    """`config.json`: the model's fields, its classes, and where their code stands."""
    config = {
        "architectures": [family.CAUSAL_LM],
        **({"auto_map": family.AUTO_MAP} if family.AUTO_MAP else {}),
        "model_type": family.NAME,
        **fields,
        **special_tokens(tokenizer),
        "dtype": dtype,
        "use_cache": True,
    }
    return document(config)


def special_tokens(tokenizer: Tokenizer) -> dict[str, int | None]:
    """The special tokens as configurations spell them."""
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def generation_config(tokenizer: Tokenizer) -> dict[str, int]:
    """`generation_config.json`: the special tokens generation needs.

    Texts are padded with their end where there is no token for it.
    """
    ids = special_tokens(tokenizer)
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = tokenizer.eos_token_id
    return {name: value for name, value in ids.items() if value is not None}


def modeling_files(family: Family) -> dict[str, bytes]:
    """The modules of a family's code that travel with the weights.

    Raises:
        MTTError: their package is not installed beside this one.
    """
    if family.CODE is None:
        return {}
    spec = importlib.util.find_spec(family.CODE)
    if spec is None or not spec.submodule_search_locations:
        raise MTTError(
            f"the package {family.CODE} is missing", fix="install modeling-mtt again: it has both"
        )
    folder = spec.submodule_search_locations[0]
    files = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".py") and name != "__init__.py":
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
    checkpoint: Checkpoint, fields: Mapping[str, object], num_parameters: int, dtype: str
) -> bytes:
    """`README.md`: what the model is, where it came from, how to load it."""
    facts = source_facts(checkpoint)
    samples = checkpoint.args.get("consumed_train_samples")
    length = checkpoint.args.get("seq_length")
    rows = [
        ("Parameters", f"{num_parameters:,}"),
        ("Layers", fields["num_hidden_layers"]),
        ("Hidden size", fields["hidden_size"]),
        ("MLP size", f"{fields['intermediate_size']}{', gated' if fields['gated_mlp'] else ''}"),
        ("Attention heads", f"{fields['num_attention_heads']} of {fields['head_dim']}"),
        ("Key/value heads", fields["num_key_value_heads"]),
        ("Activation", fields["hidden_act"]),
        ("Norm", fields["norm_type"]),
        ("Positions", f"{fields['position_embedding_type']}, {fields['max_position_embeddings']}"),
        ("Vocabulary", fields["vocab_size"]),
        ("Element type", dtype),
        ("Source", f"Megatron {facts['format']}, {facts['layout']}"),
        ("Iteration", "release" if facts["iteration"] is None else facts["iteration"]),
    ]
    if isinstance(samples, int) and isinstance(length, int) and samples:
        rows.append(("Tokens seen", f"{samples * length:,}"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    text = f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- mtt
- megatron
---

# Megatron-Turing model

| | |
|---|---|
{table}

Converted from a Megatron checkpoint by {facts["converted_by"]}; `mtt_manifest.json` has a hash
of every tensor, and `mtt verify` compares them with the files.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(path)
```

With `pip install modeling-mtt` and `import modeling_mtt`, `trust_remote_code` is not needed.

## License

To be filled in by whoever publishes this model.
"""
    return text.encode()
