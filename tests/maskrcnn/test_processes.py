"""Two processes with an image each against one with both."""

from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from maskrcnn.loss import losses
from tests.maskrcnn.test_loss import batch, draws, filled, network

KIND = "by image"


def one_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = network(KIND)
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
    own = batch((3, 2)).map(lambda x: x[rank : rank + 1])
    sum(losses(model, own, filled, draws, parallel).values()).backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in model.named_parameters() if p.requires_grad}, f"{folder}/gradients.pt")
    dist.destroy_process_group()


def test_gradients_are_those_of_one_process(tmp_path: Path):
    """The mean of two images' own losses: each of them counts as many sampled regions."""
    mp.spawn(one_rank, (str(tmp_path),), nprocs=2)
    found = torch.load(tmp_path / "gradients.pt")
    model = network(KIND)
    for i in range(2):
        own = batch((3, 2)).map(lambda x, i=i: x[i : i + 1])
        (sum(losses(model, own, filled, draws).values()) / 2).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            error, scale = (found[name] - parameter.grad).abs().max(), parameter.grad.abs().max()
            assert error <= 1e-4 * scale, name
