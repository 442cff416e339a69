"""MTT beside the class of transformers that computes the same, with the same weights.

    python benchmarks/inference.py                                  on a CPU: up to 100M parameters
    python benchmarks/inference.py --models llama-3b --attn sdpa flash_attention_2      on a GPU
    python benchmarks/inference.py --models llama-60m --lines decode --pairs 9

Random weights of the native class are saved and converted by `mtt convert`. Both classes are then
loaded in one process and take turns, native, MTT, native, MTT, after a turn that does not count;
peak memory is that of processes which do nothing else. For each line the table shows

native, MTT  median seconds of a turn; of peak memory, megabytes above a process that only imports
ratio        native / MTT, median of the pairs: above 1, MTT is faster or smaller
roofline     of MTT: for decode, bytes of weights and cache read per second as a share of the
             bandwidth; for prefill and training, operations per second as a share of what a
             matrix product reaches. Both ceilings are measured in the same run

load         from_pretrained, files in the page cache
prefill      one forward pass over a prompt, logits of the last token
decode       generate(), greedy, after a prompt of 32 tokens, with the default cache
compiled     the same with cache_implementation="static" and a compiled forward pass
train        forward, backward and a step of SGD
memory       load, prefill and decode in a process of its own
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
)

import modeling_mtt  # registers MTT with the auto classes
import mtt_convert

# hidden size, layers, heads, key and value heads, intermediate size, vocabulary
SIZES = {
    "5m": (256, 6, 4, 4, 704, 1024),
    "20m": (384, 8, 6, 6, 1024, 8192),
    "60m": (512, 12, 8, 8, 1408, 16384),
    "90m": (640, 14, 10, 10, 1728, 16384),
    "3b": (3072, 28, 24, 8, 8192, 128256),
    "8b": (4096, 32, 32, 8, 14336, 128256),
}
LINES = ("load", "prefill", "decode", "compiled", "train", "memory")
PROMPT = 32


def native_config(name: str, positions: int) -> transformers.PreTrainedConfig:
    """The configuration of `llama-60m`, `gpt2-20m`, `gpt_neox-90m` and so on."""
    family, size = name.split("-")
    hidden, layers, heads, groups, intermediate, vocab = SIZES[size]
    ids = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    if family == "gpt2":
        return GPT2Config(
            n_embd=hidden,
            n_layer=layers,
            n_head=heads,
            vocab_size=vocab,
            n_positions=positions,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            **ids,
        )
    common = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        **ids,
    }
    if family == "gpt_neox":
        return GPTNeoXConfig(intermediate_size=4 * hidden, **common)
    return LlamaConfig(intermediate_size=intermediate, num_key_value_heads=groups, **common)


@dataclass(frozen=True)
class Setting:
    """What all lines of one table have in common."""

    device: str
    dtype: torch.dtype
    attn: str
    prompt: int
    new_tokens: int
    train_tokens: int

    def load(self, folder: Path, training: bool = False) -> Any:
        """Return the model in `folder`, on the device."""
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=self.dtype, attn_implementation=self.attn
        ).to(self.device)
        return model.train() if training else model

    def wait(self) -> None:
        """Wait for what was given to the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def ids(self, model: Any, length: int) -> torch.Tensor:
        """Token ids `[1, length]`."""
        return torch.randint(1, model.config.vocab_size, (1, length), device=self.device)


# --- what is timed ------------------------------------------------------------------------------


def prefill(model: Any, setting: Setting) -> Callable[[], None]:
    """One forward pass over the prompt."""
    input_ids = setting.ids(model, setting.prompt)

    @torch.no_grad()
    def run() -> None:
        model(input_ids, logits_to_keep=1)

    return run


def decode(model: Any, setting: Setting, **options: Any) -> Callable[[], None]:
    """`new_tokens` tokens, one by one."""
    input_ids, length = setting.ids(model, PROMPT), setting.new_tokens

    def run() -> None:
        model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=False,
            **options,
        )

    return run


def compiled(model: Any, setting: Setting) -> Callable[[], None]:
    """The same, compiled: `generate` does so by itself where there is a GPU."""
    config = CompileConfig(fullgraph=False, mode="reduce-overhead", dynamic=False)
    config._compile_all_devices = True
    return decode(model, setting, cache_implementation="static", compile_config=config)


