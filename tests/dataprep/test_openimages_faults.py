"""What the OpenImages converter makes of faulty tables, class lists and files."""

import errno
import json
import re
from pathlib import Path

import pytest

from dataprep import openimages_stages, openimages_tables
from detcore import UserError
from tests.dataprep.openimages_cases import (
    made,
    met,
    output,
    rewrite,
    rows_of,
    run,
    small_parts,
    source,
    summary,
    table,
)

__all__ = ["made", "small_parts", "source"]  # fixtures
ROOT = Path(__file__).resolve().parents[2]
FLAGS = openimages_tables.FLAGS
HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax," + ",".join(FLAGS)


@pytest.mark.parametrize("change", ["crlf", "bom", "quotes", "no newline at the end", "all of it"])
def test_spellings_of_csv(source, change):
    run(source)
    reference = output(source).read_bytes()
    output(source).unlink()
    for path in (table(source), source / "train/metadata/classes.csv", source / "train/metadata/image_ids.csv"):
        text = path.read_text()
        if change in ("quotes", "all of it") and path == table(source):
            text = re.sub(r"[^,\n]+", r'"\g<0>"', text)
        if change in ("no newline at the end", "all of it"):
            text = text.rstrip("\n")
        text = text.replace("\n", "\r\n") if change in ("crlf", "all of it") else text
        path.write_bytes(text.encode("utf-8-sig" if change in ("bom", "all of it") else "utf-8"))
    run(source)
    assert output(source).read_bytes() == reference


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        ({"XMin": "0.9", "XMax": "0.1"}, "XMin > XMax"),
        ({"YMin": "0.9", "YMax": "0.1"}, "XMin > XMax"),
        ({"XMin": "NaN"}, "NaN"),
        ({"YMax": "inf"}, "NaN"),
        ({"XMax": ""}, "NaN"),
        ({"IsGroupOf": ""}, "NaN"),
        ({"LabelName": "/m/nobody"}, "class descriptions"),
        ({"LabelName": ""}, "class descriptions"),
        ({"ImageID": "0123"}, "16 hexadecimal"),
        ({"ImageID": "zzzzzzzzzzzzzzzz"}, "16 hexadecimal"),
        ({"ImageID": ""}, "16 hexadecimal"),
    ],
)
def test_faulty_rows_are_skipped_and_counted(source, spoil, kind):
    run(source)
    reference = output(source).read_bytes()
    output(source).unlink()
    mid = rows_of(source / "train/metadata/classes.csv")[0][0]  # Airplane
    extra = spoil if "LabelName" in spoil else {"LabelName": mid} | spoil
    rewrite(source, lambda number, row: [row, row | extra] if number in (3, 90, 500) else [row])
    found = summary(source)
    count, examples = met(found, kind)
    assert count == 3 and len(examples) == 3
    assert output(source).read_bytes() == reference


def test_oddities_that_are_kept(source):
    mid = rows_of(source / "train/metadata/classes.csv")[0][0]
    base = {"LabelName": mid, "IsOccluded": "-1", "XMin": "0.5", "XMax": "0.5", "YMin": "-0.25", "YMax": "1.25"}
    rewrite(source, lambda number, row: [row | base, row | base] if number == 0 else [row])
    found = summary(source)
    assert met(found, "stand there twice")[0] == 1
    assert met(found, "reach out")[0] == 2
    assert met(found, "-1, unknown")[0] >= 2
    labels = json.loads(output(source).read_text())
    first, second = labels["annotations"][:2]
    height = labels["images"][0]["height"]
    assert first | {"id": 2} == second and first["IsOccluded"] is True
    assert first["bbox"][1:] == [-0.25 * height, 0.0, 1.5 * height] and first["area"] == 0


def test_ids_in_capitals_are_the_same_images(source):
    run(source)
    reference = json.loads(output(source).read_text())
    output(source).unlink()
    rewrite(source, lambda number, row: [row | {"ImageID": row["ImageID"].upper()}])
    images = sorted((source / "train/data").iterdir())
    changed = [path.rename(path.with_name(path.stem.upper() + ".JPG")) for path in images[::2]]
    found = summary(source)
    assert met(found, "in capitals")[0] == len(reference["annotations"])
    labels = json.loads(output(source).read_text())
    assert {image["file_name"] for image in labels["images"]} >= {path.name for path in changed[:3]}
    assert [image["file_name"].lower() for image in labels["images"]] == [i["file_name"] for i in reference["images"]]
    assert labels["annotations"] == reference["annotations"]


