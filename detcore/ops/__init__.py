"""Operations that several benchmarks need: each in plain PyTorch, and as a native op that does the same faster."""

import torch


def work_elements(device: torch.device) -> int:
    """Elements of one intermediate of a reference: few for the caches of a CPU, many to fill an accelerator."""
    return 2**18 if device.type == "cpu" else 2**25
