"""What the benchmarks stand on; their figures are for people to judge."""

from __future__ import annotations

import importlib.metadata
import sys

import pytest

from benchmarks.measuring import machine


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_the_machine_is_described_without_optional_packages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "zlib-ng":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    facts = machine()
    assert facts["zlib-ng"] == "not installed"
    assert facts["numpy"] == real("numpy")
