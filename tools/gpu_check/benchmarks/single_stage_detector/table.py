"""The table's sections of RetinaNet: training, variants, inference, single operations, a real run."""

from collections.abc import Iterator
from typing import Any

from tools.gpu_check.columns import between, cut, layout, marked, number, rows

PUBLISHED = {"A100": 126.3, "H100": 291.2, "H200": 312.6, "B200": 490.7}
"""images/s a GPU, the best published MLPerf results (rounds 3.0, 4.0, 4.1, 5.1): 8 GPUs, OpenImages, fp16."""
TARGETS = {"H100": 400.0}
"""images/s a GPU that we aim at, bf16, batch 32; not measured values."""
GFLOP_PER_IMAGE = 1169.0
"""Calculated, of a training step at 800x800 with 264 classes (2 per multiplication and addition)."""


def speed(state: dict[str, Any]) -> Iterator[str]:
    ours, theirs = rows(state, "train"), rows(state, "peers")
    ours = {key: row for key, row in ours.items() if "predicted_gain_ms" not in row}
    if not ours and not theirs:
        return
    card = next((name for name in PUBLISHED if name in state.get("machine", {}).get("device", "")), None)
    beside = max((row["images_per_s"] for row in theirs.values()), default=None)
    yield ""
    names = f"{'images/s':>9} {'10 to 90 %':>15} {'peak GiB':>8} {'x publ.':>8} {'x torchv.':>9} {'% FLOP':>7}"
    yield f"{'training step':34} {names}"
    for key, r in (ours | theirs).items():
        between = f"{r['images_per_s_p10']:.1f}-{r['images_per_s_p90']:.1f}"
        times = r["images_per_s"] / beside if beside else None
        yield (
            f"{cut(key, 34)} {number(r['images_per_s'], 9)} {between:>15} {number(r.get('peak_gib'), 8)} "
            f"{number(r.get('x_published'), 8, 2)} {number(times, 9, 2)} {number(r.get('percent_of_flop_floor'), 7)}"
        )
    if card:
        yield f"publ.: {PUBLISHED[card]:g} images/s a {card}, of 8 (published MLPerf result, not measured here)"
        if card in TARGETS:
            yield f"our target on one {card}: {TARGETS[card]:g} images/s, bf16, batch 32 (a target, not measured)"
    if beside:
        yield "torchv.: the fastest row of torchvision's RetinaNet in this run"
    if any("percent_of_flop_floor" in r for r in ours.values()):
        yield "% FLOP: of the matmul rate measured above, at 1,169 GFLOP an image (calculated)"


def variants(state: dict[str, Any]) -> Iterator[str]:
    ours = rows(state, "train")
    found = {key: row for key, row in ours.items() if "predicted_gain_ms" in row or "gain_ms" in row}
    if not found:
        return
    main = next((key for key in ours if key not in found), "the main row")
    yield ""
    names = f"{'images/s':>9} {'ms':>8} {'gain ms':>8} {'predicted':>10} {'loss':>7} {'later':>7}"
    yield f"{'beside ' + main:45} {names}"
    for key, r in found.items():
        differences = (r.get(f"{name}_difference") for name in ("loss", "later_loss"))
        losses = " ".join(f"{'-' if d is None else format(d, '.0e'):>7}" for d in differences)
        yield (
            f"{cut(key, 45)} {number(r['images_per_s'], 9)} {number(r['ms'], 8, 2)} {number(r.get('gain_ms'), 8, 2)} "
            f"{between(r.get('predicted_gain_ms')):>10} {losses}"
        )
    yield "predicted: calculated, ms a step. A variant is kept only if confirmed: by a gain beyond that of"
    yield "`again`, the same step once more, and by losses (first, after 5 updates) as close as its own"


def inference(state: dict[str, Any]) -> Iterator[str]:
    found = rows(state, "inference")
    if found:
        yield ""
        yield f"{'inference':48} {'images/s':>9} {'ms':>9} {'peak GiB':>9}"
        for key, r in found.items():
            numbers = f"{number(r['images_per_s'], 9)} {number(r['ms'], 9, 2)} {number(r.get('peak_gib'), 9)}"
            yield f"{cut(key, 48)} {numbers}"


def probe(state: dict[str, Any]) -> Iterator[str]:
    found = rows(state, "probe")
    if not found:
        return
    sums = {key: row for key, row in found.items() if key.startswith("step: ")}
    yield ""
    names = f"{'ms':>8} {'10 to 90 %':>13} {'TFLOP/s':>7} {'% matm.':>7} {'GB/s':>6} {'1st s':>6}"
    yield f"{'single operation':47} {names}"
    for key, r in found.items():
        if key in sums:
            continue
        spread = f"{r['p10_ms']:.3f}-{r['p90_ms']:.3f}"
        yield (
            f"{cut(key, 47)} {number(r['ms'], 8, 3)} {spread:>13} {number(r.get('tflop_s'), 7)} "
            f"{number(r.get('percent_of_matmul'), 7)} {number(r.get('gb_s'), 6, 0)} {number(r.get('first_s'), 6, 2)}"
        )
    yield "% matm.: of the matmul rate measured above. 1st s: the first call, with the library's trials"
    for key, r in sums.items():
        predicted = between(r.get("predicted_ms"))
        refused = f"; refused: {r['refused']} of {r['pairs']}" if r.get("refused") else ""
        yield f"  won a {key}: {r['ms']:.2f} ms (predicted for the whole variant: {predicted}){refused}"
    differences = [(r["difference"], key) for key, r in found.items() if "difference" in r]
    if differences:
        off, key = max(differences)
        yield f"  largest difference of {len(differences)} faster ways from the slow one: {off:.1g} ({key})"
    yield from layout({name: None for row in found.values() for name in row.get("layout", ())})


def bccd(state: dict[str, Any]) -> Iterator[str]:
    found = {marked(k, r): r for k, r in state["parts"].get("bccd", {}).get("rows", {}).items() if "AP" in r}
    if found:
        yield ""
        names = f"{'epochs':>7} {'seconds':>8} {'AP':>7} {'AP50':>7} {'s to AP 0.4':>12} {'images/s':>9}"
        yield f"{'bccd from random weights':34} {names}"
        for key, r in found.items():
            passed = next((value for name, value in r.items() if name.startswith("seconds_to_AP")), None)
            yield (
                f"{key:34} {r['epochs']:7} {number(r['seconds'], 8)} {r['AP']:7.4f} {r['AP50']:7.4f} "
                f"{number(passed, 12)} {number(r['median_images_per_s'], 9)}"
            )
