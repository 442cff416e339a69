"""The small files of a Hugging Face folder: configuration and code.

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
    tokenizer: Tokenizer, config: Mapping[str, object] = NOTHING, kind: str = "gpt"
) -> dict[str, object]:
    """The special tokens as configurations spell them.

    Args:
        tokenizer: says which there are.
        config: `config.json` of the source, if it had one; what it says counts.
        kind: of the model; the decoder of a `t5` begins with a token that the encoder never sees,
            which is that for a beginning (T5MaskedWordPieceDataset in core/datasets/t5_dataset.py).
    """
    tokens: dict[str, object] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if kind == "t5":
        tokens["decoder_start_token_id"] = config.get("bos_token_id", tokenizer.bos_token_id)
    return {name: config.get(name, value) for name, value in tokens.items()}


def generation_config(
    tokens: Mapping[str, object], architecture: Architecture | None = None
) -> dict[str, object]:
    """`generation_config.json`: the special tokens generation needs, and where texts end.

    Texts are padded with their end where there is no token for it. Those of an encoder-decoder may
    be as long as in training: transformers would stop after 20 tokens.
    """
    ids = dict(tokens)
    if architecture is not None and architecture.kind == "t5":
        ids["max_length"] = architecture.max_position_embeddings
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
        return document(generation_config(tokens, checkpoint.architecture))
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
    """Where the weights came from, for the manifest."""
    return {
        "name": os.path.basename(checkpoint.folder),
        "format": checkpoint.format,
        "dialect": checkpoint.dialect,
        "layout": str(checkpoint.layout),
        "iteration": checkpoint.iteration,
        "converted_by": f"mtt {__version__}",
    }
