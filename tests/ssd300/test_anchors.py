"""The priors against the golden values, the loop of the specification and closed forms."""

import json
import math
from pathlib import Path

import pytest
import torch
from torchvision.ops import box_convert

from ssd300.anchors import GRIDS, PER_CELL, cell_sizes, centres, corners, decode, encode, priors

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "ssd300.json").read_text())["priors"]


def test_golden_values():
    table = priors()
    assert table.shape == (GOLDEN["count"], 4) and table.dtype == torch.float32
    for index, values in GOLDEN["selected"].items():
        assert table[int(index)].tolist() == pytest.approx(values, abs=1e-6), index
    assert table.double().sum(0).tolist() == pytest.approx(GOLDEN["column_sums"], abs=2e-4)
    assert list(GRIDS) == GOLDEN["level_sizes"] and list(PER_CELL) == GOLDEN["anchors_per_cell"]
    starts = [sum(n * g * g for n, g in zip(PER_CELL[:k], GRIDS)) for k in range(6)]
    assert starts == GOLDEN["level_start"]


def test_order_is_level_size_row_column():
    """The specification's nested loop, one box at a time."""
    expected = []
    for level, (cells, step) in enumerate(zip(GRIDS, (8, 16, 32, 64, 100, 300))):
        f = 300 / step
        for w, h in cell_sizes(level):
            for row in range(cells):
                for column in range(cells):
                    box = ((column + 0.5) / f, (row + 0.5) / f, w, h)
                    expected.append([min(max(value, 0), 1) for value in box])
    torch.testing.assert_close(priors(), torch.tensor(expected), rtol=0, atol=1e-7)


def test_sizes_of_a_cell():
    s, after = 45 / 300, 99 / 300
    q = math.sqrt(s * after)
    assert cell_sizes(1)[:2] == [(s, s), (q, q)]
    assert cell_sizes(1)[2] == pytest.approx((s * math.sqrt(2), s / math.sqrt(2)))
    assert cell_sizes(1)[5] == pytest.approx((s / math.sqrt(3), s * math.sqrt(3)))
    for level in range(6):
        assert len(cell_sizes(level)) == PER_CELL[level]
        for w, h in cell_sizes(level)[2:]:
            assert w * h == pytest.approx(cell_sizes(level)[0][0] ** 2)


def test_formats_are_torchvisions():
    table = priors()
    torch.testing.assert_close(corners(table), box_convert(table, "cxcywh", "xyxy"), rtol=0, atol=1e-7)
    torch.testing.assert_close(centres(corners(table)), table, rtol=0, atol=1e-6)
    assert corners(table).min() < 0 and corners(table).max() > 1  # boxes at the border are not cut


def test_code_has_its_closed_form_and_its_inverse():
    prior = torch.tensor([0.5, 0.4, 0.2, 0.1], dtype=torch.float64)
    box = torch.tensor([0.52, 0.37, 0.1, 0.3], dtype=torch.float64)
    expected = [10 * 0.02 / 0.2, 10 * -0.03 / 0.1, 5 * math.log(0.5), 5 * math.log(3)]
    assert encode(box, prior).tolist() == pytest.approx(expected)
    table = priors().double()
    deltas = torch.randn(len(table), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(encode(decode(deltas, table), table), deltas, rtol=1e-9, atol=1e-9)
    assert torch.equal(decode(torch.zeros(len(table), 4), priors()), priors())
