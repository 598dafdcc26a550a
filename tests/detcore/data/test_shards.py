"""Reading images from shards: the same batches as from files, bit for bit, and every damage named."""

import itertools
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from detcore import UserError
from detcore.data import Batch, loader, pack, shards
from detcore.data.coco import CocoIndex

SIZE = (48, 64)
COMMON = {"image_size": SIZE, "batch_size": 2, "rank": 0, "world_size": 1, "workers": 0}
TRAIN = COMMON | {"max_boxes": 6, "seed": 11, "epoch": 0, "step": 0}


@pytest.fixture(scope="module")
def files(thirteen) -> CocoIndex:
    return CocoIndex.open(thirteen.file, thirteen.images)


@pytest.fixture(scope="module")
def folder(thirteen, files, tmp_path_factory):
    """The thirteen images in several shards, in a random order."""
    out = tmp_path_factory.mktemp("packed") / "train"
    made = pack.pack(files, out, shard_bytes=10_240, shuffle=4, threads=2)
    assert made.shards > 3 and made.images == 13
    return out


@pytest.fixture
def own(files, tmp_path):
    """Shards that a test may damage: one image each, 13 of them."""
    pack.pack(files, tmp_path / "own", shard_bytes=1, threads=2)
    return tmp_path / "own"


@pytest.fixture(scope="module")
def packed(thirteen, folder) -> CocoIndex:
    return CocoIndex.open(thirteen.file, folder)


def assert_same(first, second, count: int | None = None) -> None:
    first, second = (list(itertools.islice(stream, count)) for stream in (first, second))
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        for name, x, y in zip(Batch._fields, a, b, strict=True):
            assert torch.equal(x, y), name


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("more", [{}, {"rank": 1, "world_size": 2}, {"drop_last": False, "step": 5, "antialias": True}])
def test_training_batches_of_several_epochs(files, packed, workers, more):
    more = more | {"workers": workers}
    assert_same(loader.train_batches(files, **TRAIN | more), loader.train_batches(packed, **TRAIN | more), 20)


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2), (2, 3)])
def test_evaluation_batches(files, packed, rank, world_size):
    more = COMMON | {"rank": rank, "world_size": world_size}
    assert_same(loader.eval_batches(files, **more), loader.eval_batches(packed, **more))


def test_the_index_is_that_of_the_files(files, packed, folder):
    assert packed.counts == files.counts and packed.content_hash == files.content_hash
    assert packed.path(0).parent.parent == folder and packed.path(0).name == files.file_name(0)
    for i in range(13):
        assert packed.read(i).tobytes() == files.path(i).read_bytes()
    again = pickle.loads(pickle.dumps(packed))
    assert again.read(5).tobytes() == files.path(5).read_bytes()


def test_names_that_are_not_there(packed):
    rows = packed.shards.find(["nothing.jpg", packed.file_name(3), ""])
    assert rows[0] == -1 and rows[1] >= 0 and rows[2] == -1
    with pytest.raises(UserError, match=r"hold no nothing\.jpg \(image 5\); pack the data set again"):
        packed.shards.read("nothing.jpg", 5)


def test_two_names_with_one_hash_are_told_apart(packed, monkeypatch):
    wanted = shards.hash_names([packed.file_name(3)])
    monkeypatch.setattr(shards, "hash_names", lambda names: np.repeat(wanted, len(names)))
    assert packed.shards.find(["other.jpg"])[0] == -1


