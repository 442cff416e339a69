"""A Hub on this machine, for the real `huggingface_hub` client: models, branches, LFS, commits.

    with HubServer() as hub:                      hub.url is HF_ENDPOINT
        hub.repos["me/model"].branches["main"]    commits, each with all its files
        hub.blobs                                 what was uploaded, committed or not

It speaks the HTTP API that the client uses for uploading through LFS and for downloading. Xet is
not spoken: clients need HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_secretsecretsecret"
LFS_ENDINGS = (".safetensors", ".bin", ".pt", ".distcp")


@dataclass
class Commit:
    """All files of a branch at one time."""

    sha: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repo:
    """A repository: branches of commits, the oldest first."""

    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)
    num_pull_requests: int = 0

    def add(self, branch: str, title: str, files: dict[str, bytes]) -> Commit:
        """A new commit at the end of a branch."""
        history = self.branches.setdefault(branch, [])
        parent = history[-1].sha if history else ""
        facts = [parent, title, *((name, hashlib.sha1(files[name]).hexdigest()) for name in files)]
        commit = Commit(hashlib.sha1(repr(facts).encode()).hexdigest(), title, files)
        history.append(commit)
        return commit

    def find(self, revision: str) -> Commit | None:
        """The commit that a branch or a hash names."""
        if revision in self.branches:
            return self.branches[revision][-1]
        commits = (commit for history in self.branches.values() for commit in history)
        return next((commit for commit in commits if commit.sha == revision), None)


class HubServer:
    """The server; use it as a context manager.

    Attributes:
        token: what clients must send; None lets everybody write.
        part_size: cut uploads in parts of so many bytes; 0 takes them whole.
        before: called with method and path of each request; what it returns, a status, is the
            answer, unless it is None.
        requests: method and path of all requests so far.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.token: str | None = None
        self.part_size = 0
        self.before: Callable[[str, str], int | None] = lambda method, path: None
        self.requests: list[tuple[str, str]] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def puts(self) -> list[str]:
        """Hashes of the blobs whose bytes were sent, one entry each time."""
        paths = [path for method, path in self.requests if method == "PUT"]
        return [path.split("/")[2] for path in paths]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a visitor sees."""
        commit = self.repos[repo_id].find(revision)
        assert commit is not None
        return commit.files


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""

    def _answer(
        self,
        body: object = None,
        status: int = 200,
        headers: dict[str, str] | None = None,
        raw: bytes | None = None,
    ) -> None:
        data = json.dumps({} if body is None else body).encode() if raw is None else raw
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, code: str, **headers: str) -> None:
        self._answer({"error": code}, 404, {"X-Error-Code": code, **headers})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _handle(self) -> None:
        url = urlsplit(self.path)
        path, query = url.path, parse_qs(url.query)
        body = self._body()
        self.hub.requests.append((self.command, path))
        if status := self.hub.before(self.command, path):
            return self._answer({"error": f"status {status}"}, status)
        allowed = self.hub.token is None or (
            self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        )
        if not allowed and not path.startswith("/upload/"):
            return self._answer({"error": "Invalid username or password."}, 401)
        for method, pattern, answer in _ROUTES:
            hit = re.fullmatch(pattern, path)
            if hit and self.command in method:
                parts = [unquote(part) for part in hit.groups() if part is not None]
                try:
                    return answer(self, *parts, body=body, query=query)
                except (AssertionError, LookupError, ValueError) as error:
                    return self._answer({"error": repr(error)}, 501)
        return self._answer({"error": f"unknown: {self.command} {path}"}, 501)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def create(self, body: bytes, query: Any) -> None:
        wanted = json.loads(body)
        repo_id = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        url = f"{self.hub.url}/{repo_id}"
        private = wanted.get("private") is True or wanted.get("visibility") == "private"
        if repo_id in self.hub.repos:
            return self._answer({"error": "You already created this model repo", "url": url}, 409)
        repo = self.hub.repos[repo_id] = Repo(private)
        repo.add("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self._answer({"url": url, "name": repo_id, "id": repo_id})

    def validate(self, body: bytes, query: Any) -> None:
        self._answer({"errors": [], "warnings": []})

    def branch(self, repo_id: str, name: str, body: bytes, query: Any) -> None:
        repo, start = self.hub.repos[repo_id], json.loads(body).get("startingPoint", "main")
        if name in repo.branches:
            return self._answer({"error": "Reference already exists"}, 409)
        commit = repo.find(start)
        assert commit is not None, start
        repo.branches[name] = [commit]
        return self._answer({})

    def commits(self, repo_id: str, revision: str, body: bytes, query: Any) -> None:
        history = self.hub.repos[repo_id].branches[revision]
        date = "2026-01-01T00:00:00.000Z"
        facts = [
            {"id": c.sha, "title": c.title, "message": "", "date": date, "authors": []}
            for c in reversed(history)
        ]
        self._answer(facts)

    def preupload(self, repo_id: str, revision: str, body: bytes, query: Any) -> None:
        commit = self.hub.repos[repo_id].find(revision)
        assert commit is not None
        answers = []
        for file in json.loads(body)["files"]:
            assert len(base64.b64decode(file["sample"])) == min(512, file["size"])
            mode = "lfs" if file["path"].endswith(LFS_ENDINGS) else "regular"
            there = commit.files.get(file["path"])
            oid = there and (
                hashlib.sha256(there).hexdigest()
                if mode == "lfs"
                else hashlib.sha1(b"blob %d\0" % len(there) + there).hexdigest()
            )
            answers.append(
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}
            )
        self._answer({"files": answers})

    def batch(self, repo_id: str, body: bytes, query: Any) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            entry: dict[str, object] = {"oid": oid, "size": size}
            if oid not in self.hub.blobs:
                upload = f"{self.hub.url}/upload/{oid}"
                header: dict[str, str] = {}
                if part := self.hub.part_size:
                    header = {"chunk_size": str(part)}
                    count = -(-size // part)
                    header |= {str(n + 1): f"{upload}/{n}?signature=secret" for n in range(count)}
                    upload += "/done"
                entry["actions"] = {"upload": {"href": upload, "header": header}}
            objects.append(entry)
        transfer = "multipart" if self.hub.part_size else "basic"
        self._answer({"transfer": transfer, "objects": objects})

    def put(self, oid: str, body: bytes, query: Any) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self._answer({})

    def put_part(self, oid: str, number: str, body: bytes, query: Any) -> None:
        self.hub.parts[oid, int(number)] = body
        self._answer({}, headers={"ETag": f'"{number}"'})

    def parts_done(self, oid: str, body: bytes, query: Any) -> None:
        numbers = sorted(number for name, number in self.hub.parts if name == oid)
        assert len(json.loads(body)["parts"]) == len(numbers)
        data = b"".join(self.hub.parts.pop((oid, number)) for number in numbers)
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.blobs[oid] = data
        self._answer({})

    def commit(self, repo_id: str, revision: str, body: bytes, query: Any) -> None:
        repo = self.hub.repos[repo_id]
        base = repo.find(revision)
        assert base is not None
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if "create_pr" not in query and header.get("parentCommit") not in (None, base.sha):
            return self._answer({"error": "A commit has happened since. Please refresh."}, 412)
        files = dict(base.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    return self._answer({"error": "LFS pointer to an unknown file"}, 400)
                files[value["path"]] = self.hub.blobs[value["oid"]]
                assert len(files[value["path"]]) == value["size"]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        extra: dict[str, str] = {}
        if "create_pr" in query:
            repo.num_pull_requests += 1
            revision = f"refs/pr/{repo.num_pull_requests}"
            extra["pullRequestUrl"] = (
                f"{self.hub.url}/{repo_id}/discussions/{repo.num_pull_requests}"
            )
        made = repo.add(revision, header["summary"], files)
        url = f"{self.hub.url}/{repo_id}/commit/{made.sha}"
        return self._answer({"commitUrl": url, "commitOid": made.sha, "success": True, **extra})

    def info(self, repo_id: str, revision: str | None = None, *, body: bytes, query: Any) -> None:
        if repo_id not in self.hub.repos:
            return self._missing("RepoNotFound")
        commit = self.hub.repos[repo_id].find(revision or "main")
        if commit is None:
            return self._missing("RevisionNotFound")
        facts = {"id": repo_id, "modelId": repo_id, "sha": commit.sha, "tags": []}
        siblings = [{"rfilename": name} for name in sorted(commit.files)]
        return self._answer({**facts, "private": False, "siblings": siblings})

    def tree(self, repo_id: str, revision: str, *rest: str, body: bytes, query: Any) -> None:
        commit = self.hub.repos[repo_id].find(revision)
        if commit is None:
            return self._missing("RevisionNotFound")
        return self._answer(
            [
                {
                    "type": "file",
                    "path": name,
                    "size": len(data),
                    "oid": hashlib.sha1(data).hexdigest(),
                }
                for name, data in commit.files.items()
            ]
        )

    def resolve(self, repo_id: str, revision: str, name: str, body: bytes, query: Any) -> None:
        if repo_id not in self.hub.repos:
            return self._missing("RepoNotFound")
        commit = self.hub.repos[repo_id].find(revision)
        if commit is None:
            return self._missing("RevisionNotFound")
        if name not in commit.files:
            return self._missing("EntryNotFound", **{"X-Repo-Commit": commit.sha})
        data = commit.files[name]
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": commit.sha,
            "X-Linked-Size": str(len(data)),
            "Accept-Ranges": "bytes",
        }
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            start, end = int(asked[1]), min(int(asked[2]) + 1, len(data))
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            return self._answer(status=206, headers=headers, raw=data[start:end])
        return self._answer(headers=headers, raw=data)


_REPO = "((?!api/|datasets/)[^/]+/[^/]+)"
_ROUTES: tuple[tuple[str, str, Callable[..., None]], ...] = (
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", f"/api/models/{_REPO}/branch/([^/]+)", _Handler.branch),
    ("GET", f"/api/models/{_REPO}/commits/([^/]+)", _Handler.commits),
    ("POST", f"/api/models/{_REPO}/preupload/([^/]+)", _Handler.preupload),
    ("POST", f"/{_REPO}\\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/upload/([^/]+)", _Handler.put),
    ("PUT", "/upload/([^/]+)/([0-9]+)", _Handler.put_part),
    ("POST", "/upload/([^/]+)/done", _Handler.parts_done),
    ("POST", f"/api/models/{_REPO}/commit/([^/]+)", _Handler.commit),
    ("GET", f"/api/models/{_REPO}", _Handler.info),
    ("GET", f"/api/models/{_REPO}/revision/([^/]+)", _Handler.info),
    ("GET", f"/api/models/{_REPO}/tree/([^/]+)(/.*)?", _Handler.tree),
    ("GET HEAD", f"/{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
)
