"""A Hugging Face folder as a source: `config.json` and safetensors files of a known family.

    config.json                  model_type -> family -> Architecture
    model*.safetensors, index    the family's names -> canonical names

What older versions of transformers saved beside the weights is left out and reported: buffers
that are computed anew, and the head of a model whose head is tied, which must be equal; so must
what a class stores twice. Names without the prefix of the model with a head are those of a folder
that was saved without it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping

from . import parameters, sources
from .architecture import Architecture
from .checkpoint import Checkpoint, Layout, Replicas
from .dialects import foreign
from .dtypes import DTYPES
from .errors import (
    CorruptError,
    IncompleteError,
    MappingError,
    SourceError,
    UnsupportedError,
    UsageError,
)
from .families import FAMILIES, Family
from .formats import float8, hf_safetensors
from .mapping import RuleTable, shorten
from .sources import listing
from .tensors import LazyTensor, zeros
from .tokenizer import has_tokenizer

FORMAT = "hf"
_HEAD, _EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"


def is_hf_folder(path: str) -> bool:
    """Whether a path is a Hugging Face folder with weights of any kind."""
    if not sources.is_file(os.path.join(path, "config.json")):
        return False
    return hf_safetensors.holds_model(path) or bool(_other_weights(path))


def _other_weights(folder: str) -> list[str]:
    """Weights in files that mtt does not read."""
    endings = (".safetensors", ".bin", ".bin.index.json", ".h5", ".msgpack", ".gguf", ".pth")
    return [n for n in listing(folder) if n.endswith(endings) and n != "training_args.bin"]


def open_hf_folder(
    path: str,
    *,
    iteration: int | None = None,
    overrides: Mapping[str, object] | None = None,
    skip_keys: Iterable[str] = (),
) -> Checkpoint:
    """Open a Hugging Face folder: its metadata under canonical names, no tensor bytes.

    Args:
        path: a folder with `config.json` and safetensors files; links are followed.
        iteration, overrides: only for Megatron checkpoints.
        skip_keys: names of tensors that are not part of the model and may be left out.

    Raises:
        SourceError: it cannot be used; the subclass and message say why.
        UsageError: an option that is for Megatron checkpoints.
    """
    given = {"--iteration": iteration is not None, "--set or --config": bool(overrides)}
    if named := [name for name, value in given.items() if value]:
        raise UsageError(
            f"{', '.join(named)}: only for a Megatron checkpoint",
            found=f"{path}, a Hugging Face folder",
            fix="leave it out: config.json says what the model is",
        )
    folder = sources.absolute(path)
    config = read_config(folder)
    family = family_of(config, folder)
    _check_class(family, config)
    _check_weights(folder)
    architecture = family.architecture(config)
    stored = hf_safetensors.read_tensors(folder)
    num_files = len({path for t in stored.values() for p in t.pieces for path in p.paths})
    if config.get("quantization_config"):
        stored = float8.without_scales(stored, config)
    elif scales := [name for name in stored if name.endswith("_scale_inv")]:
        raise _quantised(f"scales of blocks: {shorten(scales, 4)}")
    skipped = tuple(sorted(set(stored) & set(skip_keys)))
    buffers = tuple(n for n in stored if re.fullmatch(family.buffers, n) and n not in skipped)
    kept = {n: t for n, t in stored.items() if n not in {*skipped, *buffers}}
    architecture = family.as_stored(architecture, kept)
    tensors, replicas = _canonical(kept, family, architecture)
    dropped = {
        "skipped": skipped,
        "buffers": buffers,
        "tied copy": tuple(copy.name for copy in replicas if copy.tied),
        "copies": tuple(copy.name for copy in replicas if not copy.tied),
    }
    return Checkpoint(
        format=FORMAT,
        folder=folder,
        layout=Layout(),
        dialect=family.name,
        architecture=architecture,
        tensors={name: tensors[name] for name in parameters.expected(architecture)},
        iteration=None,
        args=_tokenizer_arguments(folder),
        replicas=replicas,
        dropped={kind: names for kind, names in dropped.items() if names},
        warnings=(
            *float8.note(stored.values()),
            *family.warnings(config),
            *_foreign_code(family, config),
        ),
        evidence=(f"config.json with model_type {family.name}",),
        num_files=num_files,
        iterations=(),
        config=config,
    )


def read_config(folder: str) -> Mapping[str, object]:
    """The fields of `config.json`.

    Raises:
        SourceError: it cannot be read.
        CorruptError: it is no JSON object.
    """
    path = os.path.join(folder, "config.json")
    try:
        config = json.loads(sources.read(path))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(config, dict):
        raise _damaged(path, type(config).__name__)
    return config


def _damaged(path: str, found: str) -> CorruptError:
    return CorruptError(
        f"{path} is damaged", found=found, expected="a JSON object", fix="copy it again"
    )


def family_of(config: Mapping[str, object], folder: str) -> Family:
    """The family `model_type` names.

    Raises:
        UnsupportedError: mtt has no table for it.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        more = foreign.describe(_names(folder))
        raise UnsupportedError(
            f"mtt cannot read this kind of model: {folder}",
            found=f"model_type = {name!r}" + (f"; {more}" if more else ""),
            expected=", ".join(sorted(FAMILIES)),
            fix="give a folder of one of these kinds; another tool may convert this one",
        )
    return FAMILIES[name]


