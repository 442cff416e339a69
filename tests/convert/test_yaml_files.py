"""YAML files beside weights: plain values, or one kind of error."""

from __future__ import annotations

import pytest

from mtt_convert import CorruptError
from mtt_convert.formats.yaml_files import read_yaml


@pytest.mark.parametrize(
    "text",
    [
        "a: [1",
        "- 1\n- 2",
        "",
        "hello",
        "a: &x [*x, *x]\n*x : 1",
        "\x00",
        "a: !!bool maybe",
        "a: !!int many",
        "a: !!float much",
        "a: !!timestamp soon",
        "a: !!binary é",
        "a: 2001-01-32",
        "a: " + ":".join(["59"] * 3000) + ".5",
        "a: " + "9" * 6000,
        "a: " + "[" * 3000 + "]" * 3000,
        "? {a: b}\n: 1",
    ],
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(CorruptError, match=r"x\.yaml is damaged") as refusal:
        read_yaml(text.encode(), "x.yaml")
    assert refusal.value.found and refusal.value.expected


def test_a_large_file_is_not_parsed() -> None:
    with pytest.raises(CorruptError, match="damaged"):
        read_yaml(b"a: 1\n" + b"#" * (8 << 20), "x.yaml")


def test_tags_make_nothing() -> None:
    text = "a: !!python/object/apply:os.system ['exit 1']\nb: !anything {c: 1}"
    assert read_yaml(text.encode(), "x.yaml") == {"a": ["exit 1"], "b": {"c": 1}}


def test_numbers_as_people_write_them() -> None:
    text = "a: 1e-5\nb: 1.0e-5\nc: 2E6\nd: -3e+2\ne: 1e\nf: 5\ng: 0x1e5"
    values = {"a": 1e-5, "b": 1e-5, "c": 2e6, "d": -300.0, "e": "1e", "f": 5, "g": 0x1E5}
    assert read_yaml(text.encode(), "x.yaml") == values
