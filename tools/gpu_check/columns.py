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
