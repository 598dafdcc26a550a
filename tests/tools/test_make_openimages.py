"""The generator of OpenImages-like data, and how the benchmark compares two conversions."""

import csv
import json

import pytest

from tools import make_openimages
from tools.bench import openimages


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folders = [tmp_path_factory.mktemp(name) for name in "ab"]
    for folder in folders:
        make_openimages.make(folder, "train", 30, 12.5, 10, 24, seed=5)
    return folders


def test_the_published_columns_and_their_order(made):
    with open(made[0] / "train" / "labels" / "detections.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert ",".join(rows[0]) == (
        "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside,"
        "XClick1X,XClick2X,XClick3X,XClick4X,XClick1Y,XClick2Y,XClick3Y,XClick4Y"
    )
    ids = [row["ImageID"] for row in rows]
    assert ids == sorted(ids) and len(set(ids)) == 30
    assert {path.stem for path in (made[0] / "train" / "data").iterdir()} == set(ids)


def test_the_same_seed_gives_the_same_files(made):
    first, second = (sorted(path.relative_to(f) for path in f.rglob("*") if path.is_file()) for f in made)
    assert first == second
    assert all((made[0] / path).read_bytes() == (made[1] / path).read_bytes() for path in first)


def test_both_splits_by_default(tmp_path, monkeypatch, capsys):
    words = ["make_openimages.py", "--out", str(tmp_path), "--images", "5", "--headers", "3", "--pixels", "8"]
    monkeypatch.setattr("sys.argv", words)
    make_openimages.main()
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        str(tmp_path / split) for split in ("train", "validation")
    ]


def test_the_comparison_sees_what_differs(tmp_path, made):
    images = sorted((made[0] / "train" / "data").iterdir())
    name = next(path.name for path in images if openimages.read_header(path).orientation < 5)
    flags = dict.fromkeys(("IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside", "iscrowd"), False)
    a = {
        "images": [{"id": 1, "file_name": name, "width": 9, "height": 5}],
        "categories": [{"id": 0, "name": "Cat"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 0, "bbox": [0, 1, 2, 3], "area": 6.0, **flags}],
    }
    b = json.loads(json.dumps(a))
    b["images"][0]["id"] = b["annotations"][0]["image_id"] = 7
    b["categories"][0]["id"] = b["annotations"][0]["category_id"] = 1
    (tmp_path / "a.json").write_text(json.dumps(a))

    def found():
        (tmp_path / "b.json").write_text(json.dumps(b))
        return openimages.differences(tmp_path / "a.json", tmp_path / "b.json", made[0] / "train" / "data")

    assert found()["annotations equal to the last bit"] == 1
    b["annotations"][0]["bbox"][3] = 3.3
    assert found()["largest relative difference of a number"] == pytest.approx(0.1, rel=0.1)
    b["annotations"][0]["IsInside"] = True
    assert found()["annotations that differ in image, class or attribute"] == 1
    b["images"][0]["width"] = 8
    assert found()["images that differ beyond that"] == 2
