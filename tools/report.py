"""One run on one page: reads what a training left in its output folder and writes report.html beside it.

The page is a single file without scripts and without anything from the network: text, inline SVG and the gallery's
images. It shows whether the target was reached, the loss, the mAP, where the time went, detections on validation
images, the AP of each class and the configuration. A run without an end, an evaluation or a gallery gets a page that
says so. Usage: python tools/report.py RESULT_DIR
"""

import argparse
import html
import itertools
import json
import math
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from report_run import TIMES, Run, read_run

from detcore import UserError
from detcore.cli import run_main
from detcore.training.progress import duration

CSS = """
:root { color-scheme: light dark; --bg: #f6f7f9; --card: #fff; --ink: #1b1f27; --soft: #5a6372; --line: #dfe3e9;
  --c0: #1b1f27; --c1: #1f6fd6; --c2: #c2570c; --c3: #0f8a6d; --good: #0b7a4b; --bad: #b3261e; --note: #fff4d6;
  --note-line: #e0b43c; --t0: #8a94a6; --t1: #1f6fd6; --t2: #e08a1e; --t3: #0f9b7a; --t4: #9b5fc0; --t5: #c3cad5;
  --t6: #d2554a; }
@media (prefers-color-scheme: dark) { :root { --bg: #12151b; --card: #1b2029; --ink: #e8ebf0; --soft: #a3acba;
  --line: #323a47; --c0: #e8ebf0; --c1: #6cabff; --c2: #ff9d5c; --c3: #4fd1ab; --good: #55d69b; --bad: #ff8a80;
  --note: #362d14; --note-line: #a98524; --t1: #4f93ee; --t5: #566072; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 20px 16px 40px; }
header p, .small, .none, footer { color: var(--soft); } .small, footer { font-size: 13px; }
header p { margin: 0; } h1 { margin: 4px 0 16px; font-size: 26px; line-height: 1.2; }
h2 { margin: 0 0 6px; font-size: 17px; } h3 { margin: 0; font-size: 13px; font-weight: 500; color: var(--soft); }
section > p { margin: 0 0 12px; }
.good { color: var(--good); } .bad { color: var(--bad); }
.banner { margin: 0 0 12px; padding: 10px 14px; border-left: 4px solid var(--note-line); background: var(--note);
  border-radius: 4px; overflow-wrap: anywhere; }
.problem { border-color: var(--bad); background: var(--card); }
section, .tile, .charts figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
section { padding: 16px; margin-top: 16px; } figure { margin: 0; min-width: 0; } .charts figure { padding: 16px; }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; margin: 16px 0; }
.tile { padding: 12px 14px; display: flex; flex-direction: column; } .tile strong { font-size: 26px; line-height: 1.3; }
.charts { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; }
.charts svg { display: block; width: 100%; height: auto; }
.charts text { font-size: 12px; fill: var(--soft); } .end { text-anchor: end; } .mid { text-anchor: middle; }
.grid { stroke: var(--line); } .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.line.c0 { stroke: var(--c0); stroke-width: 2.5; } .line.c1 { stroke: var(--c1); } .line.c2 { stroke: var(--c2); }
.line.c3 { stroke: var(--c3); } .dot.c0 { fill: var(--c0); } .dot.c1 { fill: var(--c1); } .dot.c2 { fill: var(--c2); }
.dot.c3 { fill: var(--c3); } .target { stroke: var(--good); stroke-width: 2; stroke-dasharray: 7 5; }
.hover { fill: transparent; } .hover:hover { fill: var(--soft); fill-opacity: .18; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 0 0 4px; font-size: 13px; }
.legend span { display: inline-flex; align-items: center; gap: 6px; }
.key { width: 18px; border-top: 3px solid; } .key.c0 { border-color: var(--c0); } .key.c1 { border-color: var(--c1); }
.key.c2 { border-color: var(--c2); } .key.c3 { border-color: var(--c3); }
.key.dashed { border-top: 2px dashed var(--good); }
.stack { display: block; width: 100%; height: 34px; border-radius: 4px; margin: 4px 0 12px; }
.swatch { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 8px; }
.t0 { fill: var(--t0); background: var(--t0); } .t1 { fill: var(--t1); background: var(--t1); }
.t2 { fill: var(--t2); background: var(--t2); } .t3 { fill: var(--t3); background: var(--t3); }
.t4 { fill: var(--t4); background: var(--t4); } .t5 { fill: var(--t5); background: var(--t5); }
.t6 { fill: var(--t6); background: var(--t6); }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 16px 4px 0; text-align: right; border-bottom: 1px solid var(--line); }
td { white-space: nowrap; }
th:first-child { text-align: left; font-weight: 500; } .sum > * { font-weight: 600; border: 0; }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.facts th { vertical-align: top; } .wide { overflow-x: auto; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); gap: 14px; }
.gallery svg { display: block; width: 100%; height: auto; border-radius: 6px; } .gallery p { margin: 2px 0 0; }
.gallery rect { fill: none; vector-effect: non-scaling-stroke; stroke-width: 2.5; pointer-events: stroke; }
.gallery .under { stroke: #000; stroke-width: 3; stroke-opacity: .7; }
.gallery .truth { stroke: #fff; stroke-width: 1.75; stroke-dasharray: 5 4; }
.gallery text { font-weight: 700; paint-order: stroke; stroke: #000; stroke-width: .22em; stroke-linejoin: round; }
.bars { columns: 2; column-gap: 32px; } .bar { display: grid; grid-template-columns: 12em 1fr 3.5em; gap: 10px;
  align-items: center; padding: 3px 0; break-inside: avoid; font-size: 14px; }
.bar span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.bar svg { width: 100%; height: 12px; background: var(--line); border-radius: 3px; } .bar rect { fill: var(--c1); }
.bar b { font-weight: 500; text-align: right; font-variant-numeric: tabular-nums; }
details { margin-top: 10px; } summary { cursor: pointer; font-weight: 500; } footer { margin-top: 20px; }
@media (max-width: 760px) { .charts { grid-template-columns: 1fr; } .tiles { grid-template-columns: 1fr 1fr; }
  .bars { columns: 1; } h1 { font-size: 21px; } .charts text { font-size: 15px; } th, td { padding-right: 12px; } }
"""
BOX_COLOURS = ("#ff7a59", "#4cc9f0", "#b5e853", "#f9c74f", "#c792ea", "#ff8fab", "#2ec4b6", "#e0aaff")
MOST_POINTS = 400  # of a curve; longer ones are drawn as means of neighbours
MOST_BOXES = 30  # detections drawn in an image
MOST_CLASSES = 40  # bars that are open to view


