"""YAML read as data: tags make nothing, and whatever is wrong with a file is one error.

Numbers like `1e-5` are numbers, as they are to OmegaConf and in YAML 1.2; PyYAML alone takes them
for text.
"""

from __future__ import annotations

import re
from typing import Any

from ..errors import CorruptError

_MOST_BYTES = 8 << 20
_FLOAT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+")


def read_yaml(data: bytes, path: str) -> dict[str, Any]:
    """A YAML file as plain values; what a tag would make is left out.

    Args:
        data: the file.
        path: what messages call it.

    Raises:
        CorruptError: it is no YAML, no mapping, or larger than 8 MiB.
    """
    import yaml

    loader_class: Any = type("PlainLoader", (yaml.SafeLoader,), {})

    def plain(loader: Any, _: str, node: Any) -> object:
        if isinstance(node, yaml.MappingNode):
            return loader.construct_mapping(node, deep=True)
        if isinstance(node, yaml.SequenceNode):
            return loader.construct_sequence(node, deep=True)
        return loader.construct_scalar(node)

    loader_class.add_multi_constructor("", plain)
    loader_class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
    if len(data) > _MOST_BYTES:
        raise _damaged(path, f"{len(data)} bytes", f"a configuration of at most {_MOST_BYTES}")
    try:
        content = yaml.load(data, loader_class)
    # A tag that does not suit its value surfaces as whatever the conversion of that value raises.
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        ArithmeticError,
        RecursionError,
    ) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise _damaged(path, first[:200], "YAML") from error
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise _damaged(path, found, "names and values in YAML")
    return content


def _damaged(path: str, found: str, expected: str) -> CorruptError:
    return CorruptError(
        f"{path} is damaged",
        found=found,
        expected=expected,
        fix="copy it again from where it was written",
    )
