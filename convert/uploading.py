"""A folder that is on the disk, uploaded to a branch on the Hub.

Large files go one by one and are noted, small ones travel inside the commit that shows them all.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import manifest
from .errors import IncompleteError, NotACheckpointError, SourceError
from .execute import Progress
from .formats.folders import iteration_folder, iterations_in
from .hub import Blob, Branch, earlier_manifest, parse_place
from .hub_state import UploadState
from .work import work_of_files

_SMALL = 1_000_000
# What mtt, git and huggingface_hub keep for themselves.
_HIDDEN = (".git", ".cache", ".mtt.lock", ".mtt.replaced")


@dataclass(frozen=True, slots=True)
class PushResult:
    """What `push` did.

    Attributes:
        url: of the branch, or of the pull request.
        num_files: files that are there now.
        num_bytes: their size.
        num_uploaded: bytes that this run sent, those inside the commit left out.
        unchanged: whether all of it was there before.
    """

    url: str
    num_files: int
    num_bytes: int
    num_uploaded: int
    unchanged: bool


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> PushResult:
    """Upload a converted folder, or any Hugging Face folder, in one commit.

    Args:
        folder: what to upload; all its files.
        repo_id: `owner/repo`, or `hf://owner/repo@branch`.
        revision: the branch; made if it is not there.
        private: hide the repository, if it is made.
        create_pr: open a pull request.
        overwrite: replace another model; it stays in the history.
        resume: do not read again what an interrupted run uploaded.
        progress: called with (bytes done, bytes in all).

    Raises:
        SourceError: the folder is not whole.
        TargetError: the branch holds another model.
        HubError: network or Hub; nothing is visible, and what was uploaded stays for `resume`.
    """
    folder = os.fspath(folder)
    place = parse_place(repo_id, revision)
    paths = _files(folder)
    sizes = {name: os.path.getsize(path) for name, path in paths.items()}
    branch = Branch(place, private, create_pr)
    state = UploadState(place, work_of_files(paths), resume)
    committed, total = False, sum(sizes.values())
    state.take()
    try:
        branch.open()
        outdated = _check_branch(branch, state, folder, paths, overwrite)
        blobs = {blob.name: blob for blob in branch.held(state.blobs())}
        state.keep(blobs)
        done = sum(blob.size for blob in blobs.values())
        num_uploaded = 0
        for name, path in paths.items():
            if name in blobs or sizes[name] < _SMALL:
                continue
            blobs[name] = _upload(branch, name, path, done, total, progress)
            state.note(blobs[name])
            done += sizes[name]
            num_uploaded += sizes[name]
        documents = {name: _read(path) for name, path in paths.items() if name not in blobs}
        message = f"Upload {os.path.basename(os.path.abspath(folder))}"
        head = branch.head
        url = branch.commit(blobs.values(), documents, outdated, message)
        committed = True
        if progress:
            progress(total, total)
        return PushResult(url, len(paths), total, num_uploaded, branch.head == head)
    finally:
        state.release(committed)


def _upload(
    branch: Branch, name: str, path: str, done: int, total: int, progress: Progress | None
) -> Blob:
    def report(sent: int) -> None:
        if progress:
            progress(min(done + sent, total), total)

    return branch.upload(name, path, report)


def _files(folder: str) -> dict[str, str]:
    """Name in the repository -> path, of a folder that is whole.

    Raises:
        SourceError: it is not.
    """
    if not os.path.isdir(folder):
        raise NotACheckpointError(
            f"{folder} is no folder",
            expected="a folder that mtt convert wrote, or another Hugging Face folder",
            fix="check the path",
        )
    paths = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _HIDDEN)
        for name in sorted(set(names) - set(_HIDDEN)):
            path = os.path.join(parent, name)
            paths[os.path.relpath(path, folder).replace(os.sep, "/")] = path
    if manifest.NAME in paths:
        _check_whole(folder, manifest.read(folder), paths)
    elif "config.json" not in paths:
        steps = [iteration_folder(folder, step) for step in iterations_in(folder)]
        raise NotACheckpointError(
            f"{folder} is no folder to upload",
            found=", ".join([*map(os.path.basename, steps), *paths][:5]) or "an empty folder",
            expected=f"{manifest.NAME} or config.json",
            fix=f"push one of the iterations, e.g. {steps[-1]}"
            if steps
            else "convert the checkpoint, and push what is written",
        )
    return paths


def _check_whole(folder: str, record: Mapping[str, Any], paths: Mapping[str, str]) -> None:
    missing = [name for name in (*record["files"], *record["documents"]) if name not in paths]
    sizes = {name: entry["bytes"] for name, entry in record["files"].items()}
    short = [name for name in sizes if name in paths]
    short = [name for name in short if os.path.getsize(paths[name]) != sizes[name]]
    if record["status"] != "complete" or missing or short:
        found = [f"{name} is missing" for name in missing]
        found += [f"{name} has another size" for name in short]
        raise IncompleteError(
            f"{folder} is not whole; nothing was uploaded",
            found="; ".join(found[:3]) or "a conversion that did not end",
            expected=f"the files of {manifest.NAME}",
            fix="convert the checkpoint again",
        )


def _check_branch(
    branch: Branch, state: UploadState, folder: str, paths: Mapping[str, str], overwrite: bool
) -> set[str]:
    """Names to remove from the branch.

    Raises:
        TargetError: it holds another model, which is not to be replaced.
    """
    there = earlier_manifest(branch, state.folder)
    taken = branch.outdated(paths, there)
    here = manifest.read(folder) if manifest.NAME in paths else None
    if taken and not overwrite and (there is None or there != here):
        raise branch.refuse(taken)
    return taken - set(paths)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise SourceError(f"{path} cannot be read", found=str(error)) from error
