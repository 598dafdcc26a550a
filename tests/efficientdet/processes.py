"""Two processes of a training step, and one with the images of both; see test_processes.py.

`python processes.py FOLDER RANK SIZE PORT`: writes FOLDER/<size>-<rank>.pt, losses, gradients and running statistics of
this process's part of four images, averaged over the processes.
"""

import os
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from detcore.data.synthetic import synthetic_batches
from detcore.device.sync_norm import synchronised
from detcore.processes import distributed
from efficientdet.loss import losses
from efficientdet.model import EfficientDet


def main(folder: str, rank: int, size: int, port: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    distributed.init("gloo", 120)
    torch.manual_seed(5)
    model = synchronised(EfficientDet("tf_efficientdet_lite0", 3, (64, 64), drop_path=0.0).double()).train()
    batch = next(synthetic_batches(3, (64, 64), 4, 5, 0))
    own = slice(0, 1) if rank == 0 else slice(1, 4)
    own = own if size > 1 else slice(None)
    over_ranks = partial(distributed.all_reduce_mean, device="cpu") if size > 1 else None
    outputs = model.predict(batch.images[own].double() / 255)
    terms = losses(
        outputs, model.anchors, batch.boxes[own].double(), batch.labels[own], 0.1, over_ranks, size
    )  # fmt: skip
    sum(terms.values()).backward()
    found = {f"loss {name}": value.detach() for name, value in terms.items()}
    found |= {f"gradient {name}": p.grad for name, p in model.named_parameters()}
    found = {name: distributed.all_reduce_mean(value) for name, value in found.items()}
    found |= {name: value for name, value in model.named_buffers() if "running" in name or "tracked" in name}
    torch.save(found, Path(folder) / f"{size}-{rank}.pt")
    dist.destroy_process_group() if size > 1 else None


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
