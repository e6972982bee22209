"""A model hub on this machine, as huggingface_hub asks it, with connections that break."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REVISION = "1" * 40


class LocalHub(ThreadingHTTPServer):
    """Serves one model of a few files.

    Attributes:
        requests: name and first byte of each download. breaks: how often the download of a file ends half way.
        missing: files whose download fails.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.requests: list[tuple[str, int]] = []
        self.breaks: dict[str, int] = {}
        self.missing: set[str] = set()

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: LocalHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _answer(self, with_content: bool) -> None:
        if self.path.startswith("/api/models/"):
            sizes = {name: len(content) for name, content in self.server.files.items()}
            siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
            entry: Any = {"id": "owner/tiny", "modelId": "owner/tiny", "sha": REVISION, "siblings": siblings}
            if "/tree/" in self.path:
                entry = [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in sizes.items()]
            self._send(json.dumps(entry).encode(), {"Content-Type": "application/json"}, with_content)
            return
        name = self.path.rpartition("/")[2]
        if name not in self.server.files:
            self.send_error(404)
            return
        content = self.server.files[name]
        digest = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": REVISION, "Accept-Ranges": "bytes"}
        if not with_content:
            self._send(content, headers, with_content)
            return
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.server.requests.append((name, start))
        if name in self.server.missing:
            self.send_error(500)
            return
        self._send(content[start:], headers, with_content, name, start)

    def _send(
        self, content: bytes, headers: dict[str, str], with_content: bool, name: str = "", start: int = 0
    ) -> None:
        self.send_response(206 if start else 200)
        size = start + len(content)
        if start:
            headers = {**headers, "Content-Range": f"bytes {start}-{size - 1}/{size}"}
        for header, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(header, value)
        self.end_headers()
        if not with_content:
            return
        if self.server.breaks.get(name, 0) > 0:
            self.server.breaks[name] -= 1
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        self.wfile.write(content)


@contextmanager
def local_hub(folder: Path) -> Iterator[LocalHub]:
    """Serve the files of a model's folder."""
    hub = LocalHub({path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()})
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
