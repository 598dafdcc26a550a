"""The losses of whole networks: every kind, images without boxes, gradients, and what must not matter."""

import pytest
import torch

from detcore.data.batch import Batch, whole_images
from detcore.data.synthetic import synthetic_batches
from detcore.device import native
from detcore.ops.mask_targets import mask_targets
from maskrcnn.loss import losses
from maskrcnn.model import MaskRCNN
from tests.maskrcnn.settings import FPN, GN, MASKS, SMALL, XCONV, settings

C4 = {
    "backbone_conv_body": "R-18-C4", "roi_box_head_num_classes": 4, "roi_heads_batch_size_per_image": 16,
    "rpn_pre_nms_top_n_train": 60, "roi_mask_head_conv_layers": (8,), "rpn_anchor_sizes": (16, 32),
    "roi_box_head_pooler_resolution": 4, "roi_mask_head_resolution": 4,
}  # fmt: skip
C5 = C4 | {
    "backbone_conv_body": "R-18-C5", "rpn_anchor_stride": (32,), "roi_box_head_pooler_scales": (1 / 32,),
    "roi_box_head_feature_extractor": "FPN2MLPFeatureExtractor", "roi_box_head_mlp_head_dim": 16,
}  # fmt: skip
GROUPS = GN | {"group_norm_num_groups": 8, "roi_box_head_conv_head_dim": 16, "roi_box_head_num_stacked_convs": 2}
KINDS = {
    "mask, FPN": (FPN, SMALL, MASKS),
    "box, FPN": (FPN, SMALL),
    "proposals, FPN": (FPN, SMALL, {"rpn_only": True}),
    "mask, C4": (C4, MASKS),
    "box, C4, dilated": (C4, {"resnets_res5_dilation": 2}),
    "box, C5": (C5,),
    "group norm, Xconv": (FPN, SMALL, MASKS, GROUPS, XCONV),
    "half-open": (FPN, SMALL, MASKS, {"legacy_boxes": False}),
    "by image": (FPN, SMALL, MASKS, {"rpn_fpn_post_nms_per_batch": False}),
}
CANVAS = (128, 192)


def batch(counts=(3, 0, 2), dtype=torch.float32) -> Batch:
    """uint8 images (floats of another dtype), so many boxes each; every image reaches less far than its canvas."""
    generator = torch.Generator().manual_seed(0)
    images, most = len(counts), max(counts)
    pixels = torch.randint(256, (images, 3, *CANVAS), generator=generator, dtype=torch.uint8)
    low = torch.rand(images, most, 2, generator=generator) * 60
    boxes = torch.cat((low, low + 14 + torch.rand(images, most, 2, generator=generator) * 50), 2)
    labels = torch.randint(3, (images, most), generator=generator)
    unused = torch.arange(most) >= torch.tensor(counts)[:, None]
    boxes, labels = boxes.masked_fill(unused[..., None], 0), labels.masked_fill(unused, -1)
    whole = whole_images(pixels, boxes, labels, torch.arange(images), torch.tensor([CANVAS] * images))
    extent = torch.tensor([CANVAS, (120, 170), (128, 140)])[:images]
    return whole._replace(extent=extent)


def filled(edges, edge_of, regions, box_of, size) -> torch.Tensor:
    """Targets of masks that fill their boxes' left half."""
    assert regions.shape == (*box_of.shape, 4)
    half = torch.arange(size) < size // 2
    return half.expand(*box_of.shape, size, size) & (box_of >= 0)[..., None, None]


def draws(like: torch.Tensor) -> torch.Tensor:
    """The same for each image, whatever stands beside it."""
    return (torch.arange(like.shape[1]) * 0.618034 % 1).expand(like.shape)


