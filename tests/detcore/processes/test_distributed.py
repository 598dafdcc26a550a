"""Agreement between processes, seeds; with real gloo processes where there are several."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from detcore import UserError
from detcore.processes import distributed
from detcore.processes.distributed import World

ROOT = Path(__file__).resolve().parents[3]


def place(rank: int, size: int, port: int) -> dict[str, str]:
    """torchrun's variables for one process."""
    values = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in values.items()}


def test_alone_everything_works_without_a_group():
    assert distributed.init("gloo", 5, {}) == World(0, 1, 0, 1)
    assert not torch.distributed.is_initialized()
    distributed.barrier()
    assert distributed.all_reduce_max([3, -4]) == [3, -4]
    rows = torch.rand(3, 2)
    assert torch.equal(distributed.gather_rows(rows), rows)
    assert distributed.choose_seed(2**40) == 2**40
    drawn = {distributed.choose_seed(None) for _ in range(8)}
    assert len(drawn) > 1 and all(0 <= seed < 2**31 for seed in drawn)
    distributed.shutdown()
    for seed in (-1, 2**63):
        with pytest.raises(UserError, match="seed"):
            distributed.choose_seed(seed)


def test_derived_seeds():
    # Published outputs of splitmix64 for the states 0 and 1234567.
    assert distributed._splitmix64(0) == 0xE220A8397B1DCDAF
    assert distributed._splitmix64(1234567) == 6457827717110365317
    assert distributed.derive_seed(1234567) == 6457827717110365317 >> 1
    streams = [
        (),
        (0,),
        (0, 0),
        (1,),
        (0, 1),
        (1, 0),
        (2**40,),
        *((2, epoch, rank) for epoch in range(50) for rank in range(50)),
    ]
    seeds = {distributed.derive_seed(seed, *stream) for seed in range(3) for stream in streams}
    assert len(seeds) == 3 * len(streams)
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.manual_seed(max(seeds))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_three_processes_agree():
    """One import of torch, then three forks of it."""
    port = free_port()
    places = [place(rank, 3, port) for rank in range(3)]
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, torch.distributed as dist
from detcore.processes import distributed
places = {places}
r = next((rank for rank in (1, 2) if os.fork() == 0), 0)
world = distributed.init('gloo', 60, places[r])
if r == 2:
    os.kill(os.getpid(), signal.SIGQUIT)
assert distributed.all_reduce_max([r, -r, 5]) == [2, 0, 5]
os.write(1, b'%d\\n' % distributed.choose_seed(None if r != 1 else 99))
assert distributed.choose_seed(7 + r) == 7
model = torch.nn.BatchNorm1d(2)
model.running_mean.fill_(r + 1)
distributed.broadcast_buffers(model)
assert model.running_mean.tolist() == [1, 1]
for counts in ([2, 0, 5], [0, 0, 3], [1, 1, 1], [0, 0, 0]):
    rows = torch.arange(counts[r] * 7, dtype=torch.float64).reshape(-1, 7) + 1000 * r
    got = distributed.gather_rows(rows)
    if r == 0:
        want = [torch.arange(n * 7, dtype=torch.float64).reshape(-1, 7) + 1000 * k for k, n in enumerate(counts)]
        assert got.dtype == torch.float64 and torch.equal(got, torch.cat(want)), counts
    else:
        assert got is None
distributed.barrier()
distributed.shutdown()
assert not dist.is_initialized()
if r == 0:
    assert [os.wait()[1] for _ in range(2)] == [0, 0]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 3 and len(set(done.stdout.split())) == 1
    assert 'File "<string>", line 10 in <module>' in done.stderr, "SIGQUIT shows where the process is"


def test_who_cannot_join_says_where():
    with pytest.raises(UserError, match=r"rank 1 of 2 could not join the others at 127\.0\.0\.1:\d+ .*MASTER_PORT"):
        distributed.init("gloo", 1, place(1, 2, free_port()))


def test_torchrun_starts_a_world(tmp_path):
    """Its agent, not rank 0, holds the rendezvous."""
    program = tmp_path / "program.py"
    program.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom detcore.processes import distributed, watchdog\n"
        "world = distributed.init('gloo', 60)\n"
        "assert distributed.all_reduce_max([world.rank]) == [1] and world.local_size == world.size == 2\n"
        "with watchdog.Watchdog(world, 60, 30) as dog:\n    dog.beat('x', 1)\n"
        "os.write(1, b'rank %d ok\\n' % world.rank)\ndistributed.shutdown()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")[:2]) == ["rank 0 ok", "rank 1 ok"]


def test_four_processes_resume_to_the_same_weights():
    """The order in which gradients are summed over four processes must not depend on where a run was interrupted."""
    port = free_port()
    places = [place(rank, 4, port) for rank in range(4)]
    program = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from detcore.device.select import select_backend
from detcore.processes import distributed
places = {places}
r = next((rank for rank in (1, 2, 3) if os.fork() == 0), 0)
distributed.init('gloo', 60, places[r])
device = select_backend('cpu', 'fp32')
def train(parts):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(6)])
    optimizer = torch.optim.Adam(model.parameters())
    for part in parts:
        parallel = device.parallel(model, 4)
        assert all(p.grad is None for p in model.parameters())
        for step in part:
            x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step * 10 + r))
            optimizer.zero_grad()
            parallel(x).square().mean().backward()
            optimizer.step()
    return torch.nn.utils.parameters_to_vector(model.parameters())
assert torch.equal(train([range(6)]), train([range(3), range(3, 6)]))
distributed.barrier()
distributed.shutdown()
if r == 0:
    assert [os.wait()[1] for _ in range(3)] == [0, 0, 0]
"""
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environ)
    assert done.returncode == 0, done.stderr
