"""How a table's rows are written; what benchmarks write their own sections with."""

from collections.abc import Iterator
from typing import Any

from tools.gpu_check.state import Row


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


def steps(
    state: dict[str, Any], part: str, title: str, published: dict[str, tuple[str, float]], targets: dict[str, float]
) -> Iterator[str]:
    """The section of a benchmark's part whose keys begin with "training" or "inference".

    published: card and images/s that others have for each of the two; targets: images/s that we aim at on one H100.
    """
    found = rows(state, part)
    if not found:
        return
    device = state.get("machine", {}).get("device", "")
    yield ""
    yield f"{title:48} {'images/s':>9} {'ms':>9} {'peak GiB':>9} {'x publ.':>8} {'% FLOP':>7}"
    for key, r in found.items():
        card, figure = published[key.partition(" ")[0]]
        times = r["images_per_s"] / figure if card in device else None
        yield (
            f"{cut(key, 48)} {number(r['images_per_s'], 9)} {number(r['ms'], 9, 2)} {number(r.get('peak_gib'), 9)} "
            f"{number(times, 8, 2)} {number(r.get('percent_of_flop_floor'), 7)}"
        )
    if device not in ("", "cpu"):
        told = ", ".join(f"{kind} {rate:g}" for kind, (_, rate) in published.items())
        yield f"published for one A100, images/s: {told} (not measured here)"
        told = ", ".join(f"{kind} {rate:g}" for kind, rate in targets.items())
        yield f"our targets on one H100, images/s: {told} (targets, not measured)"
        yield "inference: random weights, which find more than trained ones"


def between(limits: Any) -> str:
    """Two numbers in words; a dash for None."""
    if limits is None:
        return "-"
    low, high = (f"{value:.1f}".removesuffix(".0") for value in limits)
    return low if low == high else f"{low} to {high}"


def layout(kernels: dict[str, float | None]) -> Iterator[str]:
    """Whether kernels ran that only change the order in memory."""
    if not kernels:
        yield "  layout: none"
    for name, ms in kernels.items():
        yield f"  !!! LAYOUT KERNEL{'' if ms is None else f', {ms:.3f} ms'}: {name}"