def network(kind: str) -> MaskRCNN:
    torch.manual_seed(0)
    return MaskRCNN(settings(*KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns(kind):
    model = network(kind)
    terms = losses(model, batch(), filled, draws)
    names = ["loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"]
    assert list(terms) == names[: 2 if "proposals" in kind else 5 if model.makes_masks else 4]
    assert all(term.dtype == torch.float32 and term.shape == () for term in terms.values())
    assert all(term.isfinite() and term > 0 for term in terms.values())
    sum(terms.values()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or (parameter.grad.isfinite().all() and parameter.grad.any()), name


@pytest.mark.parametrize("padded", [0, 4])
def test_images_without_boxes(padded):
    """Their regions are all background; boxes and masks have nothing to learn, and no gradient is NaN."""
    model, full = network("mask, FPN"), batch()
    empty = full._replace(boxes=torch.zeros(3, padded, 4), labels=torch.full((3, padded), -1))
    terms = losses(model, empty, filled, draws)
    assert terms["loss_rpn_box_reg"] == terms["loss_box_reg"] == terms["loss_mask"] == 0
    assert terms["loss_classifier"] > 0 and terms["loss_objectness"] > 0
    sum(terms.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_padding_of_boxes_and_pixels_does_not_matter():
    model, given = network("mask, FPN"), batch()
    expected = losses(model, given, filled, draws)
    more = torch.randint(256, given.images.shape, dtype=torch.uint8)
    rows, columns = torch.arange(CANVAS[0]), torch.arange(CANVAS[1])
    covered = (rows < given.extent[:, :1])[:, :, None] & (columns < given.extent[:, 1:])[:, None]
    images = torch.where(covered[:, None], given.images, more)
    boxes = torch.cat((given.boxes, torch.full((3, 2, 4), 50.0)), 1)
    boxes = torch.where((given.labels < 0)[..., None], torch.tensor([3.0, 4, 90, 80]), boxes[:, :3])
    found = losses(model, given._replace(images=images, boxes=boxes), filled, draws)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_image_alone_is_an_image_in_a_batch():
    """Each loss of the batch is the mean of the images' own, weighted by how many of them were sampled: here all have
    as many."""
    model, given = network("by image"), batch((3, 2, 2))
    together = losses(model, given, filled, draws)
    alone = [losses(model, given.map(lambda x, i=i: x[i : i + 1]), filled, draws) for i in range(3)]
    for name in ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"):
        torch.testing.assert_close(together[name], torch.stack([one[name] for one in alone]).mean())


@pytest.mark.parametrize("kind", ["mask, FPN", "mask, C4"])
def test_float64_gradients(kind):
    """Of the heads, by differences; what comes before them also decides where proposals lie, which has no gradient."""
    model, given = network(kind).double(), batch((2, 1))
    given = given._replace(images=model.normalized(given.images, given.extent) / 100)
    picked = [p for n, p in model.named_parameters() if "roi_heads" in n][::5]

    def total() -> torch.Tensor:
        return sum(losses(model, given, filled, draws).values())

    gradients = torch.autograd.grad(total(), picked)
    for parameter, gradient in zip(picked, gradients, strict=True):
        at, step, values = gradient.abs().argmax(), 1e-6, []
        for side in (1, -1):
            with torch.no_grad():
                parameter.view(-1)[at] += side * step
                values.append(total())
                parameter.view(-1)[at] -= side * step
        found = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close(found, gradient.flatten()[at], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["mask, FPN", "mask, C4"])
def test_native_ops_give_what_the_references_give(kind):
    model, given, results = network(kind), batch(), []
    images = model.normalized(given.images, given.extent).contiguous(memory_format=torch.channels_last) / 100
    for policy in ("native", "reference"):
        with native.using(policy):
            terms = losses(model, given._replace(images=images), filled, draws)
        results.append((terms, torch.autograd.grad(sum(terms.values()), model.rpn.head.conv.weight)[0]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mask, FPN", "mask, C4", "group norm, Xconv"])
def test_mixed_precision(kind):
    """bfloat16 through autocast: float32 losses near those of float32, and finite gradients."""
    model, given = network(kind), batch()
    images = model.normalized(given.images, given.extent) / 100
    expected = losses(model, given._replace(images=images), filled, draws)
    with torch.autocast("cpu", torch.bfloat16):
        found = losses(model, given, filled, draws)
        near = losses(model, given._replace(images=images), filled, draws)
    assert all(term.dtype == torch.float32 and term.isfinite() for term in found.values())
    for name in ("loss_objectness", "loss_classifier"):
        torch.testing.assert_close(near[name], expected[name], rtol=0.05, atol=0.02)
    sum(near.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("steps", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_a_learning_network_has_the_losses_and_gradients_of_the_references(steps):
    """At every step of a training with the native ops, from the same weights and draws: no error grows from step to
    step, so that only rounding is between them. A proposal that is chosen otherwise would be seen. Where rounding puts
    an activation on the other side of 0 (step 50, 1e-4 of all gradients), the gradients alone differ at that step."""
    if native.load("detcore"):
        pytest.skip("nothing to compare with")
    model = network("mask, FPN")
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=1e-3)
    batches = [next(synthetic_batches(3, (64, 64), 2, 4, seed, max_edges=100)) for seed in range(4)]
    values, differences = [], []
    for step in range(steps):
        found = []
        for which in ("reference", "native"):
            torch.manual_seed(step)
            with native.using(which):
                terms = losses(model, batches[step % 4], mask_targets)
                found.append((terms, torch.autograd.grad(sum(terms.values()), learning)))
        (theirs, wanted), (ours, gradients) = found
        assert torch.allclose(torch.stack([*ours.values()]), torch.stack([*theirs.values()]), rtol=1e-5), step
        away = sum((mine - other).square().sum() for mine, other in zip(gradients, wanted, strict=True))
        differences.append(float((away / sum(other.square().sum() for other in wanted)).sqrt()))
        for parameter, gradient in zip(learning, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        values.append(float(sum(ours.values())))
    assert max(differences) < 1e-3 and sum(difference > 1e-5 for difference in differences) <= steps // 50
    assert sum(values[-4:]) < sum(values[:4]) / 1.5