def without(labels, names):
    """(file name, box) of the annotations of images that are not in names."""
    files = {image["id"]: image["file_name"] for image in labels["images"]}
    return [(files[a["image_id"]], a["bbox"]) for a in labels["annotations"] if files[a["image_id"]] not in names]


def test_files_that_are_no_use(source):
    run(source)
    before = json.loads(output(source).read_text())
    output(source).unlink()
    files = [source / "train/data" / image["file_name"] for image in before["images"]]
    content = files[0].read_bytes()
    for path in files[:6]:
        path.unlink()  # never through the hard links
    files[0].write_bytes(b"")
    files[1].write_bytes(b"\x89PNG\r\n\x1a\n")
    files[2].write_bytes(content[:60])
    files[3].symlink_to("nowhere")
    files[4].mkdir()
    (source / "train/data" / f"{'0' * 16}.jpg").write_bytes(content)
    (source / "train/data" / f"{files[8].stem}.jpeg").write_bytes(content)
    (source / "train/data" / "cover.jpg").write_bytes(content)
    (source / "train/data" / ".hidden").write_bytes(content)
    found = summary(source)
    assert met(found, "empty files") == [1, [files[0].name]]
    assert met(found, "not JPEG") == [1, [files[1].name]]
    assert met(found, "cut off") == [1, [files[2].name]]
    assert met(found, "can't be opened")[0] == 2
    assert met(found, "without a file") == [1, [files[5].stem]]
    assert met(found, "without a box")[1][0] == f"{'0' * 16}.jpg"
    assert met(found, "another file has too")[0] == 1
    assert met(found, "not named") == [1, ["'cover.jpg'"]]
    labels = json.loads(output(source).read_text())
    gone = {path.name for path in files[:6]}
    other = {files[8].name, f"{files[8].stem}.jpeg"}
    assert without(labels, other) == without(before, gone | other)
    assert [image["id"] for image in labels["images"]] == list(range(1, len(labels["images"]) + 1))
    assert [a["id"] for a in labels["annotations"]] == list(range(1, len(labels["annotations"]) + 1))


def test_an_unreadable_file_system_loses_no_image(source, monkeypatch):
    def broken(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(openimages_stages, "read_header", broken)
    with pytest.raises(UserError, match=r"Input/output error.*same command"):
        run(source)
    monkeypatch.undo()
    run(source)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER.replace("XMax,", "") + "\n", "no column XMax"),
        (HEADER + ",XMin\n", "no column XMin"),
        ("", "no column ImageID"),
        (HEADER + "\n", "no image has both"),
        (
            HEADER + "\n0123456789abcdef,x,/m/000000,1,a,1,0,1,0,0,0,0,0\n",
            r"invalid value 'a'.*download it again",
        ),
        (HEADER + "\n0123456789abcdef,x,/m/000000,1,0.1,0.2,0.1\n", r"Expected 13 columns, got 7.*download it again"),
        (HEADER + "\n" + "x" * (3 << 20), "longer than a megabyte"),
        (HEADER.replace(",", ";") + "\n", "no column ImageID"),
    ],
)
def test_faulty_tables_are_errors(source, text, message):
    table(source).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        run(source)
    assert str(table(source)) in str(caught.value)
    assert not output(source).exists()


def test_a_table_cut_off_in_a_row(source):
    with open(table(source), "r+b") as file:
        file.truncate(table(source).stat().st_size - 140)
    with pytest.raises(UserError, match="cut off"):
        run(source, workers=2)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train/metadata/classes.csv", "", "no class stands in it"),
        ("train/metadata/classes.csv", "/m/1,Cat\n/m/2\n", r"line 2: '/m/2' is not MID,name"),
        ("train/metadata/classes.csv", "/m/1,Cat\n/m/1,Dog\n", "is 'Cat' and 'Dog'"),
        ("train/metadata/classes.csv", "/m/1,Nothing\n", "264 classes that .* does not have: Airplane"),
    ],
)
def test_faulty_class_descriptions(source, name, text, message):
    (source / name).write_text(text)
    with pytest.raises(UserError, match=message):
        run(source)


@pytest.mark.parametrize(
    ("lines", "message"),
    [("", "no class"), ("Cat\nCat\n", "more than once"), ("Dog\n", "1 classes that"), ("Two\n", "give the MID")],
)
def test_faulty_class_lists(source, lines, message):
    (source / "train/metadata/classes.csv").write_text("/m/1,Cat\n/m/2,Two\n/m/3,Two\n")
    (source / "list.txt").write_text(lines)
    with pytest.raises(UserError, match=message):
        run(source, "--classes", source / "list.txt")
