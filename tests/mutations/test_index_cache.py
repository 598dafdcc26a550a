"""Damaged caches of the annotation index: each is found out and built again, and the index is what it was."""

import json
import random

import numpy as np
import pytest

from detcore.data.coco import CocoIndex


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    (folder / "images").mkdir()
    rng = random.Random(0)
    images = [{"id": 3 * i, "file_name": f"{i}.jpg", "height": 50 + i, "width": 60} for i in range(40)]
    for image in images:
        (folder / "images" / image["file_name"]).touch()
    boxes = [
        {"id": i, "image_id": 3 * rng.randrange(40), "category_id": rng.randrange(1, 4),
         "bbox": [rng.uniform(-5, 60) for _ in range(4)], "iscrowd": rng.randrange(2)}
        for i in range(300)
    ]  # fmt: skip
    categories = [{"id": i, "name": f"class {i}"} for i in (1, 2, 3)]
    (folder / "a.json").write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    return folder


def contents(index: CocoIndex) -> list:
    truth = [column.tolist() for column in index.ground_truth()]
    views = [[part.tolist() for part in index.boxes(i)] for i in range(len(index))]
    names = [index.file_name(i) for i in range(len(index))]
    return [truth, views, names, index.category_names, index.counts, index.content_hash, index.heights.tolist()]


def damaged(cache: bytes, rng: random.Random) -> bytes:
    data, at = bytearray(cache), rng.randrange(len(cache))
    kind = rng.randrange(7)
    if kind <= 1:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 2:  # the header, where every byte decides
        data[rng.randrange(1500)] = rng.randrange(256)
    elif kind == 3:
        del data[at:]
    elif kind == 4:
        n = rng.randint(1, 5000)
        data[at : at + n] = bytes(len(data[at : at + n]))
    elif kind == 5:
        del data[at : at + rng.randint(1, 100)]
    else:
        data[at:at] = bytes(rng.randint(1, 100))
    return bytes(data)


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_cache_changes_nothing(source, monkeypatch, seed):
    monkeypatch.setattr("os.fsync", lambda handle: None)
    right = contents(CocoIndex.open(source / "a.json", source / "images"))
    (file,) = source.glob(".a.json.*.index")
    whole, rng, rebuilt = file.read_bytes(), random.Random(seed), 0
    for case in range(250):
        bad = damaged(whole, rng)
        file.write_bytes(bad)
        assert contents(CocoIndex.open(source / "a.json", source / "images")) == right, f"case {case}"
        rebuilt += file.read_bytes() != bad
        assert [path.name for path in source.glob(".*")] == [file.name], "something was left behind"
    assert rebuilt > 50


@pytest.mark.parametrize("replace", [b"", b"\0" * 20_000, b"detcore index 1\n", b"{}", b"\x80\x04}."])
def test_another_file_in_its_place(source, replace):
    right = contents(CocoIndex.open(source / "a.json", source / "images"))
    (file,) = source.glob(".a.json.*.index")
    file.write_bytes(replace)
    assert contents(CocoIndex.open(source / "a.json", source / "images")) == right


def test_the_cache_of_another_annotation_file(source, tmp_path):
    right = contents(CocoIndex.open(source / "a.json", source / "images"))
    (file,) = source.glob(".a.json.*.index")
    content = json.loads((source / "a.json").read_text())
    content["annotations"].pop()
    (tmp_path / "a.json").write_text(json.dumps(content))
    CocoIndex.open(tmp_path / "a.json", source / "images")
    (other,) = tmp_path.glob(".a.json.*.index")
    file.write_bytes(other.read_bytes())
    index = CocoIndex.open(source / "a.json", source / "images")
    assert contents(index) == right and np.array_equal(index.box_count().sum(), 300)
