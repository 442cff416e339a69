"""What goes into a Hugging Face folder: its family, configuration, weight files, documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .architecture import Architecture
from .card import model_card
from .checkpoint import Checkpoint
from .conversion import (
    Conversion,
    check_dtype,
    choose_tokenizer,
    main_dtype,
    stored_rows,
    stored_tokens,
    true_vocabulary,
)
from .documents import config_json, generation_json, modeling_files, special_tokens
from .errors import UnsupportedError, UsageError
from .families import FAMILIES, Family, exact_families
from .families.names import EXPERTS
from .formats.hf_safetensors import INDEX, plan_files
from .plan import ConversionPlan, parse_size
from .tokenizer import Tokenizer

AUTO, DEFAULT = "auto", "mtt"
# What `mtt` stands for: the family of each kind of model that computes all of them, or the only
# one.
_DEFAULTS = {"gpt": DEFAULT, "t5": "mtt_seq2seq", "bert": "megatron-bert"}
# What every class keeps in float32 in a model of another type.
_NOT_CAST = (EXPERTS.bias,)


def plan_conversion(
    checkpoint: Checkpoint,
    *,
    model_type: str = "mtt",
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    vocab_padding: str | None = None,
    tokenizer: str | None = None,
) -> Conversion:
    """Decide everything about a Hugging Face folder; nothing is written.

    Args:
        checkpoint: an open checkpoint.
        model_type: a family of `families/`; `mtt` is the class of mtt for this kind of model, and
            of a BERT, for which it has none, that of transformers; or `auto`: one of transformers
            itself if it computes exactly the same, can be split over devices and lets choose its
            attention, else `mtt`.
        dtype: `auto` as stored, or `float32`, `bfloat16` or `float16`.
        max_shard_size: `5GB` and the like.
        vocab_padding: `trim` the rows that only pad the vocabulary, or `keep` them; None trims
            them where the true size is known.
        tokenizer: path of tokenizer files, `none`, or None for the paths in the arguments.

    Raises:
        UsageError: options that contradict each other or the checkpoint, or a family that does
            not compute what the checkpoint does.
        UnsupportedError: no family does.
    """
    if model_type not in (AUTO, *FAMILIES):
        names = ", ".join((AUTO, *sorted(FAMILIES)))
        raise UsageError(f"unknown model type {model_type!r}", expected=names)
    check_dtype(dtype)
    warnings = list(checkpoint.warnings)
    words = choose_tokenizer(checkpoint, tokenizer, warnings)
    architecture = _with_vocabulary(checkpoint, words, vocab_padding, warnings)
    exact = _preferred(exact_families(architecture), checkpoint)
    family = _family(model_type, architecture, exact)
    if model_type == DEFAULT and family.code is None:
        warnings.append(
            f"mtt has no class of its own for a {architecture.kind.upper()}: the one written is "
            f"that of transformers, as with --model-type {family.name}"
        )
    tensors = family.rules(architecture).apply(checkpoint.tensors, architecture)
    count = sum(tensor.num_elements for tensor in tensors.values())
    tensors |= {n: tensors[original] for n, original in family.copies(architecture).items()}
    files, index = plan_files(tensors, dtype, parse_size(max_shard_size), kept=_NOT_CAST)
    fields = family.config(architecture)
    stored = main_dtype(tensors) if dtype == "auto" else dtype
    tokens = special_tokens(
        words, checkpoint.config or stored_tokens(checkpoint), architecture.kind
    )
    documents = {
        **modeling_files(family),
        **words.files,
        "README.md": model_card(checkpoint, family, architecture, count, stored, words),
        **_generation(checkpoint, family, tokens),
        **({INDEX: index} if index is not None else {}),
        "config.json": config_json(family, fields, stored, tokens),
    }
    plan = ConversionPlan(files, documents, checkpoint.replicas)
    return Conversion(
        checkpoint=checkpoint,
        plan=plan,
        config=fields,
        tokens=tokens,
        dtype=stored,
        tokenizer=words,
        warnings=tuple(warnings),
        model_type=family.name,
        exact=exact,
    )


def _generation(
    checkpoint: Checkpoint, family: Family, tokens: Mapping[str, object]
) -> dict[str, bytes]:
    """`generation_config.json`, but of a model that does not generate."""
    if family.kind == "bert":
        return {}
    return {"generation_config.json": generation_json(checkpoint, tokens)}


def _preferred(exact: tuple[str, ...], checkpoint: Checkpoint) -> tuple[str, ...]:
    """Exact families, the one the checkpoint came from first."""
    return tuple(sorted(exact, key=lambda name: name != checkpoint.dialect))


def _family(model_type: str, architecture: Architecture, exact: tuple[str, ...]) -> Family:
    """The family to write.

    Raises:
        UsageError: the one asked for does not compute the same function.
        UnsupportedError: none does.
    """
    default = _DEFAULTS.get(architecture.kind, DEFAULT)
    if model_type == DEFAULT:
        model_type = default
    if model_type == AUTO:
        able = [FAMILIES[name] for name in exact]
        able = [f for f in able if f.has_tp_plan and f.has_attention_backends]
        if able:
            return able[0]
        model_type = default
    family = FAMILIES[model_type]
    is_ours = family.code and family.kind == architecture.kind  # then it computes all that mtt does
    misfits = () if is_ours else family.misfits(architecture)
    if misfits and not exact and family.name == default and not family.fix(architecture):
        raise UnsupportedError(
            "no class of transformers computes this model; nothing was written",
            found="; ".join(misfits),
            expected=f"what {family.causal_lm} computes",
            fix="if the arguments are wrong, correct them with --set NAME=VALUE",
        )
    if misfits:
        others = f"--model-type {exact[0] if exact else default}, which computes exactly the same"
        if all(text.startswith("mtp_num_layers") for text in misfits):
            others = f"--drop-mtp leaves out the layers that predict further tokens; or {others}"
        raise UsageError(
            f"this model is not exactly a {model_type}; nothing was written",
            found="; ".join(misfits),
            expected=f"what {family.causal_lm} computes",
            fix=family.fix(architecture) or others,
        )
    return family


def _with_vocabulary(
    checkpoint: Checkpoint, words: Tokenizer, vocab_padding: str | None, warnings: list[str]
) -> Architecture:
    """The architecture with the vocabulary size that will be written."""
    architecture = checkpoint.architecture
    padded = architecture.padded_vocab_size
    size = true_vocabulary(checkpoint, words, vocab_padding, warnings)
    if vocab_padding == "keep":
        return replace(architecture, vocab_size=stored_rows(checkpoint))
    if size is None:
        warnings.append(
            f"the vocabulary keeps its {padded} rows, padding included: "
            "give --tokenizer or --set vocab_size=N to trim it"
        )
    return replace(architecture, vocab_size=size or padded)
