"""Random crops and colours of training images: what is drawn for an image, and the colours' arithmetic.

All draws are hashes of (seed, epoch, position in the file, number of the draw). So they do not depend on the batch, the
process or the loader that an image is seen in, and each loader applies the same numbers: crop, mirror, resize, colours.

The crop is that of SSD in NVIDIA's DeepLearningExamples (PyTorch/Detection/SSD). A try takes one of seven options at
random: the whole image; a window whose IoU with every box exceeds .1, .3, .5, .7 or .9; any window. A window's width
and height are uniform between .3 and 1 of the image's, its place is uniform, and it counts if neither of these two
parts is more than twice the other, the option's condition holds and the centre of at least one box is inside. Tries go
on until one counts. An image without boxes has nothing to lose: any window of allowed shape counts. Windows have whole
pixels, as the image is cut, and all conditions are tested on them.

The colours change by one affine map for each image, equal to this order of steps with one rounding: hue turned by an
angle and saturation scaled in YIQ, contrast scaled about 128, brightness scaled.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MIN_IOU = np.array([-np.inf, 0.1, 0.3, 0.5, 0.7, 0.9, -np.inf])  # of the options; the first is the whole image
SMALLEST, MOST_ASPECT, TRIES = 0.3, 2.0, 16
_COLOURS, _OF_A_TRY = 4, 5  # draws
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


def uniform(seed: int, epoch: int, images: np.ndarray, *draws: np.ndarray) -> np.ndarray:
    """float64 in [0, 1), one for each image position: SplitMix64 over seed, epoch and position in turn.

    draws: the number of the draw, for more than one an image, in the shapes that broadcast with that of images.
    """
    state = np.zeros(np.broadcast_shapes(images.shape, *(draw.shape for draw in draws)), np.uint64)
    for value in (np.uint64(seed % 2**64), np.uint64(epoch), *(each.astype(np.uint64) for each in (images, *draws))):
        state = (state ^ value) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)) * 2.0**-53


@dataclass(frozen=True)
class Augment:
    """How far the colours may change, beside the crop.

    brightness, contrast, saturation: factors are uniform in 1 - value .. 1 + value. hue: degrees, uniform in +-value.
    """

    brightness: float = 0.125
    contrast: float = 0.5
    saturation: float = 0.5
    hue: float = 18.0

    def colours(self, seed: int, epoch: int, images: np.ndarray) -> np.ndarray:
        """float32 [n, 3, 4]: for each image the map of `jitter`, from the draws 0 to 3."""
        spread = np.array([self.brightness, self.contrast, self.saturation, self.hue])
        change = spread * (2 * uniform(seed, epoch, images[:, None], np.arange(_COLOURS)) - 1)
        return colour_map(*(1 + change[:, :3]).T, change[:, 3])

    def windows(
        self, seed: int, epoch: int, images: np.ndarray, size: np.ndarray, boxes: list[np.ndarray]
    ) -> np.ndarray:
        """int64 [n, 4] x1, y1, x2, y2: the part of each image that is used, in pixels.

        size: int64 [n, 2] height and width. boxes: of each image float32 [m, 4] x1, y1, x2, y2 in pixels. The tries
        are drawn and tested TRIES at a time for all images, and the first that counts is taken: as if one by one.
        """
        chosen = np.concatenate([np.zeros_like(size), size[:, ::-1]], 1)
        waiting, first = np.arange(len(images)), _COLOURS
        while len(waiting):
            number = first + np.arange(TRIES * _OF_A_TRY).reshape(TRIES, _OF_A_TRY)
            draws = uniform(seed, epoch, images[waiting, None, None], number)
            counts, windows = _tries(draws, size[waiting], [boxes[i] for i in waiting.tolist()])
            found, at = counts.any(1), counts.argmax(1)
            chosen[waiting[found]] = windows[found, at[found]]
            waiting, first = waiting[~found], first + TRIES * _OF_A_TRY
        return chosen


def _tries(draws: np.ndarray, size: np.ndarray, boxes: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Whether each try counts, bool [n, TRIES], as far as the first whole image, and its window, int64 [n, TRIES, 4].

    draws: float64 [n, TRIES, 5]: option, width, height, left, top.
    """
    option = (draws[..., 0] * len(MIN_IOU)).astype(int)
    extent = SMALLEST + (1 - SMALLEST) * draws[..., 1:3]
    corner = draws[..., 3:] * (1 - extent)
    side = size[:, None, ::-1]
    begin = np.floor(corner * side).astype(np.int64)
    end = np.maximum(np.floor((corner + extent) * side).astype(np.int64), begin + 1)
    whole = option == 0
    windows = np.where(whole[..., None], np.concatenate([0 * side, side], 2), np.concatenate([begin, end], 2))
    aspect = extent[..., 0] / extent[..., 1]
    worth = (aspect >= 1 / MOST_ASPECT) & (aspect <= MOST_ASPECT) & (np.cumsum(whole, 1) == 0)
    row, at = np.nonzero(worth)
    whole[row, at] = _counts(windows[row, at], MIN_IOU[option[row, at]], row, boxes)
    return whole, windows


