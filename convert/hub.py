"""One branch of a repository on the Hub, as a place to upload to.

    create_repo, create_branch     if they are not there; a new branch begins empty
    preupload file by file         blobs that no commit names, so nobody sees them
    one create_commit at the end   all files appear at once, or none

An uploaded blob is known by its SHA-256, its size and its first 512 bytes, which is all that the
commit needs of it. Everything goes through `huggingface_hub`, which is imported when a branch is
opened: with `HF_ENDPOINT`, `HF_TOKEN` and `HF_HOME` as for its own commands.
"""

from __future__ import annotations

import base64
import io
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import quote

from . import manifest
from .errors import CorruptError, HubError, MTTError, TargetError, UsageError
from .version import __version__

SCHEME = "hf://"
MAIN = "main"
CARD = "README.md"
# The Hub's own rules: no `..`, no `--`, and nothing but a letter or number at the ends.
_NAME = re.compile(
    r"(?!.*(\.\.|--))[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*(?<![.-])(?<!\.git)", re.ASCII
)
_REVISION = re.compile(r"[\w][\w./-]*", re.ASCII)
# Besides what mtt itself writes, what a loader might take for the model.
_WEIGHTS = re.compile(r"[^/]+\.safetensors(\.index\.json)?|(pytorch_model|model)[^/]*\.bin[^/]*")
_BUFFER = 1 << 20
_AGAIN = "run the same command again with --resume: what was uploaded stays"

Report = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class HubPlace:
    """A repository of models and a branch of it."""

    repo_id: str
    revision: str = MAIN

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.revision}" if self.revision != MAIN else self.repo_id


def is_hub(target: str) -> bool:
    """Whether a target is on the Hub."""
    return target.startswith(SCHEME)


def parse_place(text: str, revision: str | None = None) -> HubPlace:
    """The place that `hf://owner/repo`, `hf://owner/repo@branch` or `owner/repo` names.

    Raises:
        UsageError: it names none.
    """
    name, at, branch = text.removeprefix(SCHEME).partition("@")
    branch = branch if at else revision or MAIN
    if not _NAME.fullmatch(name) or len(name) > 96 or not _REVISION.fullmatch(branch):
        raise UsageError(
            f"{text!r} is no repository on the Hub",
            found=f"repository {name!r}, branch {branch!r}",
            expected="owner/repo, or hf://owner/repo, or hf://owner/repo@branch",
            fix="put your name, or your organisation's, before the repository's",
        )
    return HubPlace(name, branch)


@dataclass(frozen=True, slots=True)
class Blob:
    """A file that was uploaded, or needs no upload before the commit.

    Attributes:
        name: its path in the repository.
        sha256: in hexadecimal.
        size: in bytes.
        sample: its first 512 bytes.
        content: all of it, where the Hub wants it inside the commit: small files only.
    """

    name: str
    sha256: str
    size: int
    sample: bytes
    content: bytes | None = None

    def facts(self) -> dict[str, object]:
        """What a state file keeps of it."""
        sample = base64.b64encode(self.sample).decode()
        return {"sha256": self.sha256, "size": self.size, "sample": sample}

    @classmethod
    def from_facts(cls, name: str, facts: Mapping[str, Any]) -> Blob:
        """The blob that `facts` came from."""
        sample = base64.b64decode(facts["sample"])
        return cls(name, str(facts["sha256"]), int(facts["size"]), sample)


