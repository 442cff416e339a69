"""`mtt convert` beside `cp -r`: speed, memory and start-up of whole processes.

    python benchmarks/convert.py                                2 GB, 5 pairs of every case
    python benchmarks/convert.py --pairs 9 --formats torch --workers 1 --max-shard-size 5GB

A checkpoint of random bytes is made once per `--work` folder, in both formats:

    large/torch        8 files, TP4 x PP2     Megatron-Core with TransformerEngine's names
    large/torch_dist   16 files               the same tensors
    small/...          the same number of tensors and files, an eighth as wide

For every case `cp -r CKPT OUT`, `mtt convert CKPT OUT` and a conversion of the small checkpoint
run in turn, each as a process of its own, timed from its start to its end, Python's start
included; OUT is removed before each, outside the time. A turn in which other processes took more
than a few percent of the machine is repeated. Without `--work` everything is in a temporary
folder, on the RAM disk if there is room, and removed at the end. Modules are compiled once,
before anything is measured, as an installation does.

GB/s         bytes of weights written / wall time of the process
x cp         wall time / wall time of the `cp -r` of the same pair: below 1 is faster than cp
marginal     (large - small bytes) / (large - small time): GB/s with start-up taken away
peak RSS     the largest resident size the kernel saw of the process, from wait4
above        peak RSS - that of an interpreter that imports what `mtt convert` does, and exits

This process must stay small: a child's peak RSS begins at that of the process that starts it, so
checkpoints are made by another process, the only one here that imports torch.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

TP, PP, WRITERS = 4, 2, 2
BOUND_MB_PER_WORKER = 256
RAM_DISK = Path("/dev/shm")
NEEDED_BYTES = 9 * 10**9  # both formats, one output, and some room
IMPORTS = "import mtt_convert.cli, mtt_convert.commands.convert"
MOST_BY_OTHERS = 0.05  # share of the machine's CPU time
ATTEMPTS = 8


@dataclass(frozen=True)
class Model:
    """A llama-like model; the default has 2.07 GB of bf16 weights."""

    layers: int = 20
    hidden: int = 2048
    ffn: int = 5632
    heads: int = 32
    groups: int = 8
    vocab: int = 31999
    padded_vocab: int = 32256

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def num_bytes(self) -> int:
        """Bytes of weights written: the vocabulary's padding is not."""
        qkv = (self.heads + 2 * self.groups) * self.head_size
        matrices = qkv + self.hidden + 3 * self.ffn
        layer = matrices * self.hidden + 2 * self.hidden
        return 2 * (self.layers * layer + (2 * self.vocab + 1) * self.hidden)


LARGE = Model()
SMALL = replace(LARGE, hidden=256, ffn=704)
MODELS = {"large": LARGE, "small": SMALL}


# --- measuring ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One process from start to end, and the share of the machine others took meanwhile."""

    seconds: float
    cpu_seconds: float
    peak_mb: float
    status: int
    by_others: float


def measure(command: Sequence[str], remove: Path | None = None) -> Run:
    """Run a command; its output is shown only if it fails."""
    if remove is not None:
        shutil.rmtree(remove, ignore_errors=True)
    with tempfile.TemporaryFile() as log:
        busy, start = busy_seconds(), time.perf_counter()
        process = os.posix_spawn(
            command[0],
            command,
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, log.fileno(), number) for number in (1, 2)],
        )
        _, status, usage = os.wait4(process, 0)
        seconds, busy = time.perf_counter() - start, busy_seconds() - busy
        code = os.waitstatus_to_exitcode(status)
        if code:
            log.seek(0)
            print(log.read().decode(errors="replace"), file=sys.stderr)
    own = usage.ru_utime + usage.ru_stime
    by_others = max(0.0, busy - own) / (seconds * (os.cpu_count() or 1))
    return Run(seconds, own, usage.ru_maxrss * 1024 / 1e6, code, by_others)


def busy_seconds() -> float:
    """CPU time that all processes of the machine have used."""
    fields = Path("/proc/stat").read_text().split(maxsplit=8)[1:8]
    user, nice, system, _idle, _wait, interrupts, soft = map(int, fields)
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")


