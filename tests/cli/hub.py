"""A server of the Hugging Face hub's protocol, as far as a download of a repository goes: which files a revision has,
what each is (ETag, size, commit), and its bytes from any place on. It may break off in the middle.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """`breaks`: name -> after so many bytes its next answer breaks off, once. `sent` are bytes of bodies by name."""

    folder: Path
    repository: str
    url: str = ""
    breaks: dict[str, int] = field(default_factory=dict)
    sent: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """(from, how many) of each answer."""
    away: set[str] = field(default_factory=set)
    """Files of which no more is sent, once they broke off."""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _json(self, body: object, status: int = 200, **headers: str) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            name = re.escape(hub.repository)
            files = sorted(one for one in hub.folder.iterdir() if one.is_file())
            if re.fullmatch(rf"/api/models/{name}/revision/v9", path):
                self._json({"error": "Invalid rev id: v9"}, 404, X_Error_Code="RevisionNotFound")
            elif re.fullmatch(rf"/api/models/{name}(/revision/[^/]+)?", path):
                siblings = [{"rfilename": one.name} for one in files]
                self._json({"id": hub.repository, "sha": COMMIT, "siblings": siblings, "private": False})
            elif re.fullmatch(rf"/api/models/{name}/tree/[^/]+", path):
                rows = [
                    {"type": "file", "path": one.name, "size": one.stat().st_size, "oid": _etag(one)} for one in files
                ]
                self._json(rows)
            elif (found := re.fullmatch(rf"/{name}/resolve/[^/]+/(.+)", path)) and (hub.folder / found[1]).is_file():
                self._file(hub.folder / found[1])
            else:
                self._json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET  # noqa: N815

        def _file(self, path: Path) -> None:
            if self.command == "GET" and path.name in hub.away and path.name not in hub.breaks:
                self.close_connection = True
                self.connection.close()
                return
            data = path.read_bytes()
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            begin = int(asked[1]) if asked else 0
            end = min(int(asked[2]) + 1, len(data)) if asked and asked[2] else len(data)
            self.send_response(206 if asked else 200)
            for name, value in {
                "ETag": f'"{_etag(path)}"',
                "X-Repo-Commit": COMMIT,
                "Content-Length": str(end - begin),
                "Accept-Ranges": "bytes",
                **({"Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"} if asked else {}),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            stop = hub.breaks.pop(path.name, None)
            part = data[begin:end] if stop is None else data[begin : begin + stop]
            hub.sent.setdefault(path.name, []).append((begin, len(part)))
            self.wfile.write(part)
            if stop is not None:
                self.close_connection = True
                self.connection.close()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _etag(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
