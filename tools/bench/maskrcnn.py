"""A training step and inference of Mask R-CNN R50-FPN against torchvision's maskrcnn_resnet50_fpn, on the CPU.

    python -m tools.bench.maskrcnn [--images 2] [--size 320 448] [--rounds 5] [--json PATH]

Both have the same random weights and get the same images, boxes and polygons in tensors, on a canvas of one size, so
that neither resizes. 512 regions of an image train, and training ends with the gradients. 1,000 proposals are looked
at, scores must be above 0.05 (with the spread of these weights many are), and up to 100 masks are pasted into each
image; ours also encodes them as RLE, which is what a result is. The two run alternately in one process; the table gives
medians of seconds and how many masks there were.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d

from detcore.config import load
from detcore.data.batch import Batch
from detcore.data.synthetic import synthetic_batches
from detcore.device.select import select_backend
from detcore.ops.mask_targets import mask_targets
from detcore.ops.paste import paste
from maskrcnn.config import IGNORED_FLAGS, Config
from maskrcnn.flags import translate_flags
from maskrcnn.loss import losses
from maskrcnn.model import MaskRCNN
from maskrcnn.postprocess import postprocess
from maskrcnn.weights import converted, source_of

BOXES, EDGES, CLASSES, SPREAD = 10, 512, 80, 3.0


def polygons(batch: Batch) -> Tensor:
    """uint8 [N, M, H, W]: the masks of the boxes, which torchvision wants as bitmaps; ellipses, as the edges are."""
    height, width = batch.images.shape[2:]
    y, x = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    low, high = batch.boxes[..., :2], batch.boxes[..., 2:]
    centre, radius = (low + high) / 2, ((high - low) / 2).clamp(min=1e-3)
    across = ((x - centre[..., :1, None]) / radius[..., :1, None]) ** 2
    down = ((y - centre[..., 1:, None]) / radius[..., 1:, None]) ** 2
    return (across + down <= 1).to(torch.uint8)


def targets(batch: Batch) -> list[dict[str, Tensor]]:
    """The batch's truth as torchvision takes it."""
    masks = polygons(batch)
    real = batch.labels >= 0
    return [
        {"boxes": boxes[used], "labels": labels[used] + 1, "masks": own[used]}
        for boxes, labels, own, used in zip(batch.boxes, batch.labels, masks, real, strict=True)
    ]


def ours(state: Mapping[str, Tensor]) -> MaskRCNN:
    """With the weights of torchvision's."""
    words = ["--config-file", "configs/e2e_mask_rcnn_R_50_FPN_1x_bs96.yaml", "MODEL.WEIGHT", ""]
    words += ["MODEL.RPN.FPN_POST_NMS_TOP_N_TRAIN", "2000", "MODEL.RPN.FPN_POST_NMS_PER_BATCH", "False"]
    words += ["MODEL.RESNETS.STRIDE_IN_1X1", "False", "--no-legacy-boxes", "INPUT.TO_BGR255", "False"]
    words += ["INPUT.PIXEL_MEAN", "(0.485, 0.456, 0.406)", "INPUT.PIXEL_STD", "(0.229, 0.224, 0.225)"]
    model = MaskRCNN(load(Config, translate_flags(words), {}, IGNORED_FLAGS).config)
    model.load_state_dict(converted(model, state, source_of(state), "torchvision's"))
    return model


def theirs(size: tuple[int, int]) -> nn.Module:
    model = detection.maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=CLASSES + 1, min_size=min(size), max_size=max(size)
    )
    model.roi_heads.box_predictor.cls_score.weight.data.normal_(0, SPREAD)
    freeze(model)
    for name, parameter in model.backbone.body.named_parameters():
        parameter.requires_grad_(not name.startswith(("conv1", "layer1")))
    return model


def freeze(module: nn.Module) -> None:
    """Batch normalisation frozen, as torchvision has it with pretrained weights."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNorm2d(child.num_features))
        else:
            freeze(child)


def actions(images: int, size: tuple[int, int]) -> dict[str, dict[str, Callable[[], int | None]]]:
    """What is timed: {"training" or "inference": {whose: it, which returns the number of masks}}."""
    backend = select_backend("cpu", "fp32")
    batch = backend.to_device(next(synthetic_batches(CLASSES, size, images, BOXES, 1, EDGES)))
    pixels, truth = list(batch.images.contiguous().float() / 255), targets(batch)
    torch.manual_seed(0)
    other = theirs(size)
    own = backend.place(ours(other.state_dict()))

    def train_own() -> None:
        own.train().zero_grad()
        sum(losses(own, batch, mask_targets).values()).backward()

    def train_other() -> None:
        other.train().zero_grad()
        sum(other(pixels, truth).values()).backward()

    @torch.inference_mode()
    def infer_own() -> int:
        found = postprocess(own.eval(), batch.images, batch.extent)
        sizes = batch.size[:, None].expand(-1, found.scores.shape[1], 2).flatten(0, 1)
        real = found.labels.flatten() >= 0
        parts = (part.flatten(0, 1)[real] for part in (found.masks, found.places))
        return len(paste(*parts, sizes[real]).counts)

    @torch.inference_mode()
    def infer_other() -> int:
        return sum(len(found["masks"]) for found in other.eval()(pixels))

    return {
        "training": {"ours": train_own, "torchvision": train_other},
        "inference": {"ours": infer_own, "torchvision": infer_other},
    }


def measure(images: int, size: tuple[int, int], rounds: int) -> list[dict]:
    """One row for training and inference: medians of seconds, and how many times as fast ours is."""
    rows = []
    for what, pair in actions(images, size).items():
        times: dict[str, list[float]] = {name: [] for name in pair}
        for turn in range(rounds + 1):  # the first turn warms up
            for name, action in pair.items():
                start = time.perf_counter()
                count = action()
                if turn:
                    times[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(values) for name, values in times.items()}
        rows.append({"what": what, "masks": count, **medians, "times": medians["torchvision"] / medians["ours"]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--size", type=int, nargs=2, default=(320, 448), help="height and width")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    words = parser.parse_args()
    rows = measure(words.images, tuple(words.size), words.rounds)
    print(f"{words.images} images of {words.size[0]} x {words.size[1]}, {torch.get_num_threads()} threads")
    for row in rows:
        masks = f", {row['masks']} masks" if row["masks"] else ""
        speeds = f"ours {row['ours']:7.3f} s  torchvision {row['torchvision']:7.3f} s  {row['times']:.2f}x"
        print(f"{row['what']:10} {speeds}{masks}")
    if words.json:
        words.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
