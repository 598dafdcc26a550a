"""What the tests of the OpenImages converter share: a generated data set, and a plain reading of it."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from dataprep import openimages, openimages_stages, openimages_tables
from tools import make_openimages

FLAGS = openimages_tables.FLAGS
IMAGES = 60


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Many pieces and buckets of little data, and processes for them."""
    monkeypatch.setattr(openimages_stages, "_CHUNK", 9_000)
    monkeypatch.setattr(openimages_stages, "_BUCKET", 9_000)
    monkeypatch.setattr(openimages_stages, "_OBJECTS", 7)
    monkeypatch.setattr(openimages_tables, "_BATCH", 11)
    monkeypatch.setattr(openimages_tables, "_BLOCK", 5_000)
    monkeypatch.setattr(openimages, "SMALL", 0)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("openimages")
    make_openimages.make(folder, "train", IMAGES, 12.5, 40, 40, seed=3)
    return folder


@pytest.fixture
def source(made, tmp_path):
    """A copy of the generated data set that a test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "set"))


def run(folder, *words, workers=1):
    return openimages.main([str(folder), "--split", "train", "--workers", str(workers), *map(str, words)])


def output(folder, name="openimages-mlperf"):
    return folder / "train" / "labels" / f"{name}.json"


def table(folder):
    return folder / "train" / "labels" / "detections.csv"


def summary(folder, *words):
    run(folder, "--summary", folder / "summary.json", *words)
    return json.loads((folder / "summary.json").read_text())


def met(found, part):
    """How often, and the examples, of the one kind of thing whose description holds `part`."""
    kinds = [kind for kind in found["met"] if part in kind]
    assert len(kinds) == 1, found["met"]
    return found["met"][kinds[0]]


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def dicts_of(path):
    first, *rows = rows_of(path)
    return [dict(zip(first, row)) for row in rows]


def expected(folder, names, base=0):
    """The same by the csv module, Pillow and loops."""
    mids = {row[0]: row[1] for row in rows_of(folder / "train/metadata/classes.csv")}
    urls = {row["ImageID"]: row for row in dicts_of(folder / "train/metadata/image_ids.csv")}
    boxes = {}
    for row in dicts_of(table(folder)):
        if mids[row["LabelName"]] in names:
            boxes.setdefault(row["ImageID"], []).append(row)
    images, annotations = [], []
    for number, key in enumerate(sorted(boxes), 1):
        with Image.open(folder / "train/data" / f"{key}.jpg") as image:
            width, height = image.size
        images.append(
            {"id": number, "file_name": f"{key}.jpg", "height": height, "width": width, "license": 1}
            | {"coco_url": urls[key]["OriginalURL"]}
        )
        for row in boxes[key]:
            x1, x2, y1, y2 = (float(row[side]) for side in ("XMin", "XMax", "YMin", "YMax"))
            box = [x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height]
            flags = {flag: row[flag] != "0" for flag in FLAGS}
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "bbox": box, "area": box[2] * box[3], **flags}
                | {"category_id": names.index(mids[row["LabelName"]]) + base, "iscrowd": int(flags["IsGroupOf"])}
            )
    return images, annotations


def rewrite(source, change):
    """Apply change(row as a dict) to each row of the box table; None leaves the row out."""
    rows = dicts_of(table(source))
    with open(table(source), "w", newline="") as file:
        out = csv.DictWriter(file, rows[0], lineterminator="\n")
        out.writeheader()
        for number, row in enumerate(rows):
            out.writerows(change(number, row) or [])
    return rows
