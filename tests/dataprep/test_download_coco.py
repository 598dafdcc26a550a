"""COCO and single files, fetched and unpacked as a person calls it."""

import os
import shutil
import subprocess
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

from dataprep import download
from dataprep.download_sets import coco_archives
from tests.dataprep.download_server import Server, command, run, running


@pytest.fixture
def server():
    with running() as server:
        yield server


def coco(server: Server) -> dict[str, bytes]:
    """A small COCO 2017; returns the files that should be in the folder."""
    wanted = {}
    for archive in coco_archives(2017):
        names = archive.files if isinstance(archive.files, tuple) else [f"{k:012}.jpg" for k in range(5)]
        members = {f"{archive.folder}/{name}": name.encode() * 50 for name in names}
        server.files[f"/{archive.path}"] = make_zip(members)
        wanted |= members
    return wanted


def make_zip(members: dict[str, bytes]) -> bytes:
    out = BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, body in members.items():
            file.writestr(name, body)
    return out.getvalue()


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_coco(server, tmp_path):
    wanted = coco(server)
    server.make_trouble(seed=5, chance=0.7)
    done = run(server, "coco2017", "-d", tmp_path)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path) == wanted
    server.log.clear()
    done = run(server, "coco2017", "-d", tmp_path)
    assert done.returncode == 0 and done.stdout.count("already there") == 3
    assert server.log == []
    shutil.rmtree(tmp_path / "val2017")
    assert run(server, "coco2017", "-d", tmp_path).returncode == 0
    assert tree(tmp_path) == wanted and len(server.got()) == 1


def test_coco_with_the_original_options(server, tmp_path):
    wanted = coco(server)
    words = ("--download-path", tmp_path / "zips", "--output-path", tmp_path / "set", "--keep-archives")
    assert run(server, "coco2017", *words).returncode == 0
    assert tree(tmp_path / "set") == wanted
    assert {path.name for path in (tmp_path / "zips").iterdir()} == {
        "val2017.zip", "train2017.zip", "annotations_trainval2017.zip"
    }  # fmt: skip


def test_files_are_on_the_disk_before_their_archive_goes(server, tmp_path, monkeypatch):
    """A power cut after the deletion must find the files."""
    wanted, seen = coco(server), []
    there = {path: body for path, body in wanted.items() if path.startswith("val2017/")}

    def sync() -> None:
        archives = {path.name for path in tmp_path.rglob("*.zip")}
        seen.append(("val2017.zip" in archives, there.items() <= tree(tmp_path).items()))

    monkeypatch.setattr(os, "sync", sync)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert download.main(command(server, "coco2017", "-d", tmp_path)[2:]) == 0
    assert (True, True) in seen and not list(tmp_path.rglob("*.zip"))


def test_coco_of_other_bytes_is_refused(server, tmp_path):
    coco(server)
    words = [word for word in command(server, "coco2017", "-d", tmp_path) if word != "--trust-server"]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"no_proxy": "*"}, timeout=60)
    assert done.returncode == 2 and "published" in done.stderr
    assert tree(tmp_path) == {}


def test_an_archive_that_climbs_out_is_refused(server, tmp_path):
    server.files["/a/evil.zip"] = make_zip({"good.txt": b"1", "../../outside.txt": b"2"})
    done = run(server, "file", f"{server.url}/a/evil.zip", "-d", tmp_path / "in" / "side", "--unpack")
    assert done.returncode == 2 and "'../../outside.txt' would be written outside" in done.stderr
    assert set(tree(tmp_path)) == {"in/side/evil.zip"}


def test_file_with_a_hash(server, tmp_path):
    server.files["/a%20b.txt"] = b"hello"
    url = f"{server.url}/a%20b.txt"
    assert run(server, "file", url, "-d", tmp_path, "--sha256", "2CF24DBA").returncode == 0
    assert tree(tmp_path) == {"a b.txt": b"hello"}
    done = run(server, "file", url, "-d", tmp_path, "--sha256", "00112233")
    assert done.returncode == 2 and "wrong hash" in done.stderr
    assert run(server, "file", f"{server.url}/", "-d", tmp_path).returncode == 2
