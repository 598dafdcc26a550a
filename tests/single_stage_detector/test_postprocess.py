"""Detections against torchvision's post-processing, from each implementation of the ops and from the references."""

from unittest import mock

import pytest
import torch
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet
from torchvision.ops import batched_nms

from detcore.device import native
from single_stage_detector.anchors import anchors, grids
from single_stage_detector.ops import candidates as module
from single_stage_detector.postprocess import postprocess
from tests import emulation

SIZE = (96, 128)
gpu = pytest.param("cuda", marks=pytest.mark.gpu)


def outputs(seed: int, images: int, classes: int, spread: float = 1.5, size=SIZE):
    """Random logits, of which every later image has fewer above the threshold and the last has none; by level."""
    generator = torch.Generator().manual_seed(seed)
    a = anchors(size, grids(size))
    logits = torch.randn(images, len(a), classes, generator=generator) * spread - 3
    logits -= torch.linspace(0, 4, images)[:, None, None]
    logits[-1] -= 50
    deltas = torch.randn(images, len(a), 4, generator=generator) * 0.3
    lengths = [9 * rows * columns for rows, columns in grids(size)]
    return [[x.contiguous() for x in y.split(lengths, 1)] for y in (logits, deltas)] + [a]


def torchvision_postprocess(
    device, logits, deltas, a, size=SIZE, score_thresh=0.05, topk=1000, nms_thresh=0.5, detections=300
):
    """On the same device as ours, since its exponential may end in another bit; only the suppression on the CPU, since
    that of a GPU shifts the classes apart, which rounds the overlaps."""

    def on_the_cpu(boxes, scores, labels, threshold):
        return batched_nms(boxes.cpu(), scores.cpu(), labels.cpu(), threshold).to(boxes.device)

    logits, deltas, a = [x.to(device) for x in logits], [x.to(device) for x in deltas], a.to(device)
    model = TorchvisionRetinaNet.__new__(TorchvisionRetinaNet)
    nn.Module.__init__(model)
    model.score_thresh, model.nms_thresh = score_thresh, nms_thresh
    model.detections_per_img, model.topk_candidates = detections, topk
    model.box_coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
    lengths = [9 * rows * columns for rows, columns in grids(size)]
    images = len(logits[0])
    heads = {"cls_logits": logits, "bbox_regression": deltas}
    with mock.patch.object(torchvision.ops.boxes, "batched_nms", on_the_cpu):
        found = model.postprocess_detections(heads, [list(a.split(lengths))] * images, [size] * images)
    return [{name: value.cpu() for name, value in image.items()} for image in found]


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


@pytest.fixture(params=["reference", "reference of fixed shapes", "cpu", "emulated gpu", gpu], autouse=True)
def device(request, monkeypatch):
    """What computes the ops: the native implementations, or the references with and without a CPU's short cut."""
    if not request.param.startswith("reference"):
        with emulation.running(request.param) as implementation:
            yield implementation.device
        return
    if request.param == "reference of fixed shapes":
        monkeypatch.setattr(module, "_fullest", lambda alive: alive.shape[1])
    with native.using("reference"):
        yield torch.device("cpu")


def detections(device, logits, deltas, a, size=SIZE, **settings):
    """postprocess on the device; the results on the CPU."""
    logits, deltas = [x.to(device) for x in logits], [x.to(device) for x in deltas]
    return tuple(x.cpu() for x in postprocess(logits, deltas, a.to(device), size, **settings))


@pytest.mark.parametrize("classes", [1, 40])
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
def test_equal_to_torchvision(device, classes, settings):
    logits, deltas, a = outputs(classes, 3, classes)
    ours = detections(device, logits, deltas, a, **settings)
    theirs = torchvision_postprocess(device, logits, deltas, a, **settings)
    assert_equal_detections(ours, theirs, settings.get("detections", 300))


@pytest.mark.parametrize("size", [(64, 64), (33, 65), (201, 119)])
def test_other_image_sizes(device, size):
    logits, deltas, a = outputs(4, 2, 6, size=size)
    ours = detections(device, logits, deltas, a, size)
    assert_equal_detections(ours, torchvision_postprocess(device, logits, deltas, a, size))


def test_crowded_scene_with_many_overlaps(device):
    logits, deltas, a = outputs(7, 2, 3, spread=4.0)
    deltas = [x * 0.1 for x in deltas]
    ours = detections(device, logits, deltas, a)
    assert int((ours[2][0] >= 0).sum()) == 300
    assert_equal_detections(ours, torchvision_postprocess(device, logits, deltas, a))


