"""Waymo Open Dataset v1: camera images and their labels out of TFRecord files, without TensorFlow.

Framing: records back to back, each its length (uint64), the masked CRC-32C of those eight bytes, the data and its
masked CRC-32C, all little-endian. Data: the message Frame of waymo_open_dataset/dataset.proto (proto2), of which the
fields below are read; all others, lidar above all, are passed over, known or not. Enums are read as int32 and texts as
bytes, which is the same on the wire.
"""

import re
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

CAMERAS = ("FRONT", "FRONT_LEFT", "FRONT_RIGHT", "SIDE_LEFT", "SIDE_RIGHT")  # the camera names 1 to 5
PACKAGES = {"google_crc32c": "google-crc32c", "google.protobuf": "protobuf"}  # modules that this file needs
CONTEXT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")  # a segment's name, which becomes a folder
_LENGTH, _CRC = struct.Struct("<Q"), struct.Struct("<I")
_KNOWN = (
    (b"\x1f\x8b", "it is compressed with gzip: unpack it"),
    (b"PAR1", "it is a Parquet file: --tf-dir takes the folder with camera_image in it"),
    (b"PK\x03\x04", "it is a zip file: unpack it"),
    (b"<", "it looks like a web page: often a server's error message"),
)
_SCHEMA = """
Frame: context 1 Context, timestamp_micros 2 int64, images 4 CameraImage*, camera_labels 8 CameraLabels*
Context: name 1 bytes, camera_calibrations 2 CameraCalibration*
CameraCalibration: name 1 int32, width 4 int32, height 5 int32
CameraImage: name 1 int32, image 2 bytes
CameraLabels: name 1 int32, labels 2 Label*
Label: box 1 Box, type 3 int32, id 4 bytes, detection_difficulty_level 5 int32
Box: center_x 1 double, center_y 2 double, center_z 3 double, width 4 double, length 5 double
"""


class Label(NamedTuple):
    """One 2D box: pixels of the stored image, `length` along x and `width` along y; NaN where the file has none."""

    kind: int  # 1 vehicle, 2 pedestrian, 3 sign, 4 cyclist
    center_x: float
    center_y: float
    length: float
    width: float
    level: int  # of difficulty, as stored: 0 not set, 1, 2
    track: str


class Picture(NamedTuple):
    """One camera's image of one frame. labels: None where nobody labelled it; size: calibrated width, height, or None.

    frame: the frame's index in its file (v2: segment) from 0; position: the image's place in the frame from 1.
    """

    context: str
    timestamp: int  # microseconds
    frame: int
    camera: int  # 1 to 5, see CAMERAS
    position: int
    jpeg: bytes
    labels: list[Label] | None
    size: tuple[int, int] | None


class Fault(NamedTuple):
    """Something that was there and could not be converted: what kind, where in the file, and what was seen."""

    what: str
    where: str
    detail: str


def masked_crc(data: bytes) -> int:
    """The checksum of TFRecords: CRC-32C (Castagnoli), rotated and offset so that a CRC of CRCs stays meaningful."""
    import google_crc32c

    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def pictures(path: Path, stride: int = 1) -> Iterator[Picture | Fault]:
    """The images of every stride-th record of a file, in its order, and what is wrong with it."""
    for item in records(path, stride):
        if isinstance(item, Fault):
            yield item
        else:
            yield from parse(*item)


