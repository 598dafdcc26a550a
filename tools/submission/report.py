"""One run on one page: report.html beside what a training left in its output folder, or a page made of any MLPerf log.

  python -m tools.submission report RESULT_DIR              # writes RESULT_DIR/report.html
  python -m tools.submission report LOG... [--out FILE]     # writes <log>.html beside each log, or FILE

The page is a single file without scripts and without anything from the network: text, inline SVG and the gallery's
images. It shows whether the target was reached, the loss, the mAP beside that of public runs, where the time went,
detections on validation images, the AP of each class and the configuration. A run without an end, an evaluation or a
gallery gets a page that says so. A folder without progress.jsonl is taken for one with logs: a page for each.
"""

import argparse
import math
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from detcore import UserError
from detcore.cli import run_main
from detcore.training.progress import duration

from .logs import collect, number
from .output import add_json, print_json
from .rcp import public_runs
from .report_run import TIMES, Run, read_log_alone, read_run
from .rulesets import DEFAULT, known
from .svg import CSS, Band, Markup, Series, chart, el, nice_ticks, table

BOX_COLOURS = ("#ff7a59", "#4cc9f0", "#b5e853", "#f9c74f", "#c792ea", "#ff8fab", "#2ec4b6", "#e0aaff")
MOST_POINTS = 400  # of a curve; longer ones are drawn as means of neighbours
MOST_BOXES = 30  # detections drawn in an image
MOST_CLASSES = 40  # bars that are open to view


def loss_chart(run: Run) -> Markup:
    steps = [s for s in run.steps if math.isfinite(s["loss"])]
    if not steps:
        return el("figure", el("h2", "Loss"), el("p", "No training step was recorded.", class_="none"))
    size = math.ceil(len(steps) / MOST_POINTS)
    groups = [steps[i : i + size] for i in range(0, len(steps), size)]
    names = list(steps[-1]["terms"])
    series = [Series("total", "c0", [statistics.fmean(s["loss"] for s in g) for g in groups])]
    for i, n in enumerate(names):
        values = [statistics.fmean(s["terms"].get(n, 0.0) for s in g) for g in groups]
        series.append(Series(n, f"c{1 + i % 3}", values))
    hovers = [
        f"step {g[-1]['step']:,}, epoch {g[-1]['epoch']}\n" + "\n".join(f"{s.name} {s.values[i]:.4f}" for s in series)
        for i, g in enumerate(groups)
    ]
    every = f", means of {size} recordings" if size > 1 else ""
    return chart("Loss", "loss", f"step{every}", [g[-1]["step"] for g in groups], series, hovers)


def metric_chart(run: Run) -> Markup:
    """The metrics after each epoch, and the band in which public runs of the same batch size were."""
    if not run.evals:
        return el("figure", el("h2", "mAP"), el("p", "No evaluation was recorded.", class_="none"))
    names = {"AP": "AP (IoU 0.50 to 0.95)", "AP50": "AP50", "SEGM": "AP of masks", "segm_AP": "AP of masks"}
    proposals = run.metric.startswith("AR@")
    if proposals:
        names = {f"AR@{limit}": f"AR of {limit} proposals" for limit in (1000, 100)}
    series = [
        Series(label, f"c{1 + i}", [max(e["metrics"].get(key, 0.0), 0.0) for e in run.evals])
        for i, (key, label) in enumerate(names.items())
        if any(key in e["metrics"] for e in run.evals)
    ]
    hovers = [
        f"after epoch {e['epoch']}\n" + "\n".join(f"{s.name} {s.values[i]:.4f}" for s in series)
        for i, e in enumerate(run.evals)
    ]
    epochs, public = [e["epoch"] for e in run.evals], public_of(run)
    band = Band("public runs, lowest to highest", [(row["epoch"], row["lowest"], row["highest"]) for row in public])
    titles = (
        ("AR on the validation images", "AR, 0 to 1") if proposals else ("mAP on the validation images", "AP, 0 to 1")
    )
    return chart(*titles, "completed epochs", epochs, series, hovers, run.target, band if public else None)


