"""The table of tools/gpu_check.py, from its JSON: at most 100 columns, measured values unless a line says otherwise."""

import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from gpu_check_machine import told

PUBLISHED = {"A100": 126.3, "H100": 291.2, "H200": 312.6, "B200": 490.7}
"""images/s a GPU, the best published MLPerf results (rounds 3.0, 4.0, 4.1, 5.1): 8 GPUs, OpenImages, fp16."""
TARGETS = {"H100": 400.0}
"""images/s a GPU that we aim at, bf16, batch 32; not measured values."""
SSD300_PUBLISHED = {"training": ("A100", 724.0), "inference": ("A100", 970.0)}
"""Card and images/s of one GPU: NVIDIA's later figures for batch 128 and 32, fp16; training leaves data out."""
SSD300_TARGETS = {"training": 2500.0, "inference": 6000.0}
"""images/s on one H100 that we aim at; not measured values."""
WIDTH = 100
Row = dict[str, Any]


def table(state: dict[str, Any]) -> str:
    return "\n".join(part for section in SECTIONS for line in lines(section, state) for part in folded(line.rstrip()))


def lines(section: Callable[[dict], Iterator[str]], state: dict[str, Any]) -> list[str]:
    """A section's lines; one that says so where a row is not as it should be, which must not end a check."""
    try:
        return list(section(state))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return ["", f"{section.__name__}: a row is not as it should be ({type(error).__name__}: {error}); see the JSON"]


def folded(line: str) -> list[str]:
    """A line that is too long as several."""
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.wrap(line, WIDTH, subsequent_indent=indent) if len(line) > WIDTH else [line]


def rows(state: dict[str, Any], part: str) -> dict[str, Row]:
    """The measured rows of a part; those of another commit have a * behind their key."""
    found = state["parts"].get(part, {}).get("rows", {})
    return {marked(key, row): row for key, row in found.items() if "skipped" not in row and "ms" in row}


def marked(key: str, row: Row) -> str:
    return key + "*" * ("commit" in row)


def cut(key: str, width: int) -> str:
    """A key of so many characters, its mark included."""
    return (key if len(key) <= width else key[: width - 1] + ("*" if key.endswith("*") else key[width - 1])).ljust(
        width
    )


def number(value: float | None, width: int, places: int = 1) -> str:
    """Right-aligned; a dash where there is none."""
    return f"{value:{width}.{places}f}" if isinstance(value, int | float) else "-".rjust(width)


def about(state: dict[str, Any]) -> Iterator[str]:
    m = state.get("machine", {})
    yield (
        f"{m.get('device', '?')}: torch {m.get('torch', '?')}, CUDA {m.get('cuda')}, Python {m.get('python', '?')}, "
        f"commit {state.get('commit', '?')}{', --quick' if state.get('quick') else ''}"
    )
    if state.get("preflight"):
        yield f"  on this machine {told(state['preflight'])}"
    for c in state.get("clocks", []):
        if "missing" in c:
            yield f"  {c['when']:5} nvidia-smi: {c['missing']}"
            continue
        mhz = f"SM {c.get('sm_mhz')} MHz, memory {c.get('memory_mhz')} MHz"
        rest = f"{c.get('temperature_c')} C, {c.get('power_w')} W, {c.get('used_mib')} MiB used"
        yield f"  {c['when']:5} {mhz}, {rest}, driver {c.get('driver')}"


