"""A file server that misbehaves on request: for the tests of the downloader."""

import hashlib
import os
import random
import re
import socket
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

SCRIPTS = Path(__file__).resolve().parents[2] / "public-scripts"
QUICK = ("--trust-server", "--retry-delay", "0.01", "--connections", "8")


class Server(ThreadingHTTPServer):
    """Serves `files` (path: bytes). `faults[path]` is a list of faults for the next GET requests of it, each a dict:

    drop=N: the connection breaks after N bytes of the body. lie=N: only the first N bytes exist, says Content-Length.
    wrong: other bytes of the same number. status, headers: an answer without the file. ignore_range: 200 and all of it.
    new=BYTES: from now on the file has this content. ignore_if_range: continues the new version. hang: until the client
    goes away or the test ends. encoding: the header Content-Encoding. no_length: without Content-Length.
    silent: no answer at all. lists: answers ListObjectsV2 of `bucket`, so many keys an answer.
    `log` holds (method, path, Range, If-Range) of every request. store: it says it is an object store.
    etags: False for none, "nginx" for some that are no md5.
    """

    daemon_threads = True
    block_on_close = False  # hanging answers end with the process
    request_queue_size = 256

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.log: list[tuple[str, str, str | None, str | None]] = []
        self.store, self.lists, self.bucket = True, 0, ""
        self.etags: bool | str = True
        self.end, self.lock = threading.Event(), threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def got(self, path: str = "", method: str = "GET") -> list[str]:
        return [name for kind, name, _, _ in self.log if kind == method and path in name]

    def handle_error(self, request, client_address) -> None:
        """Clients that were stopped reset their connections; everything else is told as usual."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def make_trouble(self, seed: int, chance: float = 0.4) -> None:
        """Faults for every file, drawn: all of them pass after a few tries."""
        draw = random.Random(seed)
        for path, content in self.files.items():
            while draw.random() < chance:
                kinds = [
                    {"drop": draw.randrange(len(content) + 1)},
                    {"lie": draw.randrange(len(content))},
                    {"wrong": 1},
                ]
                kinds += [{"status": code} for code in (429, 500, 503)] + [{"ignore_range": 1, "drop": 5}]
                self.faults[path].append(draw.choice(kinds))
            # Three damaged arrivals are one too many by design.
            damaged = [fault for fault in self.faults[path] if "lie" in fault or "wrong" in fault]
            self.faults[path] = [fault for fault in self.faults[path] if fault not in damaged[2:]]


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        server, path = self.server, self.path
        if server.lists and path.startswith(f"{server.bucket}/?"):
            return self._list(dict(parse_qsl(urlsplit(path).query)))
        wanted, condition = self.headers.get("Range"), self.headers.get("If-Range")
        with server.lock:
            server.log.append((self.command, path, wanted, condition))
            fault = server.faults[path].pop(0) if body and server.faults.get(path) else {}
        if "silent" in fault:
            self.close_connection = True
            return server.end.wait(60)
        if "new" in fault:
            server.files[path] = fault["new"]
        if "status" in fault or path not in server.files:
            return self._status(fault.get("status", 404), fault.get("headers", {}))
        content = server.files[path]
        tag = f'"{hashlib.md5(content).hexdigest()}"'
        if server.etags == "nginx":
            tag = f'"{tag[1:9]}-{len(content):x}"'
        if "wrong" in fault:
            content = bytes(255 - value for value in content)
        content = content[: fault.get("lie")]
        found = re.match(r"bytes=(\d+)-", wanted or "")
        start = int(found[1]) if found and "ignore_range" not in fault else 0
        if condition and condition != tag and "ignore_if_range" not in fault:
            start = 0
        if start and start >= len(content):
            return self._status(416, {})
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if "no_length" in fault:
            self.send_header("Connection", "close")
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(content) - start))
        if server.etags:
            self.send_header("ETag", tag)
        if server.store:
            self.send_header("x-amz-request-id", "1")
        if "encoding" in fault:
            self.send_header("Content-Encoding", fault["encoding"])
        self.end_headers()
        if body:
            self._body(content[start:], fault)

    def _list(self, query: dict[str, str]) -> None:
        server = self.server
        with server.lock:
            server.log.append(("LIST", self.path, None, None))
        keys = [path.removeprefix(server.bucket + "/") for path in sorted(server.files)]
        keys = [key for key in keys if key.startswith(query["prefix"]) and key > query.get("continuation-token", "")]
        shown = keys[: server.lists]
        text = "".join(
            f"<Contents><Key>{key}</Key><Size>{len(server.files[f'{server.bucket}/{key}'])}</Size></Contents>"
            for key in shown
        )
        if keys[server.lists :]:
            text += f"<NextContinuationToken>{shown[-1]}</NextContinuationToken>"
        body = f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{text}</ListBucketResult>'.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self, content: bytes, fault: dict[str, Any]) -> None:
        self.wfile.write(content[: fault.get("drop", len(content))])
        if "hang" in fault:
            self.server.end.wait(60)
        if "drop" in fault or "hang" in fault:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _status(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        """Keeps the test's output quiet."""


@contextmanager
def running() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.end.set()
            server.shutdown()
            thread.join()


def command(server: Server, name: str, *words: str) -> list[str]:
    """download.py with this server in place of the published ones."""
    urls = {
        "openimages": ["--metadata-url", f"{server.url}/meta", "--images-url", f"{server.url}/images/"],
        "coco2017": ["--url", server.url],
        "file": [],
    }[name]
    return [sys.executable, str(SCRIPTS / "download.py"), name, *urls, *QUICK, *map(str, words)]


def run(server: Server, name: str, *words: str, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"no_proxy": "127.0.0.1"}
    return subprocess.run(
        command(server, name, *words), env=environment, capture_output=True, text=True, timeout=100, **options
    )