def _counts(windows: np.ndarray, min_iou: np.ndarray, row: np.ndarray, boxes: list[np.ndarray]) -> np.ndarray:
    """bool [c]: whether window c, of image row[c], has IoU > min_iou[c] with all boxes and a centre of one in it."""
    number = np.array([len(one) for one in boxes], np.int64)
    pairs = number[row]
    window = np.repeat(np.arange(len(row)), pairs)
    box_of = np.arange(len(window)) - np.repeat(np.cumsum(pairs) - pairs, pairs)
    box = np.concatenate(boxes)[(np.cumsum(number) - number)[row[window]] + box_of].astype(np.float64)
    cut = windows[window]
    shared = (np.minimum(cut[:, 2:], box[:, 2:]) - np.maximum(cut[:, :2], box[:, :2])).clip(0).prod(1)
    union = (cut[:, 2:] - cut[:, :2]).prod(1) + (box[:, 2:] - box[:, :2]).prod(1) - shared
    failed = np.bincount(window[shared / union <= min_iou[window]], minlength=len(row))
    centred = np.bincount(window[has_centre(box, cut)], minlength=len(row))
    return (failed == 0) & ((centred > 0) | (pairs == 0))


def has_centre(boxes: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """bool [n]: whether the centre of each box lies inside its window; both [n, 4] or [4], x1, y1, x2, y2."""
    centre = (boxes[..., :2].astype(np.float64) + boxes[..., 2:]) / 2
    return ((centre > windows[..., :2]) & (centre < windows[..., 2:])).all(-1)


def colour_map(brightness: np.ndarray, contrast: np.ndarray, saturation: np.ndarray, hue: np.ndarray) -> np.ndarray:
    """float32 [n, 3, 4]: the matrix and the offset of each set of factors, float64 [n] each, hue in degrees."""
    turn = np.deg2rad(hue)
    change = np.zeros((len(hue), 3, 3))
    change[:, 0, 0] = 1
    change[:, 1, 1] = change[:, 2, 2] = saturation * np.cos(turn)
    change[:, 1, 2] = saturation * np.sin(turn)
    change[:, 2, 1] = -change[:, 1, 2]
    matrix = (contrast * brightness)[:, None, None] * (np.linalg.inv(_YIQ) @ change @ _YIQ)
    offset = np.broadcast_to((brightness * (1 - contrast) * 128)[:, None, None], (len(hue), 3, 1))
    return np.concatenate([matrix, offset], 2).astype(np.float32)


def jitter(image: Tensor, colour: Tensor) -> Tensor:
    """uint8 RGB [H, W, 3] with its colours changed: each pixel p becomes M p + t, rounded and clipped to 0..255.

    colour: float32 [3, 4], M and t side by side, on the image's device.
    """
    together = math.gcd(image.shape[0] * image.shape[1], 8)  # pixels a row: a product of 3 columns wastes the processor
    matrix = torch.kron(torch.eye(together, device=colour.device), colour[:, :3].T.contiguous())
    pixels = image.reshape(-1, 3 * together).float()
    changed = torch.addmm(colour[:, 3].repeat(together), pixels, matrix)
    return changed.round_().clamp_(0, 255).to(torch.uint8).view(image.shape)