def public_of(run: Run) -> list[dict[str, Any]]:
    """Each evaluation beside public runs; see `rcp.public_runs`."""
    found = public_runs(run.mlperf, DEFAULT) if run.mlperf else []
    return list({row["epoch"]: row for row in found}.values())


def public_section(run: Run) -> Markup:
    rows = public_of(run)
    if not rows:
        return Markup("")
    lines = [el("li", row["words"], class_="bad" if row["far"] else "") for row in rows]
    words = (
        "Runs of rounds 2.0 to 5.1 of MLPerf Training. Far off is more than four standard deviations from their mean."
    )
    return el("section", el("h2", "Beside public runs"), el("p", words, class_="small"), el("ul", *lines))


def time_section(run: Run) -> Markup:
    """A stacked bar of the seconds by kind, and the same as a table."""
    total = sum(run.seconds.values())
    if total <= 0:
        return el("section", el("h2", "Where the time went"), el("p", "No time was recorded.", class_="none"))
    left, bars, rows = 0.0, [], []
    for i, (kind, words) in enumerate(TIMES.items()):
        value = run.seconds[kind]
        width = value / total * 1000
        if not value:
            continue
        title = el("title", f"{words}: {value:,.1f} s, {value / total:.1%}")
        bars.append(el("rect", title, x=round(left, 2), y=0, width=round(width, 2), height=40, class_=f"t{i}"))
        cells = (f"{value:,.1f} s", f"{value / total:.1%}")
        name = el("th", el("i", class_=f"swatch t{i}"), words, scope="row")
        rows.append(el("tr", name, *(el("td", c) for c in cells)))
        left += width
    bar = el("svg", *bars, viewBox="0 0 1000 40", preserveAspectRatio="none", class_="stack", role="img",
             aria_label="seconds by kind")  # fmt: skip
    last = el("tr", el("th", "together", scope="row"), el("td", f"{total:,.1f} s"), el("td", "100%"), class_="sum")
    note = "The metric itself is computed beside the training; only what the training waits for counts as evaluation."
    return el("section", el("h2", "Where the time went"), bar, el("table", *rows, last), el("p", note, class_="small"))


def picture(entry: dict[str, Any], colours: dict[str, str]) -> Markup:
    """One image with its true boxes dashed and the best detections solid, in the image's own pixels.

    Detections come best first; the words of one that finds no free place are only shown to the pointer.
    """
    width, height = entry["size"]
    size = round(width * 0.042, 2)
    suffix = Path(entry["image"]).suffix.lower().lstrip(".").replace("jpg", "jpeg")
    parts = [el("image", href=f"data:image/{suffix};base64,{entry['data']}", width=width, height=height)]
    for x0, y0, x1, y1, label in entry["truth"]:
        place = {"x": x0, "y": y0, "width": x1 - x0, "height": y1 - y0}
        title = el("title", f"truth: {label}")
        parts += [el("rect", **place, class_="under"), el("rect", title, **place, class_="truth")]
    boxes, texts, taken = [], [], []
    for x0, y0, x1, y1, label, score in entry["detections"][:MOST_BOXES]:
        words = f"{label} {score:.2f}"
        boxes.append(el("rect", el("title", f"found: {words}"), x=x0, y=y0, width=x1 - x0, height=y1 - y0,
                        stroke=colours[label], class_="found"))  # fmt: skip
        wide = 0.65 * size * len(words)  # a letter of the bold face is about 0.65 of its height wide
        left = max(min(x0, width - wide), 0.2 * size)
        for base in (y0 - 0.3 * size, y1 + size, y0 + size):  # above the box, below it, inside
            free = all(abs(y - base) > size or x > left + wide or x + w < left for x, y, w in taken)
            if size <= base <= height and free:
                taken.append((left, base, wide))
                place = {"x": round(left, 1), "y": round(base, 1), "font_size": size}
                texts.append(el("text", words, **place, fill=colours[label]))
                break
    parts += [*reversed(boxes), *texts]
    more = f", the best {MOST_BOXES} drawn" if len(entry["detections"]) > MOST_BOXES else ""
    svg = el("svg", *parts, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label="validation image with boxes")
    count, names = len(entry["detections"]), dict.fromkeys(label for *_, label in entry["truth"])
    classes = f" ({', '.join(names)})" if names else ""
    words = f"{len(entry['truth'])} true{classes}, {count} detection{'s' * (count != 1)}{more}"
    return el("figure", svg, el("p", words, class_="small"))


