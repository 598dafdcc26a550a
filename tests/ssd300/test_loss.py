"""Matching and the multibox loss: golden vectors, a plain writing of the original, closed forms, float64 gradients."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import box_convert, box_iou

from detcore.device import native
from ssd300.anchors import corners, priors
from ssd300.loss import BACKGROUND, losses, match
from ssd300.ops.multibox import hardest, multibox_loss, multibox_loss_reference

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "ssd300.json").read_text())
PRIORS = priors()


@pytest.fixture(autouse=True, params=["reference", "auto"])
def _either_op(request):
    """The reference, and where it is built the native op; float64 is the reference's either way."""
    with native.using(request.param):
        yield


def golden_batch(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    check = GOLDEN[name]
    boxes = torch.tensor([check["gt_ltrb"]], dtype=torch.float64) * 300
    return boxes.to(dtype), torch.tensor([check["classes"]]) - 1


def silent(images: int, labels: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(images, 8732, 4, dtype=dtype), torch.zeros(images, 8732, labels, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("matching_check", torch.float32),
        ("matching_check_tie_free", torch.float32),
        ("matching_check_tie_free", torch.float64),
    ],
)
def test_golden_vectors(name, dtype):
    check, table = GOLDEN[name], PRIORS.to(dtype)
    boxes, labels = golden_batch(name, dtype)
    matched = match(table, boxes, labels)
    assert int((matched >= 0).sum()) == check["positives"]
    for box, label in enumerate(check["classes"]):
        assert int((matched == box).sum()) == check["per_class"][str(label)]
        forced = check["forced_prior_per_gt"][box]
        assert matched[0, forced] == box
        own = box_iou(boxes[0, box : box + 1].double() / 300, corners(PRIORS.double()))
        assert own.max().item() == pytest.approx(check["best_iou_per_gt"][box], abs=1e-5)
    found = losses(silent(1, 81, dtype), table, boxes, labels)
    assert found["box"].item() == pytest.approx(check["location_part"], abs=1e-5)
    assert found["cls"].item() == pytest.approx(check["confidence_part"], abs=1e-4)
    assert sum(found.values()).item() == pytest.approx(check["loss_zero_logits_zero_offsets"], abs=2e-5)
    assert found["cls"].item() == pytest.approx(4 * math.log(81), rel=1e-6)


def test_golden_tie_in_float64():
    boxes, labels = golden_batch("matching_check", torch.float64)
    found = losses(silent(1, 81, torch.float64), PRIORS.double(), boxes, labels)
    assert sum(found.values()).item() == pytest.approx(GOLDEN["matching_check"]["loss_if_tie_goes_to_3316"], abs=2e-5)


@pytest.mark.parametrize("m", [0, 3])
def test_golden_losses_without_objects(m):
    boxes, labels = torch.zeros(2, m, 4), torch.full((2, m), -1)
    found = losses(silent(2, 81), PRIORS, boxes, labels, empty_negatives=0)
    assert sum(found.values()).item() == GOLDEN["image_without_boxes"]["loss"]
    assert (match(PRIORS, boxes, labels) == BACKGROUND).all()


def some_batch(seed: int, images: int = 3, m: int = 6, classes: int = 5, dtype=torch.float32):
    """Outputs and ground truth of several images, the last with one box fewer and so on."""
    g = torch.Generator().manual_seed(seed)
    centre, size = torch.rand(images, m, 2, generator=g), 0.02 * 45 ** torch.rand(images, m, 2, generator=g)
    boxes = box_convert(torch.cat((centre, size), 2), "cxcywh", "xyxy").clamp(0, 1) * 300
    labels = torch.randint(classes, (images, m), generator=g)
    for image in range(images):
        boxes[image, m - image :], labels[image, m - image :] = 0, -1
    deltas = torch.randn(images, 8732, 4, generator=g, dtype=dtype)
    return (deltas, torch.randn(images, 8732, classes + 1, generator=g, dtype=dtype)), boxes.to(dtype), labels


def original_encode(boxes: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The original's encoder as the specification tells it, for one image: boxes ltrb of 0..1, labels 1..K."""
    table = PRIORS.to(boxes.dtype)
    ious = box_iou(boxes, corners(table))
    best, index = ious.max(0)
    best_prior = ious.max(1).indices
    best.index_fill_(0, best_prior, 2.0)
    for box in range(len(boxes)):
        index[best_prior[box]] = box
    mask = best > 0.5
    targets, target_labels = table.clone(), torch.zeros(len(table), dtype=torch.int64)
    targets[mask] = box_convert(boxes, "xyxy", "cxcywh")[index[mask]]
    target_labels[mask] = labels[index[mask]]
    return targets, target_labels


def original_loss(deltas, logits, boxes, labels) -> tuple[torch.Tensor, torch.Tensor]:
    """(location, confidence) of a batch whose images all have boxes, with the original's two full sorts."""
    loc, conf = [], []
    table = PRIORS.to(deltas.dtype)
    for delta, logit, box, label in zip(deltas, logits, boxes, labels):
        real = label >= 0
        goal, target = original_encode(box[real] / 300, label[real] + 1)
        xy = 10 * (goal[:, :2] - table[:, :2]) / table[:, 2:]
        wh = 5 * (goal[:, 2:] / table[:, 2:]).log()
        positive = target > 0
        distance = F.smooth_l1_loss(delta, torch.cat((xy, wh), 1), reduction="none").sum(1)
        entropy = F.cross_entropy(logit, target, reduction="none")
        negative = entropy.detach().clone()
        negative[positive] = 0
        rank = negative.sort(descending=True).indices.sort().indices
        kept = (rank < min(3 * int(positive.sum()), 8732)) | positive
        loc.append((distance * positive).sum() / positive.sum())
        conf.append((entropy * kept).sum() / positive.sum())
    return torch.stack(loc).mean(), torch.stack(conf).mean()


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_the_original(seed):
    outputs, boxes, labels = some_batch(seed, dtype=torch.float64)
    outputs = tuple(part.requires_grad_() for part in outputs)
    found = losses(outputs, PRIORS.double(), boxes, labels)
    expected = original_loss(*outputs, boxes, labels)
    assert found["box"].item() == pytest.approx(expected[0].item(), rel=1e-9)
    assert found["cls"].item() == pytest.approx(expected[1].item(), rel=1e-9)
    own = torch.autograd.grad(sum(found.values()), outputs)
    other = torch.autograd.grad(sum(expected), outputs)
    for a, b in zip(own, other):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_match_is_the_originals():
    for seed in range(6):
        _, boxes, labels = some_batch(seed, m=9)
        matched = match(PRIORS, boxes, labels)
        for image in range(len(boxes)):
            real = labels[image] >= 0
            _, target = original_encode(boxes[image, real] / 300, torch.arange(int(real.sum())) + 1)
            assert torch.equal(matched[image], target - 1)


def test_the_last_of_two_boxes_gets_their_best_prior():
    """Boxes of one prior's middle, one a bit smaller: both have that prior as their best."""
    prior = corners(PRIORS[8543]) * 300
    smaller = prior + torch.tensor([3.0, 3.0, -3.0, -3.0])
    for boxes in ((prior, smaller), (smaller, prior), (prior, prior)):
        matched = match(PRIORS, torch.stack(boxes)[None], torch.tensor([[0, 1]]))
        assert matched[0, 8543] == 1


def test_a_claim_takes_a_prior_from_a_better_box():
    """The big box overlaps the first prior by more than the small one does, which has no other to claim."""
    table = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.1, 0.1, 0.1, 0.1], [0.5, 0.5, 0.41, 0.41]])
    big, small = torch.tensor([88.0, 88, 212, 212]), torch.tensor([140.0, 140, 160, 160])
    for small_at, boxes in enumerate(((small, big), (big, small))):
        matched = match(table, torch.stack(boxes)[None], torch.tensor([[4, 4]]))
        assert matched.tolist() == [[small_at, BACKGROUND, 1 - small_at]]


