"""The Waymo converter on what is damaged, missing or there twice: each has an outcome, and nothing is silent."""

import csv
import gzip
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from dataprep import waymo
from detcore import UserError
from tests.dataprep import waymo_cases as cases
from tests.dataprep.waymo_cases import CONTEXTS, Box, Frame, Shot, frames_of, run, write_v1, write_v2

FILE = "segment-9_100_000_120_000_with_camera_labels.tfrecord"


def images(out: Path) -> list[str]:
    found = json.loads((out / "annotations/annotations.json").read_text())["images"]
    on_disk = {str(path.relative_to(out / "images")) for path in (out / "images").rglob("*.*")}
    assert on_disk == {image["file_name"] for image in found}, "no file that is not listed, and no half-written one"
    return [image["file_name"] for image in found]


def faults(out: Path) -> list[tuple[str, str, str, str]]:
    with open(out / "waymo-converter.csv", newline="") as file:
        return [tuple(row) for row in csv.reader(file)][1:]


def with_good(tmp_path: Path) -> Path:
    """A folder with one good segment of one frame; what is bad goes beside it."""
    write_v1(tmp_path / "in", frames_of(CONTEXTS[0], 1))
    return tmp_path / "in"


def three() -> list[bytes]:
    return [cases.record(cases.message(frame)) for frame in frames_of(CONTEXTS[1])]


def flipped(data: bytes, at: int) -> bytes:
    at %= len(data)
    return data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]