class Branch:
    """A branch that one run uploads to.

    Attributes:
        names: the files that stand in it.
        head: its last commit: when it was opened, and then one's own.
    """

    def __init__(self, place: HubPlace, private: bool = False, create_pr: bool = False) -> None:
        self.place = place
        self._private, self._create_pr = private, create_pr
        self.names: frozenset[str] = frozenset()
        self.head: str | None = None
        self._api: Any = None

    @property
    def url(self) -> str:
        """Where people look at it."""
        place = self.place
        tree = f"/tree/{quote(place.revision)}" if place.revision != MAIN else ""
        return f"{self._api.endpoint}/{place.repo_id}{tree}"

    def open(self) -> None:
        """Make the repository and the branch if they are not there, and see what they hold.

        Raises:
            HubError: no network, no such account, no permission.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RevisionNotFoundError

        repo, revision = self.place.repo_id, self.place.revision
        with self._errors(f"{repo} cannot be opened"):
            self._api = HfApi(library_name="mtt", library_version=__version__)
            private = True if self._private else None
            self._api.create_repo(repo, private=private, exist_ok=True)
            try:
                info = self._api.model_info(repo, revision=revision)
            except RevisionNotFoundError:
                first = self._api.list_repo_commits(repo)[-1].commit_id
                self._api.create_branch(repo, branch=revision, revision=first, exist_ok=True)
                info = self._api.model_info(repo, revision=revision)
            self.head = info.sha
            self.names = frozenset(file.rfilename for file in info.siblings or ())

    def read(self, name: str, folder: str) -> bytes:
        """A small file of the branch; `folder` is for the client's copy.

        Raises:
            HubError: it cannot be downloaded.
        """
        repo = self.place.repo_id
        with self._errors(f"{name} of {repo} cannot be read"):
            path = self._api.hf_hub_download(repo, name, revision=self.head, local_dir=folder)
            with open(path, "rb") as file:
                return file.read()

    def upload(self, name: str, path: str, report: Report | None = None) -> Blob:
        """Upload a file; it stays out of sight until it is committed.

        Args:
            name: its path in the repository.
            path: the file.
            report: called with the bytes sent so far, where the client tells.

        Raises:
            HubError: the upload failed, after the client's own attempts.
        """
        with self._errors(f"{name} was not uploaded to {self.place.repo_id}"), _quiet():
            operation = _watched(name, path, report)
            self._api.preupload_lfs_files(
                self.place.repo_id,
                additions=[operation],
                revision=self.place.revision,
                create_pr=self._create_pr,
                free_memory=False,
            )
            info, content = operation.upload_info, None
            if not operation._is_uploaded:
                with open(path, "rb") as file:
                    content = file.read()
            return Blob(name, info.sha256.hex(), info.size, bytes(info.sample), content)

    def held(self, blobs: Sequence[Blob]) -> list[Blob]:
        """Those of these blobs that the Hub still has; it forgets what nobody commits.

        Raises:
            HubError: it does not answer.
        """
        from huggingface_hub.lfs import post_lfs_batch_info

        if not blobs:
            return []
        with self._errors(f"{self.place.repo_id} does not say what it holds"):
            actions, _, _ = post_lfs_batch_info(
                [_upload_info(blob) for blob in blobs],
                token=None,
                repo_type="model",
                repo_id=self.place.repo_id,
                endpoint=self._api.endpoint,
            )
        present = {action["oid"] for action in actions if not action.get("actions")}
        return [blob for blob in blobs if blob.sha256 in present]

    def commit(
        self,
        blobs: Iterable[Blob],
        documents: Mapping[str, bytes],
        outdated: Iterable[str],
        message: str,
    ) -> str:
        """Make everything visible at once.

        Args:
            blobs: what was uploaded.
            documents: small files.
            outdated: names to remove.
            message: the title of the commit.

        Returns:
            The URL of the branch, or of the pull request.

        Raises:
            HubError: it failed, or the branch changed since it was opened; nothing is visible.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        operations = [_committed(blob) for blob in blobs]
        operations += [CommitOperationAdd(name, data) for name, data in documents.items()]
        operations += [CommitOperationDelete(name) for name in sorted(outdated)]
        with self._errors(f"the commit to {self.place.repo_id} failed"), _quiet():
            result = self._api.create_commit(
                self.place.repo_id,
                operations,
                commit_message=message,
                revision=self.place.revision,
                create_pr=self._create_pr,
                parent_commit=self.head,
            )
        self.head = result.oid
        return str(result.pr_url or self.url)

    def outdated(self, new: Iterable[str], earlier: Mapping[str, Any] | None) -> set[str]:
        """Files of the branch that an upload of `new` replaces or would leave beside it.

        Args:
            new: names that will be written.
            earlier: the manifest in the branch, if it has one.
        """
        new = set(new)
        ours = {*earlier["files"], *earlier["documents"]} if earlier else set()
        weights = {name for name in self.names if _WEIGHTS.fullmatch(name)}
        return ((new | ours | weights) & self.names) - {CARD}

    def refuse(self, taken: Iterable[str]) -> TargetError:
        """What to say where something else stands in the branch."""
        names = sorted(taken)
        return TargetError(
            f"{self.place} holds something else; nothing was uploaded",
            found=", ".join(names[:5]) + (", ..." if names[5:] else ""),
            expected="a new branch, or exactly this conversion",
            fix="name another branch, or add --overwrite; the old files stay in the history",
        )

    @contextmanager
    def _errors(self, message: str) -> Iterator[None]:
        """Whatever the client raises, as a HubError without tokens and signed addresses."""
        try:
            yield
        except MTTError:
            raise
        except Exception as error:
            raise _hub_error(message, error, self.place) from error