def gallery_section(run: Run) -> Markup:
    if not run.gallery:
        return el("section", el("h2", "Detections"), el("p", "No gallery was made (--gallery N).", class_="none"))
    labels = sorted({box[4] for e in run.gallery for box in e["truth"] + e["detections"]})
    colours = {label: BOX_COLOURS[i % len(BOX_COLOURS)] for i, label in enumerate(labels)}
    least = run.start["config"].get("score_threshold", 0)
    words = f"Validation images. Dashed: true boxes. Solid: what best.pt finds with a score of {least:g} or more; "
    words += "where boxes crowd, only the best have room for their words."
    pictures = [picture(entry, colours) for entry in run.gallery]
    return el("section", el("h2", "Detections"), el("p", words), el("div", *pictures, class_="gallery"))


def class_section(run: Run) -> Markup:
    """A bar for each class, best first; with many classes the middle is folded away."""
    per_class = run.best["metrics"].get("per_class") if run.best else None
    if not per_class:
        return Markup("")
    ranked = sorted(((n, v) for n, v in per_class.items() if v >= 0), key=lambda item: -item[1])
    full = nice_ticks(max((v for _, v in ranked), default=1.0))[-1]
    rows = [
        el("div", el("span", n), el("svg", el("rect", width=round(v / full * 100, 2), height=10), viewBox="0 0 100 10",
           preserveAspectRatio="none", aria_hidden="true"), el("b", f"{v:.3f}"), title=f"{n}: AP {v:.4f}", class_="bar")
        for n, v in ranked
    ]  # fmt: skip
    half = MOST_CLASSES // 2
    body = [el("div", *rows, class_="bars")]
    if len(rows) > MOST_CLASSES:
        first, middle, last = (el("div", *r, class_="bars") for r in (rows[:half], rows[half:-half], rows[-half:]))
        body = [first, el("details", el("summary", f"{len(rows) - 2 * half} classes between"), middle), last]
    empty = len(per_class) - len(ranked)
    words = f"After epoch {run.best['epoch']}, the best one. A full bar is {full:g}."
    words += f" Without boxes in the validation set, so without a bar: {empty}." if empty else ""
    return el("section", el("h2", "AP of each class"), el("p", words), *body)


def metrics_table(run: Run) -> Markup:
    names = [n for n in run.evals[-1]["metrics"] if n != "per_class"]
    head = el("tr", el("th", "epoch"), *(el("th", n) for n in names))
    rows = []
    for e in run.evals:
        values = [e["metrics"].get(n, -1.0) for n in names]
        rows.append(el("tr", el("th", e["epoch"]), *(el("td", f"{v:.4f}" if v >= 0 else "-") for v in values)))
    return el("div", el("table", head, *rows), class_="wide")


def facts(run: Run) -> list[tuple[str, str, str]]:
    """The headline's numbers: (name, value, explanation)."""
    seconds, between = run.time_to_train()
    best, done = run.best, run.evals[-1]["epoch"] if run.evals else 0
    goal = "no target" if run.target is None else f"target {run.target:g}"
    where = f"after epoch {best['epoch']}; {goal}" if best else f"no evaluation yet; {goal}"
    most = run.start["config"].get("epochs", "?")  # 0: so many steps, not epochs
    rate = "-" if run.rate is None else f"{run.rate:,.1f}"
    name = "mAP" if run.metric == "AP" else run.metric
    return [
        ("Time to train", duration(seconds), between),
        ("Epochs evaluated", f"{done}", f"of at most {most}" if most else "the run's length is in steps"),
        (
            f"{name} of the best epoch" if len(run.targets) > 1 else f"Best {name}",
            f"{best['metrics'][run.metric]:.4f}" if best else "-",
            where,
        ),
        ("Images/s", rate, "over all training steps, waiting for data included"),
    ]


