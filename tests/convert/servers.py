"""Small servers on this machine: a folder over HTTP with range requests, and enough of a Hub."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Site:
    """What a server serves, how, and what it was asked for.

    Attributes:
        root: the folder; with `hub`, a folder of owner/name folders.
        ranges: whether it answers range requests with a part.
        status: code -> paths that are answered with it.
        fail_once: paths whose first request is cut off.
        delay: seconds that each answer takes.
        num_bytes: bytes of bodies sent so far.
        most_files_at_once: how many files were asked for at the same time.
    """

    root: Path
    hub: bool = False
    ranges: bool = True
    status: dict[int, str] = field(default_factory=dict)
    fail_once: set[str] = field(default_factory=set)
    delay: float = 0.0
    num_bytes: int = 0
    most_files_at_once: int = 0
    url: str = ""


@contextmanager
def serving(site: Site) -> Iterator[Site]:
    """The site, while it answers."""

    waiting: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(
            self, code: int, body: bytes = b"", kind: str = "application/octet-stream", **more: str
        ) -> None:
            self.send_response(code)
            headers = {"Content-Type": kind, "Content-Length": str(len(body))}
            for name, value in (headers | more).items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
                site.num_bytes += len(body)

        def do_GET(self) -> None:
            waiting.append(self.path)
            site.most_files_at_once = max(site.most_files_at_once, len(set(waiting)))
            time.sleep(site.delay)
            waiting.remove(self.path)
            path = unquote(urlsplit(self.path).path)
            for code, part in site.status.items():
                if part in path:
                    return self.answer(code, b"no", X_Error_Code="GatedRepo" if code == 403 else "")
            if path in site.fail_once and self.command == "GET":
                site.fail_once.remove(path)
                self.close_connection = True
                return self.connection.shutdown(socket.SHUT_RDWR)
            return self.from_hub(path) if site.hub else self.from_folder(site.root / path[1:])

        do_HEAD = do_GET

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.answer(404, b"{}", "application/json")

        def from_folder(self, place: Path) -> None:
            if place.is_dir():
                names = (f"{p.name}/" if p.is_dir() else p.name for p in sorted(place.iterdir()))
                page = "".join(f'<a href="{name}">{name}</a>\n' for name in ["../", *names])
                return self.answer(200, page.encode(), "text/html; charset=utf-8")
            if not place.is_file():
                return self.answer(404, b"not here")
            size = place.stat().st_size
            wanted = self.headers.get("Range") if site.ranges else None
            if self.command == "HEAD":
                self.send_response(200)
                self.send_header("Content-Length", str(size))
                self.send_header("Accept-Ranges", "bytes" if site.ranges else "none")
                return self.end_headers()
            if not wanted:
                return self.answer(200, place.read_bytes())
            first, last = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
            with place.open("rb") as file:
                file.seek(first)
                part = file.read(last + 1 - first)
            return self.answer(206, part, Content_Range=f"bytes {first}-{last}/{size}")

        def from_hub(self, path: str) -> None:
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                repo = site.root.joinpath(*parts[2:4])
                if len(parts) < 4 or not repo.is_dir():
                    return self.answer(401, b"{}", "application/json", X_Error_Code="RepoNotFound")
                if len(parts) > 5 and parts[5] not in ("main", "v2"):
                    return self.answer(
                        404, b"{}", "application/json", X_Error_Code="RevisionNotFound"
                    )
                if len(parts) > 4 and parts[4] == "tree":
                    return self.tree(repo, "/".join(parts[6:]))
                facts = {"id": "/".join(parts[2:4]), "sha": "a" * 40, "siblings": [], "tags": []}
                return self.answer(200, json.dumps(facts).encode(), "application/json")
            # owner/name/resolve/revision/file
            return self.from_folder(site.root / parts[0] / parts[1] / "/".join(parts[4:]))

        def tree(self, repo: Path, below: str) -> None:
            if not (repo / below).is_dir():
                return self.answer(404, b"{}", "application/json", X_Error_Code="EntryNotFound")
            entries = [
                {
                    "type": "directory" if p.is_dir() else "file",
                    "path": p.relative_to(repo).as_posix(),
                    "size": 0 if p.is_dir() else p.stat().st_size,
                    "oid": "b" * 40,
                }
                for p in sorted((repo / below).iterdir())
            ]
            return self.answer(200, json.dumps(entries).encode(), "application/json")

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """A client that has gone is no news."""

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
