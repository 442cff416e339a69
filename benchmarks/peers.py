"""Other converters, as commands on the same input; they run with the Python of the benchmark.

bare               torch     benchmarks/bare.py, always there: no conversion, only its bytes
naive              torch     benchmarks/naive.py, always there
dcp_to_torch_save  torch_dist   of torch itself; one file, Megatron's names, no conversion
slime=PATH         torch_dist   its tools/convert_torch_dist_to_hf.py
megatron-lm=PATH   torch     its tools/checkpoint/convert.py, to TP1 x PP1 of its own format
anything=PATH      torch     a script that takes CHECKPOINT and OUT
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Peer:
    """A converter, what it reads, and its script and options if it is not installed."""

    name: str
    format: str
    path: Path | None = None
    options: tuple[str, ...] = ()

    def command(self, checkpoint: Path, out: Path) -> tuple[list[str], dict[str, str]]:
        """The command line, and what its environment needs."""
        iteration = str(checkpoint / "iter_0000010")
        match self.name:
            case "dcp_to_torch_save":
                script = 'mkdir "$2" && exec "$0" -m torch.distributed.checkpoint.format_utils '
                script += 'dcp_to_torch "$1" "$2/model.pt"'
                return ["/bin/sh", "-c", script, sys.executable, iteration, str(out)], {}
            case "slime":
                options = ["--model-name", "llama", "--input-dir", iteration]
                command = [str(self.path), *options, "--output-dir", str(out)]
                return [sys.executable, *command], _on_path(self.path.parents[1])
            case "megatron-lm":
                root = self.path.parents[2]
                options = ["--model-type", "GPT", "--loader", "core", "--saver", "core"]
                options += ["--load-dir", str(checkpoint), "--save-dir", str(out)]
                options += ["--target-tensor-parallel-size", "1", "--megatron-path", str(root)]
                options += ["--target-pipeline-parallel-size", "1"]
                return [sys.executable, str(self.path), *options], _on_path(root)
        return [sys.executable, str(self.path), str(checkpoint), str(out), *self.options], {}


def _on_path(root: Path) -> dict[str, str]:
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


def peers(named: list[str]) -> list[Peer]:
    """Those that are installed, and those given as NAME=PATH."""
    found = [
        *(Peer(f"bare, {n} threads", "torch", HERE / "bare.py", (str(n),)) for n in (2, 1)),
        Peer("naive", "torch", HERE / "naive.py"),
        Peer("dcp_to_torch_save", "torch_dist"),
    ]
    for text in named:
        name, _, path = text.partition("=")
        if not Path(path).is_file():
            raise SystemExit(
                f"error: --peer {text}: no such script\n  expected: NAME=PATH of a file"
            )
        format = "torch_dist" if name == "slime" else "torch"
        found.append(Peer(name, format, Path(path).resolve()))
    return found