class Markup(str):
    """Text that is HTML already; everything else is escaped by `el`."""


def el(tag: str, *content: Any, **attributes: Any) -> Markup:
    """An element; content and attribute values are escaped. `_` in a name becomes `-`, one at its end is dropped."""
    words = "".join(
        f' {k.rstrip("_").replace("_", "-")}="{html.escape(str(v))}"' for k, v in attributes.items() if v is not None
    )
    return Markup(f"<{tag}{words}>{join(*content)}</{tag}>")


def join(*content: Any) -> Markup:
    return Markup("".join(c if isinstance(c, Markup) else html.escape(str(c)) for c in content))


class Axis(NamedTuple):
    """A linear scale from data (low..high) to SVG units (start..end), with ticks."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 2)


def nice_ticks(high: float, most: int = 6, smallest: float = 0.0) -> tuple[float, ...]:
    """0 and multiples of 1, 2 or 5 times a power of ten up to `high` or just above it; at most `most` intervals."""
    high = high if high > 0 else 1.0
    power = 10.0 ** math.floor(math.log10(high / most))
    step = next(m * power for m in (1, 2, 5, 10) if m * power * most >= high * (1 - 1e-9))
    step = max(step, smallest)
    return tuple(round(i * step, 12) for i in range(math.ceil(high / step - 1e-9) + 1))


class Series(NamedTuple):
    name: str
    css: str
    values: list[float]


def chart(name: str, unit: str, x_name: str, xs: list[float], series: list[Series], hovers: list[str],
          target: float | None = None) -> Markup:  # fmt: skip
    """A figure with one line for each series over xs, its legend, and a title for the pointer at each x."""
    top = max([v for s in series for v in s.values] + ([target] if target is not None else []))
    across, up = nice_ticks(xs[-1], smallest=1), nice_ticks(top)
    x = Axis(0, xs[-1], 46, 468, tuple(t for t in across if t <= xs[-1]))
    y = Axis(0, up[-1], 226, 30, up)
    parts = [el("text", unit, x=4, y=14, class_="unit"), el("text", x_name, x=468, y=264, class_="unit end")]
    for t in y.ticks:
        parts.append(el("path", d=f"M{x.start},{y.at(t)}H{x.end}", class_="grid"))
        parts.append(el("text", f"{t:.10g}", x=40, y=y.at(t) + 4, class_="end", data_y=t, data_at=y.at(t)))
    for t in x.ticks:
        words = f"{t:,.10g}"
        place = {"x": 478, "class_": "end"} if x.at(t) + 4 * len(words) > 478 else {"x": x.at(t), "class_": "mid"}
        parts.append(el("text", words, **place, y=246, data_x=t, data_at=x.at(t)))
    if target is not None:
        parts.append(el("path", d=f"M{x.start},{y.at(target)}H{x.end}", class_="target"))
    for s in reversed(series):
        points = [(x.at(a), y.at(b)) for a, b in zip(xs, s.values, strict=True)]
        path = "M" + "L".join(f"{a},{b}" for a, b in points)
        parts.append(el("path", d=path, class_=f"line {s.css}", data_name=s.name))
        if len(points) <= 30:
            parts += [el("circle", cx=a, cy=b, r=3, class_=f"dot {s.css}") for a, b in points]
    edges = [x.start, *((x.at(a) + x.at(b)) / 2 for a, b in itertools.pairwise(xs)), x.end]
    for left, right, words in zip(edges[:-1], edges[1:], hovers, strict=True):
        box = {"x": left, "y": 30, "width": round(max(right - left, 0), 2), "height": 196}
        parts.append(el("rect", el("title", words), **box, class_="hover"))
    keys = [el("span", el("i", class_=f"key {s.css}"), s.name) for s in series]
    if target is not None:
        keys.append(el("span", el("i", class_="key dashed"), f"target {target:g}"))
    svg = el("svg", *parts, viewBox="0 0 480 270", role="img", aria_label=f"{name} over {x_name}")
    return el("figure", el("h2", name), el("p", *keys, class_="legend"), svg)


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
    if not run.evals:
        return el("figure", el("h2", "mAP"), el("p", "No evaluation was recorded.", class_="none"))
    series = [
        Series(label, css, [max(e["metrics"].get(key, 0.0), 0.0) for e in run.evals])
        for label, key, css in (("AP (IoU 0.50 to 0.95)", "AP", "c1"), ("AP50", "AP50", "c2"))
    ]
    hovers = [
        f"after epoch {e['epoch']}\n" + "\n".join(f"{s.name} {s.values[i]:.4f}" for s in series)
        for i, e in enumerate(run.evals)
    ]
    epochs = [e["epoch"] for e in run.evals]
    return chart("mAP on the validation images", "AP, 0 to 1", "completed epochs", epochs, series, hovers, run.target)


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
        left = max(min(x0, width - wide), 0)
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
    words = f"{len(entry['truth'])} true, {len(entry['detections'])} detections{more}"
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


def table(values: dict[str, Any]) -> Markup:
    def words(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value)

    rows = [el("tr", el("th", key, scope="row"), el("td", words(value))) for key, value in values.items()]
    return el("div", el("table", *rows, class_="facts"), class_="wide")


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
    nothing = "nothing to score" if done else "no evaluation yet"
    where = f"after epoch {best['epoch']}; {goal}" if best else f"{nothing}; {goal}"
    rate = "-" if run.rate is None else f"{run.rate:,.1f}"
    return [
        ("Time to train", duration(seconds), between),
        ("Epochs evaluated", f"{done}", f"of at most {run.start['config'].get('epochs', '?')}"),
        ("Best mAP", f"{best['metrics']['AP']:.4f}" if best else "-", where),
        ("Images/s", rate, "over all training steps, waiting for data included"),
    ]


def page(run: Run) -> str:
    """The whole HTML document."""
    mood, sentence = run.verdict()
    config, begun = run.start["config"], run.log.get("run_start")
    date = datetime.fromtimestamp(begun[0][0] / 1000, UTC).strftime(", started %Y-%m-%d %H:%M UTC") if begun else ""
    images = {"training": run.log.get("train_samples"), "validation": run.log.get("eval_samples")}
    sizes = [f"{events[-1][1]:,} {kind} images" for kind, events in images.items() if events]
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
        time_section(run), gallery_section(run), class_section(run),
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
    return "\n".join([run.verdict()[1], f"best AP {best} {where}", speed, f"notes: {notes}", f"report: {path}"])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Write RESULT_DIR/report.html: one training run on one page.")
    parser.add_argument("result_dir", type=Path, help="the --output-dir of the training")
    folder = parser.parse_args(argv).result_dir
    run = read_run(folder)
    path = folder / "report.html"
    try:
        path.write_text(page(run), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}") from error
    for problem in run.problems:
        print(f"note: {problem}", file=sys.stderr)
    print(summary(run, path))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