def wait_until_quiet(seconds: float = 60) -> None:
    """Return when others leave the machine alone, or after some time in any case."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        busy = busy_seconds()
        time.sleep(0.5)
        if busy_seconds() - busy <= MOST_BY_OTHERS * 0.5 * (os.cpu_count() or 1):
            return


@dataclass(frozen=True)
class Case:
    """What is measured beside `cp -r`."""

    format: str
    workers: int
    shard_size: str

    def command(self, source: Path, target: Path) -> list[str]:
        mtt = os.path.join(sysconfig.get_path("scripts"), "mtt")
        options = ["--tokenizer", "none", "--max-shard-size", self.shard_size]
        return [mtt, "convert", str(source), str(target), *options, "--workers", str(self.workers)]


def run_case(case: Case, work: Path, pairs: int, baseline_mb: float) -> dict[str, Any]:
    """`cp`, `mtt` and the small `mtt` in turn, `pairs` times."""
    turns = [take_turn(case, work) for _ in range(pairs)]
    shutil.rmtree(work / "out", ignore_errors=True)
    copies, large, small = ([turn[name] for turn in turns] for name in ("cp", "mtt", "small"))
    hashes = sorted({turn["hash"] for turn in turns})
    ratios = [run.seconds / copy.seconds for run, copy in zip(large, copies, strict=True)]
    seconds, small_seconds = median_seconds(large), median_seconds(small)
    runs = [*copies, *large, *small]
    peak = max(run.peak_mb for run in large)
    return {
        "case": asdict(case),
        "cp_gb_s": LARGE.num_bytes / 1e9 / median_seconds(copies),
        "mtt_gb_s": LARGE.num_bytes / 1e9 / seconds,
        "x_cp": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "marginal_gb_s": (LARGE.num_bytes - SMALL.num_bytes) / 1e9 / (seconds - small_seconds),
        "small_seconds": small_seconds,
        "peak_rss_mb": peak,
        "above_mb": peak - baseline_mb,
        "bound_mb": BOUND_MB_PER_WORKER * case.workers,
        "status": next((run.status for run in runs if run.status), 0),
        "by_others": max(run.by_others for run in (*copies, *large)),
        "hashes": hashes,
        "runs": {
            name: [asdict(run) for run in group]
            for name, group in (("cp", copies), ("mtt", large), ("small", small))
        },
    }


def take_turn(case: Case, work: Path) -> dict[str, Any]:
    """One run of each; the quietest of a few attempts if others are busy."""
    large, small, out = work / "large" / case.format, work / "small" / case.format, work / "out"
    copy = [str(shutil.which("cp")), "-r", str(large), str(out)]
    best: tuple[float, dict[str, Any]] | None = None
    for _ in range(ATTEMPTS):
        wait_until_quiet()
        turn: dict[str, Any] = {"cp": measure(copy, remove=out)}
        turn["mtt"] = measure(case.command(large, out), remove=out)
        turn["hash"] = tensor_hashes(out)
        turn["small"] = measure(case.command(small, out), remove=out)
        noise = max(turn[name].by_others for name in ("cp", "mtt"))
        if best is None or noise < best[0]:
            best = noise, turn
        if any(turn[name].status for name in ("cp", "mtt", "small")):
            return turn
        if noise <= MOST_BY_OTHERS:
            break
    assert best is not None
    return best[1]


def median_seconds(runs: Sequence[Run]) -> float:
    return statistics.median(run.seconds for run in runs)


def tensor_hashes(folder: Path) -> str:
    """One hash over those of all tensors, whichever files they are in."""
    path = folder / "mtt_manifest.json"
    if not path.is_file():
        return "nothing written"
    files = json.loads(path.read_text())["files"].values()
    tensors = sorted(item for file in files for item in file["tensors"].items())
    return hashlib.sha256(repr(tensors).encode()).hexdigest()


def machine() -> dict[str, str]:
    """What the figures depend on; no host names, no paths."""
    info = Path("/proc/cpuinfo").read_text()
    model = next((line for line in info.splitlines() if line.startswith("model name")), "?: ?")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    copy = subprocess.run(["cp", "--version"], capture_output=True, text=True, check=True)
    packages = {n: importlib.metadata.version(n) for n in ("modeling-mtt", "numpy", "xxhash")}
    return {
        "cpu": f"{len(os.sched_getaffinity(0))} x {model.partition(':')[2].strip()}",
        "memory": f"{memory / 2**30:.1f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **packages,
        "cp": copy.stdout.splitlines()[0],
    }


# --- printing -----------------------------------------------------------------------------------


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    heads = (
        "format | workers | shard size | cp GB/s | mtt GB/s | x cp median (min-max) | "
        "marginal GB/s | small s | peak RSS MB | above MB | bound MB | exit"
    ).split(" | ")
    rows = [heads, ["---"] * len(heads)]
    for result in results:
        case, ratio = result["case"], result["x_cp"]
        rows.append(
            [
                case["format"],
                str(case["workers"]),
                case["shard_size"],
                f"{result['cp_gb_s']:.2f}",
                f"{result['mtt_gb_s']:.2f}",
                f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})",
                f"{result['marginal_gb_s']:.2f}",
                f"{result['small_seconds']:.2f}",
                f"{result['peak_rss_mb']:.0f}",
                f"{result['above_mb']:.0f}",
                str(result["bound_mb"]),
                str(result["status"]),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def compile_once(work: Path) -> None:
    """Let children find compiled modules, in whatever state the installation is."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(work / "pycache")
    format = next(iter((work / "small").iterdir())).name
    measure(Case(format, 1, "5GB").command(work / "small" / format, work / "out"), work / "out")
    measure([sys.executable, "-c", IMPORTS])


