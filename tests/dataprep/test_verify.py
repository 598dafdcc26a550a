"""verify_dataset.py: each finding provoked on small real files, whole data sets found fine, the exit code and files."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataprep import data_sets, shard_writer, verify, verify_images
from detcore import UserError
from detcore.cli import run_main
from detcore.data import manifest
from detcore.data.coco import CocoIndex

SCRIPT = Path(__file__).resolve().parents[2] / "public-scripts" / "verify_dataset.py"


class Data:
    """A data set in the layout `custom`: twelve training and three validation images, one box each."""

    def __init__(self, root: Path):
        self.root, self.content = root, {}
        rng = np.random.default_rng(1)
        (root / "annotations").mkdir(parents=True)
        for split, count in (("train", 12), ("val", 3)):
            (root / split).mkdir()
            self.content[split] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
            for number in range(count):
                self.image(split, number).save(root / split / f"{number}.jpg", quality=90)
                about = {"id": number, "file_name": f"{number}.jpg", "height": 30, "width": 40}
                self.content[split]["images"].append(about)
                self.box(split, number, [2, 3, 10, 12 + number])
            self.write(split)
        self.rng = rng

    def image(self, split: str, number: int) -> Image.Image:
        rng = np.random.default_rng([number, len(split)])
        return Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))

    def box(self, split: str, image: int, bbox: list, category: int = 1) -> None:
        entries = self.content[split]["annotations"]
        area = bbox[2] * bbox[3]
        entries.append({"id": len(entries), "image_id": image, "category_id": category, "bbox": bbox, "area": area})

    def write(self, split: str) -> None:
        (self.root / f"annotations/instances_{split}.json").write_text(json.dumps(self.content[split]))

    def path(self, number: int, split: str = "train") -> Path:
        return self.root / split / f"{number}.jpg"


@pytest.fixture
def data(tmp_path) -> Data:
    return Data(tmp_path / "data")


@pytest.fixture
def verified(data, tmp_path, capsys):
    """Runs the script on the data set: exit code, what was said, findings by what."""

    def run(*words: object) -> tuple[int, str, dict[str, dict]]:
        report = tmp_path / "report.json"
        report.unlink(missing_ok=True)
        words = (words if "--annotations" in words else (data.root, *words)) + ("--json", report, "--workers", 2)
        code = run_main(verify.main, [str(word) for word in words])
        found = json.loads(report.read_text())["findings"] if report.exists() else []
        said = capsys.readouterr()
        return code, said.out + said.err, {item["what"]: item for item in found}

    return run


@pytest.mark.parametrize("full", [False, True])
def test_a_whole_data_set_is_fine(verified, full):
    code, said, found = verified(*["--full"] * full)
    assert code == 0 and found == {} and "fine, 0 notes" in said
    assert ("every image read and decoded" in said) == full


def grey(path):
    Image.open(path).convert("L").save(path)


def cmyk(path):
    Image.open(path).convert("CMYK").save(path)


def orientation(path):
    exif = Image.Exif()
    exif[0x112] = 6
    Image.open(path).save(path, exif=exif)


def invalid_orientation(path):
    exif = Image.Exif()
    exif[0x112] = 9
    Image.open(path).save(path, exif=exif)


def as_png(path):
    Image.open(path).save(path, format="PNG")


def palette(path):
    Image.open(path).quantize(16).save(path, format="PNG")


def damaged_inside(path):
    """A restart marker in the middle of the pixels: libjpeg says so on stderr and goes on."""
    data = bytearray(path.read_bytes())
    at = len(data) - 400
    data[at : at + 2] = b"\xff\xd3"
    path.write_bytes(data)


def larger(path):
    Image.open(path).resize((41, 30)).save(path)


def turned(path):
    Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path)


@pytest.mark.parametrize(
    ("change", "what", "level", "example"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:500]), "truncated images", "problem", "5.jpg"),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "truncated images", "problem", "5.jpg"),
        (lambda path: path.write_bytes(b"<html>404</html>" * 9), "files that are no image", "problem", "5.jpg"),
        (lambda path: path.write_bytes(b""), "empty files", "problem", "5.jpg"),
        (larger, "images of another size than the annotation file says", "problem", "41x30, listed 40x30"),
        (turned, "images of another size than the annotation file says", "problem", "sides exchanged"),
        (damaged_inside, "images that decode with a warning", "note", "5.jpg"),
        (orientation, "images with an EXIF orientation", "note", "5.jpg (6)"),
        (invalid_orientation, "images with an invalid EXIF orientation", "note", "5.jpg (9)"),
        (grey, "greyscale images", "note", "5.jpg"),
        (cmyk, "CMYK images", "note", "5.jpg"),
        (as_png, "files of another format than their name says", "note", "5.jpg (PNG)"),
        (palette, "palette or transparent images", "note", "5.jpg (P)"),
    ],
)
def test_what_only_decoding_finds(verified, data, tmp_path, change, what, level, example):
    change(data.path(5))
    assert set(verified()[2]) == {what} & {"empty files"}
    code, said, found = verified("--full", "--list", tmp_path / "list.csv")
    item = found[what]
    assert (item["level"], item["split"], item["count"]) == (level, "train", 1) and example in item["examples"][0]
    assert code == (1 if level == "problem" else 0) and what in said and f"-> {item['do']}" in said
    rows = list(csv.DictReader((tmp_path / "list.csv").open()))
    assert ("train", what, "5.jpg") in [(row["split"], row["what"], row["file"]) for row in rows]


def test_a_file_that_cannot_be_read(verified, data, monkeypatch):
    def refuse(index, i):
        raise UserError(f"{index.file_name(i)}: Permission denied")

    monkeypatch.setattr(CocoIndex, "read", refuse)
    code, _said, found = verified("--full")
    assert code == 1 and "0.jpg: Permission denied" in found["files that cannot be read"]["examples"][0]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("target", ["nowhere", "5.jpg"])
def test_links_to_nothing_are_found_and_the_rest_is_checked(verified, data, tmp_path, full, target):
    data.path(5).unlink()
    data.path(5).symlink_to(target)
    data.path(6).write_bytes(b"")
    (data.root / "annotations/aside.txt").symlink_to("nowhere")
    code, said, found = verified("--list", tmp_path / "list.csv", *["--full"] * full)
    assert code == 1 and found["links to nothing"]["level"] == "problem" and "-> mount or fetch" in said
    assert found["images listed but missing"]["examples"] == ["5.jpg"]
    assert (found["empty files"]["examples"], found["empty files"]["count"]) == (["6.jpg"], 1)
    assert "files that cannot be read" not in found
    rows = [tuple(row)[:3] for row in csv.reader((tmp_path / "list.csv").open())][1:]
    assert ("train", "links to nothing", "5.jpg") in rows and ("", "links to nothing", "annotations/aside.txt") in rows
    pair = ["--annotations", data.root / "annotations/instances_train.json", "--images", data.root / "train"]
    code, said, found = verified(*pair, *["--full"] * full)
    assert code == 1 and found["images listed but missing"]["count"] == 1 and "files that cannot be read" not in found


def test_an_empty_file_elsewhere_is_a_note(verified, data):
    (data.root / "annotations/done").touch()
    code, said, found = verified()
    assert code == 0 and found["empty files"]["level"] == "note" and "fine, 1 note, in" in said


def test_a_folder_that_cannot_be_counted(verified, data, tmp_path):
    (data.root / manifest.NAME).write_text("something else")
    code, said, found = verified("--list", tmp_path / "list.csv")
    assert code == 1 and "1 problem, 0 notes" in said and (tmp_path / "list.csv").exists()
    assert "not a manifest" in found["files or a manifest that cannot be read"]["examples"][0]


def test_missing_and_unlisted_files(verified, data):
    data.path(5).unlink()
    data.path(7).rename(data.path(70))
    code, _said, found = verified()
    assert code == 1 and found["images listed but missing"]["count"] == 2
    assert found["images listed but missing"]["examples"] == ["5.jpg", "7.jpg"]
    item = found["files that the annotation file does not list"]
    assert (item["level"], item["examples"]) == ("note", ["70.jpg"])
    code, _said, found = verified("--partial")
    assert code == 0 and found["images listed but missing"]["level"] == "note"
    code, _said, found = verified("--partial", "--full")
    assert code == 0 and "files that cannot be read" not in found
    code, said, _found = verified("--partial", "--write-manifest")
    assert code == 1 and "not written, for 2 listed images missing" in said
    assert not (data.root / manifest.NAME).exists()
    data.path(70).rename(data.path(7))
    Image.open(data.path(1)).save(data.path(5))
    assert verified()[0] == 0, "the folder is read anew each time"


def test_boxes_and_duplicates(verified, data):
    data.box("train", 1, [5, 5, 0, 3])
    data.box("train", 1, [50, 5, 4, 3])
    data.box("train", 2, [30, 5, 12, 3])
    data.box("train", 3, [30, 5, 10.5, 3])
    data.box("train", 4, [1, 1, 5, 5])
    data.box("train", 4, [1, 1, 5, 5])
    data.content["train"]["annotations"][-1]["id"] = 0
    data.content["train"]["images"].append({"id": 99, "file_name": "0.jpg", "height": 30, "width": 40})
    data.content["train"]["images"].append(data.content["train"]["images"][0])
    data.write("train")
    code, _said, found = verified()
    assert code == 0 and {what: item["count"] for what, item in found.items()} == {
        "boxes of no width or height": 1,
        "boxes wholly outside of their image": 1,
        "boxes that reach out of their image by more than a pixel": 1,
        "annotations that stand there twice": 1,
        "duplicate annotation ids": 1,
        "duplicate images": 1,
        "duplicate file names": 1,
        "images without annotations": 1,
    }
    assert found["boxes that reach out of their image by more than a pixel"]["examples"] == [
        "2.jpg [30.0, 5.0, 12.0, 3.0]"
    ]


def test_the_same_bytes_twice_and_in_both_splits(verified, data):
    data.path(9).write_bytes(data.path(2).read_bytes())
    data.path(1, "val").write_bytes(data.path(4).read_bytes())
    code, _said, found = verified("--full")
    assert code == 0 and found["files with the same bytes as another"]["examples"] == ["9.jpg = 2.jpg"]
    assert found["images that are in the training set too"]["examples"] == ["1.jpg = training's 4.jpg"]


def test_an_annotation_file_that_cannot_be_used(verified, data):
    (data.root / "annotations/instances_train.json").write_text('{"images": [')
    code, _said, found = verified("--full")
    item = found["annotation file or image folder that cannot be used"]
    assert code == 1 and "ends in the middle" in item["examples"][0] and item["split"] == "train"
    (data.root / "annotations/instances_train.json").unlink()
    assert verified()[0] == 0, "a data set of one split"
    assert verified("--split", "train")[0] == 2


def test_categories_that_differ_between_the_splits(verified, data):
    data.content["val"]["categories"] = [{"id": 2, "name": "thing"}]
    for box in data.content["val"]["annotations"]:
        box["category_id"] = 2
    data.write("val")
    code, _said, found = verified()
    assert code == 1 and found["categories that differ between train and val"]["examples"] == [
        "id 1 ('thing') is only in instances_train.json", "id 2 ('thing') is only in instances_val.json"
    ]  # fmt: skip


def openimages(data: Data, first: int, count: int = 264) -> None:
    """The same data set in the layout openimages-mlperf, its categories numbered from `first`."""
    names = data_sets.MLPERF_CLASSES.read_text().splitlines()
    for split, long in (("train", "train"), ("val", "validation")):
        content = data.content[split]
        content["categories"] = [{"id": first + k, "name": names[k]} for k in range(count)]
        for box in content["annotations"]:
            box["category_id"] = first + 5
        (data.root / long / "labels").mkdir(parents=True)
        (data.root / long / "labels/openimages-mlperf.json").write_text(json.dumps(content))
        (data.root / long / "data").mkdir()
        for path in (data.root / split).glob("*.jpg"):
            path.rename(data.root / long / "data" / path.name)
    for split in ("train", "val"):
        (data.root / f"annotations/instances_{split}.json").unlink()


@pytest.mark.parametrize(("first", "notes"), [(0, 0), (1, 2), (2, 0)])
def test_openimages_classes_and_published_counts(verified, data, first, notes):
    openimages(data, first)
    code, said, found = verified()
    assert code == 1 and "12 listed, 1,170,301 published" in said and "3 listed, 24,781 published" in said
    code, said, found = verified("--partial")
    assert code == (1 if first == 2 else 0)
    assert ("category ids count from 1" in found) == (first == 1)
    assert ("category ids that are not 0..n-1 or 1..n" in found) == (first == 2)


def test_openimages_with_other_classes(verified, data):
    openimages(data, 0, count=263)
    code, _said, found = verified("--partial")
    assert code == 1 and found["another number of classes"]["examples"] == ["263 in the file, 264 in openimages-mlperf"]
    path = data.root / "train/labels/openimages-mlperf.json"
    content = json.loads(path.read_text())
    content["categories"].append({"id": 263, "name": "Zebras"})
    content["categories"][0]["name"] = "Acorn"
    path.write_text(json.dumps(content))
    item = verified("--partial", "--split", "train")[2]["classes of another name than the benchmark's list"]
    assert item["count"] == 2 and item["examples"][0].startswith("Acorn instead of ")


def test_published_bytes(verified, data, monkeypatch):
    openimages(data, 0)
    size = sum(path.stat().st_size for path in (data.root / "train/data").iterdir())
    published = data_sets.Published
    table = {("openimages-mlperf", "train"): published(12, size), ("openimages-mlperf", "val"): published(3, 5)}
    monkeypatch.setattr(data_sets, "PUBLISHED", table)
    code, _said, found = verified()
    item = found["bytes more or fewer than published"]
    assert code == 1 and (item["split"], item["level"]) == ("val", "problem") and "--full" in item["do"]
    code, _said, found = verified("--full")
    assert code == 0 and found["bytes more or fewer than published"]["level"] == "note"


def test_the_manifest_is_written_and_checked(verified, data):
    code, said, found = verified("--write-manifest")
    path = data.root / manifest.NAME
    assert code == 0 and "VERIFY_MOUNTS=quick" in said and manifest.check(data.root, full=True) == []
    assert verified()[0] == 0
    with data.path(3).open("ab") as file:
        file.write(b"x")
    code, said, found = verified()
    item = found["folders that are not as the manifest says"]
    assert code == 1 and "folder train: expected" in item["examples"][0] and "--full --list" in item["do"]
    before = path.read_bytes()
    assert verified("--write-manifest")[0] == 2 and path.read_bytes() == before
    assert verified("--write-manifest", "--force")[0] == 0 and manifest.check(data.root, full=True) == []
    data.path(3).unlink()
    code, said, found = verified("--write-manifest", "--force")
    assert code == 1 and "not written, for there are problems" in said and manifest.check(data.root) != []


def test_shards(verified, data, tmp_path):
    file = data.root / "annotations/instances_train.json"
    shard_writer.pack(CocoIndex.open(file, data.root / "train"), tmp_path / "shards", shard_bytes=10_240)
    assert verified("--annotations", file, "--images", tmp_path / "shards", "--full")[:1] == (0,)
    path = tmp_path / "shards/00001.tar"
    content = bytearray(path.read_bytes())
    content[800] ^= 255
    path.write_bytes(content)
    code, _said, found = verified("--annotations", file, "--images", tmp_path / "shards", "--full")
    assert code == 1 and "00001.tar: member" in found["files that cannot be read"]["examples"][0]


@pytest.mark.parametrize(
    "words",
    [[], ["nowhere"], ["DIR", "--annotations", "x.json"], ["DIR", "--layout", "coco2018"], ["DIR", "--workers", "-1"],
     ["DIR", "--force"], ["--annotations", "a", "--images", "b", "--write-manifest"]],
)  # fmt: skip
def test_mistakes_of_use(data, capsys, words):
    try:
        code = run_main(verify.main, [word.replace("DIR", str(data.root)) for word in words])
    except SystemExit as end:
        code = end.code
    assert code == 2 and capsys.readouterr().err


def test_a_killed_process_is_said_not_waited_for(data, tmp_path, monkeypatch, verified):
    check_chunk = verify_images._check_chunk

    def killed(index, first, last):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(verify_images, "_check_chunk", killed)
    code, said, _found = verified("--full", "--list", tmp_path / "list.csv")
    monkeypatch.setattr(verify_images, "_check_chunk", check_chunk)
    assert code == 2 and "was killed" in said and not list(tmp_path.glob("*.csv")) + list(tmp_path.glob(".*.part"))


def test_as_a_program_and_killed(data):
    done = subprocess.run([sys.executable, SCRIPT, data.root, "--full"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0 and "fine" in done.stdout and "decoding train: 12 of 12" in done.stderr
    assert done.stderr.count("\n") == 2, done.stderr


def test_without_full_torch_is_not_loaded(data):
    words = [sys.executable, "-X", "importtime", SCRIPT, data.root, "--write-manifest"]
    done = subprocess.run(words, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0 and "fine, 0 notes" in done.stdout
    assert "dataprep.verify_files" in done.stderr and not re.search(r"\| +torch\b", done.stderr)


def finding(verified, what: str) -> dict:
    code, _said, found = verified()
    assert code == (found[what]["level"] == "problem")
    return found[what]


def test_what_training_will_do_with_the_boxes_is_reported(verified, data):
    boxes = data.content["train"]["annotations"]
    boxes[0] |= {"bbox": [2, 3, 0.5, 10]}
    boxes[1] |= {"iscrowd": 1}
    boxes[2] |= {"area": -4}
    data.write("train")
    counts = {what: finding(verified, what)["count"] for what in (
        "boxes under one pixel", "crowd boxes left out of training", "areas below 0")}  # fmt: skip
    assert set(counts.values()) == {1}


@pytest.mark.parametrize(
    ("split", "change", "what"),
    [
        ("train", {"iscrowd": 1}, "files without a box to train with"),
        ("val", {"iscrowd": 1}, "files with nothing to score"),
        ("val", {"area": -1}, "files with nothing to score"),
        ("train", {"bbox": [0.1, 0.2, 0.3, 0.4]}, "boxes that are likely stored in another way"),
        ("train", {"bbox": [5, 6, 38, 28], "area": 33 * 22}, "boxes that are likely stored in another way"),
    ],
)
def test_what_makes_training_or_scoring_vain_is_a_problem(verified, data, split, change, what):
    for box in data.content[split]["annotations"]:
        box |= change
    data.write(split)
    found = finding(verified, what)
    assert found["level"] == "problem" and found["split"] == split


def test_names_exchanged_between_the_splits(verified, data):
    for split, names in (("train", "ab"), ("val", "ba")):
        data.content[split]["categories"] = [{"id": k, "name": name} for k, name in enumerate(names, 1)]
        data.write(split)
    found = finding(verified, "categories that differ between train and val")
    assert found["examples"][0] == "id 1 is 'a' in instances_train.json and 'b' in instances_val.json"


@pytest.mark.parametrize(
    ("orientation", "listed", "what"),
    [
        (6, (30, 40), "images that EXIF turns"),
        (6, (40, 30), "images with an EXIF orientation"),
        (3, (40, 30), "images of which the size does not tell whether EXIF turns them"),
        (1, (30, 40), "images of another size than the annotation file says"),
    ],
)
def test_what_becomes_of_an_exif_orientation(verified, data, orientation, listed, what):
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.open(data.path(5)).save(data.path(5), exif=exif)
    data.content["train"]["images"][5] |= {"width": listed[0], "height": listed[1]}
    data.write("train")
    _code, _said, found = verified("--full")
    assert set(found) == {what} and found[what]["count"] == 1


def test_roboflow_keeps_the_json_beside_the_images(verified, data):
    """As Roboflow exports: a category 0 that nothing has, further keys, and the annotation file among the images."""
    (data.root / "val").rename(data.root / "valid")
    for split, folder in (("train", "train"), ("val", "valid")):
        data.content[split]["categories"].insert(0, {"id": 0, "name": "things", "supercategory": "none"})
        data.content[split]["info"] = {"url": "x"}
        data.write(split)
        old = data.root / f"annotations/instances_{split}.json"
        old.rename(data.root / folder / "_annotations.coco.json")
    code, said, found = verified()
    assert code == 0 and found == {} and "fine, 0 notes" in said


def test_masks_are_looked_at_where_that_is_asked_for(data, verified):
    star = [[1, 1, 9, 1, 5, 8]]
    for split, content in data.content.items():
        for annotation in content["annotations"]:
            annotation["segmentation"] = star
        data.write(split)
    train = data.content["train"]["annotations"]
    train[1]["segmentation"], train[2]["segmentation"] = [[1, 1, 5, 5], *star], []
    data.write("train")
    code, _, found = verified("--masks")
    assert code == 0 and found["polygons under three points left out"]["count"] == 1
    assert found["boxes without a mask left out"]["count"] == 1
    train[3]["segmentation"] = [[1, 1, 5, 5, 8]]
    data.write("train")
    code, said, _ = verified("--masks")
    assert code != 0 and "annotation 3 of image 3 has a polygon of 5 numbers" in said
    code, _, found = verified()
    assert code == 0 and not found, "detectors of boxes do not look at them"
