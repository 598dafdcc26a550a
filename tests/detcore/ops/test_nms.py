"""Suppression: the native op against its reference, and the reference against torchvision and a plain loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import batched_nms

from detcore import UserError
from detcore.boxes import iou
from detcore.device import native
from detcore.ops import nms as module
from detcore.ops.nms import nms, nms_reference


def scene(
    images: int, candidates: int, classes: int, seed: int = 0, side: float = 60.0, ties: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, falling scores of which every later image has fewer, and labels. ties: so many different scores."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(images, candidates, 2, generator=generator) * side
    boxes = torch.cat((low, low + torch.rand(images, candidates, 2, generator=generator) * 30), 2)
    boxes[:, ::9, 2:] = boxes[:, ::9, :2]  # without area
    boxes[:, 1::7] = boxes[:, :1].clone() + 1  # identical
    scores = torch.rand(images, candidates, generator=generator)
    scores = (scores * ties).floor() / ties if ties else scores
    scores = scores.sort(1, descending=True).values
    last = torch.linspace(1, 0.4, max(images, 1))[:images, None] * candidates
    scores = torch.where(torch.arange(candidates) < last, scores, -1)
    return boxes, scores, torch.randint(classes, (images, candidates), generator=generator)


def check(device, boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, detections: int) -> Tensor:
    """The op's result, which must be the reference's."""
    found = nms(boxes.to(device), scores.to(device), labels.to(device), threshold, detections).cpu()
    assert found.dtype == torch.int64 and found.shape == (len(boxes), detections)
    assert torch.equal(found, nms_reference(boxes, scores, labels, threshold, detections))
    return found


@settings(max_examples=40)
@given(
    images=st.integers(0, 3),
    candidates=st.integers(1, 700),
    classes=st.sampled_from([1, 2, 10]),
    detections=st.integers(1, 400),
    threshold=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    side=st.sampled_from([5.0, 60.0, 1000.0]),
    ties=st.sampled_from([0, 3]),
    seed=st.integers(0, 1000),
)
def test_random_scenes(implementation, images, candidates, classes, detections, threshold, side, ties, seed):
    inputs = scene(images, candidates, classes, seed, side, ties)
    check(implementation.device, *inputs, threshold, detections)


@pytest.mark.parametrize(("candidates", "detections"), [(0, 5), (3, 0), (5, 9), (256, 256), (257, 600), (700, 650)])
def test_more_kept_than_a_tile_holds_and_other_edges(implementation, candidates, detections):
    boxes, scores, labels = scene(2, candidates, 3, side=1e4)
    found = check(implementation.device, boxes, scores, labels, 0.5, detections)
    if candidates == 700:
        assert (found[0] >= 0).sum() > 512


def test_no_candidate(implementation):
    boxes, scores, labels = scene(2, 300, 3)
    assert (check(implementation.device, boxes, scores * 0 - 1, labels, 0.5, 10) == -1).all()


def test_all_alike(implementation):
    boxes, labels = torch.tensor([0.0, 0, 2, 2]).expand(2, 600, 4), torch.zeros(2, 600, dtype=torch.int64)
    found = check(implementation.device, boxes, torch.ones(2, 600), labels, 0.5, 4)
    assert found.tolist() == [[0, -1, -1, -1]] * 2
    found = check(implementation.device, boxes, torch.ones(2, 600), torch.arange(600).expand(2, -1), 0.5, 4)
    assert found.tolist() == [[0, 1, 2, 3]] * 2


def test_overlaps_just_at_the_threshold_are_kept(implementation):
    """Bits count: an overlap of exactly 1/2, and thousands of boxes whose overlaps are a rounding apart from it."""
    generator = torch.Generator().manual_seed(1)
    width = torch.rand(40, 1, generator=generator) * 100
    corner = torch.rand(40, 2, generator=generator) * 700
    whole = torch.cat((corner, corner + width), 1)
    half = whole.clone()
    half[:, 2] = (whole[:, 0] + whole[:, 2]) / 2
    boxes = torch.stack((whole, half), 1)
    scores, labels = torch.tensor([0.9, 0.8]).expand(40, 2), torch.zeros(40, 2, dtype=torch.int64)
    found = check(implementation.device, boxes, scores, labels, 0.5, 2)
    assert 0 < (found[:, 1] < 0).sum() < 40  # the rounding decides
    exact = torch.tensor([[[0.0, 0, 4, 4], [0, 0, 2, 4]]])
    assert check(implementation.device, exact, scores[:1], labels[:1], 0.5, 2).tolist() == [[0, 1]]


def test_a_nan_overlaps_nothing(implementation):
    boxes, scores, labels = scene(1, 40, 1, side=5)
    boxes[0, 3, 1] = boxes[0, 8] = torch.nan
    found = check(implementation.device, boxes, scores, labels, 0.1, 40)
    assert {3, 8} <= set(found[0].tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": torch.zeros(2, 5, 3)}, "boxes must be float32"),
        ({"scores": torch.zeros(2, 4)}, "scores must be float32"),
        ({"labels": torch.zeros(2, 5, dtype=torch.int32)}, "labels must be int64"),
        ({"detections": -1}, "detections must not be negative"),
        ({"boxes": torch.zeros(2, 5, 4, dtype=torch.float64)}, "no code for"),
    ],
)
def test_wrong_arguments_are_named(implementation, change, message):
    arguments = {"boxes": torch.zeros(2, 5, 4), "scores": torch.zeros(2, 5), "detections": 3, "threshold": 0.5}
    arguments |= {"labels": torch.zeros(2, 5, dtype=torch.int64)} | change
    arguments = {k: v.to(implementation.device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises((RuntimeError, UserError), match=message):
        nms(**arguments)


def test_registration(implementation):
    inputs = [x.to(implementation.device) for x in scene(2, 30, 2)]
    torch.library.opcheck(torch.ops.detcore.nms.default, (*inputs, 0.5, 7))


def test_the_number_of_threads_does_not_matter():
    inputs, before = scene(5, 300, 3), torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(nms(*inputs, 0.5, 100))
    torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("seed", range(5))
def test_the_reference_is_batched_nms(seed):
    generator = torch.Generator().manual_seed(seed)
    boxes, _, labels = scene(3, 400, 4, seed)
    scores = torch.stack([torch.randperm(400, generator=generator) for _ in range(3)]).float()
    scores = scores.sort(1, descending=True).values
    boxes, scores = boxes.double(), scores.double()  # so that batched_nms, which shifts the classes apart, is exact
    with native.using("auto"):
        kept = nms(boxes, scores, labels, 0.5, 400)
    for image in range(3):
        expected = batched_nms(boxes[image], scores[image], labels[image], 0.5)
        assert kept[image][kept[image] >= 0].tolist() == expected.tolist()


@pytest.mark.parametrize("ties", [0, 2])
def test_the_reference_is_a_loop(ties):
    boxes, scores, labels = scene(1, 60, 2, ties=ties)
    overlap, kept = iou(boxes[0], boxes[0]), []
    for i in range(60):
        if scores[0, i] >= 0 and all(labels[0, k] != labels[0, i] or overlap[k, i] <= 0.3 for k in kept):
            kept.append(i)
    assert nms_reference(boxes, scores, labels, 0.3, 60)[0].tolist() == kept + [-1] * (60 - len(kept))


@pytest.mark.parametrize(("threshold", "passes"), [(0.9, 1), (0.01, 2)])
def test_the_reference_looks_further_when_the_best_do_not_fill_the_output(monkeypatch, threshold, passes):
    widths = []

    def counted(boxes, *others):
        widths.append(boxes.shape[1])
        return original(boxes, *others)

    original = module._suppressed
    monkeypatch.setattr(module, "_suppressed", counted)
    boxes, scores, labels = scene(2, 300, 1, side=20)
    boxes[..., 2:] = boxes[..., :2] + 30
    kept = nms_reference(boxes, scores, labels, threshold, 15)
    assert len(widths) == passes
    assert torch.equal(kept, original(boxes, scores, labels, threshold, 15))


def test_no_device_is_waited_for():
    """Tensors without values stand for a device where reading one would stop the queue."""
    boxes, scores, labels = (x.to("meta") for x in scene(2, 300, 3))
    assert nms(boxes, scores, labels, 0.5, 7).shape == (2, 7)
