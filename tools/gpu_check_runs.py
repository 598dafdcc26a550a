"""The parts of tools/gpu_check.py that start other programs: build, losses, bccd and sanitizer."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import gpu_carry
import torch
from gpu_check_core import ROOT, Context, Job, OutOfTime, Row, Skip
from gpu_check_machine import place
from gpu_check_tests import gpu_test_files, pytest_command

from detcore.device import native

RECIPE = [
    "--dataset", "custom", "--backbone", "resnet18", "--norm", "batch", "--trainable-backbone-layers", "5",
    "--no-pretrained", "--fpn-channels", "64", "--head-convs", "1", "--image-size", "192", "256",
    "--anchor-sizes", "16,32,64,128,256", "--max-boxes", "64", "--lr", "5e-4", "--warmup-epochs", "2",
    "--ema-decay", "0.98", "--target-map", "none", "--division", "open", "--seed", "1", "--batch-size", "8",
]  # fmt: skip
"""That of results/2026-11-22_bccd_cpu, where 18 epochs took two CPU cores 5.4 minutes to AP 0.482."""
GOAL = 0.40
"""AP at which the two bccd runs' times are compared."""


def start(context: Context, command: list[str], **environment: str) -> subprocess.CompletedProcess:
    """Runs a command in the checkout, its output in the log. Raises OutOfTime, having ended it and its children."""
    print("$", " ".join(command), flush=True)
    limit = max(context.left() - 1, 1.0)
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    ) as process:  # fmt: skip
        try:
            said, _ = process.communicate(timeout=limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            print(said, flush=True)
            if isinstance(error, subprocess.TimeoutExpired):
                raise OutOfTime(f"stopped after {limit:.0f} s, the part's time is over") from None
            raise
    print(said, flush=True)
    return subprocess.CompletedProcess(command, process.returncode, said)


def last_words(said: str) -> str:
    """The line that says what went wrong, or the last one."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "no output")[
        :300
    ]


def build(context: Context) -> Iterable[Job]:
    """The libraries, for this card alone unless TORCH_CUDA_ARCH_LIST says more; without a card for the CPU alone.

    Those that tools/gpu_carry.py has compiled are taken instead if they are of these sources and for this card.
    """

    def run() -> Row:
        if context.carried and not unfit(context):
            return described(gpu_carry.manifest(context.carried)["architectures"] + ", carried")
        chosen = os.environ.get("TORCH_CUDA_ARCH_LIST")
        if context.gpu and not chosen:
            chosen = "{}.{}".format(*torch.cuda.get_device_capability())
        environment = {"TORCH_CUDA_ARCH_LIST": chosen} if chosen else {}
        if not context.gpu:
            environment = {"KERNELS": "cpu"}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = start(context, command, **environment)
        impossible = [line for line in done.stdout.splitlines() if "so no kernels are built" in line]
        if done.returncode and not impossible:
            return {"error": last_words(done.stdout)}
        programs = gpu_carry.programs()
        built = [program for program in programs if native.library_file(program).is_file()]
        if built != programs:
            raise Skip(impossible[0] if impossible else last_words(done.stdout))
        return described((chosen or "default") if context.gpu else "the CPU")

    def described(architectures: str) -> Row:
        programs = gpu_carry.programs()
        said = native.describe(programs[-1], context.device)
        row = {"libraries": ", ".join(programs), "ops": said}
        lacking = context.gpu and "because" in said
        return row | {"architectures": architectures} | ({"error": f"no code for this GPU: {said}"} if lacking else {})

    yield "build_ext --inplace", run


def unfit(context: Context) -> str:
    """Why the carried libraries do not serve here, or ""."""
    if wrong := gpu_carry.in_place(context.carried):
        return wrong
    compiled = gpu_carry.manifest(context.carried)["architectures"]
    card = "{}.{}".format(*torch.cuda.get_device_capability()) if context.gpu else compiled
    return "" if card == compiled else f"they are for {compiled}, this card is {card}"


def data_folder(context: Context) -> Path:
    """The folder of bccd: --data, or shared/data/bccd beside or in the checkout. Raises Skip."""
    places = [context.data] if context.data else [ROOT / "shared/data/bccd", ROOT.parent / "shared/data/bccd"]
    for root in places:
        for folder in (root, root / "bccd"):
            if (folder / "annotations" / "instances_train.json").is_file():
                return folder.resolve()
    raise Skip(f"the bccd data is not at {' or '.join(map(str, places))}; --data DIR says where it is")


def losses(context: Context) -> Iterable[Job]:
    """tools/compare_losses.py: 20 steps of reference ops against native ones with graphs, fp32, the same data, and a
    control that tells how far rounding alone drives them apart."""

    def run() -> Row:
        steps = 4 if context.quick else 20
        where = context.work / "losses"
        data = ["--synthetic", "--num-classes", "3"]
        if not context.quick:
            data = ["--dataset-path", str(data_folder(context)), "--workers", "2", "--cache-dir", str(where)]
        options = [*RECIPE, *data, "--precision", "fp32", "--device", "cuda" if context.gpu else "cpu"]
        options += ["--trainable-backbone-layers", "4"]  # the gradient of the pooling before adds in any order
        command = [sys.executable, "tools/compare_losses.py", str(where / "reference"), str(where / "native"), "--run"]
        command += ["--steps", str(steps), "--control", str(where / "control"), "--figure", str(where / "losses.html")]
        command += ["--json", str(where / "losses.json"), "--", *options]
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


def sanitizer(context: Context) -> Iterable[Job]:
    """compute-sanitizer over the ops' own gpu tests, a job for each tool and file: memcheck of all of them first."""
    binary = place("compute-sanitizer")

    def case(tool: str, file: str) -> Callable[[], Row]:
        def run() -> Row:
            if not context.gpu or not binary:
                raise Skip("no compute-sanitizer on this machine" if context.gpu else "compute-sanitizer wants a GPU")
            # Without caching every tensor is an allocation of its own, so that a step past its end is seen.
            environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
            command = [binary, "--tool", tool, "--error-exitcode", "9"]
            command += [*pytest_command(context.work / "tmp" / "pytest"), "-x", "-m", "gpu", file]
            done = start(context, command, **environment)
            if "Device not supported" in done.stdout:
                raise Skip("compute-sanitizer says that it does not support this device (a virtual machine's limit)")
            found = re.search(r"(?:ERROR SUMMARY: |hazards? displayed \()(\d+) error", done.stdout)
            row = {"errors": int(found[1]) if found else None}
            return row | ({"error": last_words(done.stdout)} if done.returncode or not found or row["errors"] else {})

        return run

    files = [file for file in gpu_test_files() if "/ops/" in file]
    for tool in ("memcheck", "racecheck", "synccheck"):
        for file in files:
            yield f"{tool} {file.removeprefix('tests/')}", case(tool, file)
