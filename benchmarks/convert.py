"""`mtt convert` beside `cp -r` and other converters: one table.

    python benchmarks/convert.py                     4 GB, RAM disk and disk, about 12 minutes
    python benchmarks/convert.py --small             1 GB, about 5
    python benchmarks/convert.py --only "torch ->" --workers 2 --pairs 9
    python benchmarks/convert.py --peer slime=PATH/tools/convert_torch_dist_to_hf.py

Checkpoints of random bytes (`checkpoints.py`) stand on the RAM disk, one at a time with one output
beside it, at most 9 GB; `--disk` names a folder on a disk for the lines that say so. For every
line `cp -r CKPT OUT`, the conversion, and a conversion of the same tensors an eighth as wide run
in turn, each as a process of its own, timed from its start to its end, Python's start included;
the conversion goes first in every second turn. OUT is removed before each, outside the time. In
lines that say "until it is written" what is unwritten is written before, and both are followed by
`sync -f OUT`, inside the time. A turn in which other processes took more than a few
percent of the machine is repeated. Modules are compiled once before, as an installation does.
Other converters hold the checkpoint up to several times in memory: --small where there is little.

GB/s        bytes of weights / wall time of the process
of cp       speed / speed of the `cp -r` of the same turn: 1.2 is 1.2 times as fast as cp
best        speed of the fastest turn / of the fastest `cp -r`: what is left where nobody disturbs
marginal    (large - small bytes) / (large - small time): start-up taken away; and of cp
peak        the largest VmHWM of the process and those it starts, in MB; `above` the imports alone
temporary   the most on the disk beyond the output itself, in MB
exit        exit status, of either conversion; a line with one that failed has no speed

Exit status 1: a conversion failed, the small one too, gave other bytes in another turn, or took
more memory than 256 MB per worker. A `cp` that fails ends everything: the disk is full, probably.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkpoints import MODELS, Model
from measuring import MOST_BY_OTHERS, Run, machine, measure, wait_until_quiet
from peers import Peer, peers

BOUND_MB_PER_WORKER = 256
RAM_DISK = Path("/dev/shm")
IMPORTS = "import mtt_convert.cli, mtt_convert.commands.convert, numpy, time; time.sleep(0.2)"
MTT = os.path.join(sysconfig.get_path("scripts"), "mtt")
PEER_PAIRS = 3


@dataclass(frozen=True)
class Case:
    """One line: what is converted, where, by whom.

    Attributes:
        model: a name in `MODELS`, without `-s`.
        source, target: formats.
        tool: mtt, or a peer's name.
        options: of `mtt convert`, beyond those all have.
        note: what the line says beside the formats.
        synced: until the disk has all of it.
    """

    model: str
    source: str
    target: str
    workers: int = 1
    options: tuple[str, ...] = ()
    note: str = ""
    tool: str = "mtt"
    peer: Peer | None = None
    synced: bool = False

    @property
    def name(self) -> str:
        note = f", {self.note}" if self.note else ""
        return f"{self.source} -> {self.target}{note}"

    def command(self, source: Path, out: Path) -> tuple[list[str], dict[str, str]]:
        if self.peer is not None:
            return self.peer.command(source, out)
        options = ["--to", self.target, "--tokenizer", "none", *self.options]
        if self.target == "hf":
            options += ["--max-shard-size", "1GB"]
        command = [MTT, "convert", str(source), str(out), *options]
        return [*command, "--workers", str(self.workers)], {}


SAME, OTHER = ("--tp", "4", "--pp", "2"), ("--tp", "2")
NARROWER = ("--tp", "8")
WRITTEN = "disk, until it is written"


def cases(others: Sequence[Peer]) -> list[Case]:
    """All lines, by the checkpoint they start from."""
    lines = [
        case
        for workers in (2, 1)
        for case in (
            Case("large", "torch", "hf", workers),
            Case("large", "torch", "torch", workers, OTHER, "to TP2"),
            Case("large", "hf", "torch", workers, SAME),
            Case("large", "hf", "torch_dist", workers, SAME),
            Case("large", "torch_dist", "hf", workers),
            Case("rows", "torch", "hf", workers, (), "row-parallel"),
            Case("rows", "torch", "torch", workers, NARROWER, "row-parallel, to TP8"),
            Case("disk", "torch", "hf", workers, (), "disk"),
            Case("disk", "torch", "hf", workers, ("--resume",), WRITTEN, synced=True),
        )
    ]
    lines.append(Case("large", "torch", "hf", 2, ("--hash", "none"), "no hashes"))
    for peer in others:
        target = {"dcp_to_torch_save": "one .pt", "megatron-lm": "torch"}.get(peer.name, "hf")
        target = "a copy" if peer.options else target
        lines.append(Case("large", peer.format, target, 1, tool=peer.name, peer=peer))
    return lines


# --- measuring ----------------------------------------------------------------------------------


def run_case(
    case: Case, model: Model, work: Path, args: argparse.Namespace, baseline_mb: float
) -> dict[str, Any]:
    """`cp`, the conversion and the narrow conversion in turn, `--pairs` times."""
    turns = []
    for number in range(args.pairs if case.peer is None else min(args.pairs, PEER_PAIRS)):
        turns.append(take_turn(case, work, args.attempts, cp_first=number % 2 == 0))
        if failure(turns[-1]):
            break
    shutil.rmtree(work / "out", ignore_errors=True)
    size, narrow = model.num_bytes / 1e9, model.narrow.num_bytes / 1e9
    found: dict[str, list[float]] = {"gb_s": [], "of_cp": [], "marginal": [], "marginal_of_cp": []}
    for turn in turns:
        cp, large, small = (turn[name].seconds for name in ("cp", "large", "small"))
        if not failure(turn):
            found["gb_s"].append(size / large)
            found["of_cp"].append(cp / large)
            found["marginal"].append((size - narrow) / (large - small))
            found["marginal_of_cp"].append((size - narrow) / (large - small) / (size / cp))
    fastest = {name: min(turn[name].seconds for turn in turns) for name in ("cp", "large")}
    peak = max(turn["large"].peak_mb for turn in turns)
    bound = BOUND_MB_PER_WORKER * case.workers if case.peer is None else None
    return {
        "case": asdict(case),
        "name": case.name,
        "cp_gb_s": statistics.median(size / turn["cp"].seconds for turn in turns),
        **{name: spread(values) for name, values in found.items()},
        "best_of_cp": fastest["cp"] / fastest["large"] if found["of_cp"] else None,
        "cpu_seconds_per_gb": statistics.median(t["large"].cpu_seconds / size for t in turns),
        "peak_mb": peak,
        "above_mb": peak - baseline_mb,
        "bound_mb": bound,
        "temporary_mb": max(turn["large"].temporary_mb for turn in turns),
        "status": max(map(failure, turns), key=abs),
        "by_others": max(turn["large"].by_others for turn in turns),
        "hashes": sorted({turn["hash"] for turn in turns}),
        "small_seconds": statistics.median(turn["small"].seconds for turn in turns),
        "pairs": len(turns),
    }


def spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def take_turn(case: Case, work: Path, attempts: int, cp_first: bool = True) -> dict[str, Any]:
    """One run of each; the quietest of a few attempts if others are busy."""
    large, small, out = work / "large" / case.source, work / "small" / case.source, work / "out"
    best: tuple[float, dict[str, Any]] | None = None
    for _ in range(attempts):
        if attempts > 1:
            wait_until_quiet()
        turn: dict[str, Any] = {}
        for name in ("cp", "large") if cp_first else ("large", "cp"):
            if name == "large":
                turn[name] = run(case, large, out)
                turn["hash"] = tensor_hashes(out)
                continue
            command = [str(shutil.which("cp")), "-r", str(large), str(out)]
            turn[name] = timed(case, command, out)
            if turn[name].status:
                raise SystemExit(f"error: cp -r ended with {turn[name].status}")
        turn["small"] = run(case, small, out)
        noise = max(turn[name].by_others for name in ("cp", "large"))
        if case.peer is not None or failure(turn):  # a peer's helpers are not known
            return turn
        if best is None or noise < best[0]:
            best = noise, turn
        if noise <= MOST_BY_OTHERS:
            break
    assert best is not None
    return best[1]


def failure(turn: dict[str, Any]) -> int:
    """The exit status of a conversion of a turn that failed, or 0."""
    return turn["large"].status or turn["small"].status


def run(case: Case, source: Path, out: Path) -> Run:
    command, env = case.command(source, out)
    return timed(case, command, out, env)


def timed(case: Case, command: list[str], out: Path, env: dict[str, str] | None = None) -> Run:
    """A process, and what makes its output reach the disk where that counts."""
    if not case.synced:
        return measure(command, out, env)
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    return measure(["/bin/sh", "-c", '"$@" && sync -f "$0"', str(out), *command], out, env)


def tensor_hashes(folder: Path) -> str:
    """One hash over those of all tensors, whichever files they are in."""
    path = folder / "mtt_manifest.json"
    if not path.is_file():
        return ""
    files = json.loads(path.read_text())["files"]
    tensors = sorted(item for file in files.items() for item in sorted(file[1]["tensors"].items()))
    return hashlib.sha256(repr(tensors).encode()).hexdigest()


# --- checkpoints --------------------------------------------------------------------------------


@contextmanager
def checkpoint(name: str, model: str, format: str, folder: Path) -> Iterator[None]:
    """`large/FORMAT` and `small/FORMAT` in a folder, removed afterwards."""
    print(f"making {name} as {format}", file=sys.stderr)
    made = "torch" if format == "hf" else format
    for size, suffix in (("large", ""), ("small", ".narrow")):
        place = folder / size / made
        place.mkdir(parents=True)
        script = str(Path(__file__).with_name("checkpoints.py"))
        command = [sys.executable, script, model + suffix, made, str(place)]
        subprocess.run(command, check=True)
        if format == "hf":
            case = Case(name, "torch", "hf", workers=2)
            done = run(case, place, folder / size / "hf")
            if done.status:
                raise SystemExit("error: the Hugging Face folder could not be made")
            shutil.rmtree(place)
    try:
        yield
    finally:
        for size in ("large", "small"):
            shutil.rmtree(folder / size)


def compile_once(work: Path) -> None:
    """Let children find compiled modules, in whatever state the installation is."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(work / "pycache")
    measure([sys.executable, "-c", IMPORTS], work / "out")


