"""The table's section of SSD300."""

from collections.abc import Iterator
from typing import Any

from tools.gpu_check.columns import cut, number, rows

PUBLISHED = {"training": ("A100", 724.0), "inference": ("A100", 970.0)}
"""Card and images/s of one GPU: NVIDIA's later figures for batch 128 and 32, fp16; training leaves data out."""
TARGETS = {"training": 2500.0, "inference": 6000.0}
"""images/s on one H100 that we aim at; not measured values."""


def ssd300(state: dict[str, Any]) -> Iterator[str]:
    found = rows(state, "ssd300")
    if not found:
        return
    device = state.get("machine", {}).get("device", "")
    yield ""
    yield f"{'SSD300':48} {'images/s':>9} {'ms':>9} {'peak GiB':>9} {'x publ.':>8} {'% FLOP':>7}"
    for key, r in found.items():
        card, published = PUBLISHED[key.partition(" ")[0]]
        times = r["images_per_s"] / published if card in device else None
        yield (
            f"{cut(key, 48)} {number(r['images_per_s'], 9)} {number(r['ms'], 9, 2)} {number(r.get('peak_gib'), 9)} "
            f"{number(times, 8, 2)} {number(r.get('percent_of_flop_floor'), 7)}"
        )
    if device not in ("", "cpu"):
        told = ", ".join(f"{part} {rate:g}" for part, (_, rate) in PUBLISHED.items())
        yield f"published for one A100, images/s: {told} (not measured here)"
        told = ", ".join(f"{part} {rate:g}" for part, rate in TARGETS.items())
        yield f"our targets on one H100, images/s: {told} (targets, not measured)"
        yield "inference: random weights, which find more than trained ones"
