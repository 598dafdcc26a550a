"""The Waymo converter: frames a second and peak memory, for growing numbers of frames.

    python -m tools.bench.waymo [--frames 200 1000] [--versions v1 v2] [--workers N] [--folder DIR] [--json FILE]

Generated segments of 200 frames with five cameras of the real sizes (three of 1920x1280, two of 1920x886, 2 MB of JPEG
a frame), 12 boxes an image and, in v1, 3 MB of other bytes a frame in the place of the lidar: 5 MB a frame as in the
real data set. One line is of a single segment with all the frames. The converter runs as a whole process; memory is
that of all its processes summed, 50 times a second, without pages of mapped files. Files come from the page cache where
they fit in. Baseline, in the same run: what NVIDIA's converter does with an image, decoding it and encoding it again,
by Pillow, without reading, labels or writing.
"""

import argparse
import io
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from PIL import Image

from dataprep import waymo_parquet
from dataprep.waymo_records import CAMERAS, frame_class, masked_crc
from tools.bench.openimages import Peak

CONVERTER = Path(__file__).resolve().parents[2] / "public-scripts" / "waymo_to_coco.py"
SIZES = ((1920, 1280), (1920, 1280), (1920, 1280), (1920, 886), (1920, 886))
OTHER = 3_000_000  # bytes a frame that are no images
# field 5, lasers: its tag, and OTHER as a varint of four bytes
FIELD_5 = bytes([5 << 3 | 2, *(OTHER >> shift & 127 | 128 for shift in (0, 7, 14)), OTHER >> 21])
BOXES = 12
SEGMENT = 200  # frames


class Private(Peak):
    """The same without pages of files, which the system may drop at any time."""

    def _resident(self, pid: int) -> int:
        try:
            resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[1:3]
            return (int(resident) - int(shared)) * os.sysconf("SC_PAGESIZE")
        except (OSError, ValueError):
            return 0


