"""A server that speaks the hub's protocol over real sockets, for tests: the API's answers about repositories, `resolve`
with the hub's headers and its redirect to a second host for LFS files, ranges, errors with their codes, and ways to be
slow, to break off, and to lie.

Headers and bodies as huggingface_hub reads them: https://huggingface.co/docs/hub/api, and its `hf_raise_for_status`.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

POINTER_BYTES = 134
PIECE = 16 << 10


@dataclass
class Repository:
    """commits: commit -> path -> content; refs: branch or tag -> commit."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None  # a private repository's
    gated: bool = False
    lfs: bool = True  # or in git itself


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    authorization: str | None
    sent: int = 0  # bytes of content


class HubServer:
    """The hub and its CDN, each on a port of its own. `url` is for HF_ENDPOINT."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.bytes_per_second: float | None = None
        self.corrupt = False  # a byte of each file differs
        self.break_after: int | None = None  # bytes of a content after which the connection ends
        self.ranges = True
        self.down = 0  # so many next requests for content are answered with 503
        self.longer = 0  # bytes too many
        self.bare = False  # lists give names alone, as some mirrors do
        self.xet = False  # the headers of a repository in Xet storage, whose server does not exist
        self._hub, self._cdn = (ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, cdn)) for cdn in (False, True))
        for server in (self._hub, self._cdn):
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._hub.server_address[1]}"

    @property
    def cdn(self) -> str:
        return f"http://127.0.0.1:{self._cdn.server_address[1]}"

    def add(self, repo: str, files: dict[str, bytes], *, ref: str = "main", **options: Any) -> str:
        """A new commit of a repository, which `ref` stands at then; returns it."""
        found = self.repositories.setdefault(repo, Repository())
        for name, value in options.items():
            setattr(found, name, value)
        seen = repr((repo, len(found.commits), sorted((path, len(data)) for path, data in files.items())))
        commit = hashlib.sha1(seen.encode()).hexdigest()
        found.commits[commit] = files
        found.refs[ref] = commit
        return commit

    def content_sent(self) -> int:
        return sum(request.sent for request in self.requests)

    def close(self) -> None:
        for server in (self._hub, self._cdn):
            server.shutdown()
            server.server_close()

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _handler(hub: HubServer, cdn: bool) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            self.request_seen = Request(self.command, path, self.headers["Range"], self.headers["Authorization"])
            hub.requests.append(self.request_seen)
            with contextlib.suppress(ConnectionError):
                if cdn:
                    self.content_from_cdn(path)
                elif path.startswith("/api/models/"):
                    self.api(path.removeprefix("/api/models/"))
                else:
                    self.resolve(path)

        def api(self, path: str) -> None:
            match = re.fullmatch(r"(?P<repo>[^/]+(?:/[^/]+)?)(?:/(?P<kind>revision|tree)/(?P<rev>.+))?", path)
            found = self.repository(match["repo"] if match else path, match["rev"] if match else None)
            if found is None or match is None:
                return
            repository, commit = found
            files = repository.commits[commit]
            if match["kind"] == "tree":
                self.json(200, [{"type": "file", "oid": git_hash(data), "size": len(data), "path": name,
                                 **({"lfs": self.lfs(data, "oid")} if repository.lfs else {})}
                                for name, data in files.items()])
                return
            siblings: list[dict[str, Any]] = [{"rfilename": name} for name in files]
            if "blobs=" in urlsplit(self.path).query and not hub.bare:
                for entry, data in zip(siblings, files.values()):
                    entry |= {"size": len(data), "blobId": git_hash(data)}
                    if repository.lfs:
                        entry["lfs"] = self.lfs(data, "sha256")
            self.json(200, {"id": match["repo"], "modelId": match["repo"], "sha": commit, "siblings": siblings,
                            "private": repository.token is not None, "gated": repository.gated, "tags": ["gguf"]})

        def resolve(self, path: str) -> None:
            match = re.fullmatch(r"/(?P<repo>[^/]+(?:/[^/]+)?)/resolve/(?P<rev>[^/]+)/(?P<file>.+)", path)
            found = self.repository(match["repo"] if match else path, match["rev"] if match else None)
            if found is None or match is None:
                return
            repository, commit = found
            if repository.gated:
                self.error(403, "GatedRepo", "Access to this repository is restricted.")
                return
            data = repository.commits[commit].get(match["file"])
            if data is None:
                self.error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            elif repository.lfs:
                digest = hashlib.sha256(data).hexdigest()
                xet = {"X-Xet-Hash": digest, "X-Xet-Refresh-Route": "/nowhere"} if hub.xet else {}
                self.headers_of(302, {"Location": f"{hub.cdn}/{match['repo']}/{commit}/{match['file']}?signature=1",
                                      "X-Repo-Commit": commit, "X-Linked-Size": str(len(data)),
                                      "X-Linked-Etag": f'"{digest}"', "ETag": f'"{git_hash(data)}"', **xet}, 0)
            else:
                self.content(data, {"X-Repo-Commit": commit, "ETag": f'"{git_hash(data)}"'})

        def content_from_cdn(self, path: str) -> None:
            if self.headers["Authorization"]:  # as S3 does with signed addresses
                self.error(400, "InvalidArgument", "Only one auth mechanism allowed")
                return
            _, owner, name, commit, file = path.split("/", 4)
            data = hub.repositories[f"{owner}/{name}"].commits[commit][file]
            self.content(data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'})

        def content(self, data: bytes, headers: dict[str, str]) -> None:
            if hub.down:
                hub.down -= 1
                self.error(503, "", "Service Unavailable")
                return
            if hub.corrupt:
                middle = len(data) // 2
                data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:]
            data += bytes(hub.longer)
            status, start = 200, 0
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "") if hub.ranges else None
            if asked:
                start = int(asked[1])
                if start >= len(data):
                    self.headers_of(416, {"Content-Range": f"bytes */{len(data)}"}, 0)
                    return
                status = 206
                headers = {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            self.headers_of(status, {**headers, "Accept-Ranges": "bytes"}, len(data) - start)
            if self.command == "HEAD":
                return
            end = len(data) if hub.break_after is None else min(len(data), start + hub.break_after)
            for at in range(start, end, PIECE):
                piece = data[at:min(at + PIECE, end)]
                self.wfile.write(piece)
                self.request_seen.sent += len(piece)
                if hub.bytes_per_second:
                    time.sleep(len(piece) / hub.bytes_per_second)
            if end < len(data):
                self.close_connection = True

        def repository(self, repo: str, revision: str | None) -> tuple[Repository, str] | None:
            """The repository and commit, or an answer that there is none."""
            found = hub.repositories.get(repo)
            authorized = found is not None and (found.token is None or
                                                self.headers["Authorization"] == f"Bearer {found.token}")
            if found is None or not authorized:
                if self.headers["Authorization"]:
                    self.error(404, "RepoNotFound", "Repository not found")
                else:
                    self.error(401, "RepoNotFound", "Invalid username or password.")
                return None
            commit = found.refs.get(revision or "main", revision or "")
            if commit not in found.commits:
                self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
                return None
            return found, commit

        def lfs(self, data: bytes, name: str) -> dict[str, Any]:
            return {name: hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": POINTER_BYTES}

        def error(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
            self.json(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})

        def json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
            body = json.dumps(value).encode()
            self.headers_of(status, {"Content-Type": "application/json; charset=utf-8", **(headers or {})}, len(body))
            if self.command != "HEAD":
                self.wfile.write(body)

        def headers_of(self, status: int, headers: dict[str, str], nbytes: int) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(nbytes)}.items():
                if value:
                    self.send_header(name, value)
            self.end_headers()

    return Handler


@contextlib.contextmanager
def hub_server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server
