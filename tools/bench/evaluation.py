"""The evaluator against pycocotools: seconds and peak memory, every run in a fresh process, and the cost of submit().

    python -m tools.bench.evaluation --repeats 3 --baseline-repeats 1

The data is synthetic and seeded, by default of the size of OpenImages' MLPerf validation set: 24,781 images, 264
classes, 300 detections an image. At that size pycocotools wants 18 GB and eight minutes; --images scales both.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from detcore.evaluation.background import BackgroundEvaluator
from detcore.evaluation.coco import METRICS, GroundTruth, evaluate


def synthetic(images: int, classes: int, per_image: int, seed: int) -> tuple[GroundTruth, np.ndarray]:
    """Ground truth of about eight boxes an image, classes as uneven as OpenImages', and detections [D, 7]: one in
    seven near a true box and mostly of its class, the rest anywhere, with lower scores."""
    rng = np.random.default_rng(seed)
    image_ids = np.sort(rng.choice(10 * images, images, replace=False))
    share = 1 / np.arange(1, classes + 1)
    share /= share.sum()

    def boxes(n: int) -> np.ndarray:
        size = np.minimum(rng.lognormal(4.5, 1.0, (n, 2)), 900)
        return np.concatenate([rng.uniform(0, 1, (n, 2)) * (1024 - size), size], axis=1)

    count = np.maximum(1, rng.geometric(1 / 8, images))
    owner = np.repeat(np.arange(images), count)
    bbox = boxes(len(owner))
    category = rng.choice(classes, len(owner), p=share) + 1
    crowd = (rng.random(len(owner)) < 0.02).astype(np.uint8)
    truth = GroundTruth(
        image_ids, np.arange(1, classes + 1), image_ids[owner], category, bbox, bbox[:, 2] * bbox[:, 3], crowd
    )

    found = images * per_image
    image = np.repeat(np.arange(images), per_image)
    first = np.concatenate([[0], np.cumsum(count)[:-1]])
    source = first[image] + (rng.random(found) * count[image]).astype(np.int64)
    close = rng.random(found) < 1 / 7
    box = np.where(close[:, None], bbox[source] + rng.normal(0, 0.08, (found, 4)) * bbox[source][:, [2, 3, 2, 3]], 0)
    box[~close] = boxes(int((~close).sum()))
    box[:, 2:] = np.maximum(box[:, 2:], 1)
    right = close & (rng.random(found) < 0.85)
    label = np.where(right, category[source], rng.choice(classes, found, p=share) + 1)
    score = np.where(close, rng.beta(4, 3, found), rng.beta(1, 8, found)) * 0.95 + 0.05
    return truth, np.column_stack([image_ids[image], box, score, label])


def load(path: Path) -> tuple[GroundTruth, np.ndarray]:
    with np.load(path) as columns:
        return GroundTruth(*(columns[name] for name in GroundTruth._fields)), columns["detections"]


def peak_gb(pid: int | str = "self") -> float:
    """Highest resident memory since the process began; ru_maxrss would count the parent's from before the exec."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e6 * 1.024


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system time


