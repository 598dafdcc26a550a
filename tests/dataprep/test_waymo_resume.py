"""The Waymo converter interrupted, called again, with more or other files, other options, on a full disk."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dataprep import openimages_pieces, waymo, waymo_segment
from detcore import UserError
from tests.dataprep.waymo_cases import CONTEXTS, frames_of, run, write_v1, write_v2

SCRIPT = Path(__file__).resolve().parents[2] / "public-scripts" / "waymo_to_coco.py"


def tree(out: Path) -> dict[str, bytes]:
    """Every file but the pieces, which hold modification times of their sources."""
    files = (path for path in out.rglob("*") if path.is_file() and path.suffix != ".piece")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.fixture
def source(tmp_path):
    for seed, context in enumerate(CONTEXTS):
        write_v1(tmp_path / "in", frames_of(context, 2, seed))
    return tmp_path / "in"


def ends_at(number: int, source: Path, out: Path) -> None:
    """In a process of its own: leaves without a word at the number-th file that is about to get its name."""
    seen = 0
    replace = os.replace

    def leave(*names):
        nonlocal seen
        seen += 1
        if seen == number:
            os._exit(9)
        replace(*names)

    os.replace = leave
    run(source, out)
    os._exit(3)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_killed_at_every_file(tmp_path, source, version):
    """Options, 20 images, 2 pieces, log and annotations: 25 moments; then the same tree as without a kill."""
    if version == "v2":
        source = tmp_path / "in2"
        for seed, context in enumerate(CONTEXTS):
            write_v2(source, frames_of(context, 2, seed))
    run(source, tmp_path / "whole")
    whole = tree(tmp_path / "whole")
    assert len(whole) == 24
    context = multiprocessing.get_context("fork")
    for number in range(1, 26):
        out = tmp_path / f"out{number}"
        process = context.Process(target=ends_at, args=(number, source, out))
        process.start()
        process.join()
        assert process.exitcode == 9, number
        assert not (out / "annotations/annotations.json").exists()
        assert run(source, out) == 0
        assert tree(out) == whole, number


def test_killed_with_several_processes(tmp_path):
    for number in range(12):
        write_v1(tmp_path / "in", frames_of(f"{number}_100_000_120_000", 4, number))
    run(tmp_path / "in", tmp_path / "whole")
    words = [sys.executable, SCRIPT, "--tf-dir", tmp_path / "in", "--out-dir", tmp_path / "out", "--workers", "2"]
    process = subprocess.Popen(list(map(str, words)), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / "out").glob(".waymo_to_coco/*.piece")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    while done.returncode == 2 and "another run" in done.stderr:  # its processes are still about to end
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "of 12 segments are there already" in done.stderr
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_called_again_with_nothing_to_do(tmp_path, source, capsys, monkeypatch):
    run(source, tmp_path / "out")
    file = tmp_path / "out/annotations/annotations.json"
    before = file.stat()
    capsys.readouterr()
    monkeypatch.setattr(waymo, "convert", None)
    assert run(source, tmp_path / "out") == 0
    told = capsys.readouterr()
    assert "with the same content" in told.out and "2 of 2 segments are there already" in told.err
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_in_parts_as_at_once(tmp_path, source, capsys):
    """Each part of the data set may be removed once it is converted."""
    run(source, tmp_path / "whole")
    names = sorted(source.iterdir())
    names[1].rename(tmp_path / "later")
    run(source, tmp_path / "out")
    names[0].unlink()
    (tmp_path / "later").rename(names[1])
    run(source, tmp_path / "out")
    assert "1 segments, whose files are no longer there, stay" in capsys.readouterr().err
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_legacy_wants_all_files(tmp_path, source):
    run(source, tmp_path / "out", "--legacy")
    sorted(source.iterdir())[0].unlink()
    with pytest.raises(UserError, match="is no longer there: bring it back"):
        run(source, tmp_path / "out", "--legacy")


def test_a_changed_file_is_converted_anew(tmp_path, source):
    run(source, tmp_path / "out")
    write_v1(source, frames_of(CONTEXTS[1], 1, 9))
    run(source, tmp_path / "out")
    run(source, tmp_path / "fresh")
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh"), "the second frame's images are gone"


def test_other_options(tmp_path, source):
    run(source, tmp_path / "out")
    before = tree(tmp_path / "out")
    with pytest.raises(UserError, match=r"other options \(stride: 1, now 2\).*Nothing was changed.*--force"):
        run(source, tmp_path / "out", "--frame-stride", 2)
    assert tree(tmp_path / "out") == before
    run(source, tmp_path / "out", "--frame-stride", 2, "--force")
    run(source, tmp_path / "fresh", "--frame-stride", 2)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_a_folder_of_someone_else(tmp_path, source):
    (tmp_path / "out/images").mkdir(parents=True)
    (tmp_path / "out/images/mine.jpg").write_bytes(b"x")
    for force in ([], ["--force"]):
        with pytest.raises(UserError, match="was not made by this program"):
            run(source, tmp_path / "out", *force)
    assert list(tree(tmp_path / "out")) == ["images/mine.jpg"]


def test_two_runs_at_once(tmp_path, source):
    out = tmp_path / "out"
    with openimages_pieces.locked(out / ".waymo_to_coco", out), pytest.raises(UserError, match="another run"):
        run(source, out)


@pytest.mark.parametrize("number", [1, 5, 12, 22, 24])
def test_a_full_disk(tmp_path, source, monkeypatch, number):
    """At an option, an image, a piece, or the result; the same command goes on when there is room."""
    run(source, tmp_path / "whole")
    seen, replace = 0, os.replace

    def full(*names):
        nonlocal seen
        seen += 1
        if seen == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(*names)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(UserError, match="the disk is full"):
            run(source, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.part"))
    assert run(source, tmp_path / "out") == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_too_little_room_is_said_before(tmp_path, source, monkeypatch, capsys):
    monkeypatch.setattr(waymo.shutil, "disk_usage", lambda folder: waymo.shutil._ntuple_diskusage(10, 9, 1))
    run(source, tmp_path / "out")
    assert "of images are to be expected" in capsys.readouterr().err


def test_a_damaged_piece(tmp_path, source):
    """It is made again; without its file that is said."""
    run(source, tmp_path / "whole")
    run(source, tmp_path / "out")
    piece = tmp_path / f"out/.waymo_to_coco/{CONTEXTS[0]}.piece"
    data = piece.read_bytes()
    piece.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert run(source, tmp_path / "out") == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert next(waymo_segment.entries(piece, "images"))["segment"] == CONTEXTS[0]
    piece.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    sorted(source.iterdir())[0].unlink()
    with pytest.raises(UserError, match="is damaged: remove it, and bring its file back"):
        run(source, tmp_path / "out")
