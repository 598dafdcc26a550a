"""Waymo data sets for the tests, by writers that share no line with the readers.

The wire format, the framing and the checksum are written out here (CRC-32C bit by bit), so that reader and writer do
not share an error. All content is generated; nothing of the real data set is here.
"""

import io
import struct
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as parquet
from PIL import Image

from dataprep import waymo

CONTEXTS = ("10203656353524179475_7625_000_7645_000", "9_100_000_120_000")
NAMES = ("FRONT", "FRONT_LEFT", "FRONT_RIGHT", "SIDE_LEFT", "SIDE_RIGHT")
ORDER = (1, 2, 4, 3, 5)  # of the cameras in the one real frame that is public


class Box(NamedTuple):
    """A label; x, y: its centre."""

    x: float
    y: float
    length: float
    width: float
    kind: int = 1
    id: str = "a"
    level: int | None = None


class Shot(NamedTuple):
    """One camera's image and labels; boxes None: nobody labelled it."""

    camera: int
    boxes: tuple[Box, ...] | None
    jpeg: bytes


class Frame(NamedTuple):
    context: str
    time: int
    shots: tuple[Shot, ...]


def crc32c(data: bytes) -> int:
    """Castagnoli, reflected, a bit at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return (((crc >> 15) + (crc % 2**15) * 2**17 + 0xA282EAD8) % 2**32).to_bytes(4, "little")


def record(data: bytes) -> bytes:
    head = len(data).to_bytes(8, "little")
    return head + masked(head) + data + masked(data)


def varint(value: int) -> bytes:
    value %= 2**64
    out = b""
    while value > 127:
        out += bytes([value % 128 + 128])
        value //= 128
    return out + bytes([value])


def number(field: int, value: int) -> bytes:
    return varint(field * 8) + varint(value)


def blob(field: int, value: bytes | str) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return varint(field * 8 + 2) + varint(len(value)) + value


def double(field: int, value: float) -> bytes:
    return varint(field * 8 + 1) + struct.pack("<d", value)


@cache
def jpeg(width: int, height: int, seed: int = 0) -> bytes:
    """A small picture, another one for each seed."""
    out = io.BytesIO()
    Image.radial_gradient("L").rotate(7 * seed).resize((width, height)).convert("RGB").save(out, "JPEG", quality=30)
    return out.getvalue()


def size_of(camera: int) -> tuple[int, int]:
    return (192, 89) if camera > 3 else (192, 128)


def label(box: Box) -> bytes:
    sides = double(1, box.x) + double(2, box.y) + double(4, box.width) + double(5, box.length)
    level = b"" if box.level is None else number(5, box.level)
    return blob(1, sides) + number(3, box.kind) + blob(4, box.id) + level


def message(frame: Frame, *, sizes: bool = True, extra: bytes = b"") -> bytes:
    """A Frame with unknown fields, lasers and projected lidar labels, which must not be read."""
    context = blob(1, frame.context)
    for shot in frame.shots if sizes else ():
        width, height = size_of(shot.camera)
        context += blob(2, number(1, shot.camera) + double(2, 2059.5) + number(4, width) + number(5, height))
    out = blob(1, context) + number(2, frame.time)
    for shot in frame.shots:
        out += blob(4, number(1, shot.camera) + blob(2, shot.jpeg) + double(5, 1.5))
    out += blob(5, bytes(range(256)) * 4)
    projected = Box(50, 50, 60, 60, 3, "projected")
    for shot in frame.shots:
        if shot.boxes is not None:
            out += blob(8, number(1, shot.camera) + b"".join(blob(2, label(box)) for box in shot.boxes))
        out += blob(9, number(1, shot.camera) + blob(2, label(projected)))
    return out + blob(1000, b"new") + number(1001, 7) + extra


def frames_of(context: str, count: int = 3, seed: int = 0) -> list[Frame]:
    """`count` frames with five cameras. FRONT_RIGHT has an empty entry, SIDE_RIGHT of the first frame none at all."""
    found = []
    for k in range(count):
        shots = []
        for camera in ORDER:
            width, height = size_of(camera)
            boxes: tuple[Box, ...] | None = (
                Box(40.25 + k, 30, 40, 20, 1, f"v{seed}{k}"),
                Box(width - 8, height - 10, 16, 20, 2, f"p{seed}{k}", 2),
                Box(90, 50.5, 10, 25, 4, f"c{seed}{k}", 1),
            )
            boxes = () if camera == 3 else None if camera == 5 and k == 0 else boxes[: 1 + (camera + k) % 3]
            shots.append(Shot(camera, boxes, jpeg(width, height, seed + k * 5 + camera)))
        found.append(Frame(context, 1_550_000_000_000_000 + 100_000 * k, tuple(shots)))
    return found


def write_v1(folder: Path, frames: list[Frame], name: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (name or f"segment-{frames[0].context}_with_camera_labels.tfrecord")
    path.write_bytes(b"".join(record(message(frame)) for frame in frames))
    return path


def write_v2(folder: Path, frames: list[Frame], *, named: bool = False) -> dict[str, Path]:
    """The three components of a segment, rows in another order, with a column that nobody knows."""
    key = {"key.segment_context_name": [], "key.frame_timestamp_micros": [], "key.camera_name": []}
    images = {name: [] for name in (*key, "[CameraImageComponent].image")}
    box = "[CameraBoxComponent]."
    names = ("box.center.x", "box.center.y", "box.size.x", "box.size.y", "type", "difficulty_level.detection")
    boxes = {name: [] for name in (*key, "key.camera_object_id", *(box + name for name in names))}
    for frame in frames:
        for shot in frame.shots:
            keys = (frame.context, frame.time, NAMES[shot.camera - 1] if named else shot.camera)
            for column, value in zip(images.values(), (*keys, shot.jpeg)):
                column.append(value)
            for b in shot.boxes or ():
                values = (*keys, b.id, b.x, b.y, b.length, b.width, b.kind, b.level)
                for column, value in zip(boxes.values(), values):
                    column.append(value)
    cameras = {shot.camera: size_of(shot.camera) for shot in frames[0].shots}
    sizes = {
        "key.segment_context_name": [frames[0].context] * len(cameras),
        "key.camera_name": [NAMES[camera - 1] if named else camera for camera in cameras],
        "[CameraCalibrationComponent].width": [width for width, _ in cameras.values()],
        "[CameraCalibrationComponent].height": [height for _, height in cameras.values()],
    }
    types = {"type": pa.int8(), "difficulty_level.detection": pa.int8()}
    paths = {}
    for component, columns in (("camera_image", images), ("camera_box", boxes), ("camera_calibration", sizes)):
        arrays = {}
        for name, values in columns.items():
            kind = pa.float64() if ".box." in name else types.get(name.removeprefix(box))
            kind = pa.int8() if name == "key.camera_name" and not named else kind
            arrays[name] = pa.array(values[1::2] + values[::2], kind)
        arrays["index"] = pa.array([str(i) for i in range(len(values))])
        path = paths[component] = folder / component / f"{frames[0].context}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.table(arrays), path, compression="none")
    return paths


def run(source: Path, out: Path, *options: object) -> int:
    """The command, in this process, one worker unless `options` say otherwise."""
    words = ["--tf-dir", source, "--out-dir", out, "--workers", 1, *options]
    return waymo.main(list(map(str, words)))