def records(path: Path, stride: int = 1) -> Iterator[tuple[bytes, int, str] | Fault]:
    """(data, number from 0, place in words) of every stride-th record. Nothing is trusted after a bad length."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            yield from _records(file, size, stride)
    except OSError as error:
        yield Fault("files that cannot be read", "", error.strerror or str(error))


def _records(file: BinaryIO, size: int, stride: int) -> Iterator[tuple[bytes, int, str] | Fault]:
    if not size:
        yield Fault("empty files", "", "copy it again")
    at = number = 0
    while at < size:
        where = f"record {number}, byte {at}"
        head = file.read(12)
        left = size - at - 16
        if len(head) == 12 and masked_crc(head[:8]) != _CRC.unpack_from(head, 8)[0]:
            yield Fault("files with a damaged record length", where, _what_it_is(file, at, head))
            return
        length = _LENGTH.unpack_from(head)[0] if len(head) == 12 else 0
        if length > left or left < 0:
            yield Fault("files that end in the middle of a record", where, "what follows is lost; copy it again")
            return
        if number % stride:
            file.seek(length + 4, 1)
        else:
            data, crc = file.read(length), file.read(4)
            if len(data) + len(crc) < length + 4:
                yield Fault("files that end in the middle of a record", where, "it became shorter while it was read")
                return
            if masked_crc(data) == _CRC.unpack(crc)[0]:
                yield data, number, where
            else:
                yield Fault("records with a wrong checksum", where, "the record is skipped; copy the file again")
        at += length + 16
        number += 1


def _what_it_is(file: BinaryIO, at: int, head: bytes) -> str:
    if at == 0:
        file.seek(257)
        if file.read(5) == b"ustar":
            return "it is a tar file: unpack it"
        return next((told for start, told in _KNOWN if head.startswith(start)), "it is no TFRecord file")
    return "what follows is lost; copy it again"


@cache
def frame_class() -> type:
    """The protobuf class of Frame, built from _SCHEMA."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="waymo.proto", package="waymo", syntax="proto2")
    for line in _SCHEMA.strip().splitlines():
        name, fields = line.split(": ")
        message = file.message_type.add(name=name)
        for field in fields.split(", "):
            name, number, kind = field.split()
            label = kinds.LABEL_REPEATED if kind.endswith("*") else kinds.LABEL_OPTIONAL
            added = message.field.add(name=name, number=int(number), label=label)
            if kind[0].isupper():
                added.type, added.type_name = kinds.TYPE_MESSAGE, f".waymo.{kind.rstrip('*')}"
            else:
                added.type = kinds.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("waymo.Frame"))


def parse(data: bytes, number: int, where: str) -> Iterator[Picture | Fault]:
    """The images of one record, which must be a Frame; others often parse as one too: their names tell them."""
    from google.protobuf.message import DecodeError

    frame = frame_class()()
    try:
        frame.ParseFromString(data)
    except DecodeError as error:
        yield Fault("records that do not parse", where, f"skipped: {error}")
        return
    context = frame.context.name.decode("ascii", "replace")
    if not CONTEXT.fullmatch(context) or not frame.images:
        yield Fault("records that are no Frame", where, f"segment name {context[:40]!r}, {len(frame.images)} images")
        return
    labels: dict[int, list[Label]] = {}
    for camera in frame.camera_labels:
        if camera.name in labels:
            what = "cameras whose labels are there twice"
            yield Fault(what, where, f"the second {len(camera.labels)} labels of camera {camera.name} are left out")
        else:
            labels[camera.name] = [_label(label) for label in camera.labels]
    sizes = {found.name: (found.width, found.height) for found in frame.context.camera_calibrations}
    seen = set()
    for position, image in enumerate(frame.images, 1):
        if not 1 <= image.name <= len(CAMERAS):
            yield Fault("images of an unknown camera", where, f"camera {image.name}")
        elif image.name in seen:
            yield Fault("images that are there twice", where, f"the second of {CAMERAS[image.name - 1]} is left out")
        else:
            about = (context, frame.timestamp_micros, number, image.name, position)
            yield Picture(*about, image.image, labels.get(image.name), sizes.get(image.name))
        seen.add(image.name)
    for name in sorted(labels.keys() - seen):
        if labels[name]:
            yield Fault("labels without their image", where, f"{len(labels[name])} of camera {name}")


def _label(label: Any) -> Label:
    box, nothing = label.box, float("nan")
    sides = (box.center_x, box.center_y, box.length, box.width) if label.HasField("box") else (nothing,) * 4
    if box.HasField("center_z"):  # a 3D label, whose numbers are metres
        sides = (nothing,) * 4
    return Label(label.type, *sides, label.detection_difficulty_level, label.id.decode("utf-8", "replace"))
