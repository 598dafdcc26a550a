"""The emulated GPU itself: what its primitives compute, and that it finds the mistakes it is there to find."""

import time

import pytest
import torch

from tests import emulation

WRONG = {
    "divergent": "threads of a block wait at different places: __syncthreads in line",
    "stuck": "wait for each other for ever|wait at different places",
    "gone": "__shfl_sync in line .* reads from lane 3, which has returned",
    "mask": "__ballot_sync with a mask other than 0xffffffff",
    "misaligned": r"cases\.cu:\d+: access to a misaligned address",
    "bounds": r"cases\.cu:\d+: index outside of the array",
}


def run(kernel: str, x: torch.Tensor, blocks: int, threads: int, size: int) -> torch.Tensor:
    emulation.load("emulation_cases", (emulation.HERE / "cases.cu",))
    return torch.ops.emulation_cases.run(kernel, x, blocks, threads, size)


def bits(value: int, width: int) -> tuple[int, int, int]:
    """Bits set, position of the lowest from 1 (0: none), zeros before the highest."""
    text = format(value, f"0{width}b")
    return text.count("1"), (len(text) - text.rindex("1") if value else 0), width - len(text.lstrip("0"))


def test_warp_primitives():
    x = torch.randint(0, 1 << 20, (96,))
    x[0], x[40] = 0, 5
    found = run("warp", x, 1, 96, 96 * 12).view(96, 12).tolist()
    for i, row in enumerate(found):
        warp, lane = x[i // 32 * 32 : i // 32 * 32 + 32].tolist(), i % 32
        expected = [sum(warp), sum(warp[: lane + 1]), warp[lane + 3 if lane < 29 else lane], warp[(lane * 7 + 3) % 32]]
        expected += [warp[lane // 8 * 8 + 1], warp[lane + 4 if lane % 8 < 4 else lane]]
        expected += [sum((v % 2) << k for k, v in enumerate(warp)), int(5 in warp), 1]
        narrow, wide = bits(warp[lane], 32), bits(warp[lane], 64)
        assert row == expected + [a + b for a, b in zip(narrow, wide, strict=True)]


def test_block_primitives_and_atomics():
    x = torch.randint(0, 1000, (300,))
    x[200] = 5
    found = run("block", x, 3, 128, 1 + 3 * 5).tolist()
    assert found[0] == x.sum()
    for block, row in enumerate(torch.tensor(found[1:]).view(3, 5).tolist()):
        part = x[block * 128 : block * 128 + 128]
        assert row == [part.sum(), part.max(), (part % 2).sum(), int(5 in part.tolist()), 1]


def test_threads_that_return_are_not_waited_for():
    assert run("early", torch.zeros(1, dtype=torch.int64), 2, 64, 64).tolist() == [1] * 40 + [0] * 24


def test_shared_memory_is_unset_when_a_block_starts():
    assert set(run("unset", torch.zeros(1, dtype=torch.int64), 4, 64, 256)[64:].tolist()) == {-1}


def test_a_missing_barrier_is_seen():
    x = torch.arange(64)
    assert -1 in run("race", x, 1, 64, 64).tolist()


def test_blocks_run_in_no_order_but_the_same_each_time():
    x = torch.zeros(1, dtype=torch.int64)
    last = [run("order", x, blocks, 1, 1).item() for blocks in range(50, 70)]
    assert last != [blocks - 1 for blocks in range(50, 70)]
    assert last == [run("order", x, blocks, 1, 1).item() for blocks in range(50, 70)]


@pytest.mark.parametrize("kernel", WRONG)
def test_a_wrong_kernel_is_an_error_and_the_next_launch_works(kernel):
    x = torch.zeros(64, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=WRONG[kernel]) as raised:
        run(kernel, x, 1, 64, 64)
    assert "emulated GPU, block 0 of 1" in str(raised.value)
    test_block_primitives_and_atomics()


def test_launches_that_a_gpu_refuses():
    x = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="block of 1025 threads"):
        run("order", x, 1, 1025, 1)
    with pytest.raises(RuntimeError, match="blocks is too large"):
        run("order", x, 1 << 31, 1, 1)
    assert run("order", x, 0, 1, 1).item() == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_the_cuda_implementation_skips():
    with pytest.raises(pytest.skip.Exception, match="torch sees no GPU"), emulation.running("cuda"):
        pass


def test_it_is_quick():
    start = time.perf_counter()
    run("block", torch.zeros(128 * 1000, dtype=torch.int64), 1000, 128, 1 + 5 * 1000)
    took = time.perf_counter() - start
    assert took < 5, f"1.4 million barriers took {took:.1f} s; on two cores of 2026: 0.1 s"