def page(run: Run) -> str:
    """The whole HTML document."""
    mood, sentence = run.verdict()
    config, begun = run.start["config"], run.log.get("run_start")
    date = datetime.fromtimestamp(begun[0][0] / 1000, UTC).strftime(", started %Y-%m-%d %H:%M UTC") if begun else ""
    images = {"training": run.log.get("train_samples"), "validation": run.log.get("eval_samples")}
    sizes = [
        f"{events[-1][1]:,} {kind} images"
        for kind, events in images.items()
        if events and number(events[-1][1]) is not None
    ]
    tiles = [
        el("div", el("h3", name), el("strong", value), el("span", words, class_="small"), class_="tile")
        for name, value, words in facts(run)
    ]
    sign = {"good": "\u2713 ", "bad": "\u2717 ", "plain": ""}[mood]
    results = [el("details", el("summary", "Every evaluation"), metrics_table(run))] if run.evals else []
    body = [
        el("header", el("p", ", ".join([f"{run.start['benchmark']} on {config.get('dataset', '?')}", *sizes]) + date),
           el("h1", sign + sentence, class_=mood)),
        *(el("p", note, class_="banner") for note in run.start["notes"]),
        *(el("p", f"About this page: {problem}.", class_="banner problem") for problem in run.problems),
        el("div", *tiles, class_="tiles"),
        el("div", loss_chart(run), metric_chart(run), class_="charts"),
        time_section(run), public_section(run), gallery_section(run), class_section(run),
        el("section", el("h2", "Details"), *results, el("details", el("summary", "Configuration"), table(config)),
           el("details", el("summary", "Environment"), table(run.start["environment"]), open="")),
        el("footer", "The record of one run. An MLPerf result is only what MLCommons has reviewed and published."),
    ]  # fmt: skip
    title = el("title", f"{sentence} - {run.start['benchmark']}")
    view = Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">')
    head = el("head", view, title, el("style", Markup(CSS)))
    return "<!doctype html>\n" + el("html", head, el("body", el("main", *body)), lang="en") + "\n"


def summary(run: Run, path: Path) -> str:
    """Five lines for the console."""
    (_, time, between), _, (_, best, where), (_, rate, how) = facts(run)
    notes = " ".join(run.start["notes"]) or "none"
    speed = f"time to train {time} ({between}), {rate} images/s ({how})"
    which = f"{run.metric} of the best epoch" if len(run.targets) > 1 else f"best {run.metric}"
    return "\n".join([run.verdict()[1], f"{which} {best} {where}", speed, f"notes: {notes}", f"report: {path}"])


def write_page(run: Run, path: Path) -> None:
    """Raises UserError where the file can't be written."""
    try:
        path.write_text(page(run), encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}; choose another place by --out") from error


def main(argv: list[str]) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m tools.submission report", description=__doc__, formatter_class=form
    )
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="the --output-dir of a training, or logs")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page's name, for a single run")
    parser.add_argument("--ruleset", default=DEFAULT, help="for the benchmark's target (default: %(default)s)")
    add_json(parser)
    args = parser.parse_args(argv)
    known(args.ruleset)
    runs: list[tuple[Run, Path]] = []
    for path in args.paths:
        if (path.is_dir() and ((path / "progress.jsonl").is_file() or not any(path.iterdir()))) or not path.exists():
            runs.append((read_run(path), path / "report.html"))
            continue
        runs += [(read_log_alone(log, args.ruleset), log.with_suffix(".html")) for log in collect([path])]
    if args.out and len(runs) != 1:
        raise UserError(f"--out {args.out} is one page, and these are {len(runs)} runs; leave it out, or name one run")
    found = []
    for run, path in runs:
        write_page(run, args.out or path)
        for problem in run.problems:
            print(f"note: {problem}", file=sys.stderr)
        seconds, best = run.time_to_train()[0], run.best["metrics"][run.metric] if run.best else None
        fields = {"page": args.out or path, "verdict": run.verdict()[1], "best": best, "seconds": seconds}
        found.append(fields | {"images_per_s": run.rate, "public_runs": public_of(run)})
        if not args.json:
            print(summary(run, args.out or path))
    if args.json:
        print_json(found)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
