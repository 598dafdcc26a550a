"""The Waymo converter: framing, messages, v1 and v2 of the same content, options, verification, training's reader."""

import json
import math
from pathlib import Path

import pytest

from dataprep import verify, waymo_records
from dataprep.waymo_records import Fault, masked_crc
from detcore import UserError
from detcore.data.coco import CocoIndex
from tests.dataprep import waymo_cases as cases
from tests.dataprep.waymo_cases import CONTEXTS, NAMES, ORDER, Box, Frame, Shot, frames_of, run, write_v1, write_v2

TINY = bytes.fromhex(
    "420000000000000079f36eaa0a050a037365671001220608011202ffd8422f0801122b0a24090000000000005940110000000000004940210000"
    "00000000344029000000000000444018042201617389fe67"
)


def result(out: Path) -> dict:
    return json.loads((out / "annotations" / "annotations.json").read_text())


def both_segments(folder: Path) -> list[list[Frame]]:
    """Two segments of three frames as v1 files."""
    segments = [frames_of(context, seed=seed) for seed, context in enumerate(CONTEXTS)]
    for frames in segments:
        write_v1(folder, frames)
    return segments


@pytest.mark.parametrize(
    ("data", "crc"),
    [(b"123456789", 0xC78AB0E5), (b"", 0xA282EAD8), (bytes(32), None), (b"\xff" * 32, None)],
)
def test_checksum_against_published_vectors(data, crc):
    plain = {bytes(32): 0x8A9136AA, b"\xff" * 32: 0x62A8AB43, b"123456789": 0xE3069283, b"": 0}[data]
    assert cases.crc32c(data) == plain
    expected = ((plain >> 15 | plain << 17 & 0xFFFFFFFF) + 0xA282EAD8) % 2**32 if crc is None else crc
    assert masked_crc(data) == expected == int.from_bytes(cases.masked(data), "little")


def test_records_and_a_frame_in_hex(tmp_path):
    """Written by protobuf and TensorFlow's framing, not here."""
    path = tmp_path / "x.tfrecord"
    path.write_bytes(bytes.fromhex("000000000000000029039807d8ea82a20300000000000000b099490e6162636e57f121"))
    assert [item[0] for item in waymo_records.records(path)] == [b"", b"abc"]
    path.write_bytes(TINY)
    (picture,) = waymo_records.pictures(path)
    assert picture[:6] == ("seg", 1, 0, 1, 1, b"\xff\xd8") and picture.size is None
    assert picture.labels == [(4, 100.0, 50.0, 40.0, 20.0, 0, "a")]
    assert cases.record(TINY[12:-4]) == TINY


def test_tiny_frame_as_coco(tmp_path):
    """[80, 40, 40, 20]: length goes along x, width along y, and type 4 is category 3."""
    jpeg = cases.jpeg(192, 128)
    label = cases.blob(1, bytes.fromhex(TINY.hex()[TINY.hex().index("0900000000000059") :][:72]))
    label += cases.number(3, 4) + cases.blob(4, "a")
    data = cases.blob(1, cases.blob(1, "seg")) + cases.number(2, 1)
    data += cases.blob(4, cases.number(1, 1) + cases.blob(2, jpeg))
    data += cases.blob(8, cases.number(1, 1) + cases.blob(2, label))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tfrecord").write_bytes(cases.record(data))
    assert run(tmp_path / "in", tmp_path / "out") == 0
    found = result(tmp_path / "out")
    assert found["annotations"] == [
        {
            "id": 1, "image_id": 1, "category_id": 3, "bbox": [80, 40, 40, 20], "area": 800, "iscrowd": 0,
            "difficulty": 1, "track_id": "a",
        }
    ]  # fmt: skip
    assert found["images"][0]["file_name"] == "seg/1_FRONT.jpg"


def expected(segments: list[list[Frame]]) -> tuple[list, list]:
    """Images and annotations of clean content, worked out from the cases."""
    images, annotations = [], []
    for frames in sorted(segments, key=lambda frames: frames[0].context):
        for frame in frames:
            for shot in sorted(frame.shots):
                width, height = cases.size_of(shot.camera)
                name = f"{frame.context}/{frame.time}_{NAMES[shot.camera - 1]}.jpg"
                images.append((len(images) + 1, name, width, height, shot.jpeg))
                for box in sorted(shot.boxes or (), key=lambda box: box.id):
                    place = [box.x - box.length / 2, box.y - box.width / 2, box.length, box.width]
                    category = {1: 1, 2: 2, 4: 3}[box.kind]
                    annotations.append((len(annotations) + 1, len(images), category, place, box.level or 1, box.id))
    return images, annotations


