"""How large the pieces are in which references walk tensors that would not fit at once."""

import torch


def work_elements(device: torch.device) -> int:
    """Elements of one intermediate of a reference: few for the caches of a CPU, many to fill an accelerator."""
    return 2**18 if device.type == "cpu" else 2**25
