"""Waymo Open Dataset v2: camera images and their labels out of Parquet files, one for each segment and component.

camera_image holds the JPEG files, camera_box the 2D boxes, camera_calibration, if it is there, the sizes. Rows may come
in any order and with more columns; the camera may be a number or a name. The published files keep a segment's images in
one page of some 330 MB, which Arrow decodes at once: with the file mapped, a process takes 0.4 GB, whatever the number
of segments.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataprep.waymo_records import CAMERAS, CONTEXT, Fault, Label, Picture

PACKAGES = {"pyarrow": "pyarrow"}
_KEY = ("key.segment_context_name", "key.frame_timestamp_micros", "key.camera_name")
_IMAGE = "[CameraImageComponent].image"
SIDES = tuple(f"[CameraBoxComponent].box.{name}" for name in ("center.x", "center.y", "size.x", "size.y"))
_BOX = (
    "[CameraBoxComponent].type", *SIDES, "[CameraBoxComponent].difficulty_level.detection", "key.camera_object_id",
)  # fmt: skip
_SIZE = ("[CameraCalibrationComponent].width", "[CameraCalibrationComponent].height")
_AT_ONCE = 8  # images that are Python objects at a time
_Key = tuple[str, int, int]  # segment, microseconds, camera


class _Unusable(Exception):
    """A file that cannot be used; args are those of a Fault."""


def pictures(files: dict[str, Path], stride: int = 1) -> Iterator[Picture | Fault]:
    """The images of every stride-th frame of a segment, in the file's order, and what is wrong with it.

    files: the segment's file of each component that is there. Without camera_box nobody labelled the segment.
    """
    try:
        yield from _pictures(files, stride)
    except _Unusable as error:
        yield Fault(*error.args)
    except (TypeError, ValueError) as error:  # a null or a text where a number belongs
        yield Fault("Parquet files with values of another type", "", str(error))


def _pictures(files: dict[str, Path], stride: int) -> Iterator[Picture | Fault]:
    import pyarrow as pa

    if "camera_image" not in files:
        raise _Unusable("segments without their camera_image file", "", f"only {', '.join(files)} is there")
    table = _open(files["camera_image"], (*_KEY, _IMAGE))
    boxes = _boxes(files["camera_box"]) if "camera_box" in files else None
    sizes = _sizes(files["camera_calibration"]) if "camera_calibration" in files else {}
    contexts, times, _ = map(set, _read(table, files["camera_image"], _KEY))
    unusable = [context for context in contexts if not CONTEXT.fullmatch(context)]
    if unusable:
        raise _Unusable("segments whose name can't be a folder's", "camera_image", repr(unusable[0]))
    frames = {time: frame for frame, time in enumerate(sorted(times))}
    seen = set()
    try:
        for batch in table.iter_batches(_AT_ONCE, columns=[*_KEY, _IMAGE], use_threads=False):
            columns = (batch.column(name) for name in (*_KEY, _IMAGE))
            for context, time, camera, jpeg in zip(*columns):
                frame = frames[time.as_py()]
                key = (context.as_py(), time.as_py(), _camera(camera.as_py()))
                seen.add(key)
                if frame % stride:
                    continue
                if not 1 <= key[2] <= len(CAMERAS):
                    yield Fault("images of an unknown camera", _place(key), f"camera {camera.as_py()}")
                    continue
                labels = None if boxes is None else boxes.get(key, [])
                yield Picture(*key[:2], frame, key[2], 0, jpeg.as_py() or b"", labels, sizes.get(key[2]))
    except (pa.ArrowException, OSError) as error:
        raise _Unusable(*_damaged(files["camera_image"], error)) from error
    for key in sorted((boxes or {}).keys() - seen):
        yield Fault("labels without their image", _place(key), f"{len(boxes[key])} labels")


def _place(key: _Key) -> str:
    return f"time {key[1]}, camera {key[2]}"


def _camera(value: int | str) -> int:
    if isinstance(value, str):
        return CAMERAS.index(value) + 1 if value in CAMERAS else 0
    return value or 0


def _boxes(path: Path) -> dict[_Key, list[Label]]:
    found: dict[_Key, list[Label]] = {}
    names = (*_KEY, *_BOX)
    for context, time, camera, kind, x, y, length, width, level, track in zip(*_read(_open(path, names), path, names)):
        sides = (float("nan") if side is None else float(side) for side in (x, y, length, width))
        label = Label(kind or 0, *sides, int(level or 0), track or "")
        found.setdefault((context, time, _camera(camera)), []).append(label)
    return found


def _sizes(path: Path) -> dict[int, tuple[int, int]]:
    names = (_KEY[2], *_SIZE)
    return {_camera(camera): size for camera, *size in zip(*_read(_open(path, names), path, names))}


def _open(path: Path, names: tuple[str, ...]) -> Any:
    """The file, if it has these columns: asked for others, Arrow returns none and no error."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        if not path.stat().st_size:
            raise _Unusable("empty files", path.parent.name, "copy it again")
        table = parquet.ParquetFile(path, memory_map=True, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise _Unusable(*_damaged(path, error)) from error
    missing = [name for name in names if name not in table.schema_arrow.names]
    if missing:
        raise _Unusable("Parquet files without a column", path.parent.name, f"no {missing[0]}")
    return table


def _read(table: Any, path: Path, names: tuple[str, ...]) -> list[list]:
    import pyarrow as pa

    try:
        read = table.read(columns=list(names), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise _Unusable(*_damaged(path, error)) from error
    return [read.column(name).to_pylist() for name in names]


def _damaged(path: Path, error: Exception) -> tuple[str, str, str]:
    return "files that cannot be read as Parquet", path.parent.name, str(error).splitlines()[0]