def test_both_versions_give_the_same(tmp_path, capsys):
    segments = both_segments(tmp_path / "v1")
    for frames in segments:
        write_v2(tmp_path / "v2", frames)
        write_v2(tmp_path / "named" / "validation", frames, named=True)
    for version in ("v1", "v2", "named"):
        out = tmp_path / f"out_{version}"
        assert run(tmp_path / version, out) == 0
        found = result(out)
        images, annotations = expected(segments)
        assert [(i["id"], i["file_name"], i["width"], i["height"]) for i in found["images"]] == [i[:4] for i in images]
        assert [(out / "images" / name).read_bytes() for _, name, *_ in images] == [i[4] for i in images]
        names = ("id", "image_id", "category_id", "bbox", "difficulty", "track_id")
        assert [tuple(a[name] for name in names) for a in found["annotations"]] == annotations
        assert all(a["area"] == a["bbox"][2] * a["bbox"][3] and a["iscrowd"] == 0 for a in found["annotations"])
        assert found["images"][4]["camera"] == "SIDE_RIGHT" and found["images"][4]["segment"] == CONTEXTS[0]
    texts = {(tmp_path / f"out_{v}/annotations/annotations.json").read_bytes() for v in ("v1", "v2", "named")}
    assert len(texts) == 1 and b"Waymo LLC" in texts.pop()
    assert "images without labels" in capsys.readouterr().out


def test_the_rest_of_the_project_reads_it(tmp_path, capsys):
    both_segments(tmp_path / "in")
    for split, name in (("training", "train"), ("validation", "val")):
        out = tmp_path / "waymo" / split
        run(tmp_path / "in", out, "--dataset", split)
        index = CocoIndex.open(out / "annotations/annotations.json", out / "images", cache_dir=tmp_path)
        assert len(index) == 30 and index.category_ids.tolist() == [1, 2, 3] and not len(index.missing), name
        assert index.counts["boxes clipped"] == index.counts["boxes dropped"] == 0
    words = [tmp_path / "waymo", "--full", "--partial", "--workers", 1, "--cache-dir", tmp_path / "cache"]
    (tmp_path / "cache").mkdir()
    assert verify.main(list(map(str, words))) == 0
    assert "problem" not in capsys.readouterr().out.split("\n\n")[-1]


def test_options(tmp_path, capsys):
    segments = both_segments(tmp_path / "in")
    run(tmp_path / "in", tmp_path / "a", "--cameras", "SIDE_LEFT", "FRONT", "--frame-stride", 2, "--seg-max", 1)
    images = result(tmp_path / "a")["images"]
    assert [i["camera"] for i in images] == ["FRONT", "SIDE_LEFT"] * 2
    assert [i["timestamp_micros"] for i in images[::2]] == [segments[0][k].time for k in (0, 2)]
    assert {i["segment"] for i in images} == {CONTEXTS[0]}
    run(tmp_path / "in", tmp_path / "b", "--labelled-only")
    assert len(result(tmp_path / "b")["images"]) == 28 and "images without labels, left out" in capsys.readouterr().out
    run(tmp_path / "in", tmp_path / "a", "--cameras", "SIDE_LEFT", "FRONT", "--frame-stride", 2, "--seg-min", 1)
    assert len(result(tmp_path / "a")["images"]) == 8, "added to what was there"
    with pytest.raises(UserError, match="choose none of the 2 files"):
        run(tmp_path / "in", tmp_path / "c", "--seg-min", 2)
    assert not (tmp_path / "c").exists()


