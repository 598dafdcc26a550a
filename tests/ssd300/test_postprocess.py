"""Detections against an image by image, class by class oracle with torchvision's nms, and against the plain loop."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torchvision.ops import box_convert, nms

from detcore.device import native
from ssd300.anchors import encode, priors
from ssd300.data import DETECTOR
from ssd300.ops import candidates as module
from ssd300.postprocess import postprocess
from tools.bench.ssd_postprocess import baseline, differences, outputs

PRIORS = priors()


def some_outputs(seed: int, images: int, classes: int, spread: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random (deltas, logits), of which every later image has fewer scores above the threshold and the last none."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, 8732, classes + 1, generator=generator) * spread
    logits[..., 0] += torch.linspace(3, 9, images)[:, None]
    logits[-1, :, 0] += 50
    return torch.randn(images, 8732, 4, generator=generator), logits


def oracle(deltas, logits, score_thresh=0.05, per_class=200, nms_thresh=0.5, detections=200):
    results = []
    for delta, logit in zip(deltas.double(), logits.double()):
        table = PRIORS.double()
        centre = delta[:, :2] / 10 * table[:, 2:] + table[:, :2]
        boxes = box_convert(torch.cat((centre, (delta[:, 2:] / 5).exp() * table[:, 2:]), 1), "cxcywh", "xyxy")
        rows = [(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0))]
        for label, score in enumerate(logit.softmax(1).T[1:]):
            best = score.argsort(descending=True)[:per_class]
            best = best[score[best] > score_thresh]
            best = best[nms(boxes[best], score[best], nms_thresh)]
            rows.append((boxes[best] * 300, score[best], torch.full((len(best),), label)))
        found = [torch.cat(column) for column in zip(*rows)]
        order = found[1].argsort(descending=True)[:detections]
        results.append(tuple(column[order] for column in found))
    return results


def assert_equal_detections(ours, theirs, detections=200):
    for boxes, scores, labels, (their_boxes, their_scores, their_labels) in zip(*ours, theirs, strict=True):
        assert boxes.shape == (detections, 4) and boxes.dtype == scores.dtype == torch.float32
        assert labels.dtype == torch.int64
        count = len(their_scores)
        assert (labels[:count] >= 0).all() and (labels[count:] == -1).all()
        assert not scores[count:].any() and not boxes[count:].any()
        assert (scores[:-1] >= scores[1:]).all()
        torch.testing.assert_close(scores[:count].double(), their_scores.double(), rtol=1e-5, atol=0)
        assert torch.equal(labels[:count], their_labels.long())
        torch.testing.assert_close(boxes[:count].double(), their_boxes.double(), rtol=1e-5, atol=2e-3)


@pytest.fixture(params=["reference", "native"])
def _either_op(request):
    if request.param == "native" and native.load("ssd300"):
        pytest.skip(native.load("ssd300"))
    with native.using(request.param):
        yield


@pytest.fixture(params=["shapes follow the data", "shapes fixed"])
def _either_path(request, monkeypatch, _either_op):
    """The CPU's short cuts and the fixed shapes of other devices; the reference and the native op."""
    if request.param == "shapes fixed":
        monkeypatch.setattr(module, "_may_look", lambda tensor: False)


@pytest.mark.usefixtures("_either_path")
@pytest.mark.parametrize("classes", [1, 5, 20])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"per_class": 30, "detections": 20},
        {"score_thresh": 0.3, "nms_thresh": 0.2},
        {"per_class": 1, "nms_thresh": 0.9},
    ],
    ids=str,
)
def test_equal_to_the_oracle(classes, settings):
    made = some_outputs(classes, 3, classes)
    assert_equal_detections(
        postprocess(made, PRIORS, **settings), oracle(*made, **settings), settings.get("detections", 200)
    )


@pytest.mark.usefixtures("_either_path")
def test_equal_to_the_loop_of_the_original():
    for case in ("trained", "early"):
        made = outputs(2, 20, case, seed=3)
        assert differences(postprocess(made, PRIORS), baseline(*made)) == (0, pytest.approx(0, abs=1e-3))


@pytest.mark.usefixtures("_either_path")
def test_one_image_with_nothing():
    deltas, logits = some_outputs(1, 2, 4)
    boxes, scores, labels = postprocess((deltas[1:], logits[1:]), PRIORS)
    assert boxes.shape == (1, 200, 4) and not boxes.any() and not scores.any() and (labels == -1).all()


