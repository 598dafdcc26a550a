"""The OpenImages converter interrupted: killed, on a full disk, beside another run, with inputs that change."""

import errno
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dataprep import openimages, openimages_pieces, openimages_stages, openimages_tables
from detcore import UserError
from tests.dataprep.openimages_cases import (
    expected,
    made,
    output,
    rewrite,
    run,
    small_parts,
    source,
    table,
)

__all__ = ["made", "small_parts", "source"]  # fixtures
ROOT = Path(__file__).resolve().parents[2]


def test_another_result_is_not_overwritten(source, capsys):
    run(source)
    first = output(source).read_bytes()
    about = output(source).stat()
    run(source)
    assert "with the same content" in capsys.readouterr().out
    assert output(source).stat() == about or output(source).stat().st_mtime_ns == about.st_mtime_ns
    with pytest.raises(UserError, match=r"differs.*--force.*stay in .*\.work, a folder that may be removed"):
        run(source, "--category-base", 1)
    assert output(source).read_bytes() == first
    assert not output(source).with_name(f".{output(source).name}.part").exists()
    run(source, "--category-base", 1, "--force")
    assert json.loads(output(source).read_text())["categories"][0]["id"] == 1


def test_two_runs_at_once(source):
    work = output(source).with_name(f".{output(source).name}.work")
    with openimages_pieces.locked(work, output(source)), pytest.raises(UserError, match="another run"):
        run(source)


def test_inputs_that_change_while_they_are_read(source, monkeypatch):
    encode = openimages.encode_head

    def change(*arguments):
        (source / "train/data" / f"{'f' * 16}.jpg").write_bytes(b"new")
        return encode(*arguments)

    monkeypatch.setattr(openimages, "encode_head", change)
    with pytest.raises(UserError, match="changed while"):
        run(source)
    assert not output(source).exists()


def killed_at(event: int, source: Path, before: bool) -> bool:
    """Run in a process that dies by SIGKILL at its n-th rename, before or after it. Whether it came to that."""

    def work():
        replace, count = os.replace, [0]

        def deadly(*arguments):
            count[0] += 1
            if count[0] == event and before:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*arguments)
            if count[0] == event:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = deadly
        sys.stdout = sys.stderr = io.StringIO()
        run(source)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    return process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_killed_at_any_rename_and_given_again(source, capsys, before):
    run(source)
    reference = output(source).read_bytes()
    output(source).unlink()
    event = 0
    while killed_at(event := event + 1, source, before):
        if output(source).exists():
            assert output(source).read_bytes() == reference
        run(source)
        assert output(source).read_bytes() == reference
        assert event < 3 or "continuing in" in capsys.readouterr().err
        assert not list(output(source).parent.glob(".*"))
        output(source).unlink()
    assert event > 10


def test_finished_parts_are_not_done_again(source, monkeypatch, capsys):
    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(openimages, "encode_head", stop)
        with pytest.raises(KeyboardInterrupt):
            run(source)
    with monkeypatch.context() as patch:
        for module, name in (
            (openimages_stages, "read_header"),
            (openimages_tables, "read_boxes"),
            (openimages_tables, "list_images"),
        ):
            patch.setattr(module, name, stop)
        run(source)
    assert "continuing in" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["boxes-00001", "bucket-0001", "files-00001", "list", "inputs.json"])
def test_damaged_parts_are_done_again(source, monkeypatch, name):
    run(source)
    reference = output(source).read_bytes()
    output(source).unlink()

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(openimages, "encode_head", stop)
        with pytest.raises(KeyboardInterrupt):
            run(source)
    part = next(output(source).parent.glob(".*.work")) / name
    whole = part.read_bytes()
    part.write_bytes(whole[:-40] + bytes(20))
    run(source)
    assert output(source).read_bytes() == reference


def test_changed_inputs_start_over_and_say_so(source, monkeypatch, capsys):
    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(openimages, "encode_head", stop)
        with pytest.raises(KeyboardInterrupt):
            run(source)
    rewrite(source, lambda number, row: [row] if number % 2 else [])
    run(source)
    assert "starting over: the boxes changed" in capsys.readouterr().err
    names = openimages.MLPERF_CLASSES.read_text().splitlines()
    assert json.loads(output(source).read_text())["annotations"] == expected(source, names)[1]


def test_a_killed_worker(source, monkeypatch):
    header, parent = openimages_stages.read_header, os.getpid()

    def die(path):
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return header(path)

    monkeypatch.setattr(openimages_stages, "read_header", die)
    with pytest.raises(UserError, match=r"was killed.*fewer --workers"):
        run(source, workers=2)
    monkeypatch.undo()
    run(source)


def test_workers_end_with_their_parent(source, tmp_path):
    """Also when it is killed, which it cannot tell them."""
    script = """
import os, time
from dataprep.openimages_pieces import Workers
def work(job, number):
    if number == 5:
        print(*[p for p in open(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read().split()], flush=True)
    time.sleep(0.01 if number < 5 else 1000)
with Workers(3, None) as pool:
    list(pool.run(work, [(i,) for i in range(8)]))
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    children = process.stdout.readline().split()
    assert len(children) == 3
    process.kill()
    process.wait()
    assert process.stdout.read() == ""  # the end of the pipe: nobody holds it any more
    process.stdout.close()


def test_a_disk_that_fills(source, tmp_path):
    labels = source / "train" / "labels"
    small = tmp_path / "small"
    small.mkdir()
    words = ["--boxes", table(source), "--class-descriptions", source / "train/metadata/classes.csv"]
    words += ["--images", source / "train/data", "--image-ids", source / "train/metadata/image_ids.csv"]
    words = [*map(str, words), "--classes", "all", "--workers", "1", "--output"]
    assert openimages.main([*words, str(labels / "reference.json")]) == 0
    reference = (labels / "reference.json").read_bytes()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("no right to mount a small tmpfs")
    try:
        sizes = [64, 128, 192, 256, 320, 384, 448]
        full = 0
        for size in sizes:
            subprocess.run(["mount", "-o", f"remount,size={size}k", small], check=True)
            try:
                openimages.main([*words, str(small / "a.json")])
            except UserError as error:
                assert re.search(r"the disk is full.*same command", str(error))
                assert not (small / "a.json").exists()
                full += 1
        assert full > 2
        subprocess.run(["mount", "-o", "remount,size=8m", small], check=True)
        openimages.main([*words, str(small / "a.json")])
        assert (small / "a.json").read_bytes() == reference
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_full_disk_while_the_result_is_written(source, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="the disk is full"):
            run(source)
    assert not output(source).exists()
    assert not output(source).with_name(f".{output(source).name}.part").exists()
    run(source)
