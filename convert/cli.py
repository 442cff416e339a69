"""The `mtt` command: parses, calls one library function, reports.

Handlers live in `commands/` and are imported when they are called, so that `mtt --help` needs
nothing but the standard library. Only this module and `commands/` print.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, TypeAlias

from .errors import MTTError, UsageError
from .version import __version__

EXIT_DIFFERENT, EXIT_BUG, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 70, 130, 143
_COMMANDS = ("demo", "inspect", "convert", "diff", "verify", "generate", "estimate", "push")
_WRITING, _NOTHING_WRITTEN = ("demo", "convert", "push"), "; nothing was written"
_PATHS = {
    "source": "CKPT",
    "target": "OUT",
    "first": "A",
    "second": "B",
    "folder": "OUT",
    "model": "MODEL",
}
MEGATRON_FORMATS = ("torch", "torch_dist")
_SIZES = (
    ("--tp", "--tensor-model-parallel-size", "ranks that share every layer"),
    ("--pp", "--pipeline-model-parallel-size", "stages that share the layers"),
    ("--vpp", "--virtual-pipeline-model-parallel-size", "parts of a stage"),
    ("--ep", "--expert-model-parallel-size", "ranks that share the experts"),
    ("--etp", "--expert-tensor-parallel-size", "ranks that share one expert; default: --tp"),
)
Options: TypeAlias = "argparse._ArgumentGroup | argparse.ArgumentParser"
LAYOUT_OPTIONS = (
    *(short for short, _, _ in _SIZES),
    "--pipeline-model-parallel-layout",
    "--transformer-impl",
    "--make-vocab-size-divisible-by",
)
_SOURCE = (
    "Megatron's --save folder, one iteration, a .nemo file, or a Hugging Face folder: a path, "
    "hf://owner/repo[@revision][/folder], or a URL that fsspec knows"
)
_EPILOG = """\
examples:
  mtt demo                                     see the main job on a tiny model
  mtt inspect /checkpoints/gpt                 what is in there, without reading the weights
  mtt convert /checkpoints/gpt out             Megatron shards to a Hugging Face folder
  mtt generate out --prompt "Once upon a time"
  mtt push out owner/repo                      upload the folder, in one commit

Every command has its own help: mtt convert --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 done or equal, 1 differences, 2 usage, 3 source, 4 target, 5 network,
        70 a bug of mtt, 130 interrupted, 143 terminated.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = _before_parsing(arguments)
    try:
        with _sigterm_interrupts():
            args = _parsed(arguments)
            _check_paths(args)
            handler = importlib.import_module(f".commands.{args.command}", __package__)
            return int(handler.run(args))
    except MTTError as error:
        return _report(args, error.code, error, error.exit_code)
    except KeyboardInterrupt as stop:
        message = "interrupted; nothing that looks whole was left"
        again = "mtt " + " ".join(map(shlex.quote, _resuming(args, arguments)))
        if getattr(args, "json", False):
            _print_json_error(args, "interrupted", MTTError(message, fix=f"again: {again}"))
        print(f"\n{message}\n  again: {printable(again)}", file=sys.stderr)
        return EXIT_TERMINATED if isinstance(stop, _Terminated) else EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        message = f"mtt failed: {type(error).__name__}: {error}"
        fix = "this is a bug of mtt: report it with the output of the same command and --debug"
        return _report(args, "bug", MTTError(message, fix=fix), EXIT_BUG)


def _resuming(args: argparse.Namespace, arguments: list[str]) -> list[str]:
    """The command again: an upload and a part go on where they were."""
    uploads = args.command == "push" or getattr(args, "target", "").startswith("hf://")
    stays = uploads or getattr(args, "part", None) is not None
    return [*arguments, "--resume"] if stays and "--resume" not in arguments else arguments


