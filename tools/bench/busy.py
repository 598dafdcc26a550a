"""Training on the CPU beside another program that spins: threads that adapt to it against one thread a core.

Trains the model of `make demo` on random images, alternately with OMP_NUM_THREADS set to the number of cores ("all
threads") and unset ("adaptive"), alone and beside one process that spins, niced or not. Prints the median images/s of
the logging intervals after the first, over all rounds, and the share of the speed alone.
Usage: python -m tools.bench.busy [--steps 60] [--rounds 2] [--json PATH]
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = shlex.split(
    "--dataset custom --backbone resnet18 --norm batch --trainable-backbone-layers 5 --no-pretrained --fpn-channels 64 "
    "--head-convs 1 --image-size 128 128 --anchor-sizes 16,32,64,128,256 --max-boxes 32 --batch-size 8 --epochs 1 "
    "--synthetic --device cpu --precision fp32 --seed 1 --log-interval 5 --overwrite"
)
WAYS = {"all threads": {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}, "adaptive": {}}
LOADS = {"alone": None, "niced": 19, "equal": 0}


@contextmanager
def spinning(nice: int | None) -> Iterator[None]:
    """A process beside the body that computes all the time, with this nice value; None: none."""
    if nice is None:
        yield
        return
    spinner = subprocess.Popen([sys.executable, "-c", f"import os\nos.nice({nice})\nwhile True: pass"])
    try:
        yield
    finally:
        spinner.kill()
        spinner.wait()


def train(steps: int, variables: dict[str, str]) -> tuple[list[float], str]:
    """images/s of each logging interval but the first, and the last line of progress."""
    environ = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environ |= {"GOMP_SPINCOUNT": "10000"} | variables  # as configs/config_cpu_demo.sh
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "single_stage_detector.train", *MODEL, "--output-dir", folder]
        command += ["--max-iters-per-epoch", str(steps)]
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with code {done.returncode}:\n{done.stderr}")
        records = [json.loads(line) for line in (Path(folder) / "progress.jsonl").read_text().splitlines()]
    rates = [record["images_per_s"] for record in records if record["kind"] == "step"]
    return rates[1:], [line for line in done.stderr.splitlines() if "images/s" in line][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="steps of a run, at least 10 (default 60)")
    parser.add_argument("--rounds", type=int, default=2, help="(default 2)")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    given = parser.parse_args()
    if given.steps < 10 or given.rounds < 1:
        parser.error("--steps wants at least 10, --rounds at least 1")
    rates: dict[tuple[str, str], list[float]] = {(load, way): [] for load in LOADS for way in WAYS}
    for _ in range(given.rounds):
        for load, nice in LOADS.items():
            for way, variables in WAYS.items():
                with spinning(nice):
                    found, line = train(given.steps, variables)
                rates[load, way] += found
                print(f"{load:>6}, {way}: {statistics.median(found):6.1f} images/s   {line}", flush=True)
    medians = {key: statistics.median(values) for key, values in rates.items()}
    print(f"\n{'another process':<16}{'all threads':>12}{'adaptive':>12}   images/s, and of those alone")
    for load in LOADS:
        cells = [f"{medians[load, way]:6.1f} {medians[load, way] / medians['alone', way]:4.0%}" for way in WAYS]
        print(f"{load:<16}{cells[0]:>12}{cells[1]:>12}")
    if given.json:
        figures = {load: {way: medians[load, way] for way in WAYS} for load in LOADS}
        given.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
