"""HTML and inline SVG for the pages of this package: no scripts, nothing from the network."""

import html
import itertools
import json
import math
from typing import Any, NamedTuple

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
.dot.c3 { fill: var(--c3); } .line.c4 { stroke: var(--t4); } .line.c5 { stroke: var(--t6); }
.dot.c4 { fill: var(--t4); } .dot.c5 { fill: var(--t6); } .key.c4 { border-color: var(--t4); }
.key.c5 { border-color: var(--t6); } .target { stroke: var(--good); stroke-width: 2; stroke-dasharray: 7 5; }
.band { fill: var(--c3); fill-opacity: .22; stroke: var(--c3); stroke-opacity: .5; stroke-width: 1; }
.key.band { border-top: 9px solid var(--c3); opacity: .4; }
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
.bars.one { columns: 1; } .bars.one .bar { grid-template-columns: 12em 1fr 5em; }
.bar span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.bar svg { width: 100%; height: 12px; background: var(--line); border-radius: 3px; } .bar rect { fill: var(--c1); }
.bar b { font-weight: 500; text-align: right; font-variant-numeric: tabular-nums; }
details { margin-top: 10px; } summary { cursor: pointer; font-weight: 500; } footer { margin-top: 20px; }
@media (max-width: 760px) { .charts { grid-template-columns: 1fr; } .tiles { grid-template-columns: 1fr 1fr; }
  .bars { columns: 1; } h1 { font-size: 21px; } .charts text { font-size: 15px; } th, td { padding-right: 12px; } }
"""


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
    """values: one for each x, None where there is none."""

    name: str
    css: str
    values: list[float | None]


class Band(NamedTuple):
    """What is shaded behind the lines: (x, lowest, highest) by x."""

    name: str
    points: list[tuple[float, float, float]]


def chart(name: str, unit: str, x_name: str, xs: list[float], series: list[Series], hovers: list[str],
          target: float | None = None, band: Band | None = None) -> Markup:  # fmt: skip
    """A figure with one line for each series over xs, its legend, and a title for the pointer at each x."""
    tops = [v for s in series for v in s.values if v is not None] + [
        high for _, _, high in (band.points if band else [])
    ]
    top = max(tops + ([target] if target is not None else []))
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
    if band:
        edge = [(a, high) for a, _, high in band.points] + [(a, low) for a, low, _ in reversed(band.points)]
        path = "M" + "L".join(f"{x.at(a)},{y.at(b)}" for a, b in edge) + "Z"
        parts.append(el("path", d=path, class_="band", data_name=band.name))
    for s in reversed(series):
        points = [(x.at(a), y.at(b)) for a, b in zip(xs, s.values, strict=True) if b is not None]
        path = "M" + "L".join(f"{a},{b}" for a, b in points)
        parts.append(el("path", d=path, class_=f"line {s.css}", data_name=s.name))
        if len(points) <= 30:
            parts += [el("circle", cx=a, cy=b, r=3, class_=f"dot {s.css}") for a, b in points]
    edges = [x.start, *((x.at(a) + x.at(b)) / 2 for a, b in itertools.pairwise(xs)), x.end]
    for left, right, words in zip(edges[:-1], edges[1:], hovers, strict=True):
        box = {"x": left, "y": 30, "width": round(max(right - left, 0), 2), "height": 196}
        parts.append(el("rect", el("title", words), **box, class_="hover"))
    keys = [el("span", el("i", class_=f"key {s.css}"), s.name) for s in series]
    if band:
        keys.append(el("span", el("i", class_="key band"), band.name))
    if target is not None:
        keys.append(el("span", el("i", class_="key dashed"), f"target {target:g}"))
    svg = el("svg", *parts, viewBox="0 0 480 270", role="img", aria_label=f"{name} over {x_name}")
    return el("figure", el("h2", name), el("p", *keys, class_="legend"), svg)


def bars(name: str, unit: str, values: list[tuple[str, float | None]]) -> Markup:
    """A figure with a bar for each named value; None is a dash."""
    full = nice_ticks(max((v for _, v in values if v is not None), default=1.0))[-1]
    lines = []
    for label, value in values:
        length = round(min(max((value or 0.0) / full, 0.0), 1.0) * 100, 2)
        shown = el("svg", el("rect", width=length, height=10), viewBox="0 0 100 10", preserveAspectRatio="none",
                   role="img", aria_label=f"{label}: {value}")  # fmt: skip
        words = "-" if value is None else f"{value:,.2f}"
        lines.append(
            el("div", el("span", label), shown, el("b", words), title=f"{label}: {words} {unit}", class_="bar")
        )
    return el("figure", el("h2", f"{name}, {unit}"), el("div", *lines, class_="bars one"))


def table(values: dict[str, Any]) -> Markup:
    def words(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value)

    rows = [el("tr", el("th", key, scope="row"), el("td", words(value))) for key, value in values.items()]
    return el("div", el("table", *rows, class_="facts"), class_="wide")