def train(model: Any, setting: Setting) -> Callable[[], None]:
    """One step."""
    input_ids = setting.ids(model, setting.train_tokens)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def run() -> None:
        model(input_ids, labels=input_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


TIMED = {"prefill": prefill, "decode": decode, "compiled": compiled, "train": train}


def timed(run: Callable[[], Any], setting: Setting) -> float:
    """Return seconds."""
    gc.collect()
    setting.wait()
    start = time.perf_counter()
    run()
    setting.wait()
    return time.perf_counter() - start


def take_turns(line: str, folders: list[Path], setting: Setting, pairs: int) -> list[list[float]]:
    """Return what each turn took: seconds, or bytes, of the native class and of MTT."""
    if line == "memory":
        return [[peak_memory(folder, setting) for folder in folders] for _ in range(pairs)]
    if line == "load":
        runs: list[Callable[[], Any]] = [lambda f=f: setting.load(f) for f in folders]
    else:
        torch.compiler.reset()
        models = [setting.load(folder, training=line == "train") for folder in folders]
        runs = [TIMED[line](model, setting) for model in models]
    for run in runs * 2:
        timed(run, setting)
    return [[timed(run, setting) for run in runs] for _ in range(pairs)]


def peak_memory(folder: Path, setting: Setting) -> float:
    """Return the megabytes that a process of its own needs above one that only imports."""
    command = [sys.executable, __file__, "--child", str(folder), "--attn", setting.attn]
    command += ["--device", setting.device, "--dtype", str(setting.dtype).removeprefix("torch.")]
    command += ["--prompt", str(setting.prompt), "--new-tokens", str(setting.new_tokens)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.splitlines()[-1])


def child(folder: str, setting: Setting) -> float:
    """Return this process's peak, in megabytes, above what it needed to start."""
    # A process starts with the peak of the one that started it: forget that.
    Path("/proc/self/clear_refs").write_text("5")
    start = peak_of_this_process()
    model = setting.load(Path(folder))
    prefill(model, setting)()
    decode(model, setting)()
    if setting.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return peak_of_this_process() - start


def peak_of_this_process() -> float:
    """Return the largest resident size since it was last forgotten, in megabytes; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = [line for line in lines if line.startswith("VmHWM:")]
    return int(peak.split()[1]) / 1e3


# --- ceilings -----------------------------------------------------------------------------------


def best_of(run: Callable[[], Any], setting: Setting, times: int = 9) -> float:
    """Return the fewest seconds, of a run long enough to be timed."""
    run()
    return min(timed(run, setting) for _ in range(times))


def measure_bandwidth(setting: Setting) -> float:
    """Return bytes per second of reading a tensor that no cache holds."""
    num_bytes = 2**28 if setting.device == "cpu" else 2**32
    values = torch.ones(num_bytes // 4, device=setting.device)
    return num_bytes / best_of(values.sum, setting)


def measure_matmul(setting: Setting) -> float:
    """Return operations per second of a large matrix product."""
    size = 2048 if setting.device == "cpu" else 8192
    left, right = (
        torch.randn(size, size, device=setting.device, dtype=setting.dtype) for _ in range(2)
    )
    return 2 * size**3 / best_of(lambda: left @ right, setting)


@dataclass(frozen=True)
class Work:
    """What a line cannot do without."""

    num_bytes: float = 0.0
    num_operations: float = 0.0


def work_of(line: str, config: Any, num_matrix_values: int, setting: Setting) -> Work:
    """Count bytes or operations; elementwise operations are not counted."""
    width = config.num_attention_heads * config.head_dim
    cache_width = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    if line in ("decode", "compiled"):
        lengths = range(PROMPT, PROMPT + setting.new_tokens)
        values = setting.new_tokens * num_matrix_values + cache_width * sum(lengths)
        return Work(num_bytes=values * setting.dtype.itemsize)
    if line in ("prefill", "train"):
        length = setting.prompt if line == "prefill" else setting.train_tokens
        head = config.vocab_size * config.hidden_size
        rows = num_matrix_values * length
        if line == "prefill":
            rows -= head * (length - 1)
        # Scores and weighted values, of the half that causal attention sees.
        attention = 2 * config.num_hidden_layers * width * length * (length + 1) / 2
        passes = 3 if line == "train" else 1
        return Work(num_operations=2 * passes * (rows + attention))
    return Work()


# --- the table ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the table, and the turns it comes from."""

    model: str
    attn: str
    line: str
    native: float
    mtt: float
    ratio: float
    lowest: float
    highest: float
    roofline: float | None
    turns: list[list[float]]


def measure_model(
    name: str, lines: list[str], setting: Setting, ceilings: dict[str, float], args: Any
) -> list[Row]:
    """Return the rows of one model and attention implementation."""
    rows = []
    positions = max(setting.prompt, PROMPT + setting.new_tokens, setting.train_tokens)
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        native, mtt = Path(work) / "native", Path(work) / "mtt"
        torch.manual_seed(0)
        config = native_config(name, positions)
        model = AutoModelForCausalLM.from_config(config, dtype=setting.dtype)
        model.save_pretrained(native)
        del model
        mtt_convert.convert(native, mtt)
        config = modeling_mtt.MTTConfig.from_pretrained(mtt)
        with torch.device("meta"):
            empty = modeling_mtt.MTTForCausalLM(config)
        matrices = [p for n, p in empty.named_parameters() if p.ndim == 2 and "embed_" not in n]
        num_matrix_values = sum(matrix.numel() for matrix in matrices)
        if config.tie_word_embeddings:
            num_matrix_values += config.vocab_size * config.hidden_size
        for line in lines:
            turns = take_turns(line, [native, mtt], setting, args.pairs)
            ratios = [first / second for first, second in turns]
            medians = [statistics.median(times) for times in zip(*turns, strict=True)]
            need = work_of(line, config, num_matrix_values, setting)
            ideal = need.num_bytes / ceilings["bandwidth"]
            ideal += need.num_operations / ceilings["matmul"]
            rows.append(
                Row(
                    name,
                    setting.attn,
                    line,
                    *medians,
                    statistics.median(ratios),
                    min(ratios),
                    max(ratios),
                    ideal / medians[1] if ideal else None,
                    turns,
                )
            )
            print(format_row(rows[-1]), flush=True)
        shutil.rmtree(native)
    return rows


def format_row(row: Row) -> str:
    """Return a row of a Markdown table."""
    unit = "MB" if row.line == "memory" else "s"
    share = f"{row.roofline:.0%}" if row.roofline is not None else ""
    return (
        f"| {row.model} | {row.attn} | {row.line} | {row.native:.4g} {unit} | {row.mtt:.4g} {unit} "
        f"| {row.ratio:.2f} | {row.lowest:.2f} - {row.highest:.2f} | {share} |"
    )


def machine(device: str) -> dict[str, Any]:
    """What a reader needs to know about where this ran."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    if device == "cpu" and (info := Path("/proc/cpuinfo")).exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "mtt": mtt_convert.__version__,
        "command": " ".join(["python", "benchmarks/inference.py", *sys.argv[1:]]),
    }


def main() -> int:
    """Run."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ["llama-3b"] if on_gpu else ["llama-20m", "llama-60m", "gpt2-60m", "gpt_neox-60m"]
    parser.add_argument("--models", nargs="+", default=default, metavar="FAMILY-SIZE")
    parser.add_argument("--lines", nargs="+", default=list(LINES), choices=LINES)
    parser.add_argument("--attn", nargs="+", default=["sdpa"])
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--prompt", type=int, default=8192 if on_gpu else 256)
    parser.add_argument("--new-tokens", type=int, default=128 if on_gpu else 64)
    parser.add_argument("--train-tokens", type=int, default=2048 if on_gpu else 128)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--work", metavar="FOLDER", help="where models are written for a while")
    parser.add_argument("--json", metavar="FILE", help="all turns")
    parser.add_argument("--child", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    def setting(attn: str) -> Setting:
        dtype = getattr(torch, args.dtype)
        lengths = args.prompt, args.new_tokens, args.train_tokens
        return Setting(args.device, dtype, attn, *lengths)

    if args.child:
        print(child(args.child, setting(args.attn[0])))
        return 0
    unknown = [m for m in args.models if m.partition("-")[2] not in SIZES]
    if unknown:
        parser.error(f"unknown models {unknown}: expected llama-, gpt2- or gpt_neox- {list(SIZES)}")
    first = setting(args.attn[0])
    ceilings = {"bandwidth": measure_bandwidth(first), "matmul": measure_matmul(first)}
    about = machine(args.device)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(
        f"{args.dtype}, prompt {args.prompt}, {args.new_tokens} new tokens, training on "
        f"{args.train_tokens}; bandwidth {ceilings['bandwidth'] / 1e9:.1f} GB/s, "
        f"matrix product {ceilings['matmul'] / 1e12:.3f} Tflop/s\n"
    )
    print("| model | attention | line | native | MTT | ratio | of pairs | roofline |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    rows = [
        row
        for name in args.models
        for attn in args.attn
        for row in measure_model(name, args.lines, setting(attn), ceilings, args)
    ]
    if args.json:
        document = {"machine": about, "ceilings": ceilings, "rows": [asdict(row) for row in rows]}
        Path(args.json).write_text(json.dumps(document, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
