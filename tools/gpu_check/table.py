"""The table of a check, from its JSON: at most 100 columns, measured values unless a line says otherwise."""

import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from tools.gpu_check.benchmarks import benchmarks
from tools.gpu_check.columns import cut, layout, marked, number, rows
from tools.gpu_check.machine import told
from tools.gpu_check.state import Row

WIDTH = 100


def table(state: dict[str, Any]) -> str:
    sections = (about, overview, floor, ops, *(s for b in benchmarks().values() for s in b.sections), profile)
    return "\n".join(part for section in sections for line in lines(section, state) for part in folded(line.rstrip()))


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
    yield f"{'part':12} {'status':8} {'s':>6}  what"
    for name, part in state["parts"].items():
        status = "running" if "running" in part else part.get("status", "-")
        yield f"{name:12} {status:8} {number(part.get('seconds'), 6)}  {what(part)}"
        for key, row in part.get("rows", {}).items():
            if "error" in row:
                kind = "HUNG" if "hung" in row else "FAILED"
                yield f"{'':29} {kind} {marked(key, row)}: {row['error']}"
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


def profile(state: dict[str, Any]) -> Iterator[str]:
    found = {key: row for part in state["parts"] for key, row in rows(state, part).items() if "profile" in row}
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