def plain_pycocotools(truth: GroundTruth, detections: np.ndarray) -> dict[str, float]:
    """The baseline, as its documentation shows it and without a line of ours."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        names = ("image_id", "category_id", "bbox", "area", "iscrowd")
        annotations = zip(*(column.tolist() for column in truth[2:]), strict=True)
        coco.dataset = {
            "images": [{"id": i} for i in truth.image_ids.tolist()],
            "categories": [{"id": i, "name": str(i)} for i in truth.category_ids.tolist()],
            "annotations": [{"id": i, **dict(zip(names, row, strict=True))} for i, row in enumerate(annotations, 1)],
        }
        coco.createIndex()
        run = COCOeval(coco, coco.loadRes(detections), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return dict(zip(METRICS, run.stats.tolist(), strict=True))


def measure(what: str, path: Path) -> dict:
    """One measurement, in this process."""
    # Nearly a machine's memory goes into the baseline: when it runs out, this process is the one to end.
    Path("/proc/self/oom_score_adj").write_text("1000")
    truth, detections = load(path)
    if what != "background":
        started, cpu = time.perf_counter(), time.process_time()
        if what == "pycocotools":
            result = plain_pycocotools(truth, detections)
        else:
            result = evaluate(truth, detections, backend=what)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        return {"seconds": seconds, "cpu": cpu, "peak_gb": peak_gb(), "result": result}
    with BackgroundEvaluator(truth) as evaluator:
        evaluator.submit(np.zeros((0, 7))).wait()
        started, cpu = time.perf_counter(), cpu_seconds(evaluator.pid)
        pending = evaluator.submit(detections)
        blocked = time.perf_counter() - started
        result = pending.wait()
        seconds, cpu = time.perf_counter() - started, cpu_seconds(evaluator.pid) - cpu
        peak = peak_gb(evaluator.pid)
        return {"seconds": seconds, "cpu": cpu, "submit": blocked, "peak_gb": peak, "result": result}


def run_fresh(what: str, path: Path) -> dict:
    command = [sys.executable, "-m", "tools.bench.evaluation", "--measure", what, "--data", str(path)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=24781)
    parser.add_argument("--classes", type=int, default=264)
    parser.add_argument("--detections", type=int, default=300, help="per image")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--baseline-repeats", type=int, default=1, help="0 leaves pycocotools out")
    parser.add_argument("--json", type=Path, help="write the measurements there too")
    parser.add_argument("--measure", choices=("hotcoco", "background", "pycocotools"), help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.data)))
        return

    runs: dict[str, list[dict]] = {"hotcoco": [], "background": [], "pycocotools": []}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.npz"
        truth, detections = synthetic(options.images, options.classes, options.detections, options.seed)
        np.savez(data, detections=detections, **truth._asdict())
        size = (
            f"{options.images} images, {options.classes} classes, {len(truth.area)} boxes, {len(detections)} detections"
        )
        print(size)
        del truth, detections
        for turn in range(max(options.repeats, options.baseline_repeats)):
            for what, done in runs.items():
                if turn < (options.baseline_repeats if what == "pycocotools" else options.repeats):
                    done.append(run_fresh(what, data))
                    last = done[-1]
                    numbers = f"{last['seconds']:.2f} s, cpu {last['cpu']:.2f} s, {last['peak_gb']:.2f} GB"
                    print(f"  {what}: {numbers}", flush=True)

    print(f"\n{'':14}{'runs':>5}{'median s':>10}{'min s':>9}{'cpu s':>9}{'peak GB':>9}{'submit s':>10}")
    for what, done in runs.items():
        if done:
            seconds = [run["seconds"] for run in done]
            blocked = f"{median(run['submit'] for run in done):.3f}" if what == "background" else ""
            cpu = median(run["cpu"] for run in done)
            peak = max(run["peak_gb"] for run in done)
            print(f"{what:14}{len(done):5}{median(seconds):10.2f}{min(seconds):9.2f}{cpu:9.2f}{peak:9.2f}{blocked:>10}")
    every = [run["result"] for done in runs.values() for run in done]
    spread = max(abs(one[name] - every[0][name]) for one in every for name in METRICS)
    print(f"AP {every[0]['AP']:.6f}; largest difference between any two runs in any of the twelve: {spread:.3g}")
    if runs["pycocotools"] and runs["hotcoco"]:
        ours, theirs = (
            [median(run[key] for run in runs[what]) for key in ("seconds", "cpu")]
            for what in ("hotcoco", "pycocotools")
        )
        print(f"pycocotools / hotcoco: {theirs[0] / ours[0]:.1f} in time, {theirs[1] / ours[1]:.1f} in processor time")
    if options.json:
        options.json.write_text(
            json.dumps({"size": size, "options": {**vars(options), "json": None, "data": None}, "runs": runs}, indent=1)
        )


if __name__ == "__main__":
    main()
