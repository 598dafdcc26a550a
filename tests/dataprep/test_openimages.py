"""The OpenImages converter against a plain reading of the same tables."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dataprep import openimages, openimages_pieces, openimages_stages
from detcore import UserError
from tests.dataprep.openimages_cases import expected, made, output, rows_of, run, small_parts, source, summary, table
from tools import make_openimages

__all__ = ["made", "small_parts", "source"]  # fixtures
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("base", [0, 1])
def test_as_a_plain_reading(source, base):
    names = openimages.MLPERF_CLASSES.read_text().splitlines()
    assert run(source, "--category-base", base) == 0
    labels = json.loads(output(source).read_text())
    images, annotations = expected(source, names, base)
    assert labels["images"] == images
    assert labels["annotations"] == annotations
    assert [(c["id"], c["name"]) for c in labels["categories"]] == list(enumerate(names, base))
    assert labels["licenses"] == [{"id": 1, "name": make_openimages.LICENSE, "url": make_openimages.LICENSE}]
    assert not list(output(source).parent.glob(".*"))


def test_pycocotools_and_this_project_read_it(source, capsys):
    from pycocotools.coco import COCO

    from detcore.data.coco import CocoIndex

    run(source)
    coco = COCO(str(output(source)))
    index = CocoIndex.open(output(source), source / "train" / "data", expected_classes=264)
    assert len(index) == len(coco.imgs) and index.counts["annotations"] == len(coco.anns)
    assert index.counts["duplicate annotation ids"] == 0 and not len(index.missing)


def test_the_same_bytes_however_the_work_is_cut(source, monkeypatch):
    run(source)
    first = output(source).read_bytes()
    for chunk, bucket, workers in ((10**9, 10**9, 1), (3_000, 10**9, 3), (10**9, 1_000, 2), (700, 2_000, 3)):
        monkeypatch.setattr(openimages_stages, "_CHUNK", chunk)
        monkeypatch.setattr(openimages_stages, "_BUCKET", bucket)
        output(source).unlink()
        run(source, workers=workers)
        assert output(source).read_bytes() == first


def test_all_classes_and_lists_of_ones_own(source):
    rows = rows_of(source / "train/metadata/classes.csv")
    run(source, "--classes", "all")
    labels = json.loads(output(source, "openimages").read_text())
    assert [(c["mid"], c["name"]) for c in labels["categories"]] == [tuple(row) for row in rows]
    assert len(labels["annotations"]) == len(expected(source, [row[1] for row in rows])[1])
    mine = source / "mine.txt"
    mine.write_text(f"{rows[400][1]}\n{rows[7][0]}\n\n{rows[100][0]}\n")  # names and MIDs, in no order
    run(source, "--classes", mine)
    labels = json.loads(output(source, "openimages-mine").read_text())
    names = [rows[400][1], rows[7][1], rows[100][1]]
    assert [c["name"] for c in labels["categories"]] == names
    assert labels["annotations"] == expected(source, names)[1]


def test_published_names_single_files_and_names_as_labels(source, tmp_path):
    run(source)
    reference = output(source).read_bytes()
    labels, metadata = source / "train" / "labels", source / "train" / "metadata"
    output(source).unlink()
    table(source).rename(source / "oidv6-train-annotations-bbox.csv")
    (metadata / "image_ids.csv").rename(source / "train-images-boxable-with-rotation.csv")
    names = (metadata / "classes.csv").read_text()
    (metadata / "classes.csv").unlink()
    (source / "class-descriptions-boxable.csv").write_text("LabelName,DisplayName\n" + names)
    run(source)
    assert output(source).read_bytes() == reference
    by_mid = dict(csv.reader(io.StringIO(names)))
    boxes = re.sub(r"/m/\w+", lambda match: by_mid[match[0]], (source / "oidv6-train-annotations-bbox.csv").read_text())
    (tmp_path / "b.csv").write_text(boxes)
    words = ["--boxes", tmp_path / "b.csv", "--class-descriptions", source / "class-descriptions-boxable.csv"]
    words += ["--images", source / "train" / "data", "--output", tmp_path / "out" / "a.json"]
    words += ["--image-ids", source / "train-images-boxable-with-rotation.csv"]
    assert openimages.main(list(map(str, words))) == 0
    assert (tmp_path / "out" / "a.json").read_bytes() == reference
    assert labels.is_dir()


def test_without_an_image_list(source):
    (source / "train/metadata/image_ids.csv").unlink()
    run(source)
    labels = json.loads(output(source).read_text())
    assert {(i["license"], i["coco_url"]) for i in labels["images"]} == {(None, None)} and labels["licenses"] == []


def test_exif_orientation_is_counted_and_never_applied(source, capsys):
    found = summary(source)
    assert sum(found["orientations"].values()) > 5
    assert "EXIF" in capsys.readouterr().err


def test_options_that_do_not_fit(source, tmp_path):
    for words, message in (
        (["--output", "x.json"], "--boxes, --class-descriptions, --images missing"),
        ([str(source), "--boxes", "x.csv"], "--boxes names a single file"),
        ([str(tmp_path / "no")], "no such folder"),
        ([str(source), "--split", "validation"], "validation/labels/detections.csv"),
    ):
        with pytest.raises(UserError, match=message):
            openimages.main(words)
    words = ["--boxes", table(source), "--class-descriptions", source / "train/metadata/classes.csv", "--images"]
    words += [source / "train/data", "--output", tmp_path / "a.json", "--image-ids", tmp_path / "no.csv"]
    with pytest.raises(UserError, match=r"no\.csv: no such file"):
        openimages.main(list(map(str, words)))
    shutil.rmtree(source / "train" / "data")
    with pytest.raises(UserError, match="should hold the images"):
        run(source)


def test_a_tally_keeps_few_examples():
    tally = openimages_pieces.Tally()
    tally.add("a", 0, ["never"])
    for number in range(4):
        tally.merge({"a": [10, [f"{number}x", f"{number}y"]]})
    assert tally == {"a": [40, ["0x", "0y", "1x", "1y", "2x"]]}


def test_without_pyarrow(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr(openimages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install 'pyarrow"):
        run(source)


def test_as_a_program(source):
    """The command line alone: neither torch nor a GPU library is loaded, and errors are one line."""
    script = ROOT / "public-scripts" / "openimages_to_coco.py"
    words = [sys.executable, "-X", "importtime", str(script), str(source), "--split", "train"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"content hash  sha256 [0-9a-f]{64}\n", done.stdout)
    assert not re.search(r"\| +(torch|pandas)$", done.stderr, re.MULTILINE)
    table(source).unlink()
    done = subprocess.run([sys.executable, str(script), str(source)], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
