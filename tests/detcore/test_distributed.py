"""Agreement between processes, seeds; with real gloo processes where there are several."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from detcore import UserError, distributed
from detcore.distributed import World

ROOT = Path(__file__).resolve().parents[2]


def torchrun(rank=1, size=4, local=1, **more):
    values = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local, "MASTER_ADDR": "h0", "MASTER_PORT": 1234, **more}
    return {name: str(value) for name, value in values.items() if value is not None}


def test_alone_everything_works_without_a_group():
    assert distributed.init("gloo", 5, {}) == World(0, 1, 0, 1)
    assert not torch.distributed.is_initialized()
    distributed.barrier()
    assert distributed.agree([3, -4]) == [3, -4]
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


def launch(program: str, size: int, *argv: str, **environ) -> list[subprocess.Popen]:
    """`size` processes with torchrun's variables that run `program`, with (world, argv) ready for it."""
    prelude = (
        "import sys, os, signal, time\nimport torch\nimport torch.distributed as dist\n"
        f"sys.path.insert(0, {str(ROOT)!r})\nfrom detcore import distributed\nfrom detcore.cli import run_main\n"
        "argv = sys.argv[1:]\nworld = distributed.init('gloo', 300)\n"
    )
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-c", prelude + program, *argv],
            env={**torchrun(rank, size, rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port), "OMP_NUM_THREADS": "1",
                 **environ},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip


def finish(processes, seconds=120) -> list[tuple[int, str, str]]:
    """Exit code, stdout, stderr of each."""
    try:
        outputs = [process.communicate(timeout=seconds) for process in processes]
        return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]
    finally:
        for process in processes:
            process.kill()


def test_three_processes_agree():
    program = """
r = world.rank
assert distributed.agree([r, -r, 5]) == [2, 0, 5]
seed = distributed.choose_seed(None if r != 1 else 99)
print(seed)
assert distributed.choose_seed(7 + r) == 7
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
"""
    results = finish(launch(program, 3))
    assert [code for code, _, _ in results] == [0, 0, 0], results
    assert len({out for _, out, _ in results}) == 1


def test_who_cannot_join_says_where(monkeypatch):
    environ = torchrun(1, 2, 1, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"rank 1 of 2 could not join the others at 127\.0\.0\.1:\d+ .*MASTER_PORT"):
        distributed.init("gloo", 1)


def test_torchrun_starts_a_world(tmp_path):
    """Its agent, not rank 0, holds the rendezvous."""
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom detcore import distributed\n"
        "world = distributed.init('gloo', 60)\n"
        "assert distributed.agree([world.rank]) == [1] and world.local_size == world.size == 2\n"
        "with distributed.Watchdog(world, 60, 30) as dog:\n    dog.beat('x', 1)\n"
        "print('rank', world.rank, 'ok', flush=True)\ndistributed.shutdown()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")[:2]) == ["rank 0 ok", "rank 1 ok"]