def test_few_files_are_open_and_many_threads_may_read(own, thirteen, files, monkeypatch):
    monkeypatch.setattr(shards, "_MOST_OPEN", 2)
    index = CocoIndex.open(thirteen.file, own)
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda i: index.read(i % 13).tobytes(), range(400)))
    assert found == [files.path(i % 13).read_bytes() for i in range(400)]
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_images_that_the_shards_do_not_hold(own, coco, thirteen):
    coco.content = {**thirteen.content, "images": [*thirteen.content["images"]]}
    coco.content["images"].append({"id": 7, "file_name": "seven.jpg", "height": 4, "width": 4})
    coco.write()
    index = CocoIndex.open(coco.file, own)
    assert index.counts["missing images"] == 1 and index.counts["unlisted files"] == 0
    with pytest.raises(UserError, match=r"1 of the 14 images .*seven\.jpg"):
        next(loader.train_batches(index, **TRAIN))
    coco.content = {**thirteen.content, "images": thirteen.content["images"][:12], "annotations": []}
    coco.write()
    assert CocoIndex.open(coco.file, own).counts["unlisted files"] == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_changed_byte_is_named_with_shard_and_member(own, thirteen, files, workers):
    path = own / "00002.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    index = CocoIndex.open(thirteen.file, own)
    stream = loader.train_batches(index, **TRAIN | {"workers": workers})
    with pytest.raises(UserError, match=r"00002\.tar: member 000114\.jpg \(image 114\).*CRC-32.*pack_dataset"):
        list(itertools.islice(stream, 7))


def test_a_shard_that_shrinks_or_goes_while_it_is_read(own, thirteen):
    index = CocoIndex.open(thirteen.file, own)
    os.truncate(own / "00000.tar", 700)
    (own / "00001.tar").unlink()
    with pytest.raises(UserError, match=r"00000\.tar: member 000100\.jpg .* ends after 700 bytes"):
        index.read(0)
    with pytest.raises(UserError, match=r"00001\.tar: member 000107\.jpg .*No such file"):
        index.read(1)


def test_a_shard_that_is_cut_or_missing_at_the_start(own, thirteen):
    size = (own / "00005.tar").stat().st_size
    os.truncate(own / "00005.tar", size - 1)
    with pytest.raises(UserError, match=rf"00005\.tar: {size - 1:,} bytes, but it was packed with {size:,}"):
        CocoIndex.open(thirteen.file, own)
    (own / "00005.tar").unlink()
    with pytest.raises(UserError, match=r"00005\.tar: cannot read the shard"):
        CocoIndex.open(thirteen.file, own)


def test_an_index_cut_anywhere_is_refused(own, thirteen):
    path = own / shards.INDEX
    data = path.read_bytes()
    for length in (0, 1, 20, 100, 4096, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"shards\.index: the index of the shards is damaged"):
            CocoIndex.open(thirteen.file, own)
    for at in range(0, len(data), 4099):
        damaged = bytearray(data)
        damaged[at] ^= 0x10
        path.write_bytes(damaged)
        try:
            index = CocoIndex.open(thirteen.file, own)
        except UserError as error:
            assert "damaged" in str(error)
        else:  # between two columns
            assert index.counts["missing images"] == 0
    path.unlink()
    with pytest.raises(UserError, match="begun but not finished"):
        CocoIndex.open(thirteen.file, own)


def test_a_new_packing_of_other_images_is_noticed(own, thirteen, coco, tmp_path):
    assert CocoIndex.open(thirteen.file, own).counts["missing images"] == 0
    coco.content = {**thirteen.content, "images": thirteen.content["images"][:12], "annotations": []}
    coco.write()
    pack.pack(CocoIndex.open(coco.file, thirteen.images), own, force=True)
    assert CocoIndex.open(thirteen.file, own).counts["missing images"] == 1


def test_reading_ahead_reads_every_shard_once(packed):
    readers = [shards.ReadAhead([packed.shards], part, 3) for part in range(3)]
    for reader in readers:
        assert "reading ahead" in reader.words
        reader._thread.join(60)
        reader.close()
    assert sum(reader.bytes for reader in readers) == sum(packed.shards.sizes)


def test_reading_ahead_ends_at_close_and_is_left_out_without_memory(packed, monkeypatch):
    reader = shards.ReadAhead([packed.shards], 0, 1)
    reader.close()
    assert not reader._thread.is_alive()
    monkeypatch.setattr(shards, "free_memory", lambda: 1000)
    reader = shards.ReadAhead([packed.shards], 0, 1)
    reader.close()
    assert "left out" in reader.words and reader.bytes == 0
    monkeypatch.undo()
    assert 2**20 < shards.free_memory() < 2**50
