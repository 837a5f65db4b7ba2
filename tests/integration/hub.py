"""A hub on this machine: what huggingface_hub asks of one for pushing and loading, and no more.

It keeps every repository's files in memory, takes all of them in commits as base64 (`regular`
uploads, no LFS), and knows one revision, the newest.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Repo = dict[str, bytes]  # the files of a repository, by their paths


class Hub(ThreadingHTTPServer):
    """Serves `repos`, by `models/OWNER/NAME` and `datasets/OWNER/NAME`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.private: set[str] = set()
        self.cards: list[str] = []  # each README.md that was sent to be checked

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that serves until the end of the context."""
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        match self._path().split("/"):
            case ["api", "repos", "create"]:
                self._json(self._create(json.loads(body)))
            case ["api", "validate-yaml"]:
                self.server.cards.append(json.loads(body)["content"])
                self._json({"errors": [], "warnings": []})
            case ["api", kind, owner, name, "preupload", _]:
                assert f"{kind}/{owner}/{name}" in self.server.repos
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                self._json({"files": files})
            case ["api", kind, owner, name, "commit", _]:
                repo = f"{kind}/{owner}/{name}"
                self._commit(repo, [json.loads(line) for line in body.splitlines()])
                sha = _sha(self.server.repos[repo])
                self._json({"commitUrl": f"{self._url_of(repo)}/commit/{sha}", "commitOid": sha})
            case ["api", kind, owner, name, "paths-info", _]:
                paths = parse_qs(body.decode())["paths"]
                files = _tree(self.server.repos[f"{kind}/{owner}/{name}"])
                self._json([file for file in files if file["path"] in paths])
            case _:
                self._fail("EntryNotFound")

    def do_GET(self) -> None:
        match self._path().split("/"):
            case ["api", kind, owner, name, *more]:
                self._about(f"{kind}/{owner}/{name}", more)
            case ["datasets", owner, name, "resolve", _, *file]:
                self._file(f"datasets/{owner}/{name}", "/".join(file))
            case [owner, name, "resolve", _, *file]:
                self._file(f"models/{owner}/{name}", "/".join(file))
            case _:
                self._fail("EntryNotFound")

    do_HEAD = do_GET

    def _path(self) -> str:
        return unquote(urlsplit(self.path).path).strip("/")

    def _url_of(self, name: str) -> str:
        return f"{self.server.url}/{name.removeprefix('models/')}"

    def _create(self, asked: dict[str, Any]) -> dict[str, str]:
        name = f"{asked.get('type') or 'model'}s/{asked['organization']}/{asked['name']}"
        self.server.repos.setdefault(name, {})
        if asked.get("visibility") == "private":
            self.server.private.add(name)
        return {"url": self._url_of(name)}

    def _commit(self, name: str, operations: list[dict[str, Any]]) -> None:
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                content = base64.b64decode(value["content"])
                self.server.repos[name][value["path"]] = content

    def _about(self, name: str, asked: list[str]) -> None:
        repo = self.server.repos.get(name)
        if repo is None:
            self._fail("RepoNotFound")
        elif asked[:1] == ["tree"]:
            folder = "/".join(asked[2:])
            found = [file for file in _tree(repo) if file["path"].startswith(folder)]
            self._json(found) if found else self._fail("EntryNotFound")
        else:
            self._json({"id": name.partition("/")[2], "sha": _sha(repo), "tags": []})

    def _file(self, name: str, path: str) -> None:
        repo = self.server.repos.get(name)
        if repo is None or path not in repo:
            self._fail("RepoNotFound" if repo is None else "EntryNotFound")
            return
        etag = hashlib.sha1(repo[path]).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": _sha(repo)}
        content, status = repo[path], 200
        if asked := self.headers["range"]:  # bytes=FIRST-LAST
            first, last = asked.removeprefix("bytes=").split("-")
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[int(first) : int(last or len(content)) + 1], 206
        self._answer(status, content, "application/octet-stream", headers)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), "application/json", {})

    def _fail(self, code: str) -> None:
        self._answer(404, b"", "text/plain", {"X-Error-Code": code, "X-Error-Message": code})

    def _answer(self, status: int, body: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Type": kind}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _sha(repo: Repo) -> str:
    """The commit of a repository: a hash of its files."""
    digest = hashlib.sha1()
    for path, content in sorted(repo.items()):
        digest.update(path.encode() + b"\0" + content)
    return digest.hexdigest()


def _tree(repo: Repo) -> list[dict[str, Any]]:
    return [
        {
            "type": "file",
            "path": path,
            "size": len(content),
            "oid": hashlib.sha1(content).hexdigest(),
        }
        for path, content in repo.items()
    ]
