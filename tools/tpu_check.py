"""Runs SSD300's training on the TPU path without a TPU, two ways, and compares it with the CPU: a table, and JSON.

    python -m tools.tpu_check                      makes the two environments under build/tpu (13 GB, minutes) and runs
    python -m tools.tpu_check --python xla=DIR/bin/python --python tpu=DIR/bin/python    takes existing ones
    python -m tools.tpu_check --only xla           one of the two

xla: torch-xla 2.9 on PJRT's CPU device. tpu: torch-tpu on the emulation of the package xla-cpu-pjrt. What runs there
is tools.tpu_steps: the product's backend and training step, on a ResNet-18 SSD300 with an eighth of the channels at
300 x 300. Ends with 1 if anything is not as it must be.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "tpu"
COMMON = ("numpy", "pycocotools", "hotcoco", "msgspec", "mlperf-logging", "pillow", "urllib3")
PACKAGES = {
    "xla": ("torch==2.9.0", "torchvision==0.24.0", "torch-xla==2.9.0"),
    "tpu": ("torch==2.14.1", "torchvision==0.29.1", "torch-tpu==0.2.0", "xla-cpu-pjrt==0.0.1"),
}
STEPS = 20
PATIENCE = 900
"""Seconds for the steps of one precision on one device; torch-tpu's emulation has been seen to wait for ever."""
TOLERANCES = {"fp32": 5e-3, "bf16": 3e-2}
"""Largest relative difference of a step's loss. The first step's, before rounding has gone through the weights, is held
to a hundredth of it in fp32."""
STATISTICS = 5e-3  # absolute, of the first normalisation's running mean and variance after all steps
SCORES = {"fp32": 1e-4, "bf16": 2e-2}  # absolute, before the first step
Row = tuple[str, str, bool]


