"""Packing: plain tar files, the same bytes each time, and after a kill at any moment the next run goes on."""

import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from dataprep import shard_writer
from detcore import UserError
from detcore.data import shards
from detcore.data.coco import CocoIndex

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def index(thirteen) -> CocoIndex:
    return CocoIndex.open(thirteen.file, thirteen.images)


def visible(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def do(index, folder, **more) -> shard_writer.Packed:
    return shard_writer.pack(index, folder, **{"shard_bytes": 12_000, "threads": 2} | more)


def test_any_tar_program_reads_them(index, tmp_path):
    made = do(index, tmp_path)
    names, contents = [], {}
    for path in sorted(tmp_path.glob("*.tar")):
        with tarfile.open(path) as tar:
            assert path.stat().st_size <= 12_000 or len(tar.getnames()) == 1
            for member in tar:
                assert (member.mtime, member.uid, member.uname, member.mode) == (0, 0, "", 0o644)
                names.append(member.name)
                contents[member.name] = tar.extractfile(member).read()
    assert names == [index.file_name(i) for i in range(13)] and made.images == 13 and made.shards == made.written
    assert all(contents[index.file_name(i)] == index.path(i).read_bytes() for i in range(13))
    listed = subprocess.run(["tar", "tf", tmp_path / "00000.tar"], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == names[: len(listed.stdout.split())] and not listed.stderr
    assert not list(tmp_path.glob(".*")), "nothing but the result stays"


def test_the_index_for_dali_has_the_places_of_the_members(index, tmp_path):
    do(index, tmp_path)
    for path in tmp_path.glob("*.tar"):
        first, *lines = path.with_suffix(".idx").read_text().splitlines()
        with tarfile.open(path) as tar:
            members = list(tar)
        assert first == f"v1.2 {len(members)}"
        assert lines == [f"jpg {m.offset_data} {m.size} {m.name}" for m in members]


def test_the_same_images_give_the_same_bytes_and_another_order_the_same_content(index, tmp_path):
    first, second = do(index, tmp_path / "a", threads=1), do(index, tmp_path / "b", threads=5)
    assert visible(tmp_path / "a") == visible(tmp_path / "b") and first == second
    third = do(index, tmp_path / "c", shuffle=1, shard_bytes=10**9)
    assert third.content_hash == first.content_hash and third.shards == 1
    with tarfile.open(tmp_path / "c" / "00000.tar") as tar:
        order = np.random.default_rng([1]).permutation(13)
        assert tar.getnames() == [index.file_name(i) for i in order.tolist()]


def test_a_second_run_writes_nothing(index, tmp_path):
    do(index, tmp_path)
    before = visible(tmp_path)
    assert do(index, tmp_path).written == 0 and visible(tmp_path) == before


class Killed(BaseException):
    pass


def test_an_end_at_any_rename_goes_on(index, tmp_path, monkeypatch):
    """Before the k-th rename of the whole packing, for every k."""
    do(index, tmp_path / "whole")
    whole, rename = visible(tmp_path / "whole"), os.replace
    calls: list[int] = []
    for last in range(1000):
        folder = tmp_path / str(last)

        def replace(source, target, last=last):
            calls.append(1)
            if len(calls) > last:
                raise Killed
            rename(source, target)

        calls.clear()
        monkeypatch.setattr(os, "replace", replace)
        try:
            do(index, folder)
        except Killed:
            monkeypatch.setattr(os, "replace", rename)
            kept = {name: data for name, data in visible(folder).items() if not name.startswith(".")}
            assert kept.items() <= whole.items() and shards.INDEX not in kept
            if kept:
                with pytest.raises(UserError, match="not finished"):
                    shards.open_folder(folder)
            done = sum(name.endswith(".tar") for name in kept)
            made = do(index, folder)
            assert made.written == made.shards - done and visible(folder) == whole
        else:
            break
    assert last > 15


PROGRAM = """
import sys
from pathlib import Path
from dataprep import shard_writer
from detcore.data.coco import CocoIndex

def done(images, size, new):
    print(images, flush=True)

index = CocoIndex.open(sys.argv[1], sys.argv[2])
shard_writer.pack(index, Path(sys.argv[3]), shard_bytes=12_000, threads=2, done=done)
"""


@pytest.mark.parametrize("after", [1, 4, 9])
def test_a_real_kill(index, thirteen, tmp_path, after):
    do(index, tmp_path / "whole")
    command = [sys.executable, "-c", PROGRAM, thirteen.file, thirteen.images, tmp_path / "out"]
    program = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for _ in range(after):
        assert program.stdout.readline() == "1\n"
    program.send_signal(signal.SIGKILL)
    program.communicate()
    do(index, tmp_path / "out")
    assert visible(tmp_path / "out") == visible(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["removed", "cut", "noted nowhere", "changed and noted nowhere"])
def test_what_is_damaged_is_written_again(index, tmp_path, damage):
    do(index, tmp_path)
    whole, path = visible(tmp_path), tmp_path / "00001.tar"
    if damage == "removed":
        path.unlink()
    elif damage == "cut":
        os.truncate(path, 1000)
    else:
        (tmp_path / shards.INDEX).write_bytes(b"no index")
    if damage.startswith("changed"):
        os.truncate(path, path.stat().st_size - 512)
    assert do(index, tmp_path).written == (0 if damage == "noted nowhere" else 1)
    assert visible(tmp_path) == whole


def test_check_reads_everything(index, tmp_path):
    do(index, tmp_path)
    seen = []
    shard_writer.check(shards.open_folder(tmp_path), lambda images, size, new: seen.append(images))
    assert sum(seen) == 13
    path = tmp_path / "00001.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        UserError, match=r"00001\.tar: its members are not those of the index \(crc, first at member 0\)"
    ):
        shard_writer.check(shards.open_folder(tmp_path))


def test_another_packing_is_not_touched_without_force(index, tmp_path):
    do(index, tmp_path)
    before = visible(tmp_path)
    with pytest.raises(UserError, match=r"\(--shard-size 12k, now 50k, --shuffle none, now 3\); --force"):
        do(index, tmp_path, shard_bytes=50_000, shuffle=3)
    assert visible(tmp_path) == before
    made = do(index, tmp_path, shard_bytes=50_000, shuffle=3, force=True)
    assert made.shards == len(list(tmp_path.glob("*.tar"))) == len(list(tmp_path.glob("*.idx"))) < 4
    shard_writer.check(shards.open_folder(tmp_path))


def test_a_folder_with_other_files_is_refused_even_with_force(index, tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    for force in (False, True):
        with pytest.raises(UserError, match=r"other files already \(thesis\.txt\)"):
            do(index, tmp_path, force=force)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_images_that_changed_since_are_refused(coco, tmp_path):
    out = tmp_path / "out"
    coco.categories(1)
    for image_id in range(4):
        coco.add_image(image_id, 40, 30)
    coco.write()
    do(coco.open(), out, shard_bytes=1)
    (out / shards.INDEX).unlink()
    os.replace(out / "00001.tar", out / "00002.tar")
    os.replace(out / "00003.tar", out / "00001.tar")
    with pytest.raises(UserError, match=r"00001\.tar: holds other images than this packing puts there"):
        do(coco.open(), out, shard_bytes=1)


def test_names_of_every_kind(coco, tmp_path):
    coco.categories(1)
    names = ["a b.jpg", "sub/ü.jpg", "x" * 150 + ".jpg", "no_suffix", "a.b.c.JPG"]
    (coco.images / "sub").mkdir()
    for image_id, name in enumerate(names):
        path = coco.add_image(image_id, 40, 30, name=f"{image_id}.jpg")
        os.replace(path, coco.images / name)
        coco.content["images"][-1]["file_name"] = name
    coco.content["images"].append({**coco.content["images"][0], "id": 77})
    coco.write()
    out = tmp_path / "out"
    assert do(coco.open(), out).images == 5, "a file that two images share is packed once"
    packed = CocoIndex.open(coco.file, out)
    for i in range(6):
        assert packed.read(i).tobytes() == coco.open().path(i).read_bytes()
    found = []
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += tar.getnames()
    assert found == names


def test_missing_and_empty_images(coco, tmp_path):
    coco.simple()
    (coco.images / "000010.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"000010\.jpg: the file of image 10 is empty"):
        do(coco.open(), tmp_path / "out")
    (coco.images / "000010.jpg").unlink()
    coco.write()
    with pytest.raises(UserError, match="1 of the 2 images"):
        do(coco.open(), tmp_path / "out")


def test_a_full_disk(index, tmp_path, monkeypatch):
    sync, calls = os.fsync, []

    def full(handle):
        calls.append(1)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device.*Finished shards are kept"):
        do(index, tmp_path / "out")
    monkeypatch.undo()
    assert not list((tmp_path / "out").glob("*.tar.part")) and not list((tmp_path / "out").glob(".*tar*"))
    do(index, tmp_path / "out")
    do(index, tmp_path / "whole")
    assert visible(tmp_path / "out") == visible(tmp_path / "whole")


def test_a_disk_that_gives_back_other_bytes(index, tmp_path, monkeypatch):
    scan = shard_writer.scan

    def forgetful(path):
        part = scan(path)
        return part._replace(crc=part.crc ^ np.uint32(1))

    monkeypatch.setattr(shard_writer, "scan", forgetful)
    with pytest.raises(UserError, match="gives back other bytes than were written"):
        do(index, tmp_path)
    assert not list(tmp_path.glob("*.tar"))


def test_two_at_once(index, tmp_path):
    with shard_writer._alone(tmp_path), pytest.raises(UserError, match="another process is packing"):
        do(index, tmp_path)
