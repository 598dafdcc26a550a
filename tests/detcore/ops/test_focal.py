"""Focal loss: published points, autograd on the plain formula in float64, and RetinaNet's own reference."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from detcore.ops import focal
from detcore.ops.focal import focal_reference
from detcore.ops.match import IGNORED, UNMATCHED
from single_stage_detector.ops.focal import focal_reference as retinanet

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "efficientdet.json").read_text())["focal"]


@pytest.mark.parametrize("point", GOLDEN["points"])
def test_golden_points(point):
    x = torch.tensor([[[point["logit"]]]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[0 if point["target"] else UNMATCHED]])
    weight = torch.ones(1, dtype=torch.float64)
    loss = focal_reference(x, target, weight, GOLDEN["alpha"], GOLDEN["gamma"], point["smoothing"])
    loss.backward()
    assert float(loss.detach()) == pytest.approx(point["loss"], rel=1e-6)
    assert float(x.grad) == pytest.approx(point["dloss_dlogit"], abs=6e-7)


def drawn(dtype: torch.dtype, scale: float = 3.0):
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(3, 40, 5, generator=generator, dtype=torch.float64)
    target = torch.randint(IGNORED, 5, (3, 40), generator=generator)
    return logits.to(dtype), target, torch.rand(3, generator=generator, dtype=torch.float64).to(dtype)


def plainly(logits, target, weight, alpha, gamma, smoothing):
    t = F.one_hot(target.clamp(min=0), logits.shape[2]).to(logits.dtype) * (target >= 0)[..., None]
    p = logits.sigmoid()
    wrong = t * (1 - p) + (1 - t) * p
    entropy = F.binary_cross_entropy_with_logits(logits, t * (1 - smoothing) + smoothing / 2, reduction="none")
    terms = (t * alpha + (1 - t) * (1 - alpha)) * wrong**gamma * entropy
    return (terms * (target != IGNORED)[..., None] * weight[:, None, None]).sum()


@pytest.mark.parametrize("elements", [1, 10**6])
@pytest.mark.parametrize(
    "alpha, gamma, smoothing", [(0.25, 1.5, 0.0), (0.25, 1.5, 0.1), (0.6, 2.0, 0.3), (0.5, 0.7, 0.02)]
)
def test_autograd_of_the_formula(monkeypatch, alpha, gamma, smoothing, elements):
    monkeypatch.setattr(focal, "work_elements", lambda device: elements)
    logits, target, weight = drawn(torch.float64)
    logits.requires_grad_()
    ours, plain = (f(logits, target, weight, alpha, gamma, smoothing) for f in (focal_reference, plainly))
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=0)
    found, expected = (torch.autograd.grad(3 * loss, logits)[0] for loss in (ours, plain))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-11)


def test_large_logits():
    """No overflow, and the limits: p^gamma * softplus is x for large x, 0 for small ones."""
    x = torch.tensor([-1e4, -100.0, 100.0, 1e4]).view(1, 4, 1).requires_grad_()
    loss = focal_reference(x, torch.full((1, 4), UNMATCHED), torch.ones(1), 0.25, 1.5)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.75 * 10100)
    assert x.grad.flatten().tolist() == pytest.approx([0, 0, 0.75, 0.75])


def test_it_is_retinanets_where_the_constants_are():
    logits, target, weight = drawn(torch.float32)
    matched, labels = torch.where(target >= 0, target, target), torch.arange(5).expand(3, 5)
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    ours = focal_reference(a, target, weight, 0.25, 2.0)
    theirs = retinanet(b, matched, labels, weight)
    torch.testing.assert_close(ours, theirs)
    ours.backward(), theirs.backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)
