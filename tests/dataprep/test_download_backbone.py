"""The download of backbone weights, against a server of this process."""

import hashlib
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dataprep.download_sets import WEIGHTS
from detcore.nn.resnet import BACKBONES, weights_file_name

SCRIPT = Path(__file__).resolve().parents[2] / "public-scripts" / "download_backbone.sh"
CONTENT = bytes(range(256)) * 400
NAME = f"tiny-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"


class Server(ThreadingHTTPServer):
    """Serves `content` under any name; `requests` collects the Range headers.

    ranges: whether they are obeyed. cut: how many bytes to send before the connection breaks. answers: after how many
    of them every request is answered by 500.
    """

    def __init__(self):
        self.content, self.requests, self.ranges, self.cut, self.answers = CONTENT, [], True, None, None
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.server.requests.append(wanted)
        if not self.path.endswith((".pth", ".pkl")) or "absent" in self.path:
            return self.send_error(404)
        if self.server.answers is not None and len(self.server.requests) > self.server.answers:
            return self.send_error(500)
        start = int(re.match(r"bytes=(\d+)-", wanted)[1]) if wanted and self.server.ranges else 0
        if start and start >= len(self.server.content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            total = len(self.server.content)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.send_header("Content-Length", str(len(self.server.content) - start))
        self.end_headers()
        self.wfile.write(self.server.content[start:][: self.server.cut])

    def log_message(self, *args):
        """Keeps the test's output quiet."""


@pytest.fixture
def server():
    with Server() as instance:
        thread = threading.Thread(target=instance.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield instance
        instance.shutdown()
        thread.join()


def run(server: Server, folder: Path, *names: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("BACKBONE_DIR", "TORCH_HOME")} | variables
    environment |= {"BACKBONE_URL": f"http://127.0.0.1:{server.server_address[1]}", "no_proxy": "127.0.0.1"}
    environment["PYTHON"] = sys.executable
    where = [] if variables else ["-d", str(folder)]
    command = ["bash", str(SCRIPT), *where, "--retry-delay", "0.01", *names]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "hub" / "checkpoints").iterdir()}


def test_fetches_and_keeps(server, tmp_path):
    result = run(server, tmp_path, NAME)
    assert result.returncode == 0, result.stderr
    assert files(tmp_path) == {NAME: CONTENT}
    assert "already there" in run(server, tmp_path, NAME).stdout
    assert server.requests == [None]


@pytest.mark.parametrize("variable", ["BACKBONE_DIR", "TORCH_HOME"])
def test_folder_from_the_environment(server, tmp_path, variable):
    assert run(server, tmp_path, NAME, **{variable: str(tmp_path)}).returncode == 0
    assert files(tmp_path) == {NAME: CONTENT}


@pytest.mark.parametrize("name", ["MSRA/R-101", "catalog://ImageNetPretrained/MSRA/R-101"])
def test_weights_of_detectrons_catalog(server, tmp_path, name):
    assert run(server, tmp_path, name).returncode == 0
    assert files(tmp_path) == {"R-101.pkl": CONTENT}


def test_weights_of_detectrons_catalog_are_checked_where_their_md5_is_published(server, tmp_path):
    result = run(server, tmp_path, "MSRA/R-50", "--attempts", "1")
    assert result.returncode == 2 and "R-50.pkl" in result.stderr and "md5" in result.stderr
    assert "R-50.pkl" not in files(tmp_path)


def test_resumes(server, tmp_path):
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / f"{NAME}.part").write_bytes(CONTENT[:70000])
    assert run(server, tmp_path, NAME).returncode == 0
    assert server.requests == ["bytes=70000-"]
    assert files(tmp_path) == {NAME: CONTENT}


@pytest.mark.parametrize(
    "part", [b"something else entirely", CONTENT, CONTENT + b"more"], ids=["other", "whole", "long"]
)
@pytest.mark.parametrize("ranges", [True, False])
def test_a_useless_part_is_fetched_anew(server, tmp_path, part, ranges):
    server.ranges = ranges
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / f"{NAME}.part").write_bytes(part)
    result = run(server, tmp_path, NAME)
    assert result.returncode == 0, result.stderr
    assert files(tmp_path) == {NAME: CONTENT}


def test_a_damaged_file_is_replaced(server, tmp_path):
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / NAME).write_bytes(CONTENT[:-1])
    assert run(server, tmp_path, NAME).returncode == 0
    assert files(tmp_path) == {NAME: CONTENT}


def test_an_interrupted_transfer_keeps_what_it_has(server, tmp_path):
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / f"{NAME}.part").write_bytes(CONTENT[:1000])
    server.cut = 50000
    server.answers = 1
    result = run(server, tmp_path, NAME)
    assert result.returncode == 2
    assert "could not be fetched" in result.stderr
    part = files(tmp_path)[f"{NAME}.part"]
    assert part == CONTENT[: len(part)]
    assert len(part) >= 51000
    server.cut = server.answers = None
    assert run(server, tmp_path, NAME).returncode == 0
    assert files(tmp_path) == {NAME: CONTENT}


def test_wrong_content_is_refused(server, tmp_path):
    server.content = b"<html>an error page</html>"
    result = run(server, tmp_path)  # the default backbone
    assert result.returncode == 2
    assert weights_file_name("resnext50_32x4d") in result.stderr
    assert "arrived damaged" in result.stderr and "wrong hash" in result.stderr
    assert files(tmp_path) == {}


def test_missing_on_the_server(server, tmp_path):
    result = run(server, tmp_path, "absent-01234567.pth")
    assert result.returncode == 2
    assert "absent-01234567.pth: 404" in result.stderr
    assert NAME not in files(tmp_path)


@pytest.mark.parametrize("name", ["resnet19", "../../etc/passwd", "tiny.pth", ""])
def test_unknown_names(server, tmp_path, name):
    result = run(server, tmp_path, name)
    assert result.returncode == 2
    assert "unknown backbone" in result.stderr
    assert server.requests == []


def test_the_names_are_those_the_program_looks_for():
    assert {name: weights_file_name(name) for name in BACKBONES} == WEIGHTS


def test_an_interruption_during_a_run_heals(server, tmp_path):
    server.cut = 50000
    assert run(server, tmp_path, NAME).returncode == 0
    assert files(tmp_path) == {NAME: CONTENT}
    assert server.requests == [None, "bytes=50000-", "bytes=100000-"]


def test_all(server, tmp_path):
    result = run(server, tmp_path, "all")
    assert result.returncode == 2
    assert all(name in result.stderr for name in WEIGHTS.values())