@contextmanager
def work_folder(named: str | None) -> Iterator[Path]:
    """The folder to work in: the user's, which is kept, or a temporary one."""
    if named is not None:
        work = Path(named).resolve()
        work.mkdir(parents=True, exist_ok=True)
        with open(work / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SystemExit(f"error: another benchmark works in {named}") from None
            yield work
        return
    room = RAM_DISK.is_dir() and shutil.disk_usage(RAM_DISK).free > NEEDED_BYTES
    with tempfile.TemporaryDirectory(prefix="mtt-bench-", dir=RAM_DISK if room else None) as path:
        yield Path(path)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure mtt convert beside cp -r.")
    parser.add_argument("--work", metavar="DIR", help="keep the checkpoints here for further runs")
    parser.add_argument("--pairs", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--formats", nargs="+", default=["torch", "torch_dist"], metavar="NAME")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2], metavar="N")
    parser.add_argument("--max-shard-size", nargs="+", default=["5GB", "1GB"], metavar="SIZE")
    parser.add_argument("--json", action="store_true", help="everything measured, as JSON")
    parser.add_argument("--make", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        folder, model, format = args.make
        WRITE[format](Path(folder), MODELS[model])
        return 0
    with work_folder(args.work) as work:
        make_checkpoints(work, args.formats)
        compile_once(work)
        baseline = [measure([sys.executable, "-c", IMPORTS]) for _ in range(args.pairs)]
        baseline_mb = statistics.median(run.peak_mb for run in baseline)
        cases = [
            Case(format, workers, shard_size)
            for format in args.formats
            for shard_size in args.max_shard_size
            for workers in args.workers
        ]
        results = [run_case(case, work, args.pairs, baseline_mb) for case in cases]
    report = {
        "machine": machine(),
        "command": " ".join(["python benchmarks/convert.py", *_without_work(sys.argv[1:])]),
        "ram_disk": work.is_relative_to(RAM_DISK),
        "weights_bytes": LARGE.num_bytes,
        "baseline_mb": baseline_mb,
        "baseline_seconds": statistics.median(run.seconds for run in baseline),
        "by_others": max(result["by_others"] for result in results),
        "same_hashes": len({h for result in results for h in result["hashes"]}) == 1,
        "results": results,
    }
    print(json.dumps(report, indent=2) if args.json else text(report))
    failed = any(r["status"] or r["above_mb"] > r["bound_mb"] for r in results)
    return 1 if failed or not report["same_hashes"] else 0


def text(report: dict[str, Any]) -> str:
    """The report for people, as Markdown."""
    place = "a RAM disk" if report["ram_disk"] else "disk"
    facts = {
        **report["machine"],
        "command": f"`{report['command']}`",
        "weights": f"{report['weights_bytes'] / 1e9:.3f} GB, input and output on {place}",
        "interpreter with the same imports": f"{report['baseline_mb']:.0f} MB, "
        f"{report['baseline_seconds']:.2f} s",
        "taken by other processes": f"at most {report['by_others']:.0%} of the CPU time of any run",
        "tensors have the same hashes in all runs": "yes" if report["same_hashes"] else "NO",
    }
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    return "\n".join([*lines, "", table(report["results"])])


def _without_work(arguments: Sequence[str]) -> list[str]:
    """The command line as it may be published: without folders of this machine."""
    kept = list(arguments)
    if "--work" in kept:
        at = kept.index("--work")
        del kept[at : at + 2]
    return [argument for argument in kept if not argument.startswith("--work=")]


# --- making checkpoints: runs in a process of its own -------------------------------------------


def make_checkpoints(work: Path, formats: Sequence[str]) -> None:
    """Write what is not there yet; a folder gets its name when it is complete."""
    for model in MODELS:
        for format in formats:
            folder = work / model / format
            if folder.is_dir():
                continue
            print(f"making {model}/{format}", file=sys.stderr)
            part = folder.with_name(folder.name + ".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            subprocess.run(
                [sys.executable, __file__, "--make", str(part), model, format], check=True
            )
            part.rename(folder)


def arguments(model: Model) -> argparse.Namespace:
    """The arguments Megatron-LM stores that describe the model."""
    import torch

    return argparse.Namespace(
        tensor_model_parallel_size=TP,
        pipeline_model_parallel_size=PP,
        virtual_pipeline_model_parallel_size=None,
        expert_model_parallel_size=1,
        use_legacy_models=False,
        transformer_impl="transformer_engine",
        num_layers=model.layers,
        hidden_size=model.hidden,
        ffn_hidden_size=model.ffn,
        num_attention_heads=model.heads,
        group_query_attention=True,
        num_query_groups=model.groups,
        kv_channels=model.head_size,
        max_position_embeddings=2048,
        position_embedding_type="rope",
        rotary_base=10000,
        rotary_percent=1.0,
        use_rope_scaling=False,
        normalization="RMSNorm",
        layernorm_epsilon=1e-5,
        layernorm_zero_centered_gamma=False,
        swiglu=True,
        bias_gelu_fusion=False,
        add_bias_linear=False,
        add_qkv_bias=False,
        qk_layernorm=False,
        untie_embeddings_and_output_weights=True,
        tokenizer_type="NullTokenizer",
        vocab_size=model.vocab - 1,  # Megatron's NullTokenizer adds one
        padded_vocab_size=model.padded_vocab,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=0.02,
        params_dtype=torch.bfloat16,
        bf16=True,
        fp16=False,
    )


@dataclass(frozen=True)
class Parameter:
    """A parameter of one layer, or of the model, and how tensor parallelism splits it."""

    shape: tuple[int, ...]
    split: int | None
    stage: int | None = None
    gated: bool = False

    def parts(self, whole, rank: int):
        """What a tensor-parallel rank holds of it: (place in the whole, tensor) for each block."""
        blocks = whole.chunk(2) if self.gated else (whole,)
        for number, block in enumerate(blocks):
            start = [number * block.shape[0]] + [0] * (whole.dim() - 1)
            part = block
            if self.split is not None:
                part = block.chunk(TP, self.split)[rank]
                start[self.split] += rank * part.shape[self.split]
            yield tuple(start), part.clone()  # torch.save writes whole storages


def parameters(model: Model) -> tuple[dict[str, Parameter], dict[str, Parameter]]:
    """Parameters of every layer, and those outside layers."""
    hidden, ffn = model.hidden, model.ffn
    qkv = (model.heads + 2 * model.groups) * model.head_size
    layer = {
        "self_attention.linear_proj.weight": Parameter((hidden, hidden), 1),
        "self_attention.linear_qkv.layer_norm_weight": Parameter((hidden,), None),
        "self_attention.linear_qkv.weight": Parameter((qkv, hidden), 0),
        "mlp.linear_fc1.layer_norm_weight": Parameter((hidden,), None),
        "mlp.linear_fc1.weight": Parameter((2 * ffn, hidden), 0, gated=True),
        "mlp.linear_fc2.weight": Parameter((hidden, ffn), 1),
    }
    outside = {
        "embedding.word_embeddings.weight": Parameter((model.padded_vocab, hidden), 0, 0),
        "decoder.final_layernorm.weight": Parameter((hidden,), None, PP - 1),
        "output_layer.weight": Parameter((model.padded_vocab, hidden), 0, PP - 1),
    }
    return layer, outside


def whole_tensor(shape: tuple[int, ...], key: str):
    """Random bytes that depend on the name alone, so that both formats hold the same model."""
    import numpy as np
    import torch

    count = 1
    for size in shape:
        count *= size
    data = np.random.default_rng(list(key.encode())).integers(0, 2**16, count, dtype=np.uint16)
    return torch.from_numpy(data.view(np.int16)).view(torch.bfloat16).view(shape)


def rank_parts(model: Model, pp: int) -> Iterator[tuple[str, int | None, Parameter]]:
    """(name, global layer, parameter) of everything one pipeline stage holds."""
    layer, outside = parameters(model)
    per_stage = model.layers // PP
    for name, parameter in outside.items():
        if parameter.stage == pp == 0:
            yield name, None, parameter
    for number in range(pp * per_stage, (pp + 1) * per_stage):
        for name, parameter in layer.items():
            yield name, number, parameter
    for name, parameter in outside.items():
        if parameter.stage == pp > 0:
            yield name, None, parameter


def write_torch(folder: Path, model: Model) -> None:
    """`mp_rank_TT_PPP/model_optim_rng.pt`."""
    import torch

    args = arguments(model)
    for pp in range(PP):
        shards: list[dict] = [{} for _ in range(TP)]
        for name, layer, parameter in rank_parts(model, pp):
            whole = whole_tensor(parameter.shape, f"{layer} {name}")
            local = (
                name if layer is None else f"decoder.layers.{layer % (model.layers // PP)}.{name}"
            )
            for tp in range(TP):
                blocks = [part for _, part in parameter.parts(whole, tp)]
                shards[tp][local] = torch.cat(blocks) if len(blocks) > 1 else blocks[0]
        for tp, shard in enumerate(shards):
            place = folder / "iter_0000010" / f"mp_rank_{tp:02d}_{pp:03d}"
            place.mkdir(parents=True)
            content = {"args": args, "checkpoint_version": 3.0, "iteration": 10, "model": shard}
            torch.save(content, place / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("10")


def write_torch_dist(folder: Path, model: Model) -> None:
    """`.metadata` and `__R_W.distcp`: one small torch.save after another, layers stacked."""
    import pickle

    import torch
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    place = folder / "iter_0000010"
    place.mkdir(parents=True)
    tensors: dict[str, dcp.TensorStorageMetadata] = {}
    storage: dict[dcp.MetadataIndex, _StorageInfo] = {}
    for name, start, shape, rank, part in global_chunks(model):
        properties = dcp.TensorProperties(dtype=part.dtype)
        empty = dcp.TensorStorageMetadata(properties, torch.Size(shape), [])
        chunk = dcp.ChunkStorageMetadata(torch.Size(start), part.shape)
        tensors.setdefault(name, empty).chunks.append(chunk)
        paths = [place / f"__{rank}_{writer}.distcp" for writer in range(WRITERS)]
        path = min(paths, key=lambda path: path.stat().st_size if path.exists() else 0)
        with open(path, "ab") as file:
            offset = file.tell()
            torch.save(part, file)
            length = file.tell() - offset
        storage[dcp.MetadataIndex(name, torch.Size(start))] = _StorageInfo(
            path.name, offset, length
        )
    metadata = dcp.Metadata(state_dict_metadata=tensors, storage_data=storage)
    (place / ".metadata").write_bytes(pickle.dumps(metadata))
    common = {"args": arguments(model), "checkpoint_version": 3.0, "iteration": 10}
    torch.save(common, place / "common.pt")
    facts = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    facts |= {"common_backend": "torch", "common_backend_version": 1}
    (place / "metadata.json").write_text(json.dumps(facts))
    (folder / "latest_checkpointed_iteration.txt").write_text("10")


def global_chunks(model: Model):
    """(global name, place in the global tensor, its shape, rank, tensor) of every chunk.

    Tensors that all tensor-parallel ranks hold are written by the first of them.
    """
    for pp in range(PP):
        for name, layer, parameter in rank_parts(model, pp):
            whole = whole_tensor(parameter.shape, f"{layer} {name}")
            for tp in range(TP if parameter.split is not None else 1):
                for start, part in parameter.parts(whole, tp):
                    rank, shape = pp * TP + tp, parameter.shape
                    if layer is None:
                        yield name, start, shape, rank, part
                    else:
                        stacked = (model.layers, *shape)
                        yield f"decoder.layers.{name}", (layer, *start), stacked, rank, part[None]


WRITE = {"torch": write_torch, "torch_dist": write_torch_dist}

if __name__ == "__main__":
    raise SystemExit(main())
