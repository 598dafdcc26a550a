"""The largest values against a stable sort."""

import pytest
import torch

from detcore.ops.largest import largest


@pytest.mark.parametrize("count", [0, 1, 7, 40])
def test_it_is_a_stable_sort(count):
    generator = torch.Generator().manual_seed(count)
    values = torch.randint(-3, 4, (5, 40), generator=generator).float() / 2
    values[0, ::3] = -torch.inf
    values[1, ::4] = -0.0
    values[2, ::5] = torch.inf
    expected = values.sort(dim=1, descending=True, stable=True)
    found, at = largest(values, count)
    assert torch.equal(found, expected.values[:, :count]) and torch.equal(at, expected.indices[:, :count])
