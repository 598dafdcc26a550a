"""A convolution, its norm and the activation: which of them become one op, and that it is the same."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from detcore.device import native
from detcore.device.sync_norm import SyncBatchNorm
from detcore.nn import norm_folding
from detcore.nn.norm_folding import folded_norms, normed_act


@pytest.fixture
def parts() -> tuple[nn.Conv2d, nn.BatchNorm2d, Tensor]:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8, eps=1e-3, momentum=0.01)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    return nn.Conv2d(4, 8, 1, bias=False), norm, torch.randn(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The activations that went to the op."""
    seen = []
    op = norm_folding.norm_act
    monkeypatch.setattr(norm_folding, "norm_act", lambda *given: seen.append(given[-1]) or op(*given))
    return seen


def trained(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradients and the norm's state after two passes."""
    conv, norm = copy.deepcopy(conv), copy.deepcopy(norm)
    for _ in range(2):
        out = normed_act(conv, norm, x, "silu")
    grads = torch.autograd.grad(out.square().sum(), [*conv.parameters(), *norm.parameters()])
    return [out.detach(), *grads, norm.running_mean, norm.running_var, norm.num_batches_tracked]


def test_training_is_what_the_modules_do(parts, calls):
    expected = trained(*parts)
    assert calls == [], "it is a variant"
    with native.using("auto", "norm_activations"):
        found = trained(*parts)
    assert calls == ["silu"] * 2
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert found[-1] == 2


@pytest.fixture
def variant() -> Iterator[None]:
    with native.using("auto", "norm_activations"):
        yield


def test_what_is_no_plain_norm_in_training_stays_itself(parts, calls, variant):
    """Evaluation, folded or not, statistics over processes, norms that are watched, cumulative averages."""
    conv, norm, x = parts
    normed_act(conv, copy.deepcopy(norm).eval(), x, "silu")
    with torch.no_grad(), folded_norms([(conv, norm.eval())], torch.float32):
        normed_act(conv, norm, x, "silu")
    watched = copy.deepcopy(norm).train()
    watched.register_forward_pre_hook(lambda *_: None)
    read = copy.deepcopy(norm).train()
    read.register_forward_hook(lambda *_: None)
    for other in (SyncBatchNorm(8), nn.BatchNorm2d(8, momentum=None), nn.BatchNorm2d(8, affine=False), watched, read):
        normed_act(conv, other, x, "silu")
    assert calls == []
