"""The largest values of each row, with a fixed choice among equal ones."""

import torch
from torch import Tensor


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row and their places int64, both [N, count], falling; of equal ones the first places.

    values: float32 [N, M] without NaN, M >= count. The choice is the same on every device, which torch.topk's is not.
    """
    at = largest_places(values, count)
    return values.gather(1, at), at


def largest_places(values: Tensor, count: int, sorted: bool = True) -> Tensor:
    """The places int64 [N, count] of `largest`; in any order unless sorted."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0: the two zeros are equal
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the values
    places = torch.arange(values.shape[1], device=values.device)
    return ((rising.long() << 32) - places).topk(count, 1, sorted=sorted).indices  # all different: topk has no choice
