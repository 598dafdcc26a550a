"""Streams of batches from the parameters that the tests of loaders vary."""

from collections.abc import Iterator
from types import ModuleType

import torch

from detcore.data import torch_loader
from detcore.data.augment import Augment
from detcore.data.batch import Batch
from detcore.data.coco import CocoIndex
from detcore.data.pace import Pace
from detcore.data.plan import EvalPlan, TrainPlan
from detcore.data.recipes import Recipe, ssd_crop, stretch

CPU = torch.device("cpu")


def recipe_of(image_size: tuple[int, int], hflip: float, min_box: float, augment: Augment | None) -> Recipe:
    return ssd_crop(image_size, augment, hflip) if augment else stretch(image_size, hflip, min_box)


def train_batches(
    index: CocoIndex, *, image_size: tuple[int, int], batch_size: int, max_boxes: int, seed: int, rank: int = 0,
    world_size: int = 1, workers: int = 0, epoch: int = 0, step: int = 0, drop_last: bool = True, hflip: float = 0.5,
    antialias: bool = False, crowd: str = "keep", min_box: float = 0.0, augment: Augment | None = None,
    pace: Pace | None = None, device: torch.device = CPU, by: ModuleType = torch_loader,
) -> Iterator[Batch]:  # fmt: skip
    """An endless stream of training batches by a loader's module."""
    recipe = recipe_of(image_size, hflip, min_box, augment)
    plan = TrainPlan(index, recipe, batch_size, max_boxes, seed, rank, world_size, drop_last, crowd)
    return by.batches(plan, plan.keys(epoch, step), torch_loader.Options(workers, device, antialias, pace))


def eval_batches(
    index: CocoIndex, *, image_size: tuple[int, int], batch_size: int, rank: int = 0, world_size: int = 1,
    workers: int = 0, antialias: bool = False, device: torch.device = CPU, by: ModuleType = torch_loader,
) -> Iterator[Batch]:  # fmt: skip
    """One pass of evaluation by a loader's module."""
    plan = EvalPlan(index, stretch(image_size), batch_size, rank, world_size)
    return by.batches(plan, plan.keys(), torch_loader.Options(workers, device, antialias))