def test_everything_is_above_the_threshold(device):
    logits, deltas, a = outputs(12, 1, 3)
    logits = [(x + 53) / 6 - 1.5 for x in logits]
    assert_equal_detections(detections(device, logits, deltas, a), torchvision_postprocess(device, logits, deltas, a))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_is_lifted_to_float32(device, dtype):
    logits, deltas, a = outputs(8, 3, 4)
    logits, deltas = [x.to(dtype) for x in logits], [x.to(dtype) for x in deltas]
    ours = detections(device, logits, deltas, a)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    lifted = detections(device, [x.float() for x in logits], [x.float() for x in deltas], a)
    assert all(torch.equal(own, expected) for own, expected in zip(ours, lifted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_implementations_agree_on_ties(device, dtype):
    logits, deltas, a = outputs(13, 2, 8)
    logits = [(x * 2).round().to(dtype) / 2 for x in logits]
    deltas = [x.to(dtype) for x in deltas]
    ours = detections(device, logits, deltas, a)
    with native.using("reference"):
        expected = detections("cpu", logits, deltas, a)
    assert torch.equal(ours[2], expected[2])
    exact = {} if device.type == "cpu" else {"rtol": 1e-5, "atol": 1e-3}  # another exponential function
    torch.testing.assert_close(ours, expected, **(exact or {"rtol": 0, "atol": 0}))


def test_nothing_above_the_threshold(device):
    logits, deltas, a = outputs(9, 2, 4)
    boxes, scores, labels = detections(device, [x - 100 for x in logits], deltas, a)
    assert (boxes == 0).all()
    assert (scores == 0).all()
    assert (labels == -1).all()


def test_no_images(device):
    logits, deltas, a = outputs(9, 1, 4)
    boxes, scores, labels = detections(device, [x[:0] for x in logits], [x[:0] for x in deltas], a)
    assert boxes.shape == (0, 300, 4)
    assert scores.shape == labels.shape == (0, 300)


def test_anchors_with_a_nan_are_left_out(device):
    logits, deltas, a = outputs(14, 2, 4)
    with_nan = [x.clone() for x in logits]
    without = [x.clone() for x in logits]
    for x, y in zip(with_nan, without):
        x[0, ::3, 1], y[0, ::3] = torch.nan, -100
    ours = detections(device, with_nan, deltas, a)
    assert all(torch.equal(x, y) for x, y in zip(ours, detections(device, without, deltas, a)))
    everywhere = [torch.full_like(x, -torch.nan) for x in logits]
    assert (detections(device, everywhere, deltas, a)[2] == -1).all()


def test_deltas_that_are_not_finite_harm_nobody_else(device):
    logits, deltas, a = outputs(15, 2, 4)
    deltas[0][0, 5], deltas[1][1, 2, 1] = torch.nan, torch.inf
    boxes, scores, labels = detections(device, logits, deltas, a)
    assert scores.isfinite().all()
    assert boxes[labels < 0].eq(0).all()


def test_no_gradient_is_recorded(device):
    logits, deltas, a = outputs(10, 1, 2)
    logits = [x.to(device).requires_grad_() for x in logits]
    assert not postprocess(logits, [x.to(device) for x in deltas], a.to(device), SIZE)[1].requires_grad


@pytest.mark.parametrize("kind", ["meta", "cuda", "cuda and native"])
def test_shapes_never_depend_on_values(device, kind, monkeypatch):
    """Tensors without values stand for a device where reading one would stop the queue: it raises here."""
    if kind.endswith("native"):
        if missing := native.load("single_stage_detector") or native.load("detcore"):
            emulation.unavailable(missing)
        monkeypatch.setattr(native, "_missing", lambda *_: "")
    logits, deltas, a = outputs(11, 2, 4)
    kind = kind.split()[0]
    with FakeTensorMode(), native.using("auto"):
        logits, deltas = ([torch.empty(x.shape, device=kind) for x in y] for y in (logits, deltas))
        a = torch.empty(a.shape, device=kind)
        boxes, scores, labels = postprocess(logits, deltas, a, SIZE, detections=7)
    assert boxes.device.type == kind
    assert boxes.shape == (2, 7, 4)
    assert scores.shape == labels.shape == (2, 7)


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_torch_compile_sees_one_graph(device):
    logits, deltas, a = outputs(16, 2, 4)
    compiled = torch.compile(postprocess, fullgraph=True, backend="aot_eager")
    ours = compiled(logits, deltas, a, SIZE)
    assert all(torch.equal(x, y) for x, y in zip(ours, postprocess(logits, deltas, a, SIZE)))
