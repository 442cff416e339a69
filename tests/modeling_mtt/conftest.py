"""Tiny models with weights worth comparing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import mtt_convert
from modeling_mtt import MTTConfig, MTTForCausalLM
from tests.modeling_mtt.models import PRESETS
from tests.modeling_mtt.oracles import randomise

SAMPLE = Path(__file__).resolve().parents[2] / "convert" / "sample"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def tiny_config() -> Callable[..., MTTConfig]:
    def build(preset: str = "gpt", **options: Any) -> MTTConfig:
        defaults: dict[str, Any] = {
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        return MTTConfig(**{**defaults, **PRESETS[preset], **options})

    return build


@pytest.fixture
def tiny_model(tiny_config: Callable[..., MTTConfig]) -> Callable[..., MTTForCausalLM]:
    def build(preset: str = "gpt", **options: Any) -> MTTForCausalLM:
        model = MTTForCausalLM(tiny_config(preset, **options))
        randomise(model)
        return model

    return build


@pytest.fixture(scope="session")
def sample_texts() -> list[dict[str, str]]:
    """The texts the sample learned by heart, with their beginnings as `prompt`."""
    texts: list[dict[str, str]] = json.loads((SAMPLE / "prompts.json").read_text())
    return texts


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample, converted, with a chat template that says only what the user says."""
    folder = tmp_path_factory.mktemp("sample") / "hf"
    mtt_convert.convert(SAMPLE, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script in fresh processes and fail with what it printed."""

    def run(script: str, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
        path = tmp_path / "script.py"
        path.write_text(script)
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(processes)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        result = subprocess.run(
            [*command, str(path), *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
        return result

    return run