def test_the_threshold_is_strict():
    table = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.25]])
    box = torch.tensor([[[75.0, 75, 225, 225]]])  # the first prior; half of it is the second
    assert match(table, box, torch.tensor([[0]])).tolist() == [[0, BACKGROUND]]
    assert match(table, box * torch.tensor([1, 1, 1, 0.99]), torch.tensor([[0]])).tolist() == [[0, 0]]


@pytest.mark.parametrize("bad", [[50.0, 50, 50, 90], [50.0, 90, 80, 60], [0.0, 0, 0, 0], [math.nan] * 4])
def test_boxes_without_area_take_no_prior(bad):
    good = [30.0, 30, 150, 180]
    boxes = torch.tensor([[good, bad], [bad, bad]])
    labels = torch.tensor([[1, 2], [0, 0]])
    matched = match(PRIORS, boxes, labels)
    assert not (matched[0] == 1).any() and (matched[1] == BACKGROUND).all()
    outputs = tuple(part.requires_grad_() for part in silent(2, 4))
    found = losses(outputs, PRIORS, boxes, labels)
    alone = losses(silent(1, 4), PRIORS, boxes[:1, :1], labels[:1, :1])
    assert found["box"].item() == pytest.approx(alone["box"].item() / 2)
    sum(found.values()).backward()
    assert all(torch.isfinite(part.grad).all() for part in outputs)


