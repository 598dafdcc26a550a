"""The largest values of each row, with a fixed choice among equal ones."""

import torch
from torch import Tensor


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row and their places int64, both [N, count], falling; of equal ones the first places.

    values: float32 [N, M] without NaN, M >= count. The choice is the same on every device, which torch.topk's is not.
    """
    bits = (values + 0.0).view(torch.int32)  # + 0.0: the two zeros are equal
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the values
    places = torch.arange(values.shape[1], device=values.device)
    at = ((rising.long() << 32) - places).topk(count, 1).indices  # all different
    return values.gather(1, at), at
