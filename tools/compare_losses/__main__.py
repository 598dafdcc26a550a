"""Whether two training runs have the same loss curve: the largest relative difference over the steps both recorded.

    python -m tools.compare_losses A B [--tolerance 0.02 | --control C] [--steps N] [--figure FILE.html] [--json FILE]
    python -m tools.compare_losses A B --run [--steps 20] [--control C] [--b-options "OPTIONS"] ... -- OPTIONS

A and B are output folders of two runs, or their progress.jsonl. --run trains them first: A with --ops reference and
--graphs off, B with --ops auto and --graphs auto, for so many steps, recording each, and by deterministic algorithms
where torch has them; OPTIONS are those of single_stage_detector.train and are the same for both (give a --seed, or one
is chosen). With --b-options, in one word, both run by --ops auto and --graphs auto, and B has these beside: what an
option changes, such as "--variants fp8_heads"; --control C then is that of this A.
The difference of a step is |a - b| / max(|a|, |b|, 1e-6), of the total loss and of every term. Rounding differs between
two correct programs, and training lets that grow from step to step, as fast as the task and the learning rate make it.
So a fixed tolerance is a guess. --control C measures it: C is A's program again, trained by --run from weights times
1 + 1e-7 N(0, 1), about one rounding each. B may then differ from A at any step by 1e-5, which is what single ops may,
and by ten times what C has differed up to there, since B rounds otherwise in every step, C only once.
--figure draws both curves as a page of HTML. Exit code: 0 within the tolerance, 1 over it, 2 nothing to compare.
"""

import argparse
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from detcore import UserError
from detcore.cli import TARGET_NOT_REACHED, run_main
from tools.submission.svg import CSS, Markup, Series, chart, el

ROOT = Path(__file__).resolve().parents[2]
APART = 1e-7  # of the control's weights from those of A, relative
SINGLE, MARGIN = 1e-5, 10  # what is allowed: SINGLE + MARGIN times the control's difference
Curve = dict[int, dict[str, float]]


def read_curve(path: Path) -> Curve:
    """Step: {"loss": total, and each term by name}. A step that was done again by a resumed run counts as done last."""
    file = path / "progress.jsonl" if path.is_dir() else path
    try:
        lines = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines() if text.strip()]
        return {r["step"]: {"loss": r["loss"], **r["terms"]} for r in lines if r["kind"] == "step"}
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; name a run's output folder or its progress.jsonl") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no progress.jsonl ({type(error).__name__}: {error})") from error


def compare(a: Curve, b: Curve, steps: int | None = None) -> dict[str, Any]:
    """{steps, largest, at_step, term, mean} of the relative differences over the common steps up to `steps`.

    A value that is finite in one curve only differs by infinity. Raises UserError where there is no common step.
    """
    common = sorted(step for step in a.keys() & b.keys() if steps is None or step <= steps)
    if not common:
        raise UserError("the two runs have no recorded step in common; give both the same --log-interval")
    if a[common[0]].keys() != b[common[0]].keys():
        raise UserError(f"the runs have other terms: {', '.join(a[common[0]])} and {', '.join(b[common[0]])}")
    found = [(relative(a[s][term], b[s][term]), s, term) for s in common for term in a[s]]
    largest, step, term = max(found, key=lambda item: (item[0], -item[1]))
    totals = [difference for difference, _, name in found if name == "loss"]
    return {"steps": len(common), "largest": largest, "at_step": step, "term": term, "mean": sum(totals) / len(totals)}


def compare_with_control(a: Curve, b: Curve, control: Curve, steps: int | None = None) -> dict[str, Any]:
    """As `compare`, with {control: its largest difference, tolerance, within}.

    tolerance: what is allowed at the step that comes nearest to it, or passes it by most.
    """
    found, differs = compare(a, b, steps), compare(a, control, steps)
    largest, nearest = 0.0, (-1.0, SINGLE)
    for step in sorted(a.keys() & b.keys() & control.keys()):
        if steps is not None and step > steps:
            break
        largest = max(largest, *(relative(a[step][term], control[step][term]) for term in a[step]))
        allowed = SINGLE + MARGIN * largest
        own = max(relative(a[step][term], b[step][term]) for term in a[step])
        nearest = max(nearest, (own / allowed if own < math.inf else math.inf, allowed))
    return found | {"control": differs["largest"], "tolerance": nearest[1], "within": nearest[0] <= 1}


def relative(a: float, b: float) -> float:
    if not (math.isfinite(a) and math.isfinite(b)):
        return 0.0 if a == b or (math.isnan(a) and math.isnan(b)) else math.inf
    return abs(a - b) / max(abs(a), abs(b), 1e-6)