def test_legacy(tmp_path):
    """Names, ids and raw boxes of the original: the place in the frame, not the camera; frames count from 1."""
    frame = frames_of(CONTEXTS[1], 2)
    shots = tuple(shot._replace(boxes=(Box(190, 30, 40, 20),)) for shot in frame[1].shots)
    write_v1(tmp_path / "in", frames_of(CONTEXTS[0], 1))
    write_v1(tmp_path / "in", [frame[0], frame[1]._replace(shots=shots)])
    assert run(tmp_path / "in", tmp_path / "out", "--legacy") == 0
    found = result(tmp_path / "out")
    by_id = {image["id"]: image for image in found["images"]}
    assert len(by_id) == 15 and by_id[10000203]["file_name"] == "1_2_3.jpg"
    assert by_id[10000203]["camera"] == NAMES[ORDER[2] - 1] == "SIDE_LEFT"
    boxes = [a["bbox"] for a in found["annotations"] if a["image_id"] == 10000203]
    assert boxes == [[170, 20, 40, 20]]
    assert min(a["id"] for a in found["annotations"]) == 1
    write_v2(tmp_path / "v2", frame)
    with pytest.raises(UserError, match="Parquet files do not keep"):
        run(tmp_path / "v2", tmp_path / "x", "--legacy")


BOXES = [
    (Box(10, 30, 40, 20), [0, 20, 30, 20], "boxes clipped to their image"),
    (Box(185, 120, 20, 30), [175, 105, 17, 23], "boxes clipped to their image"),
    (Box(96, 64, 300, 200), [0, 0, 192, 128], "boxes clipped to their image"),
    (Box(96.1, 64, 191.8, 128), [0.2, 0, 191.8, 128], None),
    (Box(-20, 30, 40.5, 20), None, "boxes outside of their image, left out"),
    (Box(500, 500, 40, 20), None, "boxes outside of their image, left out"),
    (Box(50, 50, 0.5, 0.5), [49.75, 49.75, 0.5, 0.5], None),
    (Box(50, 50, 0, 20), None, "boxes without a size or place in pixels, left out"),
    (Box(50, 50, 20, -3), None, "boxes without a size or place in pixels, left out"),
    (Box(math.nan, 50, 20, 3), None, "boxes without a size or place in pixels, left out"),
    (Box(50, 50, math.inf, 3), None, "boxes without a size or place in pixels, left out"),
    (Box(50, 50, 20, 10, 0), None, "labels of type 0, left out"),
    (Box(50, 50, 20, 10, 3), None, "labels of type 3 (sign), left out"),
    (Box(50, 50, 20, 10, 9), None, "labels of type 9, left out"),
    (Box(50, 50, 20, 10, 2, "t", 2), [40, 45, 20, 10], "boxes of LEVEL_2"),
]


@pytest.mark.parametrize(("box", "bbox", "told"), BOXES)
@pytest.mark.parametrize("write", [write_v1, write_v2])
def test_each_kind_of_box(tmp_path, capsys, write, box, bbox, told):
    good = Box(100, 60, 20, 10, 1, "good")
    shot = Shot(1, (box, good), cases.jpeg(192, 128))
    write(tmp_path / "in", [Frame(CONTEXTS[0], 5, (shot,))])
    assert run(tmp_path / "in", tmp_path / "out") == 0
    found = {a["track_id"]: a for a in result(tmp_path / "out")["annotations"]}
    assert found.pop("good")["bbox"] == [90, 55, 20, 10]
    assert [a["bbox"] for a in found.values()] == ([pytest.approx(bbox, abs=1e-9)] if bbox else [])
    out = capsys.readouterr().out
    assert (f"1  {told}" in out) if told else all(word not in out for word in ("left out", "clipped", "LEVEL"))


def test_labels_without_box_and_3d_ones(tmp_path):
    shot = Shot(1, (), cases.jpeg(192, 128))
    three_d = cases.blob(1, b"".join(cases.double(k, 3.0) for k in (1, 2, 3, 4, 5, 6, 7))) + cases.number(3, 1)
    for name, label in (("none", cases.number(3, 1)), ("3d", three_d)):
        extra = cases.blob(8, cases.number(1, 1) + cases.blob(2, label))
        data = cases.message(Frame(CONTEXTS[0], 5, (shot._replace(boxes=None),)), extra=extra)
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.tfrecord").write_bytes(cases.record(data))
        assert run(tmp_path / name, tmp_path / f"out_{name}") == 0
        assert result(tmp_path / f"out_{name}")["annotations"] == []
        picture = next(waymo_records.pictures(tmp_path / name / "a.tfrecord"))
        assert not isinstance(picture, Fault) and len(picture.labels) == 1
