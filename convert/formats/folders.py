"""Where a checkpoint's files are: the root with its tracker file, or one iteration's folder.

<root>/latest_checkpointed_iteration.txt     "1000", or "release"
<root>/iter_0001000/                         or <root>/release/

<root>/latest                                DeepSpeed's: "global_step1000"
<root>/global_step1000/                      Megatron-DeepSpeed writes both trackers beside it
<root>/latest_universal                      "global_step1000_universal"
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
TAGS = ("latest", "latest_universal")
_ITERATION = re.compile(r"iter_(\d{7,15})|global_step(\d{1,15})(_universal)?")
_TAG = re.compile(r"[^/\\\0]{1,200}")


@dataclass(frozen=True, slots=True)
class Place:
    """The folder to read, its iteration, and all iterations beside it."""

    folder: str
    iteration: int | None
    iterations: tuple[int, ...] = ()


def iteration_folder(root: str, iteration: int) -> str:
    """Where Megatron puts one iteration, or where DeepSpeed has put it."""
    usual = os.path.join(root, f"iter_{iteration:07d}")
    others = (f"global_step{iteration}", f"global_step{iteration}_universal")
    places = [usual, *(os.path.join(root, name) for name in others)]
    return next((place for place in places if sources.is_dir(place)), usual)


def iterations_in(root: str) -> tuple[int, ...]:
    """Iterations that have a folder under `root`, in order."""
    found = (iteration_of(name) for name in listing(root))
    return tuple(sorted({number for number in found if number is not None}))


def iteration_of(name: str) -> int | None:
    """The iteration a folder is named after."""
    hit = _ITERATION.fullmatch(name)
    return int(hit[1] or hit[2]) if hit else None


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
        raise NotACheckpointError(
            f"{path} does not exist",
            expected="a checkpoint folder",
            fix="check the path; what is on the Hub is hf://owner/repo",
        )
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
        if iteration_of(os.path.basename(path)) == iteration and holds_model(path):
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
        return Place(path, iteration_of(os.path.basename(path)))
    weights = os.path.join(path, "weights")  # NeMo 2
    if sources.is_dir(weights) and holds_model(weights):
        return Place(weights, None)
    tagged = _tagged(path, here)
    if sources.is_file(tracker):
        try:
            tracked = _tracked(path, tracker, here)
        except IncompleteError:  # Megatron-DeepSpeed writes both, and the folder of one
            if tagged is None or not sources.is_dir(tagged.folder):
                raise
        else:
            if tagged and tagged.folder != tracked.folder and sources.is_dir(tagged.folder):
                raise _disagreement(path, tracked, tagged)
            return tracked
    if tagged and sources.is_dir(tagged.folder):
        return tagged
    if tagged:
        raise IncompleteError(
            f"{path} names a folder that is not there",
            found=_choices(here),
            expected=tagged.folder,
            fix=_choose(here),
        )
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


def _tagged(path: str, here: tuple[int, ...]) -> Place | None:
    """The folder that DeepSpeed's tracker names, whether it is there or not."""
    for name in TAGS:
        tracker = os.path.join(path, name)
        if not sources.is_file(tracker):
            continue
        text = _first_word(tracker)
        if text in (".", "..") or not _TAG.fullmatch(text):
            raise IncompleteError(
                f"{tracker} names no folder",
                found=repr(text),
                expected="a tag, such as global_step1000",
                fix=_choose(here),
            )
        return Place(os.path.join(path, text), iteration_of(text), here)
    return None


def _disagreement(path: str, tracked: Place, tagged: Place) -> UsageError:
    """Megatron and DeepSpeed each go on from what their own tracker file names."""
    folders = [os.path.basename(place.folder) for place in (tracked, tagged)]
    return UsageError(
        f"the tracker files in {path} name different folders",
        found=f"{folders[0]} in {TRACKER}, {folders[1]} in DeepSpeed's",
        expected="one and the same",
        fix=f"give the folder that is meant, e.g. {tagged.folder}",
    )


def _first_word(tracker: str) -> str:
    return sources.read(tracker)[:256].decode("utf-8", "replace").strip()


def _tracked(path: str, tracker: str, here: tuple[int, ...]) -> Place:
    text = _first_word(tracker)[:64]
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
