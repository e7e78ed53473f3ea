"""An S3 server of this machine, and a proxy before it that counts, delays and spoils requests."""

from __future__ import annotations

import http.client
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Spoil = Callable[[str, str], str | None]  # (method, path with query) -> "503", "403", "cut", "lost", "hang" or None

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


class Proxy:
    """Forwards to a server on this machine; `requests` are those that have come, `sent` the bytes of answers to GET."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.requests: list[tuple[str, str]] = []
        self.sent = 0  # bytes of objects, listings aside
        self.latency = 0.0
        self.spoil: Spoil = lambda method, path: None
        self.at_once = self.most = 0
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def clear(self) -> None:
        """As new."""
        self.requests, self.sent, self.latency, self.most = [], 0, 0.0, 0
        self.spoil = lambda method, path: None

    def _handler(proxy) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *args: object) -> None:
                pass

            def _forward(self) -> None:
                with proxy.lock:
                    proxy.requests.append((self.command, self.path))
                    proxy.at_once += 1
                    proxy.most = max(proxy.most, proxy.at_once)
                    how = proxy.spoil(self.command, self.path)
                try:
                    time.sleep(proxy.latency)
                    self._answer(how)
                finally:
                    with proxy.lock:
                        proxy.at_once -= 1

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            def _say(self, status: int) -> None:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def _answer(self, how: str | None) -> None:
                body = self._body()
                if how == "hang":
                    time.sleep(4)  # longer than the client waits
                if how and how.isdigit():
                    return self._say(int(how))
                chunked = "Transfer-Encoding" in self.headers
                upstream = http.client.HTTPConnection("127.0.0.1", proxy.target)
                headers = {key: value for key, value in self.headers.items() if key != "Expect"}
                upstream.request(self.command, self.path, [body] if chunked else body, headers, encode_chunked=chunked)
                answer = upstream.getresponse()
                data = answer.read()
                if how == "lost":  # it was done, but nobody hears of it
                    return self._say(503)
                self.send_response(answer.status)
                for key, value in answer.getheaders():
                    if key.lower() not in ("transfer-encoding", "connection", "server", "date"):
                        self.send_header(key, value)
                self.end_headers()
                cut = how == "cut"
                with suppress(BrokenPipeError):  # a client that has had enough
                    self.wfile.write(data[: len(data) // 2] if cut else data)
                self.close_connection = cut
                if self.command == "GET" and "list-type" not in self.path:
                    with proxy.lock:
                        proxy.sent += len(data)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward

        return Handler


@contextmanager
def serve() -> Iterator[Proxy]:
    """A server and the proxy before it."""
    from moto.server import ThreadedMotoServer  # takes a second to import

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # not a line for every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = Proxy(server.get_host_and_port()[1])
    yield proxy
    proxy.server.shutdown()
    server.stop()


def client(proxy: Proxy) -> Any:
    """boto3's, which makes buckets."""
    import boto3

    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=proxy.url, **keys)