def firing(*wanted: tuple[int, int, float, torch.Tensor], classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of one image: (prior, class, score, box cx, cy, w, h of 0..1) fire, all others are background."""
    logits = torch.zeros(1, 8732, classes + 1)
    logits[..., 0] = 20
    deltas = torch.zeros(1, 8732, 4)
    for prior, label, score, box in wanted:
        logits[0, prior] = -20
        logits[0, prior, 0] = math.log(1 - score)
        logits[0, prior, label + 1] = math.log(score)
        deltas[0, prior] = encode(box, PRIORS[prior])
    return deltas, logits


@pytest.mark.usefixtures("_either_path")
def test_closed_form():
    box, shifted = torch.tensor([0.5, 0.5, 0.4, 0.2]), torch.tensor([0.6, 0.5, 0.4, 0.2])  # IoU 0.3 / 0.5
    made = firing((5, 1, 0.9, box), (70, 1, 0.8, shifted), (8731, 2, 0.7, shifted), (400, 0, 0.6, box))
    boxes, scores, labels = postprocess(made, PRIORS, nms_thresh=0.55)
    assert labels[0, :4].tolist() == [1, 2, 0, -1]
    assert scores[0, :3].tolist() == pytest.approx([0.9, 0.7, 0.6], rel=1e-5)
    assert boxes[0, 0].tolist() == pytest.approx([90, 120, 210, 180], abs=1e-2)
    assert boxes[0, 1].tolist() == pytest.approx([120, 120, 240, 180], abs=1e-2)
    assert postprocess(made, PRIORS, nms_thresh=0.65)[2][0, :5].tolist() == [1, 1, 2, 0, -1]


@pytest.mark.usefixtures("_either_path")
def test_overlap_equal_to_the_threshold_is_dropped():
    """Kept is what overlaps by less: IoU 0.5 exactly, from two priors of the same middle and powers of two."""
    table = torch.zeros(8732, 4) + 0.5
    table[0], table[1] = torch.tensor([0.5, 0.5, 0.5, 0.5]), torch.tensor([0.5, 0.5, 0.5, 0.25])
    deltas, logits = torch.zeros(1, 8732, 4), torch.zeros(1, 8732, 2)
    logits[..., 0] = 20
    logits[0, 0, 1], logits[0, 1, 1] = 22, 21
    made = deltas, logits
    assert (postprocess(made, table, nms_thresh=0.5)[2] >= 0).sum() == 1
    assert (postprocess(made, table, nms_thresh=0.51)[2] >= 0).sum() == 2


@pytest.mark.usefixtures("_either_path")
def test_boxes_over_the_border_stay_as_they_are():
    made = firing((0, 0, 0.9, torch.tensor([0.0, 0.5, 0.4, 0.2])))
    assert postprocess(made, PRIORS)[0][0, 0].tolist() == pytest.approx([-60, 120, 60, 180], abs=1e-2)


@pytest.mark.usefixtures("_either_op")
def test_half_precision_and_no_graph():
    deltas, logits = some_outputs(2, 1, 3)
    deltas, logits = deltas.requires_grad_(), logits.requires_grad_()
    exact = postprocess((deltas.detach().bfloat16().float(), logits.detach().bfloat16().float()), PRIORS)
    for own, other in zip(postprocess((deltas.bfloat16(), logits.bfloat16()), PRIORS), exact):
        assert torch.equal(own, other) and not own.requires_grad


@pytest.mark.usefixtures("_either_path")
def test_an_image_does_not_depend_on_its_batch():
    deltas, logits = some_outputs(6, 4, 7)
    whole = postprocess((deltas, logits), PRIORS)
    for image in range(4):
        alone = postprocess((deltas[image : image + 1], logits[image : image + 1]), PRIORS)
        for own, other in zip(alone, whole):
            torch.testing.assert_close(own[0], other[image], rtol=1e-6, atol=1e-5)


@pytest.mark.usefixtures("_either_path")
def test_priors_with_nan_are_no_detections():
    deltas, logits = some_outputs(3, 2, 4)
    expected = postprocess((deltas, logits), PRIORS)
    quiet = (logits.softmax(2)[0, :, 1:] < 0.05).all(1).nonzero().flatten()[:300]
    logits[0, quiet, 2] = torch.nan
    for own, other in zip(postprocess((deltas, logits), PRIORS), expected):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-5)


@pytest.mark.usefixtures("_either_path")
@pytest.mark.parametrize(
    ("place", "delta"), [(0, math.nan), (0, math.inf), (1, -math.inf), (0, 3e38), (3, math.nan), (3, 435), (2, 445)]
)
def test_candidates_whose_box_is_not_finite_are_no_detections(place, delta):
    """e^(445 / 5) is beyond float32; 435 and 3e38 make boxes that are beyond it in pixels alone."""
    box, other = torch.tensor([0.5, 0.5, 0.4, 0.2]), torch.tensor([0.2, 0.2, 0.1, 0.1])
    good = (70, 1, 0.8, box), (8731, 2, 0.7, other)
    deltas, logits = firing((5, 1, 0.9, box), *good)
    deltas[0, 5, place] = delta
    boxes, scores, labels = postprocess((deltas, logits), PRIORS)
    assert (labels[0] >= 0).sum() == 2 and boxes.isfinite().all() and torch.equal(scores > 0, labels >= 0)
    for own, wanted in zip((boxes, scores, labels), postprocess(firing(*good), PRIORS), strict=True):
        assert torch.equal(own[labels >= 0], wanted[0, :2])


@pytest.mark.usefixtures("_either_path")
@pytest.mark.parametrize("score_thresh", [0.0, 1.0])
def test_extreme_thresholds(score_thresh):
    made = some_outputs(3, 2, 2)
    found = postprocess(made, PRIORS, score_thresh=score_thresh)
    assert_equal_detections(found, oracle(*made, score_thresh=score_thresh))


def test_shapes_come_from_shapes_alone():
    """Tensors without values stand for those of a device where reading one would wait, and XLA's."""
    made = torch.empty(2, 8732, 4, device="meta"), torch.empty(2, 8732, 5, device="meta")
    boxes, scores, labels = postprocess(made, PRIORS.to("meta"), detections=7)
    assert boxes.shape == (2, 7, 4) and scores.shape == labels.shape == (2, 7)


def detected(*wanted: tuple[int, int, float, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What evaluation finds in one image: boxes, scores and labels without the unused places."""

    class Model(SimpleNamespace):
        def __call__(self, images):
            return firing(*wanted)

    boxes, scores, labels = DETECTOR.infer(Model(priors=PRIORS), SimpleNamespace(images=None), nullcontext)
    assert labels.shape == (1, 200)
    return boxes[labels >= 0], scores[labels >= 0], labels[labels >= 0]


def test_evaluation_takes_scores_above_a_twentieth():
    box = torch.tensor([0.5, 0.5, 0.4, 0.2])
    assert detected((5, 0, 0.051, box), (70, 1, 0.049, box))[2].tolist() == [0]


def test_evaluation_drops_boxes_that_overlap_by_half():
    box = torch.tensor([0.5, 0.5, 0.4, 0.2])
    for overlap, count in ((0.52, 1), (0.48, 2)):  # of two boxes, one moved by a part of its width: (1 - s) / (1 + s)
        moved = box + torch.tensor([0.4 * (1 - overlap) / (1 + overlap), 0, 0, 0])
        assert len(detected((5, 0, 0.9, box), (70, 0, 0.8, moved))[2]) == count


def test_evaluation_looks_at_200_boxes_of_a_class():
    box, other, last = torch.tensor([[0.5, 0.5, 0.4, 0.2], [0.1, 0.1, 0.1, 0.1], [0.9, 0.9, 0.1, 0.1]])
    same = [(prior, 0, 0.9 - prior / 1000, box) for prior in range(199)]
    found = detected(*same, (300, 0, 0.6, other), (301, 0, 0.5, last))
    assert found[1].tolist() == pytest.approx([0.9, 0.6])


def test_evaluation_reports_200_boxes_of_an_image():
    places = [
        torch.tensor([x, y, 0.05, 0.05]) for x in torch.linspace(0.1, 0.9, 15) for y in torch.linspace(0.1, 0.9, 15)
    ]
    scores = detected(*[(i, i % 3, 0.9 - i / 1000, place) for i, place in enumerate(places)])[1]
    assert scores.tolist() == pytest.approx([0.9 - i / 1000 for i in range(200)])