DAMAGE = {
    "length CRC": (lambda a, b, c: a + flipped(b, 9) + c, 1, "files with a damaged record length", "record 1, byte"),
    "length": (lambda a, b, c: a + flipped(b, 6) + c, 1, "files with a damaged record length", "record 1, byte"),
    "data": (lambda a, b, c: a + flipped(b, 500) + c, 2, "records with a wrong checksum", "record 1, byte"),
    "data CRC": (lambda a, b, c: a + b + flipped(c, -1), 2, "records with a wrong checksum", "record 2, byte"),
    "cut in data": (lambda a, b, c: a + b + c[:-300], 2, "files that end in the middle of a record", "record 2"),
    "cut in the CRC": (lambda a, b, c: a + b + c[:-2], 2, "files that end in the middle of a record", "record 2"),
    "cut in the length": (lambda a, b, c: a + b + c[:5], 2, "files that end in the middle of a record", "record 2"),
    "cut after the length": (lambda a, b, c: a + b + c[:12], 2, "files that end in the middle of a record", "record 2"),
    "trailing bytes": (lambda a, b, c: a + b + c + bytes(40), 3, "files with a damaged record length", "record 3"),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("stride", [1, 2])
def test_damaged_records(tmp_path, name, stride, capsys):
    damage, frames, what, where = DAMAGE[name]
    folder = with_good(tmp_path)
    (folder / FILE).write_bytes(damage(*three()))
    code = run(folder, tmp_path / "out", "--frame-stride", stride)
    if stride == 2 and "checksum" in what and where.startswith("record 1"):
        assert code == 0 and not faults(tmp_path / "out"), "records that nobody wants are not read"
        return
    assert code == 1 and "LOST 1" in capsys.readouterr().out
    (fault,) = faults(tmp_path / "out")
    assert fault[0] == "9_100_000_120_000" and fault[1] == what and fault[2].startswith(where) and fault[3]
    kept = [k for k in (0, 1, 2) if (k < frames if "checksum" not in what else k != int(where[7])) and k % stride == 0]
    times = [int(name.split("/")[1].split("_")[0]) for name in images(tmp_path / "out") if name.startswith("9_")]
    assert sorted(set(times)) == [1_550_000_000_000_000 + 100_000 * k for k in kept]


def tar(data: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        about = tarfile.TarInfo(FILE)
        about.size = len(data)
        file.addfile(about, io.BytesIO(data))
    return out.getvalue()


WRONG = {
    "empty": (b"", "empty files", "copy it again"),
    "stub": (b"stub\r\n", "files that end in the middle of a record", "copy it again"),
    "gzip": (gzip.compress(b"x" * 100), "files with a damaged record length", "gzip"),
    "tar": (tar(b"x" * 100), "files with a damaged record length", "tar file"),
    "page": (b"<!DOCTYPE html><p>AccessDenied", "files with a damaged record length", "web page"),
    "parquet": (b"PAR1" + bytes(100), "files with a damaged record length", "Parquet"),
    "zip": (b"PK\x03\x04" + bytes(100), "files with a damaged record length", "zip"),
    "text": (b"no record at all", "files with a damaged record length", "no TFRecord"),
    "empty record": (cases.record(b""), "records that are no Frame", "''"),
    # Features {feature: {"a": Int64List}} of a tf.Example, which parses as a Frame with an odd name
    "example": (
        cases.record(cases.blob(1, cases.blob(1, cases.blob(1, "a") + cases.blob(2, b"\x1a\0")))),
        "records that are no Frame", "0 images",
    ),
    "cut message": (
        cases.record(cases.message(frames_of(CONTEXTS[1], 1)[0])[:900]), "records that do not parse", "skipped",
    ),
    "noise": (cases.record(bytes(range(1, 255))), "records that do not parse", "skipped"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_files_and_records_of_another_kind(tmp_path, name):
    data, what, detail = WRONG[name]
    folder = with_good(tmp_path)
    (folder / FILE).write_bytes(data)
    assert run(folder, tmp_path / "out") == 1
    (fault,) = faults(tmp_path / "out")
    assert fault[1] == what and detail in fault[3] and len(images(tmp_path / "out")) == 5
    (folder / FILE).write_bytes(b"".join(three()))  # copied again: it alone is converted, and all is well
    assert run(folder, tmp_path / "out") == 0
    assert not faults(tmp_path / "out") and len(images(tmp_path / "out")) == 20


def test_nothing_usable_is_an_error(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / FILE).write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"not written, for there is no image \(1 files that end in the middle"):
        run(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out/annotations").exists()


def one(camera: int = 1, boxes: tuple[Box, ...] | None = (Box(50, 50, 20, 10),), jpeg: bytes | None = None) -> Shot:
    return Shot(camera, boxes, cases.jpeg(*cases.size_of(camera)) if jpeg is None else jpeg)


WHOLE = cases.jpeg(192, 128)
SHOTS = {
    "no JPEG": ((one(), one(2, jpeg=b"<html>")), "damaged images", "6 bytes that are no JPEG"),
    "no bytes": ((one(), one(2, jpeg=b"")), "damaged images", "0 bytes"),
    "cut JPEG": ((one(), one(2, jpeg=WHOLE[:-50])), "damaged images", "end is missing"),
    "cut header": ((one(), one(2, jpeg=WHOLE[:20] + b"\xff\xd9")), "damaged images", "without a size"),
    "another size": (
        (one(), one(2, jpeg=cases.jpeg(128, 192))),
        "another size than calibrated",
        "128x192, not 192x128",
    ),
}


@pytest.mark.parametrize("name", SHOTS)
@pytest.mark.parametrize("write", [write_v1, write_v2])
def test_images_that_cannot_be_used(tmp_path, name, write):
    shots, what, detail = SHOTS[name]
    write(tmp_path / "in", [Frame(CONTEXTS[0], 5, shots)])
    assert run(tmp_path / "in", tmp_path / "out") == 1
    (fault,) = faults(tmp_path / "out")
    assert what in fault[1] and "time 5, FRONT_LEFT" in fault[2] and detail in fault[3]
    assert images(tmp_path / "out") == [f"{CONTEXTS[0]}/5_FRONT.jpg"]
    assert len(json.loads((tmp_path / "out/annotations/annotations.json").read_text())["annotations"]) == 1


@pytest.mark.parametrize("write", [write_v1, write_v2])
def test_the_same_frame_twice(tmp_path, write):
    frame = Frame(CONTEXTS[0], 5, (one(),))
    write(tmp_path / "in", [frame, frame] if write is write_v1 else [Frame(CONTEXTS[0], 5, (one(), one(boxes=())))])
    assert run(tmp_path / "in", tmp_path / "out") == 1
    assert [fault[1] for fault in faults(tmp_path / "out")] == ["images that are there twice"]
    assert images(tmp_path / "out") == [f"{CONTEXTS[0]}/5_FRONT.jpg"]


def labelled(camera: int, count: int) -> bytes:
    return cases.blob(8, cases.number(1, camera) + cases.blob(2, cases.label(Box(50, 50, 20, 10))) * count)


@pytest.mark.parametrize(
    ("shots", "extra", "what", "detail"),
    [
        ((one(), one(boxes=None)), b"", "images that are there twice", "second of FRONT is left out"),
        ((one(), one(7, None, WHOLE)), b"", "images of an unknown camera", "camera 7"),
        ((one(), one(0, None, WHOLE)), b"", "images of an unknown camera", "camera 0"),
        ((one(),), labelled(1, 3), "cameras whose labels are there twice", "second 3 labels of camera 1"),
        ((one(),), labelled(4, 2), "labels without their image", "2 of camera 4"),
    ],
)
def test_frames_that_contradict_themselves(tmp_path, shots, extra, what, detail):
    (tmp_path / "in").mkdir()
    data = cases.message(Frame(CONTEXTS[0], 5, shots), sizes=False, extra=extra)
    (tmp_path / "in" / FILE).write_bytes(cases.record(data))
    assert run(tmp_path / "in", tmp_path / "out") == 1
    (fault,) = faults(tmp_path / "out")
    assert fault[1] == what and fault[2] == "record 0, byte 0" and detail in fault[3]
    assert images(tmp_path / "out") == [f"{CONTEXTS[0]}/5_FRONT.jpg"]
    assert len(json.loads((tmp_path / "out/annotations/annotations.json").read_text())["annotations"]) == 1


def without(path: Path, column: str) -> None:
    parquet.write_table(parquet.read_table(path).drop_columns([column]), path)


def changed(path: Path, column: str, value: object, row: int) -> None:
    table = parquet.read_table(path)
    values = table.column(column).to_pylist()
    values[row] = value
    at = table.schema.get_field_index(column)
    parquet.write_table(table.set_column(at, column, pa.array(values, table.schema.field(column).type)), path)


COMPONENTS = {
    "no camera_image": (lambda paths: paths["camera_image"].unlink(), "without their camera_image file", ""),
    "empty": (lambda paths: paths["camera_box"].write_bytes(b""), "empty files", "camera_box"),
    "page": (lambda paths: paths["camera_box"].write_bytes(b"<html>" * 9), "cannot be read as Parquet", "camera_box"),
    "cut": (
        lambda paths: paths["camera_image"].write_bytes(paths["camera_image"].read_bytes()[:-99]),
        "cannot be read as Parquet", "camera_image",
    ),
    "no column": (
        lambda paths: without(paths["camera_image"], "[CameraImageComponent].image"),
        "without a column", "camera_image",
    ),
    "no box column": (
        lambda paths: without(paths["camera_box"], "[CameraBoxComponent].box.size.x"), "without a column", "camera_box",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPONENTS)
def test_damaged_components(tmp_path, name):
    """Images whose labels cannot be read are not taken for images without objects: the segment is left out."""
    damage, what, where = COMPONENTS[name]
    write_v2(tmp_path / "in", frames_of(CONTEXTS[0], 1))
    damage(write_v2(tmp_path / "in", frames_of(CONTEXTS[1], 1)))
    assert run(tmp_path / "in", tmp_path / "out") == 1
    (fault,) = faults(tmp_path / "out")
    assert fault[0] == CONTEXTS[1] and what in fault[1] and fault[2] == where and fault[3]
    assert len(images(tmp_path / "out")) == 5


def test_segments_that_nobody_labelled(tmp_path, capsys):
    write_v2(tmp_path / "in", frames_of(CONTEXTS[0], 1))["camera_box"].unlink()
    assert run(tmp_path / "in", tmp_path / "out") == 0
    assert len(images(tmp_path / "out")) == 5 and "5  images without labels (" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"there is no image \(images without labels, left out\)"):
        run(tmp_path / "in", tmp_path / "out2", "--labelled-only")


def test_rows_that_do_not_fit_together(tmp_path):
    paths = write_v2(tmp_path / "in", frames_of(CONTEXTS[0], 1))
    changed(paths["camera_box"], "key.camera_name", 3, 0)
    changed(paths["camera_box"], "key.frame_timestamp_micros", 77, 1)
    assert run(tmp_path / "in", tmp_path / "out") == 1
    (fault,) = faults(tmp_path / "out")
    assert fault[1:3] == ("labels without their image", fault[2]) and fault[2].startswith("time 77, camera ")
    named = write_v2(tmp_path / "named", frames_of(CONTEXTS[0], 1), named=True)
    changed(named["camera_image"], "key.camera_name", "REAR", 0)
    assert run(tmp_path / "named", tmp_path / "out2") == 1
    assert {fault[1] for fault in faults(tmp_path / "out2")} >= {"images of an unknown camera"}


def test_values_that_make_no_sense(tmp_path):
    """Nulls, texts and names that lead out of the folder end their segment, not the run."""
    write_v2(tmp_path / "in", frames_of(CONTEXTS[0], 1))
    paths = write_v2(tmp_path / "in", frames_of(CONTEXTS[1], 1))
    times, contexts = "key.frame_timestamp_micros", "key.segment_context_name"
    for component, column, value, what in (
        ("camera_image", times, None, "values of another type"),
        ("camera_image", contexts, None, "values of another type"),
        ("camera_image", contexts, "../../x", "name can't be a folder's"),
        ("camera_box", times, None, "labels without their image"),
    ):
        before = paths[component].read_bytes()
        changed(paths[component], column, value, 0)
        assert run(tmp_path / "in", tmp_path / "out") == 1
        (fault,) = faults(tmp_path / "out")
        assert fault[0] == CONTEXTS[1] and what in fault[1] and fault[3]
        paths[component].write_bytes(before)
    assert run(tmp_path / "in", tmp_path / "out") == 0 and len(images(tmp_path / "out")) == 10


def test_a_file_that_goes_away_meanwhile(tmp_path, monkeypatch):
    folder = with_good(tmp_path)
    found = waymo.find_sources(folder, "validation")
    monkeypatch.setattr(waymo, "find_sources", lambda *_: found)
    found[0].records.unlink()
    with pytest.raises(UserError, match="was there and is gone; give the command again"):
        run(folder, tmp_path / "out")


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(UserError, match="no such folder; check --tf-dir"):
        run(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "segment-1_$folder$").write_bytes(b"stub\r\n")
    (tmp_path / "in" / f"{FILE}_.gstmp").write_bytes(b"half a copy")
    with pytest.raises(UserError, match=r"holds neither .* check --tf-dir"):
        run(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "training_0000.tar").write_bytes(tar(b""))
    with pytest.raises(UserError, match=r"unpack the tar files, as training_0000\.tar"):
        run(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / FILE).symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="a link to nothing"):
        run(tmp_path / "in", tmp_path / "out")
    write_v1(tmp_path / "splits" / "training", frames_of(CONTEXTS[0], 1))
    with pytest.raises(UserError, match="holds training and not validation; choose with --dataset"):
        run(tmp_path / "splits", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_same_segment_in_two_files(tmp_path):
    frames = frames_of(CONTEXTS[0], 1)
    write_v1(tmp_path / "in" / "a", frames)
    write_v1(tmp_path / "in" / "b", frames)
    with pytest.raises(UserError, match="are the same segment; remove one of them"):
        run(tmp_path / "in", tmp_path / "out")
    write_v1(tmp_path / "in2", frames)
    second = write_v1(tmp_path / "in2", frames, "other.tfrecord")
    with pytest.raises(UserError, match=r"hold the same segment.*remove one of the two and .*/other\.piece"):
        run(tmp_path / "in2", tmp_path / "out")
    second.unlink()
    (tmp_path / "out/.waymo_to_coco/other.piece").unlink()
    assert run(tmp_path / "in2", tmp_path / "out") == 0 and len(images(tmp_path / "out")) == 5


def test_packages_that_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(waymo.waymo_records, "PACKAGES", {"no_such_module.at_all": "no-such", "json": "json"})
    with pytest.raises(UserError, match="has no no-such: pip install no-such"):
        run(with_good(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
