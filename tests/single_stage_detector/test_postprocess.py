"""Detections against torchvision's post-processing and batched_nms."""

import pytest
import torch
from torch import nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet
from torchvision.ops import batched_nms

from single_stage_detector import postprocess as module
from single_stage_detector.anchors import anchors, grids
from single_stage_detector.postprocess import _greedy_nms, postprocess

SIZE = (128, 192)


def outputs(seed: int, images: int, classes: int, spread: float = 1.5, size=SIZE):
    """Random logits, of which every later image has fewer above the threshold and the last has none."""
    generator = torch.Generator().manual_seed(seed)
    a = anchors(size, grids(size))
    logits = torch.randn(images, len(a), classes, generator=generator) * spread - 3
    logits -= torch.linspace(0, 4, images)[:, None, None]
    logits[-1] -= 50
    return logits, torch.randn(images, len(a), 4, generator=generator) * 0.3, a


def torchvision_postprocess(logits, deltas, a, size, score_thresh=0.05, topk=1000, nms_thresh=0.5, detections=300):
    model = TorchvisionRetinaNet.__new__(TorchvisionRetinaNet)
    nn.Module.__init__(model)
    model.score_thresh, model.nms_thresh = score_thresh, nms_thresh
    model.detections_per_img, model.topk_candidates = detections, topk
    model.box_coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
    lengths = [9 * rows * columns for rows, columns in grids(size)]
    heads = {"cls_logits": list(logits.split(lengths, 1)), "bbox_regression": list(deltas.split(lengths, 1))}
    return model.postprocess_detections(heads, [list(a.split(lengths))] * len(logits), [size] * len(logits))


def assert_equal_detections(ours, theirs, detections=300):
    """The same boxes and labels, and scores but for the last bit (a vectorised sigmoid's depends on the position)."""
    for boxes, scores, labels, expected in zip(*ours, theirs, strict=True):
        assert boxes.shape == (detections, 4)
        count = len(expected["scores"])
        assert (labels[:count] >= 0).all()
        assert (labels[count:] == -1).all()
        assert (scores[count:] == 0).all()
        assert (boxes[count:] == 0).all()
        assert (scores[:-1] >= scores[1:]).all()
        torch.testing.assert_close(scores[:count], expected["scores"], rtol=2e-7, atol=0)
        own = sorted(zip(labels[:count].tolist(), boxes.tolist(), scores.tolist()))
        other = sorted(zip(*(expected[key].tolist() for key in ("labels", "boxes", "scores")), strict=True))
        assert [row[:2] for row in own] == [row[:2] for row in other]
        assert [row[2] for row in own] == pytest.approx([row[2] for row in other], rel=2e-7)


@pytest.fixture(params=["shapes follow the data", "shapes fixed"])
def either_path(request, monkeypatch):
    """The CPU's short cut and the fixed shapes of other devices."""
    if request.param == "shapes fixed":
        monkeypatch.setattr(module, "_needed", lambda alive: alive.shape[-1])


@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize("classes", [1, 5, 40])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"topk": 37, "detections": 20},
        {"score_thresh": 0.3, "nms_thresh": 0.2},
        {"topk": 1, "nms_thresh": 0.9},
        {"detections": 2000},
    ],
    ids=str,
)
def test_equal_to_torchvision(classes, settings):
    logits, deltas, a = outputs(classes, 3, classes)
    ours = postprocess(logits, deltas, a, SIZE, **settings)
    theirs = torchvision_postprocess(logits, deltas, a, SIZE, **settings)
    assert_equal_detections(ours, theirs, settings.get("detections", 300))


@pytest.mark.parametrize("size", [(64, 64), (33, 65), (201, 119)])
def test_other_image_sizes(size):
    logits, deltas, a = outputs(4, 2, 6, size=size)
    ours = postprocess(logits, deltas, a, size)
    assert_equal_detections(ours, torchvision_postprocess(logits, deltas, a, size))


def test_crowded_scene_with_many_overlaps():
    logits, deltas, a = outputs(7, 2, 3, spread=4.0)
    ours = postprocess(logits, deltas * 0.1, a, SIZE)
    assert int((ours[2][0] >= 0).sum()) == 300
    assert_equal_detections(ours, torchvision_postprocess(logits, deltas * 0.1, a, SIZE))


@pytest.mark.parametrize(("nms_thresh", "passes"), [(0.9, 1), (0.01, 2)])
def test_looks_further_when_the_best_do_not_fill_the_output(monkeypatch, nms_thresh, passes):
    widths = []

    def counted(boxes, *others):
        widths.append(boxes.shape[1])
        return _greedy_nms(boxes, *others)

    monkeypatch.setattr(module, "_greedy_nms", counted)
    logits, deltas, a = outputs(12, 2, 1, spread=3.0)
    settings = {"detections": 20, "nms_thresh": nms_thresh}
    ours = postprocess(logits, deltas, a, SIZE, **settings)
    assert len(widths) == passes
    assert_equal_detections(ours, torchvision_postprocess(logits, deltas, a, SIZE, **settings), 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_is_lifted_to_float32(dtype):
    logits, deltas, a = outputs(8, 3, 4)
    logits, deltas = logits.to(dtype), deltas.to(dtype)
    ours = postprocess(logits, deltas, a, SIZE)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    for own, expected in zip(ours, postprocess(logits.float(), deltas.float(), a, SIZE)):
        assert torch.equal(own, expected)


def test_nothing_above_the_threshold():
    logits, deltas, a = outputs(9, 2, 4)
    boxes, scores, labels = postprocess(logits - 100, deltas, a, SIZE)
    assert (boxes == 0).all()
    assert (scores == 0).all()
    assert (labels == -1).all()


def test_no_gradient_is_recorded():
    logits, deltas, a = outputs(10, 1, 2)
    assert not postprocess(logits.requires_grad_(), deltas, a, SIZE)[1].requires_grad


@pytest.mark.parametrize("seed", range(5))
def test_greedy_suppression_equals_batched_nms(seed):
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(3, 400, 2, generator=generator) * 60
    boxes = torch.cat((low, low + torch.rand(3, 400, 2, generator=generator) * 30), 2)
    boxes[:, ::9, 2:] = boxes[:, ::9, :2]  # without area
    boxes[:, 1::9] = boxes[:, 1:2]  # identical
    scores = torch.stack([torch.randperm(400, generator=generator) for _ in range(3)]).float()
    labels = torch.randint(4, (3, 400), generator=generator)
    boxes, scores = boxes.double(), scores.double()  # so that batched_nms, which shifts the classes apart, is exact
    kept = _greedy_nms(boxes, scores.clone(), labels, 0.5, 400)
    for image in range(3):
        expected = batched_nms(boxes[image], scores[image], labels[image], 0.5)
        assert kept[image][kept[image] >= 0].tolist() == expected.tolist()


def test_shapes_never_depend_on_values():
    """Tensors without values stand for a device where reading one would stop the queue."""
    logits, deltas, a = (x.to("meta") for x in outputs(11, 2, 4))
    boxes, scores, labels = postprocess(logits, deltas, a, SIZE, detections=7)
    assert boxes.shape == (2, 7, 4)
    assert scores.shape == labels.shape == (2, 7)