def pictures() -> list[bytes]:
    """One JPEG for each camera, about as large as a real one."""
    made = []
    for k, (width, height) in enumerate(SIZES):
        noise = np.random.default_rng(k).normal(128, 40, (height // 6, width // 6, 3)).clip(0, 255).astype(np.uint8)
        out = io.BytesIO()
        Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(out, "JPEG", quality=78)
        made.append(out.getvalue())
    return made


def boxes(dice: random.Random) -> list[tuple[float, float, float, float]]:
    return [(dice.uniform(300, 1600), dice.uniform(200, 680), dice.uniform(9, 300), dice.uniform(9, 300))
            for _ in range(BOXES)]  # fmt: skip


def write_v1(folder: Path, name: str, frames: int, jpegs: list[bytes], dice: random.Random) -> None:
    other = dice.randbytes(OTHER)
    with open(folder / f"segment-{name}_with_camera_labels.tfrecord", "wb") as file:
        for k in range(frames):
            frame = frame_class()(timestamp_micros=10**15 + 100_000 * k)
            frame.context.name = name.encode()
            for camera, jpeg in enumerate(jpegs, 1):
                frame.images.add(name=camera, image=jpeg)
                labels = frame.camera_labels.add(name=camera).labels
                for x, y, length, width in boxes(dice):
                    label = labels.add(type=dice.choice((1, 1, 1, 2, 4)), id=dice.randbytes(16).hex().encode())
                    label.box.center_x, label.box.center_y, label.box.length, label.box.width = x, y, length, width
            data = frame.SerializeToString() + FIELD_5 + other
            size = len(data).to_bytes(8, "little")
            crcs = (masked_crc(part).to_bytes(4, "little") for part in (size, data))
            file.write(b"".join((size, next(crcs), data, next(crcs))))


def write_v2(folder: Path, name: str, frames: int, jpegs: list[bytes], dice: random.Random) -> None:
    rows = [(10**15 + 100_000 * k, camera) for k in range(frames) for camera in range(1, 6)]
    each = [(time_, camera, *box) for time_, camera in rows for box in boxes(dice)]
    tables = {
        "camera_image": {"[CameraImageComponent].image": pa.array([jpegs[camera - 1] for _, camera in rows])},
        "camera_box": {
            "key.camera_object_id": pa.array([dice.randbytes(16).hex() for _ in each]),
            "[CameraBoxComponent].type": pa.array([dice.choice((1, 1, 1, 2, 4)) for _ in each], pa.int8()),
            "[CameraBoxComponent].difficulty_level.detection": pa.nulls(len(each), pa.int8()),
            **{key: pa.array([box[2 + k] for box in each]) for k, key in enumerate(waymo_parquet.SIDES)},
        },
    }
    for component, columns in tables.items():
        keys = rows if component == "camera_image" else each
        key = {
            "key.segment_context_name": pa.array([name] * len(keys)),
            "key.frame_timestamp_micros": pa.array([row[0] for row in keys], pa.int64()),
            "key.camera_name": pa.array([row[1] for row in keys], pa.int8()),
        }
        (folder / component).mkdir(exist_ok=True)
        path = folder / component / f"{name}.parquet"
        parquet.write_table(pa.table(key | columns), path, compression="none", use_dictionary=False)


def measure(folder: Path, out: Path, workers: int) -> dict[str, Any]:
    words = [sys.executable, CONVERTER, "--tf-dir", folder, "--out-dir", out, "--workers", workers]
    begin = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = Private(process.pid)
    _, errors = process.communicate()
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if process.returncode:
        raise SystemExit(f"the converter ended with {process.returncode}:\n{errors}")
    found = json.loads((out / "annotations" / "annotations.json").read_text())
    shutil.rmtree(out)
    return {"images": len(found["images"]), "boxes": len(found["annotations"]), "seconds": seconds, "busy": busy,
            "peak_mb": peak.end()}  # fmt: skip


def again(jpegs: list[bytes], frames: int = 10) -> float:
    """Processor seconds a frame to decode its images and encode them with Pillow's default quality: the median."""
    seconds = []
    for _ in range(frames):
        begin = time.process_time()
        for jpeg in jpegs:
            Image.open(io.BytesIO(jpeg)).convert("RGB").save(io.BytesIO(), "JPEG")
        seconds.append(time.process_time() - begin)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--versions", nargs="+", choices=("v1", "v2"), default=["v1", "v2"])
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="where the files go, and their JPEGs: 10 GB for 1,000 frames")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    jpegs, rows = pictures(), []
    assert len(jpegs) == len(CAMERAS)
    print(f"{sum(map(len, jpegs)) / 1e6:.2f} MB of JPEG a frame, {args.workers} processes")
    titles = ("files", "frames", "images", "seconds", "frames/s", "MB/s", "CPU ms/frame", "peak MB")
    print("{:>22} {:>7} {:>7} {:>8} {:>9} {:>6} {:>13} {:>8}".format(*titles))
    for version in args.versions:
        layouts = [(f"{version}, segments of {SEGMENT}", frames, SEGMENT) for frames in args.frames]
        layouts += [(f"{version}, one segment", frames, frames) for frames in args.frames if version == "v1"]
        for what, frames, each in layouts:
            with tempfile.TemporaryDirectory(prefix="bench_waymo_", dir=args.folder) as temporary:
                folder = Path(temporary) / "in"
                folder.mkdir()
                dice = random.Random(0)
                for first in range(0, frames, each):
                    write = write_v1 if version == "v1" else write_v2
                    write(folder, f"{first}_100_000_120_000", min(each, frames - first), jpegs, dice)
                size = sum(path.stat().st_size for path in folder.rglob("*.*"))
                row = measure(folder, Path(temporary) / "out", args.workers)
            row |= {"files": what, "frames": frames, "bytes": size}
            rows.append(row)
            rate, each_ms = frames / row["seconds"], row["busy"] / frames * 1e3
            print(f"{what:>22} {frames:7,} {row['images']:7,} {row['seconds']:8.1f} {rate:9.1f} "
                  f"{size / row['seconds'] / 1e6:6.0f} {each_ms:13.1f} {row['peak_mb']:8.0f}", flush=True)  # fmt: skip
    baseline = again(jpegs)
    print(f"decoding and encoding again: {baseline * 1e3:.0f} CPU ms/frame")
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "again_seconds_a_frame": baseline}, indent=1) + "\n")


if __name__ == "__main__":
    main()
