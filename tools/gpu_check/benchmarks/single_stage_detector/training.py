"""The parts `losses` and `bccd`: RetinaNet's curves by references and by native ops, and a real training."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from tools.gpu_check.programs import last_words, start
from tools.gpu_check.state import ROOT, Context, Job, Row, Skip

RECIPE = [
    "--dataset", "custom", "--backbone", "resnet18", "--norm", "batch", "--trainable-backbone-layers", "5",
    "--no-pretrained", "--fpn-channels", "64", "--head-convs", "1", "--image-size", "192", "256",
    "--anchor-sizes", "16,32,64,128,256", "--max-boxes", "64", "--lr", "5e-4", "--warmup-epochs", "2",
    "--ema-decay", "0.98", "--target-map", "none", "--division", "open", "--seed", "1", "--batch-size", "8",
]  # fmt: skip
"""That of results/2026-11-22_bccd_cpu, where 18 epochs took two CPU cores 5.4 minutes to AP 0.482."""
GOAL = 0.40
"""AP at which the two bccd runs' times are compared."""


def data_folder(context: Context) -> Path:
    """The folder of bccd: --data, or shared/data/bccd beside or in the checkout. Raises Skip."""
    places = [context.data] if context.data else [ROOT / "shared/data/bccd", ROOT.parent / "shared/data/bccd"]
    for root in places:
        for folder in (root, root / "bccd"):
            if (folder / "annotations" / "instances_train.json").is_file():
                return folder.resolve()
    raise Skip(f"the bccd data is not at {' or '.join(map(str, places))}; --data DIR says where it is")


def losses(context: Context) -> Iterable[Job]:
    """tools.compare_losses: 20 steps of reference ops against native ones with graphs, fp32, the same data, and a
    control that tells how far rounding alone drives them apart."""

    def run() -> Row:
        steps = 4 if context.quick else 20
        where = context.work / "losses"
        data = ["--synthetic", "--num-classes", "3"]
        if not context.quick:
            data = ["--dataset-path", str(data_folder(context)), "--workers", "2", "--cache-dir", str(where)]
        options = [*RECIPE, *data, "--precision", "fp32", "--device", "cuda" if context.gpu else "cpu"]
        options += ["--trainable-backbone-layers", "4"]  # the gradient of the pooling before adds in any order
        command = [sys.executable, "-m", "tools.compare_losses", str(where / "reference"), str(where / "native")]
        command += ["--run", "--steps", str(steps), "--control", str(where / "control")]
        command += ["--figure", str(where / "losses.html"), "--json", str(where / "losses.json"), "--", *options]
        done = start(context, command)
        if done.returncode not in (0, 1) or not (where / "losses.json").is_file():
            return {"error": last_words(done.stdout)}
        row = json.loads((where / "losses.json").read_text())
        return row | (
            {} if row["within"] else {"error": f"the curves part by {row['largest']:.3g} at step {row['at_step']}"}
        )

    yield "reference against native", run


def bccd(context: Context) -> Iterable[Job]:
    """A real training from random weights, with native ops in a graph and with the references, eager."""

    def case(name: str, options: list[str]) -> Callable[[], Row]:
        def run() -> Row:
            folder = context.work / "bccd" / name
            shutil.rmtree(folder, ignore_errors=True)
            data = ["--dataset-path", str(data_folder(context)), "--cache-dir", str(context.work / "bccd")]
            epochs = "1" if context.quick else "18"
            workers = str(max(1, min(6, (os.cpu_count() or 2) - 2)))
            short = ["--max-iters-per-epoch", "2", "--workers", "1"] if context.quick else ["--workers", workers]
            device = ["--device", "cuda" if context.gpu else "cpu"]
            command = [sys.executable, "-m", "single_stage_detector.train", *RECIPE, *data, *device, *short, *options]
            command += ["--epochs", epochs, "--log-interval", "12", "--output-dir", str(folder)]
            done = start(context, command)
            if done.returncode:
                return {"error": last_words(done.stdout)}
            return curve(folder)

        return run

    yield "graph native", case("graph_native", ["--ops", "auto", "--graphs", "on" if context.gpu else "off"])
    yield "eager reference", case("eager_reference", ["--ops", "reference", "--graphs", "off"])


def curve(folder: Path) -> Row:
    """AP and the time of each evaluation of a run, and when it passed GOAL; writes its report.html."""
    lines = [json.loads(text) for text in (folder / "progress.jsonl").read_text().splitlines()]
    evals = [line for line in lines if line["kind"] == "eval"]
    steps = [line for line in lines if line["kind"] == "step"]
    points = [
        {"epoch": e["epoch"], "time_s": e["time_s"], "AP": e["metrics"]["AP"], "AP50": e["metrics"]["AP50"]}
        for e in evals
    ]
    best = max(points, key=lambda p: p["AP"])
    passed = next((p["time_s"] for p in points if p["AP"] >= GOAL), None)
    report = subprocess.run([sys.executable, "tools/report.py", str(folder)], cwd=ROOT, capture_output=True, text=True)
    rates = sorted(s["images_per_s"] for s in steps)
    return {
        "seconds": lines[-1]["time_s"], "AP": best["AP"], "AP50": best["AP50"], "epochs": points[-1]["epoch"],
        f"seconds_to_AP_{GOAL}": passed, "median_images_per_s": rates[len(rates) // 2], "curve": points,
        "report": str(folder / "report.html") if not report.returncode else last_words(report.stderr),
        "losses": [[s["step"], s["loss"]] for s in steps],
    }  # fmt: skip
