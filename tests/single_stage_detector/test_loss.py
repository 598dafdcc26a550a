"""Matcher and losses against golden values, torchvision and float64 derivatives."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import box_iou, sigmoid_focal_loss

from detcore import ops
from detcore.data.synthetic import synthetic_batches
from detcore.device import native
from detcore.ops.match import IGNORED, UNMATCHED
from detcore.ops.match import match as detcore_match
from single_stage_detector.anchors import anchors, grids
from single_stage_detector.loss import MATCH, losses
from single_stage_detector.model import RetinaNet

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "retinanet.json").read_text())
CHECK = GOLDEN["match_and_loss_check"]
SIZE = (160, 224)
match = partial(detcore_match, **MATCH)


@pytest.fixture(params=["auto", "reference"], autouse=True)
def policy(request):
    """Every test runs with the native ops, where they are built and apply, and with the references."""
    with native.using(request.param):
        yield request.param


@pytest.fixture(scope="module")
def at_800() -> torch.Tensor:
    return anchors((800, 800), grids((800, 800)))


def golden_truth() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(CHECK["gt_xyxy"])[None], torch.tensor(CHECK["class_indices_0based"])[None]


def random_truth(seed: int, counts: list[int], padded: int, classes: int = 7, size=SIZE):
    """Boxes on whole and half pixels, so that ties between anchors are common."""
    generator = torch.Generator().manual_seed(seed)
    boxes, labels = torch.zeros(len(counts), padded, 4), torch.full((len(counts), padded), -1)
    limit = torch.tensor([size[1], size[0]])
    for i, count in enumerate(counts):
        low = (torch.rand(count, 2, generator=generator) * (limit - 12) * 2).round() / 2
        extent = (torch.rand(count, 2, generator=generator) ** 2 * limit * 1.6).round() / 2 + 2
        boxes[i, :count] = torch.cat((low, torch.minimum(low + extent, limit)), 1)
        labels[i, :count] = torch.randint(classes, (count,), generator=generator)
    return boxes, labels


def expected_match(a: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    matcher, rows = Matcher(0.5, 0.4, allow_low_quality_matches=True), []
    for box, label in zip(boxes, labels):
        real = box[label >= 0]
        rows.append(matcher(box_iou(real, a)) if len(real) else torch.full((len(a),), -1))
    return torch.stack(rows)


def test_golden_match(at_800):
    matched = match(at_800, *golden_truth())[0]
    assert int((matched >= 0).sum()) == CHECK["foreground"]
    assert int((matched == IGNORED).sum()) == CHECK["ignored"]
    assert int((matched == UNMATCHED).sum()) == CHECK["background"]
    assert [int((matched == i).sum()) for i in range(4)] == CHECK["foreground_per_gt"]
    per_level = [int((part >= 0).sum()) for part in matched.split(GOLDEN["anchors"]["per_level"])]
    assert per_level == CHECK["foreground_per_level"]
    assert (matched == 1).nonzero().flatten().tolist() == CHECK["anchors_matched_to_gt1"]


@pytest.mark.parametrize(
    ("logit", "expected"),
    [
        (0.0, CHECK["class_loss_zero_logits"]),
        (GOLDEN["class_prior_bias"], CHECK["class_loss_all_logits_at_prior_bias"]),
    ],
)
def test_golden_losses(at_800, logit, expected):
    outputs = [torch.full((1, len(at_800), 264), logit)], [torch.zeros(1, len(at_800), 4)]
    result = losses(outputs, at_800, *golden_truth())
    assert float(result["cls"]) == pytest.approx(expected, rel=2e-6)
    assert float(result["box"]) == pytest.approx(CHECK["box_l1_loss_zero_deltas"], rel=2e-6)


@pytest.mark.parametrize("work", [1, 2**12, 2**18, 2**30])
def test_match_equals_torchvision_in_any_chunking(monkeypatch, work):
    monkeypatch.setattr(ops, "work_elements", lambda device: work)
    a = anchors(SIZE, grids(SIZE))
    for seed in range(4):
        boxes, labels = random_truth(seed, [9, 0, 1, 23, 4], padded=25)
        boxes[3, 20], boxes[0, 8] = boxes[3, 2], boxes[0, 0]  # of two equal boxes the first is taken
        assert torch.equal(match(a, boxes, labels), expected_match(a, boxes, labels))


def test_low_quality_match_takes_the_anchors_own_best_box():
    a = torch.tensor([[0.0, 0, 10, 10], [100, 100, 101, 101]])
    boxes = torch.tensor([[[0.0, 0, 10, 9], [0, 0, 5, 9]]])
    # Anchor 0 is the best of both boxes; it belongs to the first, which it overlaps more.
    assert match(a, boxes, torch.tensor([[3, 4]])).tolist() == [[0, UNMATCHED]]


def test_boxes_that_touch_no_anchor_are_never_matched():
    a = anchors(SIZE, grids(SIZE))
    nowhere = torch.tensor([[[5000.0, 5000, 5010, 5010], [20, 20, 20, 40]]])
    assert (match(a, nowhere, torch.tensor([[0, 0]])) == UNMATCHED).all()


def test_padding_content_does_not_matter():
    a = anchors(SIZE, grids(SIZE))
    boxes, labels = random_truth(5, [3, 0], padded=6)
    other = torch.where(labels[..., None] < 0, torch.tensor([10.0, 10, 90, 90]), boxes)
    assert torch.equal(match(a, boxes, labels), match(a, other, labels))


@pytest.mark.parametrize("counts", [[6, 0, 1], [0, 0, 0]])
def test_losses_and_gradients_equal_torchvision(counts):
    a = anchors(SIZE, grids(SIZE))
    boxes, labels = random_truth(11, counts, padded=8)
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, len(a), 7, generator=generator, dtype=torch.float64).mul_(2).sub_(2)
    deltas = torch.randn(3, len(a), 4, generator=generator, dtype=torch.float64)
    ours = [logits.clone().requires_grad_(), deltas.clone().requires_grad_()]
    theirs = [logits.clone().requires_grad_(), deltas.clone().requires_grad_()]
    result = losses(([ours[0]], [ours[1]]), a.double(), boxes, labels)

    targets = [{"boxes": b[k >= 0].double(), "labels": k[k >= 0]} for b, k in zip(boxes, labels)]
    head = RetinaNetHead(8, 9, 7)
    outputs = {"cls_logits": theirs[0], "bbox_regression": theirs[1]}
    matched = list(expected_match(a.double(), boxes.double(), labels))
    expected = head.compute_loss(targets, outputs, [a.double()] * 3, matched)

    torch.testing.assert_close(result["cls"], expected["classification"], rtol=1e-12, atol=0)
    torch.testing.assert_close(result["box"], expected["bbox_regression"], rtol=1e-12, atol=0)
    (2 * result["cls"] + 3 * result["box"]).backward()
    (2 * expected["classification"] + 3 * expected["bbox_regression"]).backward()
    for own, other in zip(ours, theirs):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-9, atol=1e-15)


def test_no_ground_truth_columns_at_all():
    a = anchors((64, 64), grids((64, 64)))
    logits, deltas = torch.zeros(2, len(a), 3, requires_grad=True), torch.ones(2, len(a), 4, requires_grad=True)
    result = losses(([logits], [deltas]), a, torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64))
    sum(result.values()).backward()
    expected = sigmoid_focal_loss(torch.zeros(len(a), 3), torch.zeros(len(a), 3), reduction="sum")
    torch.testing.assert_close(result["cls"], expected)
    assert result["box"].item() == 0
    assert float(deltas.grad.abs().sum()) == 0


def test_shapes_never_depend_on_values():
    """Tensors without values stand for a device where reading one would stop the queue."""
    a = anchors(SIZE, grids(SIZE))
    boxes, labels = random_truth(1, [3, 0], padded=5)
    logits = torch.zeros(2, len(a), 7, device="meta", requires_grad=True)
    deltas = torch.zeros(2, len(a), 4, device="meta", requires_grad=True)
    result = losses(([logits], [deltas]), a.to("meta"), boxes.to("meta"), labels.to("meta"))
    sum(result.values()).backward()
    assert logits.grad.shape == logits.shape


def test_overlaps_of_many_boxes_are_never_held_at_once():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    a = anchors(SIZE, grids(SIZE))
    boxes, labels = random_truth(1, [1000, 1000], padded=1000)
    with Largest() as largest:
        match(a, boxes, labels)
    assert largest.elements <= 2**18
    assert 2 * len(a) * 1000 > 10 * 2**18


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_outputs(dtype):
    """The arithmetic is float32 whatever the type of the outputs, also under autocast; gradients keep that type."""
    a = anchors(SIZE, grids(SIZE))
    boxes, labels = random_truth(2, [4, 2], padded=5)
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(2, len(a), 7, generator=generator).sub_(2).to(dtype)
    deltas = torch.randn(2, len(a), 4, generator=generator).to(dtype)
    low = logits.clone().requires_grad_(), deltas.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = losses(([low[0]], [low[1]]), a, boxes, labels)
    sum(result.values()).backward()
    exact = losses(([logits.double()], [deltas.double()]), a.double(), boxes, labels)
    for name, value in result.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact[name].item(), rel=1e-5)
    assert low[0].grad.dtype == dtype
    assert low[1].grad.dtype == dtype


@pytest.mark.parametrize("steps", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_learning_model_has_the_losses_and_gradients_of_the_references(policy, steps):
    """At every step of a training with the native ops, on the same outputs: so no error grows from step to step.

    The references compute in float64, since in float32 they lose digits themselves: a certain positive counts as a
    large negative first and is corrected.
    """
    if policy == "reference" or native.load("single_stage_detector"):
        pytest.skip("nothing to compare with")
    torch.manual_seed(0)
    size = (64, 64)
    model = RetinaNet("resnet18", 5, size, "batch", 5, 16, 1, (16, 24, 32, 48, 64)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    stream = synthetic_batches(5, size, 2, 6, seed=1)
    batches = [next(stream) for _ in range(4)]
    values = []
    for step in range(steps):
        batch = batches[step % 4]
        outputs = model(batch.images)
        found = {}
        for which in ("reference", "native"):
            dtype = torch.float64 if which == "reference" else torch.float32
            leaves = [[x.detach().to(dtype).requires_grad_() for x in part] for part in outputs]
            with native.using(which):
                terms = losses(leaves, model.anchors, batch.boxes, batch.labels)
                sum(terms.values()).backward()
            found[which] = terms, [x.grad for part in leaves for x in part]
        ours, theirs = found["native"], found["reference"]
        for name, value in theirs[0].items():
            assert torch.allclose(ours[0][name].double(), value, rtol=1e-5), (step, name)
        for mine, other in zip(ours[1], theirs[1], strict=True):
            assert torch.allclose(mine.double(), other, rtol=1e-4, atol=1e-6 * float(other.abs().max())), step
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward([x for part in outputs for x in part], ours[1])
        optimizer.step()
        values.append(sum(ours[0].values()).item())
    assert values[-1] < values[0] / 1.5
