"""The ways to compute the heads' convolutions that the part `probe` times: the same results, so times compare."""

import pytest
import torch

from tools.gpu_check.benchmarks.single_stage_detector import conv3x3


@pytest.fixture
def tensors():
    """(input, weight, gradient of the output)"""
    torch.manual_seed(0)
    shapes = (2, 32, 7, 5), (27, 32, 3, 3), (2, 27, 7, 5)
    return [torch.randn(shape).contiguous(memory_format=torch.channels_last) for shape in shapes]


@pytest.mark.parametrize("what", ["forward", "input gradient", "weight gradient"])
def test_ways_agree(tensors, what):
    ways = conv3x3.ways(*tensors)
    expected = ways[f"library {what}"]()
    assert torch.allclose(ways[f"16-bit {what}"](), expected, rtol=1e-4, atol=1e-4)
    rounded = ways[f"8-bit {what}"]()[: len(expected)]  # without padded channels, and unscaled
    alike = torch.nn.functional.cosine_similarity(rounded.flatten(), expected.flatten(), dim=0)
    assert 0.99 < alike < 0.9999


def test_errors_are_of_the_sums_alone(tensors):
    errors = conv3x3.errors(*tensors)
    assert set(errors) == {"forward", "input gradient"} and max(errors.values()) == 0