class _Terminated(KeyboardInterrupt):
    """SIGTERM: what an interruption cleans up, it cleans up too."""


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Raise `_Terminated` on SIGTERM, unless the program around has a handler of its own."""

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        raise _Terminated

    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """All arguments; words that the command does not know lead to its own help."""
    args, unknown = build_parser().parse_known_args(arguments)
    if unknown:
        raise UsageError(
            f"unrecognized arguments: {' '.join(unknown)}", fix=f"see mtt {args.command} --help"
        )
    return args


def _before_parsing(arguments: Sequence[str]) -> argparse.Namespace:
    """What errors of the parser need to know: whether to print JSON, and for which command."""
    command = arguments[0] if arguments and arguments[0] in _COMMANDS else None
    return argparse.Namespace(
        command=command, json="--json" in arguments, debug="--debug" in arguments
    )


def _check_paths(args: argparse.Namespace) -> None:
    for name, label in _PATHS.items():
        if getattr(args, name, None) == "":
            raise UsageError(f"{label} is empty", expected="a path", fix="give a folder")


def printable(text: str, keep: str = "") -> str:
    """A text without anything a terminal would obey: such characters are shown as escapes.

    Args:
        text: may hold names from files of strangers, and paths that are no text.
        keep: characters to leave as they are.
    """
    return "".join(
        c if c in keep or c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


def _report(args: argparse.Namespace, code: str, error: MTTError, exit: int) -> int:
    """Print the error that is being handled."""
    if args.debug:
        traceback.print_exc()
    if args.command not in _WRITING:
        error = MTTError(error.message.removesuffix(_NOTHING_WRITTEN), **_details(error))
    if getattr(args, "json", False):
        _print_json_error(args, code, error)
    details = {name: value and printable(value) for name, value in _details(error).items()}
    text = f"error: {MTTError(printable(error.message), **details)}"
    print(f"{_rank_of(args)}{text}", file=sys.stderr)
    return exit


def _rank_of(args: argparse.Namespace) -> str:
    """Which of many processes this is, where a launcher started all of them."""
    if getattr(args, "part", None) != "auto":
        return ""
    import socket

    from .parts import parse_part

    try:
        part = parse_part("auto")
    except UsageError:
        return ""
    return f"[rank {part.number - 1}/{part.count} {socket.gethostname()}] "


def _print_json_error(args: argparse.Namespace, code: str, error: MTTError) -> None:
    body = {"schema": 1, "command": args.command, "status": "error", "code": code}
    print(json.dumps({**body, "message": error.message, **_details(error)}))


def _details(error: MTTError) -> dict[str, str | None]:
    return {"found": error.found, "expected": error.expected, "fix": error.fix}


class _Parser(argparse.ArgumentParser):
    """Errors in the shape all errors of mtt have."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, fix=f"see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = _Parser(
        prog="mtt",
        description="Megatron checkpoints as Hugging Face models: convert, check, use.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mtt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _demo(commands)
    _inspect(commands)
    _convert(commands)
    _diff(commands)
    _verify(commands)
    _generate(commands)
    _estimate(commands)
    _push(commands)
    return parser


def _command(
    commands: argparse._SubParsersAction[_Parser], name: str, summary: str, *examples: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_source_options(parser: Options) -> None:
    """What every command that opens a Megatron checkpoint accepts."""
    parser.add_argument(
        "--iteration",
        "--ckpt-step",
        type=int,
        metavar="N",
        help="which iteration; default: the one the tracker file names",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a Megatron argument the checkpoint lacks or has wrong; may be repeated",
    )
    parser.add_argument(
        "--config",
        metavar="FILE_OR_FOLDER",
        help="a file of such arguments (JSON, or NAME: VALUE lines), a folder with the config.json "
        "of an MTT model, or a preset such as megatron-gpt2-345m; --set wins over it",
    )
    parser.add_argument(
        "--skip-key",
        action="append",
        default=[],
        metavar="NAME",
        help="an entry to leave out that is not part of the model; may be repeated",
    )
    parser.add_argument(
        "--qkv-order",
        default="auto",
        choices=("auto", "head", "block", "element"),
        help="order of the rows of query_key_value on each rank, where the checkpoint is wrong "
        "about it: head (checkpoint_version 2 and 3), block (0: queries, keys, values) or element "
        "(1); docs/formats.md says when to suspect that (default: auto)",
    )


def _add_replicated(parser: Options) -> None:
    parser.add_argument(
        "--replicated",
        choices=("error", "first", "average"),
        help="if ranks hold different copies of a parameter (default: average for DeepSpeed's "
        "checkpoints, whose copies drift, else error)",
    )


def _add_layout_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("layout of a Megatron target (sizes are 1 unless said)")
    for short, long, meaning in _SIZES:
        group.add_argument(short, long, type=int, metavar="N", help=meaning)
    group.add_argument(
        "--pipeline-model-parallel-layout",
        metavar="LAYOUT",
        help="a custom pipeline: 'Et*3|t*4|t*4|t*3L' is embedding, layers, loss, | between stages",
    )
    group.add_argument(
        "--transformer-impl",
        choices=("transformer_engine", "local"),
        help="whose layers to name the parameters for; default: the source's, else "
        "transformer_engine",
    )
    group.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        metavar="N",
        help="with --tp, what the vocabulary is padded to a multiple of; default: the source's, "
        "else 128",
    )


def _add_upload_options(group: Options) -> None:
    group.add_argument("--private", action="store_true", help="if the repository is new")
    group.add_argument(
        "--create-pr", action="store_true", help="open a pull request instead of committing"
    )


def _add_resume(parser: argparse.ArgumentParser, meaning: str) -> None:
    parser.add_argument("--resume", action="store_true", help=meaning)


def _add_dtype(parser: argparse.ArgumentParser, meaning: str) -> None:
    choices = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", default="auto", choices=choices, help=meaning)


def _add_overwrite(parser: argparse.ArgumentParser, meaning: str) -> None:
    parser.add_argument("--overwrite", action="store_true", help=meaning)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _demo(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _command(
        commands,
        "demo",
        "convert and run the sample checkpoint, step by step",
        "mtt demo",
        "mtt demo --output sample-hf     keep the converted folder",
    )
    parser.add_argument("--output", metavar="OUT", help="keep the converted folder here")
    _add_overwrite(parser, "replace an earlier conversion in OUT")


def _inspect(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _command(
        commands,
        "inspect",
        "show what a checkpoint is, without reading its weights",
        "mtt inspect /checkpoints/gpt",
        "mtt inspect /checkpoints/gpt --iteration 1000 --json",
        "mtt inspect hf://owner/repo",
    )
    parser.add_argument("source", metavar="CKPT", help=_SOURCE)
    _add_source_options(parser)
    _add_json(parser)


def _convert(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _command(
        commands,
        "convert",
        "convert a checkpoint to a Hugging Face folder, or to a Megatron layout",
        "mtt convert /checkpoints/gpt out",
        "mtt convert /checkpoints/gpt out --tokenizer gpt2-vocab.json --dtype bfloat16",
        "mtt convert /checkpoints/gpt out --dry-run",
        "mtt convert /checkpoints/gpt out --model-type auto",
        "mtt convert /checkpoints/345m out --config megatron-gpt2-345m",
        "mtt convert /checkpoints/gpt new --to torch --tp 4 --pp 2",
        "mtt convert hf://owner/repo@main/iter_0001000 out",
        "mtt convert llama-folder new --to torch_dist --tp 8",
        "mtt convert llama-folder out --to hf --model-type mtt",
        "mtt convert /checkpoints/gpt hf://owner/repo     upload while converting",
        "mtt convert /checkpoints/gpt out --all-iterations",
        "mtt convert /checkpoints/gpt out --resume     go on after an interruption",
        "mtt convert /checkpoints/gpt out --resume --part 3/8     one of eight machines",
        "mtt convert /checkpoints/gpt out --resume --part auto     under srun, torchrun, mpirun",
    )
    parser.add_argument("source", metavar="CKPT", help=_SOURCE)
    parser.add_argument(
        "target", metavar="OUT", help="a new or empty folder, or hf://owner/repo[@branch]"
    )
    parser.add_argument(
        "--to",
        choices=("hf", *MEGATRON_FORMATS),
        help="target format: a Hugging Face folder, or a Megatron checkpoint (default: hf; needed "
        "if CKPT is a Hugging Face folder)",
    )
    parser.add_argument(
        "--model-type",
        default="mtt",
        metavar="NAME",
        help="class to write: mtt (of a T5 mtt_seq2seq, of a BERT megatron-bert), or llama, qwen2, "
        "... if it computes exactly the same; auto: such a class if it can be split over devices "
        "and lets choose its attention, else mtt (default: mtt)",
    )
    _add_dtype(parser, "element type to write (default: auto, as stored)")
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="a folder, vocab.json beside merges.txt, tokenizer.json, a SentencePiece .model, "
        "tiktoken's ranks, or none; default: what the checkpoint names, if it is there",
    )
    parser.add_argument(
        "--vocab-padding",
        choices=("keep", "trim"),
        help="rows that only pad the vocabulary; default: trim if the true size is known",
    )
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="per file (default: 5GB); a rank of a torch checkpoint is always one file",
    )
    _add_replicated(parser)
    parser.add_argument(
        "--drop-mtp",
        action="store_true",
        help="leave out layers that predict further tokens (default: keep them)",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="threads (default: CPUs, at most 8)"
    )
    parser.add_argument(
        "--hash",
        default="xxh3",
        choices=("xxh3", "sha256", "none"),
        help="per tensor, for the manifest (default: xxh3)",
    )
    _add_overwrite(parser, "replace an earlier conversion in OUT")
    _add_resume(
        parser,
        "go on with an interrupted conversion: finished files stay, and those of this run do if it "
        "is interrupted too; if there is nothing to go on with, begin",
    )
    parser.add_argument(
        "--part",
        metavar="I/N",
        help="write one part of N, on machines that share a file system: each runs the same "
        "command with its own number, from 1/N to N/N, and the last to end makes OUT whole; auto: "
        "the rank of torchrun, srun or mpirun; docs/scale.md",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    parser.add_argument(
        "--all-iterations",
        action="store_true",
        help="every iteration: to OUT/iter_0001000, or to the branch step1000 on the Hub; what is "
        "there already stays",
    )
    _add_source_options(parser)
    _add_layout_options(parser)
    _add_upload_options(parser.add_argument_group("a target on the Hub"))
    _add_json(parser)


def _diff(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _command(
        commands,
        "diff",
        "compare two checkpoints tensor by tensor, bit by bit",
        "mtt diff /checkpoints/tp4 /checkpoints/tp8",
        "mtt diff /checkpoints/gpt out",
        "mtt diff /checkpoints/2020 out --qkv-order block     as it was converted",
    )
    parser.add_argument("first", metavar="A", help="a Megatron checkpoint or a Hugging Face folder")
    parser.add_argument("second", metavar="B", help="another one")
    group = parser.add_argument_group("for each of the two that is of Megatron")
    _add_source_options(group)
    _add_replicated(group)
    _add_json(parser)


def _verify(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _command(
        commands,
        "verify",
        "read a converted folder again and compare it with its manifest",
        "mtt verify out",
        "mtt verify out --logits reference.npz     also run the model",
    )
    parser.add_argument("folder", metavar="OUT", help="a folder that mtt convert wrote")
    parser.add_argument(
        "--logits",
        metavar="FILE",
        help="an .npz with input_ids and logits to compare the model's with, in float32; of a T5 "
        "also decoder_input_ids",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="X",
        help="largest difference of a logit that counts as equal (default: 1e-4)",
    )
    _add_json(parser)


def _generate(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _command(
        commands,
        "generate",
        "continue a text with a converted folder or a Megatron checkpoint",
        'mtt generate out --prompt "Once upon a time"',
        'mtt generate /checkpoints/gpt --tp 8 --prompt "Once upon a time"     on eight GPUs',
        'mtt generate /checkpoints/gpt --tokenizer gpt2-folder --prompt "Once upon a time"',
    )
    parser.add_argument("source", metavar="OUT_OR_CKPT", help="a converted folder or a checkpoint")
    parser.add_argument("--prompt", required=True, help="the text to continue, or for a T5 to read")
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="at most (default: 64)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 takes the likeliest token every time (default: 0)",
    )
    parser.add_argument("--seed", type=int, default=0, help="for temperatures above 0 (default: 0)")
    _add_dtype(parser, "element type to compute in (default: auto, as stored)")
    parser.add_argument(
        *_SIZES[0][:2],
        type=int,
        default=1,
        metavar="N",
        help="processes that share every layer; started here, on GPUs where there are (default: 1)",
    )
    parser.add_argument(
        *_SIZES[1][:2],
        type=int,
        default=1,
        metavar="N",
        help="stages that the layers are dealt to (default: 1)",
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="if it is not with the model")
    _add_source_options(parser)
    _add_replicated(parser)
    _add_json(parser)


def _estimate(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _command(
        commands,
        "estimate",
        "say on how many GPUs a model fits, in which layout, and with which command",
        "mtt estimate mt-nlg-530b --gpus 16 --gpu-memory 80GB",
        "mtt estimate out --gpus 1 --gpu-memory 24GB --sequence-length 4096 --batch-size 8",
        "mtt estimate /checkpoints/gpt --gpus 8 --gpu-memory 80GB --json",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a Megatron checkpoint, a folder with a config.json, or a preset of hub_configs/",
    )
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="how many there are")
    parser.add_argument(
        "--gpu-memory", required=True, metavar="SIZE", help="of one: 80GB, 141GB, 24GiB"
    )
    parser.add_argument(
        "--gpu-bandwidth",
        default="3.35TB",
        metavar="SIZE",
        help="bytes a second that one reads from its memory (default: 3.35TB, an H100 SXM's; an "
        "A100 80GB's is 2TB)",
    )
    parser.add_argument(
        "--sequence-length",
        type=int,
        metavar="N",
        help="tokens of a prompt and its answer (default: 2048, or the model's longest)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="prompts at once (default: 1)"
    )
    _add_dtype(parser, "element type of weights and KV cache (default: auto, the model's)")
    _add_source_options(parser)
    _add_json(parser)


def _push(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _command(
        commands,
        "push",
        "upload a converted folder to the Hub, in one commit",
        "mtt push out owner/repo --private",
        "mtt push out owner/repo --revision step1000",
        "mtt push out owner/repo --resume     go on after an interruption",
    )
    parser.add_argument(
        "folder", metavar="OUT", help="a folder that mtt convert wrote, or any Hugging Face folder"
    )
    parser.add_argument("repo_id", metavar="OWNER/REPO", help="made if it is not there")
    parser.add_argument(
        "--revision", metavar="R", help="the branch, made if it is not there (default: main)"
    )
    _add_overwrite(parser, "replace another model in the branch; it stays in the history")
    _add_resume(
        parser, "go on with an upload that was interrupted: what is there is not read again"
    )
    _add_upload_options(parser)
    _add_json(parser)


def source_options(args: argparse.Namespace) -> dict[str, Any]:
    """How to open a Megatron checkpoint: the options of `open_checkpoint` of the same names.

    Raises:
        UsageError: see `overrides`.
    """
    return {
        "iteration": args.iteration,
        "overrides": overrides(args),
        "skip_keys": args.skip_key,
        "qkv_order": args.qkv_order,
    }


def given_source_options(args: argparse.Namespace) -> list[str]:
    """Those of the options of a Megatron checkpoint that were given."""
    given = {
        "--iteration": args.iteration is not None,
        "--set": args.set,
        "--config": args.config is not None,
        "--skip-key": args.skip_key,
        "--qkv-order": args.qkv_order != "auto",
    }
    return [name for name, value in given.items() if value]


def overrides(args: argparse.Namespace) -> dict[str, object]:
    """The values of `--config` and `--set`.

    Raises:
        UsageError: something is not NAME=VALUE, or `--config` names nothing that can be used.
    """
    from .config_file import read_config_file, value_of

    values: dict[str, object] = {}
    if args.config is not None:
        said = read_config_file(args.config)
        values.update({_name(name): value for name, value in said.items()})
    for text in args.set:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise UsageError(f"--set {text} is not understood", expected="--set NAME=VALUE")
        values[_name(name)] = value_of(value)
    return values


def _name(text: str) -> str:
    """The name of an argument, however it was spelled: `--hidden-size` is `hidden_size`."""
    return text.strip().lstrip("-").replace("-", "_")
