"""The manifest of a data set, against a plain count of the same folders."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from detcore import UserError
from detcore.data import manifest
from detcore.data.manifest import Count

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def data(tmp_path) -> Path:
    """Folders with known counts, and everything that does not count."""
    folder = tmp_path / "a data set"
    for name, sizes in {".": [1], "train": [10, 20, 30], "train/a,b": [5], "val/deep/er": [7, 0], "empty": []}.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i, size in enumerate(sizes):
            (folder / name / f"{i}.jpg").write_bytes(bytes(size))
    (folder / ".hidden").mkdir()
    (folder / ".hidden/x").write_text("x")
    (folder / "train/.part").write_text("x")
    os.mkfifo(folder / "val/pipe")
    return folder


COUNTS = {".": Count(1, 1), "train": Count(3, 60), "train/a,b": Count(1, 5), "val/deep/er": Count(2, 7)}


def test_counts(data):
    assert manifest.build(data) == COUNTS
    assert manifest.build(data, sizes=False) == {name: Count(c.files, 0) for name, c in COUNTS.items()}
    assert list(manifest.build(data)) == sorted(COUNTS)
    (data / "train" / manifest.NAME).write_text("a file of the data, not the manifest")
    assert manifest.build(data)["train"].files == 4


def test_many_files_in_one_folder_and_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "_CHUNK", 3)
    for i in range(1000):
        (tmp_path / f"{i}").write_bytes(bytes(i % 7))
    heard = []
    counts = manifest.build(tmp_path, progress=heard.append)
    assert counts == {".": Count(1000, sum(i % 7 for i in range(1000)))}
    assert heard == sorted(heard) and heard[-1] == 1000


def test_written_and_checked(data):
    assert manifest.write(data) == COUNTS
    text = (data / manifest.NAME).read_text()
    assert text == 'folder,files,bytes\n.,1,1\ntrain,3,60\n"train/a,b",1,5\nval/deep/er,2,7\n'
    assert manifest.read(data / manifest.NAME) == COUNTS
    assert manifest.check(data) == manifest.check(data, full=True) == []
    assert manifest.write(data) == COUNTS  # the same again is no harm
    assert [path.name for path in data.iterdir() if "part" in path.name] == []


def test_what_is_wrong_is_named(data):
    manifest.write(data)
    (data / "train/0.jpg").write_bytes(bytes(11))
    assert manifest.check(data) == []
    assert manifest.check(data, full=True) == ["folder train: expected 3 files, 60 bytes, found 3 files, 61 bytes"]
    (data / "train/a,b/0.jpg").unlink()
    (data / "empty/new").write_text("x")
    assert manifest.check(data) == [
        "folder empty: expected 0 files, found 1 files",
        "folder train/a,b: expected 1 files, found none",
    ]
    with pytest.raises(UserError, match=r"there already and differs .*folder empty.* and 2 more\. .*--force"):
        manifest.write(data)
    assert manifest.read(data / manifest.NAME) == COUNTS
    manifest.write(data, force=True)
    assert manifest.check(data, full=True) == []


def test_links_are_followed_once(tmp_path):
    real, data = tmp_path / "raid", tmp_path / "data"
    (real / "sub").mkdir(parents=True)
    data.mkdir()
    (real / "sub/1").write_bytes(bytes(4))
    (real / "2").write_bytes(bytes(5))
    (data / "b").symlink_to(real)
    (data / "a").symlink_to(real)
    (data / "c").symlink_to(real / "sub")
    (data / "loop").symlink_to(data)
    (real / "sub/up").symlink_to(real)
    (data / "file").symlink_to(real / "2")
    for _ in range(5):
        assert manifest.build(data) == {".": Count(1, 5), "a": Count(1, 5), "a/sub": Count(1, 4)}
    (data / "a").unlink()
    (data / "inside").mkdir()
    (data / "inside/3").write_text("x")
    (data / "alias").symlink_to(data / "inside")  # counted where it lies, not where the link is
    assert set(manifest.build(data)) == {".", "b", "b/sub", "inside"}


def test_names_of_other_encodings(tmp_path):
    folder = os.fsencode(tmp_path) + b"/\xff\n"
    os.mkdir(folder)
    with open(folder + b"/x", "wb"):
        manifest.write(tmp_path)
    assert manifest.check(tmp_path, full=True) == []
    assert manifest.read(tmp_path / manifest.NAME) == {"\udcff\n": Count(1, 0)}


def test_what_cannot_be_counted(tmp_path, data):
    with pytest.raises(UserError, match="no such folder"):
        manifest.build(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a folder"):
        manifest.build(data / "0.jpg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no files"):
        manifest.write(tmp_path / "empty")
    (data / "train/gone.jpg").symlink_to("nowhere")
    (data / "loop").symlink_to("loop")
    for sizes in (True, False):
        with pytest.raises(UserError, match=r": 2 links to nothing \(loop, train/gone\.jpg\); mend or remove"):
            manifest.build(data, sizes=sizes)
    with pytest.raises(UserError, match="2 links to nothing"):
        manifest.write(data)
    (data / "train/empty.jpg").touch()
    odd = manifest.Odd([], [])
    counts = manifest.build(data, odd=odd)
    assert odd == (["loop", "train/gone.jpg"], ["train/empty.jpg", "val/deep/er/1.jpg"])
    assert counts["train"] == (COUNTS["train"].files + 1, COUNTS["train"].bytes)


def test_a_folder_that_cannot_be_read(data, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if path.endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"folder .*val/deep can't be read: Permission denied"):
        manifest.build(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a manifest"),
        ("a,b\n", "not a manifest"),
        ("folder,files,bytes\ntrain,3\n", r"line 2: 'train,3' is not valid"),
        ("folder,files,bytes\n.,1,1\ntrain,x,1\n", r"line 3: 'train,x,1' is not valid"),
        ("folder,files,bytes\ntrain,-3,1\n", "is not valid"),
        ("folder,files,bytes\na,1,1\na,1,1\n", "stands there twice"),
        ('folder,files,bytes\n"a,1,1\n', "can't be read as a manifest|is not valid"),
    ],
)
def test_malformed_manifests(data, text, message):
    (data / manifest.NAME).write_text(text)
    with pytest.raises(UserError, match=message):
        manifest.check(data)
    with pytest.raises(UserError, match=message):
        manifest.write(data)
    assert manifest.write(data, force=True) == COUNTS


def test_nothing_half_written_stays(data, tmp_path, monkeypatch):
    manifest.write(data, tmp_path / "m.csv")
    (data / "new").write_text("x")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"m\.csv can't be written: No space left"):
        manifest.write(data, tmp_path / "m.csv", force=True)
    assert manifest.read(tmp_path / "m.csv") == COUNTS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a data set", "m.csv"]
    with pytest.raises(UserError, match="can't be written: No such file"):
        manifest.write(data, tmp_path / "nowhere/m.csv")


def test_the_program(data, tmp_path):
    def call(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "detcore.data.manifest", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)

    link = tmp_path / "link"
    link.symlink_to(data)
    done = call("write", str(link))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{link / manifest.NAME}: 4 folders, 7 files, 73 bytes\n"
    assert call("check", str(data), "--full").returncode == 0
    (data / "train/0.jpg").unlink()
    done = call("check", str(data), "--manifest", str(link / manifest.NAME))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "folder train: expected 3 files, found 2 files" in done.stderr
    assert call("check", str(tmp_path / "x")).returncode == 2