def _names(folder: str) -> Iterable[str]:
    """Names of tensors, as far as files say them."""
    try:
        return hf_safetensors.read_tensors(folder) if hf_safetensors.holds_model(folder) else ()
    except SourceError:
        return ()


def _check_class(family: Family, config: Mapping[str, object]) -> None:
    """Raise UnsupportedError for another head, or weights that are not plain numbers."""
    names = config.get("architectures") or []
    known = (family.causal_lm, family.base_model, *family.other_heads)
    if not isinstance(names, list) or any(name not in known for name in names):
        raise UnsupportedError(
            "mtt converts language models only",
            found=f"architectures = {names!r}",
            expected=family.causal_lm,
        )
    if config.get("quantization_config"):
        details = config["quantization_config"]
        method = details.get("quant_method") if isinstance(details, dict) else None
        if method != float8.METHOD:
            raise _quantised(f"quantization_config with quant_method = {method!r}")


def _quantised(found: str) -> UnsupportedError:
    return UnsupportedError(
        "the weights are kept in a quantised form",
        found=found,
        expected="weights in float32, float16 or bfloat16, or in fp8 with scales for blocks",
        fix="give the folder this one was quantised from",
    )


def _check_weights(folder: str) -> None:
    """Raise UnsupportedError for weights that are not in safetensors files."""
    if hf_safetensors.holds_model(folder):
        return
    raise UnsupportedError(
        f"the weights of {folder} cannot be read",
        found=shorten(_other_weights(folder), 4),
        expected=f"model.safetensors, or {hf_safetensors.INDEX} with its files",
        fix="load it with transformers and call save_pretrained, which writes safetensors files",
    )


def _with_prefix(
    tensors: Mapping[str, LazyTensor], family: Family, head: str
) -> Mapping[str, LazyTensor]:
    """Tensors under the names of the class with a head."""
    if any(name.startswith(family.prefix) for name in tensors):
        return tensors
    return {n if n == head else family.prefix + n: tensor for n, tensor in tensors.items()}


