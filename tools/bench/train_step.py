"""One training step of RetinaNet on the CPU against torchvision's: forward, loss, backward, Adam.

    python -m tools.bench.train_step [--backbone resnet50] [--image-size 320] [--batch 2] [--classes 264]
                                     [--boxes 8] [--rounds 5] [--json PATH]

Both models have the same backbone, frozen normalisation, trained layers, weights, images and boxes; torchvision's
resizing is switched off. Ours runs with weights in both memory layouts. The programs run alternately in one process;
the table gives the median, and the first losses, which must agree.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models import get_model
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.retinanet import _default_anchorgen
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from single_stage_detector.loss import losses
from single_stage_detector.model import RetinaNet, load_reference_state

Step = Callable[[], dict[str, Tensor]]


def batch(size: int, count: int, classes: int, boxes: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random uint8 images, boxes and labels without padding."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    centre = torch.rand(count, boxes, 2, generator=generator) * size
    half = torch.rand(count, boxes, 2, generator=generator) * size / 4 + 4
    corners = torch.cat((centre - half, centre + half), 2).clamp(0, size)
    return images, corners, torch.randint(classes, (count, boxes), generator=generator)


def torchvision_model(backbone: str, classes: int, size: int) -> TorchvisionRetinaNet:
    """torchvision's RetinaNet with the benchmark's frozen layers and norms, and no resizing."""
    body = get_model(backbone, weights=None, norm_layer=FrozenBatchNorm2d)
    extractor = _resnet_fpn_extractor(body, 3, [2, 3, 4], LastLevelP6P7(256, 256))
    anchor_generator = _default_anchorgen()
    return TorchvisionRetinaNet(
        extractor, classes, size, size, anchor_generator=anchor_generator, _skip_resize=True
    ).train()


def adam_step(model: torch.nn.Module, loss: Callable[[], dict[str, Tensor]]) -> Step:
    """The whole step as a function that returns its losses."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> dict[str, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        terms = loss()
        sum(terms.values()).backward()
        optimizer.step()
        return terms

    return step


def programs(options: argparse.Namespace) -> dict[str, Step]:
    images, boxes, labels = batch(options.image_size, options.batch, options.classes, options.boxes, seed=1)
    torch.manual_seed(1)
    theirs = torchvision_model(options.backbone, options.classes, options.image_size)
    as_floats = [image.float() / 255 for image in images]
    targets = [{"boxes": b, "labels": k} for b, k in zip(boxes, labels, strict=True)]
    steps = {"torchvision": adam_step(theirs, lambda: theirs(as_floats, targets))}
    for name, layout in (("ours", torch.contiguous_format), ("ours, channels_last", torch.channels_last)):
        model = RetinaNet(options.backbone, options.classes, (options.image_size, options.image_size))
        load_reference_state(model, theirs.state_dict())
        model = model.to(memory_format=layout).train()

        def loss(model: RetinaNet = model) -> dict[str, Tensor]:
            return losses(model(images), model.anchors, boxes, labels)

        steps[name] = adam_step(model, loss)
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--image-size", type=int, default=320)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--classes", type=int, default=264)
    parser.add_argument("--boxes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    steps = programs(options)
    first = {name: float(sum(step().values()).detach()) for name, step in steps.items()}  # warms up as well
    times: dict[str, list[float]] = {name: [] for name in steps}
    work: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            start, before = time.perf_counter(), time.process_time()
            step()
            work[name].append(time.process_time() - before)
            times[name].append(time.perf_counter() - start)
    rows = [
        {"program": k, "seconds": statistics.median(v), "cpu_s": statistics.median(work[k]), "first_loss": first[k]}
        for k, v in times.items()
    ]
    shape = f"{options.backbone}, {options.batch} x {options.image_size} pixels, {options.classes} classes"
    print(f"{shape}; median of {options.rounds}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'program':20} {'s/step':>8} {'CPU s':>8} {'speed-up':>9} {'first loss':>11}")
    for row in rows:
        gain = rows[0]["seconds"] / row["seconds"]
        print(f"{row['program']:20} {row['seconds']:8.3f} {row['cpu_s']:8.3f} {gain:8.2f}x {row['first_loss']:11.5f}")
    if options.json:
        options.json.write_text(json.dumps({"settings": shape, "threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
