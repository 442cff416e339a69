"""`--config`: what a checkpoint does not say, from a file, a folder or a preset.

    a JSON object, or NAME: VALUE lines     Megatron's arguments, some of them or a dump of all
    a folder with config.json, or that file, with `model_type: mtt`
    the name of a preset                    the same, from `presets.py`

All of them become Megatron's arguments by name.
"""

from __future__ import annotations

import ast
import json
import os

from .architecture import Architecture
from .argument_tables import FOREIGN, NEUTRAL, RENAMED, SETTINGS
from .arguments import OWN
from .errors import MTTError, UsageError
from .families import FAMILIES
from .megatron_args import described_arguments
from .preset_files import preset_config
from .presets import PRESETS, nearest_preset

_WORDS: dict[str, object] = {"true": True, "false": False, "none": None, "null": None, "~": None}
_MEGATRONS_KIND = "ModelType."  # an enum of its own, in a dump of all its arguments
_ACCEPTED = {*SETTINGS, *NEUTRAL} - {*RENAMED, *FOREIGN}
_EXPECTED = (
    "a JSON object of Megatron arguments, or NAME: VALUE lines; a folder with the config.json of "
    "an MTT model; or the name of a preset"
)


def read_config_file(path: str) -> dict[str, object]:
    """Megatron's arguments by name.

    Args:
        path: a file, a folder, or the name of a preset.

    Raises:
        UsageError: it is none of them, or the model is one Megatron's arguments cannot describe.
    """
    if not os.path.exists(path) and path in PRESETS:
        return _described(preset_config(PRESETS[path]), path)
    file = os.path.join(path, "config.json") if os.path.isdir(path) else path
    values = _parse(_text(file, path), path)
    kind = values.get("model_type")
    if isinstance(kind, str) and kind.startswith(_MEGATRONS_KIND):
        # `vocab_size` there is what was typed: some tokenizers count one more.
        known = _ACCEPTED - {"vocab_size"}
        return {name: value for name, value in values.items() if name in known}
    return _described(values, path) if "model_type" in values else values


def value_of(text: str) -> object:
    """A value as Python or YAML writes it: a number, a list, true, none; else the text itself."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _text(file: str, path: str) -> str:
    try:
        with open(file, encoding="utf-8") as opened:
            return opened.read()
    except (OSError, ValueError) as error:
        raise _cannot_be_used(path, str(error)) from error


def _parse(text: str, path: str) -> dict[str, object]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip()[:1] in ("{", "["):
            raise _cannot_be_used(path, str(error)) from error
        return _lines(text, path)
    if not isinstance(values, dict):
        raise _cannot_be_used(path, "text that is no JSON object")
    return values


def _lines(text: str, path: str) -> dict[str, object]:
    """`NAME: VALUE` or `NAME = VALUE`, one a line; `#` begins a comment."""
    values: dict[str, object] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("#")[0].rstrip()
        if not line.strip():
            continue
        ends = [end for end in (line.find(":"), line.find("=")) if end > 0]
        name = line[: min(ends)].strip() if ends else ""
        if not name or line[0].isspace() or not name.replace("-", "_").lstrip("_").isidentifier():
            raise _cannot_be_used(path, f"line {number}: {line.strip()[:60]}")
        value = line[min(ends) + 1 :].strip()
        if not value:
            raise _cannot_be_used(path, f"line {number}: {name} has no value of its own")
        values[name] = value_of(value)
    if not values:
        raise _cannot_be_used(path, "no arguments")
    return values


def _cannot_be_used(path: str, found: str) -> UsageError:
    preset = None if os.path.exists(path) else nearest_preset(path)
    fix = f"--config {preset}" if preset else None
    return UsageError(f"{path} cannot be used", found=found, expected=_EXPECTED, fix=fix)


def _described(config: dict[str, object], path: str) -> dict[str, object]:
    """What the configuration of an MTT model says, as arguments."""
    if config.get("model_type", "mtt") != "mtt":
        raise UsageError(
            f"--config {path} is the configuration of another class",
            found=f"model_type = {config['model_type']!r}",
            expected="mtt",
            fix="give Megatron's arguments, or the config.json of an MTT model",
        )
    try:
        architecture: Architecture = FAMILIES["mtt"].architecture(config)
        arguments = described_arguments(architecture)
    except MTTError as error:
        raise UsageError(
            f"--config {path}: {error.message}",
            found=error.found,
            expected=error.expected,
            fix="give Megatron's arguments as a JSON object",
        ) from error
    # How far the table is padded, the checkpoint's own shape says.
    del arguments["padded_vocab_size"], arguments[OWN]
    said = {name: value for name, value in arguments.items() if name in _ACCEPTED}
    if architecture.params_dtype is not None:
        said["params_dtype"] = architecture.params_dtype
    return {**said, "vocab_size": architecture.vocab_size}