@pytest.mark.parametrize("m", [0, 2])
@pytest.mark.parametrize("count", [3, 10])
def test_images_without_objects_are_negatives(m, count):
    (deltas, logits), boxes, labels = some_batch(1, 2, m)
    labels[:] = -1
    logits = logits.requires_grad_()
    found = losses((deltas, logits), PRIORS, boxes, labels, empty_negatives=count)
    entropy = F.cross_entropy(logits.flatten(0, 1), torch.zeros(2 * 8732, dtype=torch.int64), reduction="none")
    assert found["box"].item() == 0
    assert found["cls"].item() == pytest.approx(entropy.view(2, -1).topk(count).values.sum(1).mean().item(), rel=1e-6)
    found["cls"].backward()
    assert ((logits.grad != 0).any(2).sum(1) == count).all()


def test_more_positives_than_a_quarter_take_all_and_count_once():
    """Every prior is positive or among the hardest: the loss is plain cross-entropy."""
    table = torch.full((8, 4), 0.5)
    boxes, labels = torch.tensor([[[75.0, 75, 225, 225]]]), torch.tensor([[1]])
    table[5:] = 0.05
    logits = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(0))
    found = losses((torch.zeros(1, 8, 4), logits), table, boxes, labels)
    target = torch.tensor([2] * 5 + [0] * 3)
    assert found["cls"].item() == pytest.approx(F.cross_entropy(logits[0], target, reduction="sum").item() / 5)


def test_gradients_of_the_whole_loss():
    generator = torch.Generator().manual_seed(2)
    table = torch.cat((torch.rand(12, 2, generator=generator), 0.2 + 0.4 * torch.rand(12, 2, generator=generator)), 1)
    boxes = torch.tensor([[[30.0, 60, 150, 210], [120, 90, 285, 270]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
    labels = torch.tensor([[0, 2], [-1, -1]])
    deltas = torch.randn(2, 12, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(2, 12, 4, generator=generator, dtype=torch.float64, requires_grad=True)

    def whole(deltas, logits):
        return sum(losses((deltas, logits), table.double(), boxes.double(), labels).values())

    assert torch.autograd.gradcheck(whole, (deltas, logits))


def test_hardest():
    values = torch.tensor([[1.0, 3, 2, 3, 0], [5, 5, 5, 5, 5], [1, 2, 3, 4, 5]])
    chosen = hardest(values, torch.tensor([3, 2, 9]))
    assert chosen.int().tolist() == [[0, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert not hardest(values, torch.zeros(3, dtype=torch.int64)).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    (deltas, logits), boxes, labels = some_batch(3)
    deltas, logits = deltas.to(dtype), logits.to(dtype)
    expected = losses((deltas.float(), logits.float()), PRIORS, boxes, labels)
    found = losses((deltas.requires_grad_(), logits.requires_grad_()), PRIORS, boxes, labels)
    for name, value in found.items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[name])
    sum(found.values()).backward()
    assert deltas.grad.dtype == logits.grad.dtype == dtype


def test_padding_and_order_of_images_do_not_matter():
    outputs, boxes, labels = some_batch(4)
    expected = losses(outputs, PRIORS, boxes, labels)
    padded = losses(outputs, PRIORS, F.pad(boxes, (0, 0, 0, 5)), F.pad(labels, (0, 5), value=-1))
    turned = losses(tuple(part.flip(0) for part in outputs), PRIORS, boxes.flip(0), labels.flip(0))
    for name, value in expected.items():
        assert torch.equal(padded[name], value)
        torch.testing.assert_close(turned[name], value)


def test_the_public_op_is_its_reference():
    (deltas, logits), boxes, labels = some_batch(5, classes=1)
    matched = match(PRIORS, boxes, labels)
    arguments = (deltas, logits, PRIORS, boxes, labels, matched)
    for own, other in zip(multibox_loss(*arguments), multibox_loss_reference(*arguments)):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("m", [0, 3])
def test_shapes_come_from_shapes_alone(m):
    """Tensors without values stand for those of a device where reading one would wait, and XLA's."""
    deltas = torch.empty(2, 8732, 4, device="meta", requires_grad=True)
    logits = torch.empty(2, 8732, 5, device="meta", requires_grad=True)
    boxes = torch.empty(2, m, 4, device="meta")
    labels = torch.empty(2, m, dtype=torch.int64, device="meta")
    found = losses((deltas, logits), PRIORS.to("meta"), boxes, labels)
    assert found["box"].shape == found["cls"].shape == ()
    sum(found.values()).backward()
    assert logits.grad.shape == logits.shape