def _upload_info(blob: Blob) -> Any:
    from huggingface_hub.lfs import UploadInfo

    return UploadInfo(sha256=bytes.fromhex(blob.sha256), size=blob.size, sample=blob.sample)


def _committed(blob: Blob) -> Any:
    """What a commit says of a blob: the client must not ask for its bytes again."""
    from huggingface_hub import CommitOperationAdd

    operation = CommitOperationAdd(blob.name, blob.content or b"")
    if blob.content is None:
        operation.upload_info = _upload_info(blob)
        operation._upload_mode, operation._should_ignore = "lfs", False
        operation._is_uploaded = True
    return operation


class _Watched(io.FileIO):
    """A file that tells how far it was read."""

    report: Report

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        self.report(self.tell())
        return count


def _watched(name: str, path: str, report: Report | None) -> Any:
    """The upload of a file whose progress is reported."""
    from huggingface_hub import CommitOperationAdd

    operation = CommitOperationAdd(name, path)

    @contextmanager
    def as_file(with_tqdm: bool = False) -> Iterator[BinaryIO]:
        raw = _Watched(path)
        raw.report = report or (lambda done: None)
        with io.BufferedReader(raw, _BUFFER) as file:
            yield file

    operation.as_file = as_file
    return operation


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the client's own bars and notes away: progress and errors are the caller's."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    logger, showed = logging.getLogger("huggingface_hub"), not are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    if showed:
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if showed:
            enable_progress_bars()


def earlier_manifest(branch: Branch, folder: str) -> dict[str, Any] | None:
    """The manifest that stands in a branch; None if there is none that can be read.

    Raises:
        HubError: it cannot be downloaded.
    """
    if manifest.NAME not in branch.names:
        return None
    branch.read(manifest.NAME, folder)
    try:
        return manifest.read(folder)
    except CorruptError:
        return None


def _hub_error(message: str, error: Exception, place: HubPlace) -> HubError:
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)  # type: ignore[arg-type]
    status = next((code for code in map(_status, causes) if code), 0)
    offline = any(isinstance(cause, OfflineModeIsEnabled) for cause in causes)
    if offline:
        fix = "unset HF_HUB_OFFLINE"
    elif status == 401 or isinstance(error, LocalTokenNotFoundError):
        fix = "log in with hf auth login, or set HF_TOKEN to a token that may write"
    elif status == 403:
        fix = f"use a token that may write to {place.repo_id.partition('/')[0]}"
    elif status == 404:
        fix = f"check the name {place} and that your token may see it"
    elif status in (409, 412):
        fix = f"the branch changed meanwhile: look at it, then {_AGAIN}"
    else:
        fix = f"check the network and the Hub's status, then {_AGAIN}"
    # The client wraps what happened in sentences of its own; the innermost says most.
    told = next((cause for cause in causes if _status(cause)), causes[-1] if not offline else error)
    return HubError(message, found=_plain(told), expected="an answer of the Hub", fix=fix)


def _status(error: BaseException) -> int:
    response = getattr(error, "response", None)
    code = getattr(response, "status_code", 0)
    return code if isinstance(code, int) else 0


def _plain(error: BaseException) -> str:
    """An error of the client on one line, without tokens and signed addresses."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {' '.join(lines)[:300]}"
    text = re.sub(r"hf_[A-Za-z0-9]+|Bearer \S+", "***", text)
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1?...", text)
