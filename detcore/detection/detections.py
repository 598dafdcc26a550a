"""What a detector is, and the way from a batch to what it finds: rows of numbers, and masks where it has them."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from detcore.data.batch import Batch
from detcore.data.recipes import Recipe
from detcore.device.base import Backend
from detcore.evaluation.rle import Rles
from detcore.ops.paste import paste
from detcore.processes import distributed
from detcore.training.task import Beat

_MOST_WAITING = 4  # batches whose masks are still to be pasted


class Detector(NamedTuple):
    """What tells one detector from another.

    recipe(config): what happens to its images. infer(model, batch, autocast): boxes [N, D, 4] (x1, y1, x2, y2 in pixels
    of the canvas), scores [N, D] and labels int64 [N, D] (class index, -1 where unused), of fixed shapes; a detector
    with masks adds their probabilities [N, D, M, M] and where these lie, [N, D, 4] as the boxes (other numbers where
    its boxes count their last pixel). autocast() is the context of the network's forward pass. classes: of random data,
    where nobody says how many. scores_empty(config): whether detections on validation images without any annotation
    count. masks(config): whether masks are trained and scored; the config then has `max_edges`, for `TrainPlan`.
    proposals(config): whether what it finds has no class (label 0), so that its recall is what is measured.
    """

    recipe: Callable[[Any], Recipe]
    infer: Callable[[nn.Module, Batch, Callable[[], AbstractContextManager]], tuple[Tensor, ...]]
    classes: int
    scores_empty: Callable[[Any], bool] = lambda config: True
    extra_metrics: Callable[[Any, dict[int, list[float]]], dict[str, float]] = lambda config, by_iou: {}
    masks: Callable[[Any], bool] = lambda config: False
    proposals: Callable[[Any], bool] = lambda config: False


class Detections(NamedTuple):
    """What was found. rows: float64 [D, 7] on the CPU, as `detect` has them, without unused ones. masks: of each row;
    None where the detector has none."""

    rows: Tensor
    masks: Rles | None


def detect(
    detector: Detector, model: nn.Module, batch: Batch, backend: Backend, category_ids: Tensor
) -> Tensor | dict[str, Tensor]:
    """Detections of a batch as float64 [N * D, 7] on the device: image_id, x, y, w, h, score, category_id.

    Boxes are in pixels of the original image, categories are the file's own ids. Unused rows, and all rows of padding
    images, have score 0. category_ids: int64 [K] on the device. Of a detector with masks a dictionary: these as "rows",
    "masks" [N * D, M, M], "boxes" float32 [N * D, 4] where these lie (x1, y1, x2, y2 in pixels of the original image),
    and "sizes" int64 [N * D, 2], height and width of each one's image.
    """
    boxes, scores, labels, *masks = detector.infer(model, batch, backend.autocast)
    scale = (batch.size.double() / batch.extent).flip(1)
    corners = boxes.double().unflatten(2, (2, 2)) * scale[:, None, None]
    corner, extent = corners[:, :, 0], corners[:, :, 1] - corners[:, :, 0]
    real = (batch.image_id >= 0)[:, None] & (labels >= 0)
    columns = [
        batch.image_id[:, None, None].expand(-1, scores.shape[1], 1).double(),
        corner,
        extent,
        scores.masked_fill(~real, 0).double()[..., None],
        category_ids[labels.clamp(min=0)].double()[..., None],
    ]
    rows = torch.cat(columns, 2).flatten(0, 1)
    if not masks:
        return rows
    probabilities, places = masks
    lie = (places.double() * scale.repeat(1, 2)[:, None]).float()
    sizes = batch.size[:, None].expand(-1, scores.shape[1], 2)
    parts = {"masks": probabilities, "boxes": lie, "sizes": sizes}
    return {"rows": rows} | {name: part.flatten(0, 1) for name, part in parts.items()}


def compiled_detect(
    detector: Detector, model: nn.Module, category_ids: Sequence[int] | Tensor, backend: Backend
) -> Callable[[Batch], Tensor | dict[str, Tensor]]:
    """`detect` with a model as a function of a batch on the device, recorded where the device records.

    category_ids: numbers, or an int64 [K] on the device, which a recording reads where it lies.
    """
    ids = category_ids if isinstance(category_ids, Tensor) else torch.tensor(list(category_ids), device=backend.device)
    return backend.compile_inference(lambda batch: detect(detector, model, batch, backend, ids))


@torch.no_grad()
def finished(found: Tensor | dict[str, Tensor], least: float = 0.0) -> Detections:
    """What `detect` found, on the CPU, masks pasted: the rows of a score above `least`."""
    if isinstance(found, Tensor):
        rows = found.cpu()
        return Detections(rows[rows[:, 5] > least], None)
    host = {name: part.cpu() for name, part in found.items()}
    real = host["rows"][:, 5] > least
    rows, *parts = (host[name][real] for name in ("rows", "masks", "boxes", "sizes"))
    return Detections(rows, paste(*parts))


@torch.inference_mode()
def detect_all(
    infer: Callable[[Batch], Tensor | dict[str, Tensor]],
    batches: Iterator[Batch],
    backend: Backend,
    beat: Beat,
    times: list[float] | None = None,
) -> Detections:
    """This rank's detections. infer: as `compiled_detect` makes it. Masks are pasted by a thread, while the device is
    at the next batches.

    times: gets the seconds from each batch's coming until the device has found its objects, whose end is then waited
    for; None: the device may fall behind.
    """
    rows: list[Tensor] = []
    pasted: list[Future[Detections]] = []
    with ThreadPoolExecutor(1) as pool:
        for step, batch in enumerate(backend.prefetch(batches)):
            beat("evaluation", step)
            began = time.perf_counter()
            found = infer(batch)
            if times is not None:
                backend.synchronize()
                times.append(time.perf_counter() - began)
            if isinstance(found, Tensor):
                rows.append(found)
                continue
            pasted.append(pool.submit(finished, found))
            if len(pasted) > _MOST_WAITING:
                pasted[-_MOST_WAITING - 1].result()
    if not pasted:
        return finished(torch.cat(rows) if rows else torch.zeros(0, 7, dtype=torch.float64))
    parts = [part.result() for part in pasted]
    return Detections(torch.cat([part.rows for part in parts]), Rles.joined([part.masks for part in parts]))


def gathered(found: Detections, masked: bool, device: torch.device) -> Detections | None:
    """The detections of all ranks, in rank order, on rank 0; None on the others. All ranks call it.

    masked: whether the detector has masks, which a rank without images cannot tell. device: for collectives.
    """
    rows = distributed.gather_rows(found.rows.to(device))
    if not masked:
        return rows if rows is None else Detections(rows.cpu(), None)
    own = found.masks or Rles.of([])
    facts = torch.from_numpy(np.column_stack([own.sizes, own.counts, own.areas]))
    text = distributed.gather_rows(torch.from_numpy(own.text.copy())[:, None].to(device))
    facts = distributed.gather_rows(facts.to(device))
    if rows is None:
        return None
    facts = facts.cpu().numpy()
    return Detections(rows.cpu(), Rles(text.cpu().numpy()[:, 0], facts[:, 2], facts[:, :2], facts[:, 3]))
