"""The shell and Python blocks of a Markdown page, and a folder in which they run.

A block that cannot run here has a reason in a comment before it, and is parsed all the same:

    <!-- not run: needs a GPU -->
    ```console
    $ mtt generate out --tp 8 --prompt "Once upon a time"
    ```

Blocks of one page run in order, in one folder. There, `/checkpoints/gpt` is the sample,
`/checkpoints/t5` the encoder-decoder sample,
`gpt2-folder` its tokenizer, `llama-folder` a small Llama, `reference.npz` the sample's logits,
`texts.txt` its texts, and the Hub is the tests' own.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from mtt_convert.cli import build_parser, main

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "convert" / "sample"
SAMPLE_SEQ2SEQ = ROOT / "convert" / "sample_seq2seq"
SHELL, PYTHON = ("console", "shell", "bash", "sh"), ("python",)
_FENCE = re.compile(r"^( *)(`{3,})([^\n`]*)\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
_MARKER = re.compile(r"<!-- not run: ([^>]+?) -->\s*\Z")


@dataclass(frozen=True)
class Block:
    """One block of a page; `reason` says why it does not run, and is empty if it does."""

    page: str
    line: int
    language: str
    text: str
    reason: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[str]:
        """The commands of a shell block: in a console what stands behind `$`."""
        text = self.text.replace("\\\n", " ")
        if self.language == "console":
            return [line[2:] for line in text.splitlines() if line.startswith("$ ")]
        return [line for line in text.splitlines() if line.strip()]


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for hit in _FENCE.finditer(text):
        marker = _MARKER.search(text[: hit.start()])
        line = text.count("\n", 0, hit.start()) + 1
        name = page.relative_to(ROOT).as_posix()
        found.append(Block(name, line, hit[3].strip(), hit[4], marker[1] if marker else ""))
    return found


def words_of(command: str) -> list[str]:
    """The words of a command, comments left out."""
    return shlex.split(command, comments=True)


def check(block: Block) -> None:
    """Parse a block: Python, shell, and every command of mtt in it."""
    if block.language in PYTHON:
        compile(block.text, block.where, "exec")
        return
    for command in block.commands():
        result = subprocess.run(["bash", "-n"], input=command, text=True, capture_output=True)
        assert result.returncode == 0, f"{block.where}: {result.stderr}"
        words = words_of(command)
        if words[:1] == ["mtt"]:
            build_parser().parse_args(words[1:])
        elif "mtt_convert" in words:
            build_parser().parse_args(words[words.index("mtt_convert") + 1 :])


def furnish(folder: Path) -> None:
    """Put what the pages talk about into a folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    for name, sample in (("gpt", SAMPLE), ("t5", SAMPLE_SEQ2SEQ)):
        shutil.copytree(
            sample, folder / "checkpoints" / name, ignore=shutil.ignore_patterns("*.py", "*.md")
        )
    (folder / "gpt2-folder").mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(SAMPLE / name, folder / "gpt2-folder")
    shutil.copy(SAMPLE / "reference.npz", folder)
    texts = [entry["text"] for entry in json.loads((SAMPLE / "prompts.json").read_text())]
    (folder / "texts.txt").write_text("\n\n".join(texts), encoding="utf-8")
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "llama-folder")
    (folder / "examples").symlink_to(ROOT / "examples")


def run(block: Block, folder: Path, names: dict[str, object]) -> None:
    """Run a block in a furnished folder; `names` are the variables of the page's Python."""
    text = block.text.replace("/checkpoints", str(folder / "checkpoints"))
    if block.language in PYTHON:
        exec(compile(text, block.where, "exec"), names)
        return
    for command in Block(block.page, block.line, block.language, text, "").commands():
        status = _run_command(command, folder)
        assert status == 0, f"{block.where}: exit status {status}: {command}"


def _run_command(command: str, folder: Path) -> int:
    """What the shell would do; plain commands of mtt and Python in this process: it is faster."""
    words = words_of(command)
    plain = not set("|<>;&`$") & set(command.partition(" #")[0])
    if plain and words[0] == "mtt":
        return main(words[1:])
    if plain and words[0] == "python" and words[1].endswith(".py"):
        with mock.patch.object(sys, "argv", words[1:]):
            runpy.run_path(str(folder / words[1]), run_name="__main__")
        return 0
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    shell = ["bash", "-euo", "pipefail", "-c", command]
    return subprocess.run(shell, env=environment, cwd=folder, check=False).returncode
