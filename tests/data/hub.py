"""A stand-in for the Hugging Face Hub: one data set's files, as its API shows them."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves `folder` as the data set `name`, or answers everything with `status`; `requests` are those so far."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name, self.status = folder, name, 0
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def entry(self, path: Path) -> dict[str, object]:
        """A file or folder as the API shows it."""
        name = str(path.relative_to(self.folder))
        if path.is_dir():
            return {"type": "directory", "oid": SHA, "size": 0, "path": name}
        return {
            "type": "file",
            "oid": hashlib.sha1(name.encode()).hexdigest(),
            "size": path.stat().st_size,
            "path": name,
        }

    def _handler(hub) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def say(self, status: int, data: bytes = b"", **headers: str) -> None:
                self.send_response(status)
                for key, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(key.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def say_json(self, value: object) -> None:
                self.say(200, json.dumps(value).encode(), Content_Type="application/json")

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.requests.append(f"{self.command} {self.path}")
                hub.tokens.add(self.headers.get("Authorization"))
                url = urlsplit(self.path)
                path, query = unquote(url.path), parse_qs(url.query)
                api, files = f"/api/datasets/{hub.name}", f"/datasets/{hub.name}/resolve/main/"
                if hub.status:
                    self.say(hub.status)
                elif path in (api, f"{api}/revision/main"):
                    self.say_json({"id": hub.name, "sha": SHA, "siblings": [], "private": False, "tags": []})
                elif path.startswith(f"{api}/tree/main"):
                    top = hub.folder / path.removeprefix(f"{api}/tree/main").strip("/")
                    deep = query.get("recursive", ["false"])[0].lower() == "true"
                    found = sorted(top.rglob("*") if deep else top.iterdir()) if top.is_dir() else None
                    self.say(404, X_Error_Code="EntryNotFound") if found is None else self.say_json(
                        [hub.entry(f) for f in found]
                    )
                elif path == f"{api}/paths-info/main":
                    form = parse_qs(body.decode()) if not body.startswith(b"{") else json.loads(body)
                    wanted = [hub.folder / name for name in form.get("paths", [])]
                    self.say_json([hub.entry(one) for one in wanted if one.exists()])
                elif path.startswith(files) and (file := hub.folder / path.removeprefix(files)).is_file():
                    data = file.read_bytes()
                    if asked := self.headers.get("Range"):
                        first, _, last = asked.removeprefix("bytes=").partition("-")
                        self.say(206, data[int(first) : int(last or len(data)) + 1])
                    else:
                        self.say(200, data)
                else:
                    self.say(404, X_Error_Code="RepoNotFound")

            do_GET = do_POST = do_HEAD = answer

        return Handler


@contextmanager
def serve_hub(folder: Path, name: str) -> Iterator[Hub]:
    """The server, for as long as this is entered."""
    hub = Hub(folder, name)
    yield hub
    hub.server.shutdown()