def overview(state: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield f"{'part':10} {'status':8} {'s':>6}  what"
    for name, part in state["parts"].items():
        status = "running" if "running" in part else part.get("status", "-")
        yield f"{name:10} {status:8} {number(part.get('seconds'), 6)}  {what(part)}"
        for key, row in part.get("rows", {}).items():
            if "error" in row:
                kind = "HUNG" if "hung" in row else "FAILED"
                yield f"{'':27} {kind} {marked(key, row)}: {row['error']}"
    others = {
        row["commit"] for part in state["parts"].values() for row in part.get("rows", {}).values() if "commit" in row
    }
    if others:
        yield f"*: rows of commit {', '.join(sorted(others))}"


def what(part: dict[str, Any]) -> str:
    old = sum("commit" in row for row in part.get("rows", {}).values())
    return summary(part) + f"; {old} of another commit*" * bool(old)


def summary(part: dict[str, Any]) -> str:
    found = part.get("rows", {})
    first = next(iter(found.values()), {})
    if "passed" in first:
        return f"{tests(found)}; {part['reason']}" if part.get("reason") else tests(found)
    if "libraries" in first:
        return f"libraries of {first['libraries']} for {first['architectures']}"
    if "largest" in first:
        return (
            f"largest difference of {first['steps']} losses {first['largest']:.2g} (tolerance {first['tolerance']:g})"
        )
    left_out, failed = (sum(kind in row for row in found.values()) for kind in ("skipped", "error"))
    words = f"{len(found) - left_out - failed} measured"
    words += f", {failed} failed" if failed else ""
    words += f", {left_out} left out" if left_out else ""
    return f"{words}; {part['reason']}" if part.get("reason") else words


def tests(found: dict[str, Row]) -> str:
    """The counts of the tests of every group, such as "ops detcore 151 of 151, 2 not run"."""
    words = []
    for job, row in found.items():
        for group, r in row.get("groups", {}).items():
            all_run = r["passed"] + r["failed"]
            told = f"{job} {group}: {r['passed']} of {all_run} passed"
            told += f", {r['skipped_tests']} skipped" if r["skipped_tests"] else ""
            words.append(told + (f", {r['not_run']} not run" if r["not_run"] else ""))
    return "; ".join(words)


def floor(state: dict[str, Any]) -> Iterator[str]:
    found = rows(state, "floor")
    if found:
        words = [f"{key} {row['tflop_s']:,.3g} TFLOP/s" for key, row in found.items() if "tflop_s" in row]
        copy = [f"{key} {row['gb_s']:,.0f} GB/s" for key, row in found.items() if "gb_s" in row]
        yield ""
        yield "floor: " + ", ".join(copy + words)


def ops(state: dict[str, Any]) -> Iterator[str]:
    found = rows(state, "ops")
    if not found:
        return
    yield ""
    names = f"{'ms':>9} {'ref. ms':>9} {'speed-up':>9} {'MB':>8} {'% of floor':>10} {'max diff':>9}"
    yield f"{'op, native against reference':34} {names}"
    for key, r in found.items():
        yield (
            f"{cut(key, 34)} {number(r['ms'], 9, 3)} {number(r['reference_ms'], 9, 3)} {number(r['speedup'], 8)}x "
            f"{number(r['mb'], 8)} {number(r.get('percent_of_floor'), 10)} {r['difference']:9.1g}"
        )


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


def inference(state: dict[str, Any]) -> Iterator[str]:
    found = rows(state, "inference")
    if found:
        yield ""
        yield f"{'inference':48} {'images/s':>9} {'ms':>9} {'peak GiB':>9}"
        for key, r in found.items():
            numbers = f"{number(r['images_per_s'], 9)} {number(r['ms'], 9, 2)} {number(r.get('peak_gib'), 9)}"
            yield f"{cut(key, 48)} {numbers}"


def ssd300(state: dict[str, Any]) -> Iterator[str]:
    found = rows(state, "ssd300")
    if not found:
        return
    device = state.get("machine", {}).get("device", "")
    yield ""
    yield f"{'SSD300':48} {'images/s':>9} {'ms':>9} {'peak GiB':>9} {'x publ.':>8} {'% FLOP':>7}"
    for key, r in found.items():
        card, published = SSD300_PUBLISHED[key.partition(" ")[0]]
        times = r["images_per_s"] / published if card in device else None
        yield (
            f"{cut(key, 48)} {number(r['images_per_s'], 9)} {number(r['ms'], 9, 2)} {number(r.get('peak_gib'), 9)} "
            f"{number(times, 8, 2)} {number(r.get('percent_of_flop_floor'), 7)}"
        )
    if device not in ("", "cpu"):
        told = ", ".join(f"{part} {rate:g}" for part, (_, rate) in SSD300_PUBLISHED.items())
        yield f"published for one A100, images/s: {told} (not measured here)"
        told = ", ".join(f"{part} {rate:g}" for part, rate in SSD300_TARGETS.items())
        yield f"our targets on one H100, images/s: {told} (targets, not measured)"
        yield "inference: random weights, which find more than trained ones"


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


def between(limits: Any) -> str:
    """Two numbers in words; a dash for None."""
    if limits is None:
        return "-"
    low, high = (f"{value:.1f}".removesuffix(".0") for value in limits)
    return low if low == high else f"{low} to {high}"


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


def layout(kernels: dict[str, float | None]) -> Iterator[str]:
    """Whether kernels ran that only change the order in memory."""
    if not kernels:
        yield "  layout: none"
    for name, ms in kernels.items():
        yield f"  !!! LAYOUT KERNEL{'' if ms is None else f', {ms:.3f} ms'}: {name}"


def profile(state: dict[str, Any]) -> Iterator[str]:
    found = {key: row for part in ("train", "ssd300") for key, row in rows(state, part).items() if "profile" in row}
    for key, row in found.items():
        kernels = row["profile"]
        yield ""
        if "error" in kernels:
            yield f"kernels of a step, {key}: {kernels['error']}"
            continue
        yield f"kernels of a step, {key}: {kernels['ms']:.2f} ms of {row['ms']:.2f} ms"
        yield f"  {'family':24} {'ms':>9} {'share':>7} {'floor ms':>9}"
        for name, f in kernels["families"].items():
            yield f"  {name:24} {number(f['ms'], 9, 2)} {f['share']:7.1%} {number(f['floor_ms'], 9, 2)}"
        yield from layout(kernels.get("layout", {}))
        yield "  the next three things:"
        for i, words in enumerate(kernels["next"], 1):
            yield f"  {i}. {words}"


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


SECTIONS = (about, overview, floor, ops, speed, variants, inference, ssd300, profile, probe, bccd)
