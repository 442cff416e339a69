"""Where a checkpoint's files are: the root with its tracker file, or one iteration's folder.

<root>/latest_checkpointed_iteration.txt     "1000", or "release"
<root>/iter_0001000/                         or <root>/release/
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from .. import sources
from ..errors import IncompleteError, NotACheckpointError, UsageError
from ..sources import listing

TRACKER = "latest_checkpointed_iteration.txt"
_ITERATION = re.compile(r"iter_(\d{7,})")


@dataclass(frozen=True, slots=True)
class Place:
    """The folder to read, its iteration, and all iterations beside it."""

    folder: str
    iteration: int | None
    iterations: tuple[int, ...] = ()


def iteration_folder(root: str, iteration: int) -> str:
    """Where Megatron puts one iteration."""
    return os.path.join(root, f"iter_{iteration:07d}")


def iterations_in(root: str) -> tuple[int, ...]:
    """Iterations that have a folder under `root`, in order."""
    found = (_ITERATION.fullmatch(name) for name in listing(root))
    return tuple(sorted(int(hit[1]) for hit in found if hit))


def locate(path: str, iteration: int | None, holds_model: Callable[[str], bool]) -> Place:
    """Find the folder of one iteration.

    Args:
        path: the root, or an iteration's folder.
        iteration: the wanted one; None follows the tracker file.
        holds_model: whether a folder itself has model files.

    Raises:
        NotACheckpointError: there is nothing of the kind at `path`.
        IncompleteError: the tracker names an iteration that is not there.
        UsageError: the choice between several iterations is the user's.
    """
    if not sources.exists(path):
        raise NotACheckpointError(f"{path} does not exist", expected="a checkpoint folder")
    if not sources.is_dir(path):
        raise NotACheckpointError(
            f"{path} is a file",
            expected="the folder that holds iter_* or mp_rank_* folders",
            fix="give that folder",
        )
    path = sources.absolute(path)
    here = iterations_in(path)
    tracker = os.path.join(path, TRACKER)
    if iteration is not None:
        own = _ITERATION.fullmatch(os.path.basename(path))
        if own and int(own[1]) == iteration and holds_model(path):
            return Place(path, iteration, (iteration,))
        if iteration not in here:
            raise IncompleteError(
                f"{path} has no iteration {iteration}",
                found=_choices(here),
                expected=os.path.basename(iteration_folder(path, iteration)),
                fix=_choose(here),
            )
        return Place(iteration_folder(path, iteration), iteration, here)
    if holds_model(path):
        own = _ITERATION.fullmatch(os.path.basename(path))
        return Place(path, int(own[1]) if own else None)
    weights = os.path.join(path, "weights")  # NeMo 2
    if sources.is_dir(weights) and holds_model(weights):
        return Place(weights, None)
    if sources.is_file(tracker):
        return _tracked(path, tracker, here)
    if len(here) == 1:
        return Place(iteration_folder(path, here[0]), here[0], here)
    if sources.is_dir(os.path.join(path, "release")) and not here:
        return Place(os.path.join(path, "release"), None)
    if here:
        raise UsageError(
            f"{path} has {len(here)} iterations and no {TRACKER}",
            found=_choices(here),
            fix=_choose(here),
        )
    raise NotACheckpointError(
        f"no Megatron checkpoint in {path}",
        found=", ".join(listing(path)[:6]) or "an empty folder",
        expected=f"{TRACKER} with iter_* folders, or mp_rank_* folders, or a .metadata file",
        fix="give the folder that was Megatron's --save",
    )


def _tracked(path: str, tracker: str, here: tuple[int, ...]) -> Place:
    text = sources.read(tracker)[:64].decode("utf-8", "replace").strip()
    if text == "release":
        folder, number = os.path.join(path, "release"), None
    elif text.isascii() and text.isdecimal():
        number = int(text)
        folder = iteration_folder(path, number)
    else:
        raise IncompleteError(
            f"{tracker} names no iteration",
            found=repr(text),
            expected="a number, or the word release",
            fix=_choose(here),
        )
    if not sources.is_dir(folder):
        raise IncompleteError(
            f"{TRACKER} says {text}, but {os.path.basename(folder)} is not there",
            found=_choices(here),
            expected=folder,
            fix=_choose(here),
        )
    return Place(folder, number, here)


def _choices(iterations: tuple[int, ...]) -> str:
    return "iterations " + ", ".join(map(str, iterations)) if iterations else "no iter_* folder"


def _choose(iterations: tuple[int, ...]) -> str:
    if iterations:
        return f"choose one with --iteration, e.g. --iteration {iterations[-1]}"
    return "copy the iteration's folder again from where it was written"