def _canonical(
    stored: Mapping[str, LazyTensor], family: Family, architecture: Architecture
) -> tuple[dict[str, LazyTensor], tuple[Replicas, ...]]:
    """Tensors under canonical names, and copies: a tied head, and what the class has twice."""
    table = family.rules(architecture)
    head, embedding = (table.resolve([name])[0].targets[0] for name in (_HEAD, _EMBEDDING))
    tensors = dict(family.respell(_with_prefix(stored, family, head), architecture))
    replicas = []
    if head in tensors and not architecture.untie_embeddings_and_output_weights:
        copy = tensors.pop(head)
        if embedding in tensors:
            pair = {embedding: tensors[embedding], head: copy}
            replicas.append(Replicas(_HEAD, *_copies(pair), tied=True))
    for name, original in family.copies(architecture).items():
        if name in tensors and original in tensors:
            pair = {original: tensors[original], name: tensors.pop(name)}
            replicas.append(Replicas(name, *_copies(pair), within=True))
    _check_complete(tensors, table, architecture)
    _check_types(tensors, table)
    return table.inverse.apply(tensors, architecture), tuple(replicas)


def _copies(named: Mapping[str, LazyTensor]) -> tuple[tuple[LazyTensor, ...], tuple[str, ...]]:
    """Tensors that must be equal, and where each of them is."""
    where = (f"{n} in {os.path.basename(t.pieces[0].paths[0])}" for n, t in named.items())
    return tuple(named.values()), tuple(where)


def _check_complete(
    tensors: Mapping[str, LazyTensor], table: RuleTable, architecture: Architecture
) -> None:
    """Hold the tensors of the files against those the configuration describes.

    Raises:
        IncompleteError: tensors are missing.
        MappingError: there are tensors this model does not have.
        CorruptError: a shape contradicts the configuration.
    """
    fix = "copy the folder again, or correct config.json if it belongs to another model"
    if architecture.num_layers + architecture.encoder_num_layers > len(tensors):
        raise IncompleteError(
            "layers are missing; nothing was written",
            found=f"{len(tensors)} tensors",
            expected=f"those of {parameters.layers_text(architecture)}",
            fix=fix,
        )
    blank = {
        name: zeros(DTYPES["float32"], shape)
        for name, shape in parameters.expected(architecture).items()
    }
    wanted = {name: t.shape for name, t in table.apply(blank, architecture).items()}
    if missing := [name for name in wanted if name not in tensors]:
        raise IncompleteError(
            f"{len(missing)} of {len(wanted)} tensors are missing; nothing was written",
            found=f"{len(tensors)} tensors",
            expected=shorten(missing),
            fix=fix,
        )
    if extra := [name for name in tensors if name not in wanted]:
        raise MappingError(
            f"{len(extra)} tensors do not belong to the model config.json describes",
            found=shorten(extra),
            expected=f"the {len(wanted)} tensors of {parameters.layers_text(architecture)}",
            fix=f"{fix}; --skip-key NAME leaves out what is no part of the model",
        )
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise CorruptError(
                f"{name} has another shape than config.json says",
                found=str(list(tensors[name].shape)),
                expected=str(list(shape)),
                fix=fix,
            )


def _check_types(tensors: Mapping[str, LazyTensor], table: RuleTable) -> None:
    """Raise UnsupportedError for element types that are no weights, or cannot be joined."""
    for match in table.inverse.resolve(tensors):
        found = {name: tensors[name].dtype for name in match.sources}
        odd = [dtype for dtype in found.values() if not dtype.is_floating]
        if odd or len(set(found.values())) > 1:
            raise UnsupportedError(
                "weights that are no plain numbers" if odd else "weights of several types as one",
                found=", ".join(f"{name} in {dtype}" for name, dtype in found.items()),
                expected="float32, float16 or bfloat16" if odd else "one type",
                fix="give the folder this one was quantised from"
                if odd
                else "save the model in one type",
            )


def _tokenizer_arguments(folder: str) -> Mapping[str, object]:
    """Where the tokenizer is, as Megatron says it."""
    if not has_tokenizer(folder):
        return {}
    return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": folder}


def _foreign_code(family: Family, config: Mapping[str, object]) -> tuple[str, ...]:
    if family.code is not None or not config.get("auto_map"):
        return ()
    return (
        f"the folder brings code of its own (auto_map); what is converted is what "
        f"{family.causal_lm} of transformers computes",
    )