# --- printing -----------------------------------------------------------------------------------


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    heads = (
        "conversion | by | workers | cp GB/s | GB/s | of cp (min-max) | best | marginal GB/s | "
        "marginal of cp | small s | CPU s/GB | peak MB | above MB | temporary MB | exit"
    ).split(" | ")
    rows = [heads, ["---"] * len(heads)]
    for result in results:
        case, ratio = result["case"], result["of_cp"]
        has_bound = case["peer"] is None
        speed = f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})" if ratio else ""
        rows.append(
            [
                result["name"],
                case["tool"],
                str(case["workers"]) if has_bound else "",
                f"{result['cp_gb_s']:.2f}",
                median(result["gb_s"]),
                speed,
                f"{result['best_of_cp']:.2f}" if ratio else "",
                median(result["marginal"]),
                median(result["marginal_of_cp"]),
                f"{result['small_seconds']:.2f}",
                f"{result['cpu_seconds_per_gb']:.2f}",
                f"{result['peak_mb']:.0f}",
                f"{result['above_mb']:.0f}" if has_bound else "",
                f"{result['temporary_mb']:.0f}",
                str(result["status"]),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def median(values: dict[str, float] | None) -> str:
    return f"{values['median']:.2f}" if values else ""


def text(report: dict[str, Any]) -> str:
    """The report for people, as Markdown."""
    facts = {
        **report["machine"],
        "command": f"`{report['command']}`",
        "weights": ", ".join(f"{n} {size / 1e9:.2f} GB" for n, size in report["weights"].items()),
        "interpreter with the same imports": f"{report['baseline_mb']:.0f} MB",
        "taken by other processes": f"at most {report['by_others']:.0%} of the CPU time of any run",
        "tensors have the same hashes in all runs": "yes" if report["same_hashes"] else "NO",
    }
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    return "\n".join([*lines, "", table(report["results"])])


def published(arguments: Sequence[str]) -> list[str]:
    """The command line without folders of this machine."""
    kept = []
    for argument, before in zip(arguments, ["", *arguments], strict=False):
        if before == "--peer":
            argument = argument.partition("=")[0] + "=PATH"
        elif before in ("--disk", "--work"):
            argument = "DIR"
        kept.append(argument)
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure mtt convert beside cp -r and others.")
    parser.add_argument("--small", action="store_true", help="models of 1 GB instead of 4")
    parser.add_argument("--pairs", type=int, default=5, metavar="N", help="turns; default: 5")
    tries = "for each turn, until others are quiet; default: 4"
    parser.add_argument("--attempts", type=int, default=4, metavar="N", help=tries)
    parser.add_argument("--only", default="", metavar="TEXT", help="lines that have it in them")
    parser.add_argument("--workers", nargs="+", type=int, default=[2, 1], metavar="N")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="one more")
    parser.add_argument("--no-peers", action="store_true", help="only cp and mtt")
    parser.add_argument("--work", metavar="DIR", help="instead of the RAM disk")
    parser.add_argument("--disk", metavar="DIR", help="instead of the system's temporary folder")
    parser.add_argument("--json", action="store_true", help="everything measured, as JSON")
    args = parser.parse_args()
    chosen = [
        case
        for case in cases([] if args.no_peers else peers(args.peer))
        if args.only in f"{case.name} {case.tool}" and (case.peer or case.workers in args.workers)
    ]
    groups = list(dict.fromkeys((case.model, case.source) for case in chosen))
    work_place = args.work or (RAM_DISK if RAM_DISK.is_dir() else None)
    facts = machine()
    results = []
    with (
        tempfile.TemporaryDirectory(prefix="mtt-bench-", dir=work_place) as work,
        tempfile.TemporaryDirectory(prefix="mtt-bench-", dir=args.disk) as disk,
    ):
        compile_once(Path(work))
        baseline = [measure([sys.executable, "-c", IMPORTS], Path(work, "out")) for _ in range(5)]
        baseline_mb = statistics.median(run.peak_mb for run in baseline)
        for name, source in groups:
            model = name + ("-s" if args.small else "")
            folder = Path(disk if name == "disk" else work)
            with checkpoint(name, model, source, folder):
                for case in chosen:
                    if (case.model, case.source) != (name, source):
                        continue
                    print(f"{case.name}, {case.tool} {case.workers}", file=sys.stderr)
                    results.append(run_case(case, MODELS[model], folder, args, baseline_mb))
    suffix = "-s" if args.small else ""
    own = [r for r in results if r["case"]["peer"] is None]
    report = {
        "machine": facts,
        "command": " ".join(["python benchmarks/convert.py", *published(sys.argv[1:])]),
        "weights": {name: MODELS[name + suffix].num_bytes for name in dict(groups)},
        "baseline_mb": baseline_mb,
        "by_others": max((r["by_others"] for r in own), default=0.0),
        "same_hashes": all(len(result["hashes"]) == 1 for result in results),
        "results": results,
    }
    print(json.dumps(report, indent=2, default=str) if args.json else text(report))
    failed = any(r["status"] or r["above_mb"] > r["bound_mb"] for r in own)
    return 1 if failed or not report["same_hashes"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
