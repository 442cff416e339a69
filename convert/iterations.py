"""All iterations of a checkpoint, one conversion each.

OUT/iter_0001000/                  a folder
hf://owner/repo, branch step1000   on the Hub
"""

from __future__ import annotations

import os
from typing import Any

from . import sources
from .errors import UsageError
from .execute import Progress
from .formats.folders import iteration_folder, iterations_in
from .hub import is_hub, parse_place
from .pipeline import Result, convert


def list_iterations(source: str) -> tuple[int, ...]:
    """The iterations of Megatron's `--save` folder, in order.

    Raises:
        UsageError: it has none.
        SourceError: it cannot be read.
    """
    found = iterations_in(source) if sources.is_dir(source) else ()
    if not found:
        raise UsageError(
            f"{source} has no iterations",
            expected="a folder with iter_* folders",
            fix="give the folder that was Megatron's --save, or leave out --all-iterations",
        )
    return found


def iteration_target(target: str, iteration: int) -> str:
    """Where one iteration goes.

    Raises:
        UsageError: the target names one branch.
    """
    if not is_hub(target):
        return iteration_folder(target, iteration)
    if "@" in target:
        raise UsageError(
            "every iteration has a branch of its own",
            found=target,
            expected=f"hf://{parse_place(target).repo_id}, for branches like step{iteration}",
            fix="leave out the branch, or --all-iterations",
        )
    return f"{target}@step{iteration}"


def convert_iterations(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    **options: Any,
) -> dict[int, Result]:
    """Convert every iteration to a Hugging Face folder of its own.

    What is there already and equal, by the hash of every tensor, is left alone, so that a second
    call only does what the first one did not.

    Args:
        source: Megatron's `--save` folder.
        target: a folder for folders like `iter_0001000`, or `hf://owner/repo` for branches like
            `step1000`.
        progress: called with (bytes done, bytes in all) of one iteration after the other.
        options: see `convert`.

    Raises:
        MTTError: see `convert`; the iterations before stay.
    """
    source, target = os.fspath(source), os.fspath(target)
    return {
        iteration: convert_iteration(source, target, iteration, progress=progress, **options)
        for iteration in list_iterations(source)
    }


def convert_iteration(source: str, target: str, iteration: int, **options: Any) -> Result:
    """Convert one of them; see `convert_iterations`."""
    if options.get("to", "hf") != "hf":
        raise UsageError(
            "all iterations together: only to Hugging Face folders",
            found=f"--to {options['to']}",
            fix="leave out --to, or convert one iteration at a time with --iteration",
        )
    place = iteration_target(target, iteration)
    return convert(source, place, iteration=iteration, keep_same=True, **options)