def train(folder: Path, steps: int, options: list[str], how: list[str], apart: float = 0) -> None:
    """One run of at least so many steps, from weights that are so far `apart`. Raises UserError if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tools.compare_losses", TRAINER, str(apart), "single_stage_detector.train"]
    command += ["--target-map", "none", *options, *how, "--cudnn-benchmark-limit", "1"]  # no choice, the same each time
    command += ["--output-dir", str(folder.resolve()), "--overwrite", "--log-interval", "1", *length(options, steps)]
    print("$", " ".join(command), flush=True)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, TARGET_NOT_REACHED):
        raise UserError(f"the run failed with code {done.returncode}:\n{done.stderr.strip()[-2000:]}")


TRAINER = "--trainer"


def trainer(apart: float, options: list[str]) -> int:
    """What `train` starts: single_stage_detector.train by deterministic algorithms, its first weights times 1 + apart
    N(0, 1)."""
    import torch

    from single_stage_detector import train as program

    build = program.build_model

    def build_apart(*arguments: Any) -> torch.nn.Module:
        model, random = build(*arguments), torch.Generator().manual_seed(0)
        for weight in model.parameters():
            weight.data.mul_(1 + apart * torch.randn(weight.shape, generator=random))
        return model

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # that looks for errors, which other tests do
    program.build_model = build_apart if apart else build
    try:
        return program.main(options)
    finally:
        program.build_model = build


def length(options: list[str], steps: int) -> list[str]:
    """The options that make a run so many steps long, or a little longer: it ends with an epoch."""
    from detcore.config import load
    from detcore.data.plan import steps_per_epoch
    from detcore.detection.detector import open_index
    from single_stage_detector.config import Config

    config = load(Config, options, {}, {})[0]
    if config.synthetic:
        return ["--epochs", "1", "--max-iters-per-epoch", str(steps)]
    index = open_index(config, "train")
    each = steps_per_epoch(len(index), config.batch_size, 1, config.drop_last) // config.accumulate
    each = max(min(each, steps), 1)
    return ["--epochs", str(math.ceil(steps / each)), "--max-iters-per-epoch", str(each)]


def figure(path: Path, names: tuple[str, str], curves: tuple[Curve, Curve], said: str) -> None:
    """Both curves of the total loss on a page of HTML, by the report's own drawing."""
    steps = sorted(curves[0].keys() & curves[1].keys())
    values = [[curve[step]["loss"] for step in steps] for curve in curves]
    drawn = [i for i in range(len(steps)) if all(math.isfinite(v[i]) for v in values)]
    series = [Series(n, css, [v[i] for i in drawn]) for n, css, v in zip(names, ("c0", "c2"), values, strict=True)]
    hovers = [f"step {steps[i]}: {values[0][i]:.6g} and {values[1][i]:.6g}" for i in drawn]
    plot = chart("Loss of both runs", "loss", "step", [float(steps[i]) for i in drawn], series, hovers)
    body = el("main", el("h1", said), el("div", plot, class_="charts"))
    head = el("head", Markup('<meta charset="utf-8">'), el("title", "Loss of both runs"), el("style", Markup(CSS)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("<!doctype html>\n" + el("html", head, el("body", body), lang="en") + "\n", encoding="utf-8")


def sentence(found: dict[str, Any]) -> str:
    """The result in words."""
    what = f"the tolerance of {found['tolerance']:g}"
    if "control" in found:
        what = f"what rounding explains (weights {APART:g} apart differ by up to {found['control']:.3g})"
    return (
        f"{'within' if found['within'] else 'OVER'} {what}: over {found['steps']} steps the "
        f"largest relative difference is {found['largest']:.3g} ({found['term']}, step {found['at_step']}), "
        f"the mean of the total's {found['mean']:.3g}"
    )


def main(argv: list[str]) -> int:
    if argv[:1] == [TRAINER]:
        return trainer(float(argv[1]), argv[3:])
    cut = argv.index("--") if "--" in argv else len(argv)
    words, options = argv[:cut], argv[cut + 1 :]
    parser = argparse.ArgumentParser(
        "python -m tools.compare_losses", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", type=Path, help="output folder or progress.jsonl")
    parser.add_argument("b", type=Path, help="the other one's")
    parser.add_argument("--tolerance", type=float, default=0.02, help="largest relative difference (0.02)")
    parser.add_argument("--control", type=Path, help="A's program again from weights that are a rounding apart")
    parser.add_argument("--steps", type=int, help="compare so many steps only; with --run: train so many (20)")
    parser.add_argument("--run", action="store_true", help="train them first")
    parser.add_argument("--b-options", type=shlex.split, help="with --run: options that B alone has, in one word")
    parser.add_argument("--figure", type=Path, help="draw both curves into this HTML file")
    parser.add_argument("--json", type=Path, help="write the numbers into this file")
    given = parser.parse_args(words)
    if given.b_options is not None and not given.run:
        parser.error("--b-options is for --run")
    if given.run:
        steps = given.steps or 20
        seed = [] if "--seed" in options else ["--seed", "1"]
        ours, own = ["--ops", "auto", "--graphs", "auto"], given.b_options
        reference = ["--ops", "reference", "--graphs", "off"] if own is None else ours
        train(given.a, steps, [*options, *seed], reference)
        train(given.b, steps, [*options, *seed], [*ours, *(own or ())])
        if given.control:
            train(given.control, steps, [*options, *seed], reference, APART)
        given.steps = steps
    curves = read_curve(given.a), read_curve(given.b)
    if given.control:
        found = compare_with_control(*curves, read_curve(given.control), given.steps)
    else:
        found = compare(*curves, given.steps)
        found |= {"tolerance": given.tolerance, "within": found["largest"] <= given.tolerance}
    print(sentence(found))
    if given.figure:
        figure(given.figure, (given.a.name, given.b.name), curves, sentence(found))
    if given.json:
        given.json.write_text(json.dumps(found))
    return 0 if found["within"] else 1


if __name__ == "__main__":
    sys.exit(run_main(main))
