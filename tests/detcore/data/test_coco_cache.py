"""The cache of CocoIndex: used when it fits, rebuilt when it does not, safe for processes that start together."""

import json
import multiprocessing
import os
import pickle

import numpy as np
import pytest

from detcore import UserError
from detcore.data import coco_json, columns
from detcore.data.coco import CocoIndex


@pytest.fixture
def builds(monkeypatch):
    """Counts how often annotation files are parsed."""
    calls = []
    parse = coco_json.parse
    monkeypatch.setattr(coco_json, "parse", lambda file, masks: calls.append(file) or parse(file, masks))
    return calls


def cache_of(coco):
    (cache,) = coco.file.parent.glob(".*.index")
    return cache


def replace(cache, data: bytes) -> None:
    """Put other bytes in the cache's place; the old file stays whole for those who have it mapped."""
    cache.unlink()
    cache.write_bytes(data)


def same(a: CocoIndex, b: CocoIndex) -> bool:
    return a._columns.keys() == b._columns.keys() and all(
        np.array_equal(a._columns[name], b._columns[name]) for name in a._columns
    )


def test_the_second_start_reads_the_cache(coco, builds):
    first = coco.simple().open()
    second = coco.open()
    assert len(builds) == 1 and same(first, second)
    assert second.counts == first.counts and second.content_hash == first.content_hash
    assert [path.name for path in coco.file.parent.iterdir() if path.suffix == ".tmp"] == []


def test_a_changed_file_is_read_again(coco, builds):
    coco.simple().open()
    coco.add_box(10, 5, (1, 1, 4, 5))
    coco.write()
    assert len(coco.open().boxes(1)[0]) == 1 and len(builds) == 2
    stat = coco.file.stat()
    coco.file.write_bytes(coco.file.read_bytes().replace(b"30, 20, 8, 8", b"30, 20, 8, 9"))
    os.utime(coco.file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert coco.open().boxes(0)[0][1].tolist() == [30, 20, 38, 29] and len(builds) == 3


def test_a_cache_damaged_anywhere_is_rebuilt(coco, builds):
    good = coco.simple().open()
    cache = cache_of(coco)
    data = cache.read_bytes()
    header = columns.PREFIX.unpack(data[: columns.PREFIX.size])[1]
    base = columns.aligned(columns.PREFIX.size + header)
    table = json.loads(data[columns.PREFIX.size :][:header])["columns"]
    used = [*range(0, columns.PREFIX.size + header, 11)]
    for _, _, start, length, _ in table.values():
        used += [base + start, base + start + length - 1] * bool(length)
    assert same(good, coco.open()) and len(builds) == 1
    for at in used:
        builds.clear()
        replace(cache, data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :])
        assert same(good, coco.open()) and len(builds) == 1, at


@pytest.mark.parametrize("length", [0, 1, 20, 28, 200, 4096, 9000, -1, None])
def test_a_truncated_or_grown_cache_is_rebuilt(coco, builds, length):
    good = coco.simple().open()
    data = cache_of(coco).read_bytes()
    replace(cache_of(coco), data + b"x" if length is None else data[:length])
    assert same(good, coco.open()) and len(builds) == 2


def test_large_columns_are_sampled_at_both_ends():
    column = np.arange(1 << 20, dtype=np.float64)
    whole = columns.checksum_of(column)
    for at in (0, -1):
        changed = column.copy()
        changed[at] += 1
        assert columns.checksum_of(changed) != whole


def test_a_folder_that_cannot_be_written(coco, builds, monkeypatch, tmp_path):
    coco.simple()
    writable = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != coco.file.parent and writable(path, mode))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = coco.open()
    assert list((tmp_path / "cache" / "detcore").iterdir()) and not list(coco.file.parent.glob(".*"))
    assert same(first, coco.open()) and len(builds) == 1
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    coco.add_box(10, 5, (1, 1, 4, 5))
    coco.write()
    with pytest.raises(UserError, match="no place for the cache"):
        coco.open()


def test_a_disk_that_is_full(coco, monkeypatch, tmp_path):
    coco.simple()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        coco.open()
    assert not list(tmp_path.rglob("*.index*"))


def test_cache_dir(coco, tmp_path):
    coco.simple().open(cache_dir=tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").glob(".*.index")) and not list(coco.file.parent.glob(".*"))


def test_pickling_opens_the_cache_again(coco):
    index = coco.simple().open()
    text = pickle.dumps(index)
    assert len(text) < 2000 and same(index, pickle.loads(text))
    cache_of(coco).unlink()
    with pytest.raises(UserError, match="start again"):
        pickle.loads(text)


def build_in_process(arguments):
    index = CocoIndex.open(*arguments)
    return index.content_hash, float(index._columns["bbox"].sum())


def test_processes_that_build_at_once(coco):
    coco.categories(1)
    coco.add_image(1, 40, 40)
    for number in range(20_000):
        coco.add_box(1, 1, (1, 1, 3, 4 + number))
    coco.write()
    with multiprocessing.get_context("fork").Pool(4) as pool:
        results = pool.map(build_in_process, [(coco.file, coco.images)] * 8)
    assert len(set(results)) == 1
    assert len(list(coco.file.parent.glob(".*"))) == 1
