"""The anchors against the golden values and closed forms."""

import json
from pathlib import Path

import pytest
import torch

from efficientdet.anchors import PER_CELL, anchors, grids

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "efficientdet.json").read_text())


def test_golden_values():
    golden = GOLDEN["anchors_d0"]
    found = anchors((golden["image_size"],) * 2, scale=golden["anchor_scale"])
    assert found.dtype == torch.float32 and len(found) == golden["count"]
    for place, (y1, x1, y2, x2) in golden["selected"].items():
        assert found[int(place)].tolist() == pytest.approx([x1, y1, x2, y2], abs=2e-4)
    sums = torch.tensor(golden["column_sums_float32_original"], dtype=torch.float64)
    torch.testing.assert_close(found.double().sum(0), sums, rtol=1e-11, atol=0)
    cells = [rows * columns * PER_CELL for rows, columns in grids((golden["image_size"],) * 2)]
    assert cells == golden["per_level"]


@pytest.mark.parametrize("size, count", GOLDEN["anchor_count_by_image_size"].items())
def test_counts(size, count):
    assert len(anchors((int(size), int(size)))) == count


def test_a_wide_image_with_six_levels():
    """Area and centre of every anchor, from its number alone."""
    scale, size = 5.0, (256, 512)
    found = anchors(size, levels=6, scale=scale).double()
    areas = (found[:, 2:] - found[:, :2]).prod(1)
    first = 0
    for level, (rows, columns) in enumerate(grids(size, 6)):
        stride = 2 ** (3 + level)
        assert (rows * stride, columns * stride) == size
        number = torch.arange(rows * columns * PER_CELL)
        octave, aspect = number % PER_CELL // 3, number % 3
        part = slice(first, first + len(number))
        expected = (scale * stride * 2 ** (octave / 3)) ** 2 * torch.where(aspect == 0, 1.0, 0.98)
        torch.testing.assert_close(areas[part], expected.double(), rtol=1e-5, atol=0)
        cell = number // PER_CELL
        centres = torch.stack((cell % columns + 0.5, cell // columns + 0.5), 1) * stride
        torch.testing.assert_close((found[part, :2] + found[part, 2:]) / 2, centres.double(), rtol=0, atol=1e-4)
        first = part.stop
    assert first == len(found)


def test_sizes_that_a_stride_does_not_divide():
    """320 pixels are three cells of P7, 106.7 pixels wide, as effdet has it."""
    found = anchors((320, 320), scale=3.0)
    last = (found[-PER_CELL, :2] + found[-PER_CELL, 2:]) / 2
    assert grids((320, 320))[-1] == (3, 3)
    assert last.tolist() == pytest.approx([320 * 5 / 6] * 2)