def environment(kind: str) -> Path:
    """The interpreter of an environment of its own, made if it is not there yet."""
    python = FOLDER / kind / "bin" / "python"
    ready = FOLDER / kind / ".ready"
    wanted = " ".join((*PACKAGES[kind], *COMMON))
    if not ready.is_file() or ready.read_text() != wanted:
        print(f"{kind}: installing {wanted}", file=sys.stderr)
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "venv", "--clear", FOLDER / kind], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *wanted.split()], check=True)
        ready.write_text(wanted)
        print(f"{kind}: installed in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return python


def surroundings(kind: str, python: Path) -> dict[str, str]:
    """The variables under which torch takes the CPU for a TPU."""
    environ = {k: v for k, v in os.environ.items() if k not in ("PJRT_DEVICE", "TPU_LIBRARY_PATH", "PYTHONPATH")}
    if kind == "xla":
        return environ | {"PJRT_DEVICE": "CPU"}
    library = next(python.parents[1].glob("lib/python3*/site-packages/xla_plugins/xla_cpu_pjrt/*.so"))
    return environ | {"TPU_LIBRARY_PATH": str(library), "TPU_SKIP_MDS_QUERY": "1"}


def steps(kind: str, python: Path, device: str, precision: str, *more: str) -> dict:
    """What tools.tpu_steps saw. Raises RuntimeError with the end of what it said if it failed."""
    name = "_".join((kind, device, precision, *more)).replace("--", "").replace("/", "")
    out = FOLDER / f"{name}.json"
    out.unlink(missing_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    words = ["--device", device, "--precision", precision, "--json", out, *more]
    print(f"{kind}: {device} {precision} {' '.join(more)}", file=sys.stderr)
    program = [python, "-m", "tools.tpu_steps", *words]
    try:
        done = subprocess.run(
            program, cwd=ROOT, env=surroundings(kind, python), capture_output=True, text=True, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired as late:
        raise RuntimeError(f"{kind} {device} {precision}: not at its end after {PATIENCE} s, ended") from late
    (FOLDER / f"{name}.log").write_text(done.stdout + done.stderr)
    if done.returncode or not out.is_file():
        lines = [line for line in done.stderr.splitlines() if line[:5] not in ("E0000", "I0000", "W0000")]
        raise RuntimeError(f"{kind} {device} {precision}: exit code {done.returncode}\n" + "\n".join(lines[-15:]))
    return json.loads(out.read_text())


def apart(ours: list[float], theirs: list[float]) -> list[float]:
    """Relative differences; infinite where one is not a number."""
    found = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    return [math.inf if math.isnan(difference) else difference for difference in found]


def compare(precision: str, there: dict, cpu: dict) -> list[Row]:
    """A device's run beside the CPU's: what, how it is, whether that is right."""
    differences = apart(there["losses"], cpu["losses"])
    limit, near = TOLERANCES[precision], SCORES[precision]
    best = zip(there["scores"], cpu["scores"], strict=True)
    scores = max((abs(a - b) for a, b in best), default=math.inf)
    first = limit / 100 if precision == "fp32" else limit
    (kind, *ours), (_, *theirs) = there["statistics"], cpu["statistics"]
    moved = max(abs(a - b) for mine, other in zip(ours, theirs) for a, b in zip(mine, other))
    rows = [
        (f"loss of step 1, relative (at most {first:g})", f"{differences[0]:.1e}", differences[0] <= first),
        (
            f"losses of {len(differences)} steps (at most {limit:g})",
            f"{max(differences):.1e}",
            max(differences) <= limit,
        ),
        ("loss, type", ", ".join(there["loss_dtype"]), there["loss_dtype"] == ["torch.float32"]),
        ("running statistics, type", kind, kind == "torch.float32"),
        (f"best scores, evaluation, prediction (at most {near:g})", f"{scores:.1e}", scores <= near),
        ("a batch of another shape", "refused" if there["refused"] else "taken", bool(there["refused"])),
        ("checkpoint and generators", "return" if there["checkpoint"] else "lost", there["checkpoint"]),
        ("seconds, first and later steps", f"{there['seconds'][0]:.1f}, {min(there['seconds'][1:]):.2f}", True),
    ]
    bound = STATISTICS if precision == "fp32" else 10 * STATISTICS
    rows.insert(4, (f"running statistics (at most {bound:g})", f"{moved:.1e}", moved <= bound))
    if there["compiled"][0] is not None:
        seen = there["compiled"]
        rows.append(("programs compiled after each step", f"{seen}", seen[-1] == seen[1]))
        rows.append(("operations left to the CPU", ", ".join(there["on_the_host"]) or "none", not there["on_the_host"]))
    return rows


def accumulated(kind: str, python: Path, device: str) -> list[Row]:
    """Two micro-batches a step beside the CPU's: the same lines of accumulation."""
    more = ("--steps", "4", "--accumulate", "2")
    there, cpu = (steps(kind, python, where, "fp32", *more) for where in (device, "cpu"))
    worst = max(apart(there["losses"], cpu["losses"]))
    return [("4 steps of 2 micro-batches", f"{worst:.1e}", worst <= TOLERANCES["fp32"])]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--python", action="append", default=[], metavar="KIND=FILE", help="an environment's interpreter"
    )
    parser.add_argument("--only", choices=tuple(PACKAGES))
    parser.add_argument("--precision", choices=tuple(TOLERANCES))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--json", type=Path, default=FOLDER / "report.json")
    given = parser.parse_args(argv)
    pythons = dict(words.split("=", 1) for words in given.python)
    report, right = {}, True
    for kind in [given.only] if given.only else PACKAGES:
        python = Path(pythons[kind]) if kind in pythons else environment(kind)
        for precision in [given.precision] if given.precision else TOLERANCES:
            count = ("--steps", str(given.steps))
            start = time.perf_counter()
            there, cpu = (steps(kind, python, device, precision, *count) for device in ("tpu", "cpu"))
            rows = compare(precision, there, cpu)
            if kind == "xla" and precision == "fp32":
                rows += accumulated(kind, python, "tpu")
            print(f"\n{there['device']}, torch {there['torch']}, {precision}: {time.perf_counter() - start:.0f} s")
            for what, how, is_right in rows:
                print(f"  {'ok ' if is_right else 'BAD'} {what:48} {how}")
                right = right and is_right
            report[f"{kind} {precision}"] = {"device": there, "cpu": cpu, "rows": rows}
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{'everything as it must be' if right else 'NOT as it must be'}; {given.json}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
