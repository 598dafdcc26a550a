"""Start-up from an annotation file the size of OpenImages: the index's cache against json.load + pycocotools.

Makes a COCO file and an empty file for each image in a temporary folder, then measures in fresh processes: building
the index, opening it from its cache (alternately with the baseline), and `pycocotools.coco.COCO(file)`, which is
json.load and its dictionaries. The baseline of the full size wants some 25 GB, so it runs on a smaller file of the
same kind and its size is printed with it. Usage: python -m tools.bench.index [--images 1170301] [--json PATH]
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

CLASSES = 264
ANNOTATION = (
    '{"id": %d, "image_id": %d, "category_id": %d, "bbox": [%.6f, %.6f, %.6f, %.6f], "area": %.6f, '
    '"IsOccluded": %d, "IsTruncated": 0, "IsGroupOf": %d, "IsDepiction": 0, "IsInside": 0, "iscrowd": %d}'
)


def make(folder: Path, images: int, boxes_per_image: float) -> int:
    """Write folder/annotations.json and folder/data/*.jpg (empty). Returns the number of boxes."""
    rng = np.random.default_rng(0)
    (folder / "data").mkdir(parents=True)
    names = [f"{number:016x}.jpg" for number in range(images)]
    for name in names:
        os.close(os.open(folder / "data" / name, os.O_CREAT | os.O_WRONLY))
    boxes = 0
    with open(folder / "annotations.json", "w") as out:
        out.write('{"info": {}, "licenses": [], "categories": [')
        out.write(", ".join(f'{{"id": {k}, "name": "class {k}"}}' for k in range(CLASSES)))
        out.write('], "images": [')
        for i, name in enumerate(names):
            out.write(", " if i else "")
            out.write(
                f'{{"id": {i + 1}, "file_name": "{name}", "height": 768, "width": 1024, "license": null, '
                '"coco_url": null}'
            )
        out.write('], "annotations": [')
        for first in range(0, images, 10000):
            of_image = np.repeat(
                np.arange(first, min(first + 10000, images)) + 1,
                boxes_per_image_draw(rng, boxes_per_image, min(10000, images - first)),
            )
            n = len(of_image)
            x, y, w, h = rng.random((4, n)) * np.array([[900.0], [650.0], [124.0], [118.0]])
            crowd = (rng.random(n) < 0.05).astype(int)
            columns = (
                np.arange(boxes, boxes + n) + 1,
                of_image,
                rng.integers(0, CLASSES, n),
                x,
                y,
                w,
                h,
                w * h,
                rng.integers(0, 2, n),
                crowd,
                crowd,
            )
            lines = ", ".join(map(ANNOTATION.__mod__, zip(*(column.tolist() for column in columns))))
            out.write((", " if first else "") + lines)
            boxes += n
        out.write("]}")
    return boxes


def boxes_per_image_draw(rng: np.random.Generator, mean: float, images: int) -> np.ndarray:
    """At least one box an image, on average `mean`."""
    return 1 + rng.poisson(mean - 1, images)


def child(job: str, folder: str) -> None:
    """Run one job in this fresh process and print its seconds and peak memory as JSON."""
    peak = [0]

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], memory("RssAnon"))
            time.sleep(0.02)

    if job == "pycocotools":
        from pycocotools.coco import COCO
    else:
        from detcore.data.coco import CocoIndex
    before = memory("VmRSS")
    threading.Thread(target=watch, daemon=True).start()
    file = Path(folder) / "annotations.json"
    begin = time.perf_counter()
    if job == "pycocotools":
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(file)
        found = len(coco.imgToAnns[1])
    else:
        index = CocoIndex.open(file, Path(folder) / "data", expected_classes=CLASSES)
        found = len(index.boxes(0)[0]) + len(index.boxes(len(index) - 1)[0])
    seconds = time.perf_counter() - begin
    assert found
    peak[0] = max(peak[0], memory("RssAnon"))
    result = {"seconds": seconds, "peak_mb": memory("VmHWM"), "anonymous_mb": peak[0], "before_mb": before}
    print(json.dumps(result))


def memory(field: str) -> int:
    """A size of this process from /proc/self/status, in MB (10**6 bytes)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 // 10**6 for line in lines if line.startswith(field + ":"))


def fresh(job: str, folder: Path) -> dict:
    run = subprocess.run(
        [sys.executable, "-m", "tools.bench.index", "--job", job, "--folder", str(folder)],
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise SystemExit(f"{job} failed with exit code {run.returncode}:\n{run.stderr}")
    return json.loads(run.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1_170_301)
    parser.add_argument("--boxes-per-image", type=float, default=12.5)
    parser.add_argument("--baseline-images", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--job", choices=["index", "pycocotools"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        return child(args.job, args.folder)
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench_index_") as temporary:
        sizes = {}
        for name, images in (("large", args.images), ("small", min(args.baseline_images, args.images))):
            begin = time.perf_counter()
            boxes = make(Path(temporary) / name, images, args.boxes_per_image)
            size = (Path(temporary) / name / "annotations.json").stat().st_size
            sizes[name] = f"{images:,} images, {boxes:,} boxes, {size / 1e9:.2f} GB"
            print(f"made {sizes[name]} in {time.perf_counter() - begin:.0f} s", flush=True)
            rows.append({"what": "index, build", "file": sizes[name], **fresh("index", Path(temporary) / name)})
            cache = next((Path(temporary) / name).glob(".*.index"))
            rows[-1]["cache_gb"] = cache.stat().st_size / 1e9
        runs: dict[tuple[str, str], list[dict]] = {}
        for _ in range(args.rounds):
            for what, job, name in (
                ("index, from cache", "index", "large"),
                ("index, from cache", "index", "small"),
                ("json.load + pycocotools", "pycocotools", "small"),
            ):
                runs.setdefault((what, sizes[name]), []).append(fresh(job, Path(temporary) / name))
    for (what, file), results in runs.items():
        rows.append(
            {"what": what, "file": file} | {key: statistics.median(r[key] for r in results) for key in results[0]}
        )
    columns = ("seconds", "peak_mb", "anonymous_mb", "before_mb")
    print(f"\n{'':26}" + "".join(f"{name:>14}" for name in ("seconds", "peak RSS MB", "anonymous MB", "imports MB")))
    for row in rows:
        print(f"{row['what']:26}" + "".join(f"{row[column]:14.3f}" for column in columns) + f"   {row['file']}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
