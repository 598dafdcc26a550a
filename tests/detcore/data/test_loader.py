"""The loader: what a batch holds depends on seed, epoch, step and rank alone; every mistake has a clear end."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from detcore import UserError
from detcore.data import plan, torch_loader
from detcore.data.augment import uniform
from detcore.data.batch import Batch
from detcore.data.coco import CocoIndex
from tests.detcore.data.streams import eval_batches, train_batches

SIZE = (48, 64)


@pytest.fixture(scope="module")
def index(thirteen) -> CocoIndex:
    return CocoIndex.open(thirteen.file, thirteen.images)


def train(index, **changes):
    arguments = {
        "image_size": SIZE,
        "batch_size": 2,
        "max_boxes": 6,
        "seed": 11,
        "rank": 0,
        "world_size": 1,
        "workers": 0,
        "epoch": 0,
        "step": 0,
    }
    return train_batches(index, **arguments | changes)


def take(stream, count: int) -> list[Batch]:
    batches = list(itertools.islice(stream, count))
    stream.close()
    return batches


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for name, x, y in zip(Batch._fields, a, b, strict=True):
            assert torch.equal(x, y), name


def ids(batches: list[Batch]) -> list[int]:
    return torch.cat([batch.image_id for batch in batches]).tolist()


def test_contract(index):
    for batch in take(train(index), 6):
        assert batch.images.shape == (2, 3, *SIZE) and batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.boxes.shape == (2, 6, 4) and batch.boxes.dtype == torch.float32
        assert batch.labels.shape == (2, 6) and batch.labels.dtype == torch.int64
        assert batch.image_id.shape == (2,) and batch.image_id.dtype == torch.int64
        assert batch.size.shape == (2, 2) and batch.size.dtype == torch.int64
        for row in range(2):
            i = index.image_ids.tolist().index(batch.image_id[row])
            boxes, labels, _ = index.boxes(i)
            assert batch.size[row].tolist() == [index.heights[i], index.widths[i]]
            assert batch.labels[row].tolist() == labels.tolist() + [-1] * (6 - len(labels))
            scale = np.array([64 / index.widths[i], 48 / index.heights[i]] * 2)
            straight = boxes * scale
            mirrored = np.stack([64 - straight[:, 2], straight[:, 1], 64 - straight[:, 0], straight[:, 3]], 1)
            got = batch.boxes[row, : len(boxes)].numpy()
            assert np.allclose(got, straight, atol=1e-3) or np.allclose(got, mirrored, atol=1e-3)
            assert not batch.boxes[row, len(boxes) :].any()


def test_image_and_boxes_are_mirrored_together(index):
    plain, mirrored = take(train(index, hflip=0.0), 6), take(train(index, hflip=1.0), 6)
    for a, b in zip(plain, mirrored, strict=True):
        difference = (a.images.flip(-1).int() - b.images.int()).abs()
        assert difference.max() <= 1, "the order of mirroring and resizing may change rounding only"
        real = a.labels >= 0
        assert torch.equal(a.labels, b.labels)
        x = 64 - a.boxes[..., [2, 0]]
        assert torch.allclose(x[real], b.boxes[..., [0, 2]][real], atol=1e-4)
        assert torch.equal(a.boxes[..., [1, 3]], b.boxes[..., [1, 3]])


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same(index, workers):
    assert_same(take(train(index), 15), take(train(index, workers=workers), 15))


@pytest.mark.parametrize("drop_last", [True, False])
def test_any_restart_gives_the_same(index, drop_last):
    whole = take(train(index, drop_last=drop_last), 20)
    steps = plan.steps_per_epoch(13, 2, 1, drop_last)
    assert steps == (6 if drop_last else 7)
    for at in (0, 1, 5, 6, 7, 13, 14):
        assert_same(whole[at:], take(train(index, epoch=at // steps, step=at % steps, drop_last=drop_last), 20 - at))
    assert_same(whole[9:], take(train(index, epoch=0, step=9, drop_last=drop_last), 11))


def test_epochs_and_seeds_differ_in_order_and_mirroring(index):
    epochs = [ids(take(train(index, epoch=e), 6)) for e in range(4)]
    assert len({tuple(order) for order in epochs}) == 4
    assert all(len(set(order)) == 12 for order in epochs)
    assert len({frozenset(order) for order in epochs}) > 1, "another image is left out each epoch"
    assert ids(take(train(index, seed=12), 6)) != epochs[0]
    every = np.arange(13)
    flips = [tuple(uniform(seed, epoch, every) < 0.5) for seed in (1, 2) for epoch in (0, 1)]
    assert len(set(flips)) == 4


def test_uniform_is_uniform_and_independent():
    images = np.arange(100_000)
    draws = np.stack([uniform(seed, epoch, images) for seed, epoch in ((0, 0), (0, 1), (1, 0), (2**63, 7))])
    assert draws.min() >= 0 and draws.max() < 1
    counts = np.stack([np.histogram(row, 20, (0, 1))[0] for row in draws])
    # 5,000 expected in each of 80 bins, standard deviation 69: five of them are far out.
    assert np.abs(counts - 5000).max() < 5 * 69
    correlation = np.corrcoef(np.concatenate([draws, draws[:, ::-1][:1], np.roll(draws, 1, axis=1)[:1]]))
    assert np.abs(correlation - np.eye(6)).max() < 5 / np.sqrt(100_000)
    few = uniform(0, 1, np.array([77, 5]))
    assert few.tolist() == [draws[1, 77], draws[1, 5]], "a draw depends on the image alone, not on its batch"


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("drop_last", [True, False])
def test_shards_are_disjoint_and_complete(index, world_size, drop_last):
    steps = plan.steps_per_epoch(13, 2, world_size, drop_last)
    ranks = [
        ids(take(train(index, rank=r, world_size=world_size, drop_last=drop_last), steps)) for r in range(world_size)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    seen = sorted(itertools.chain.from_iterable(ranks))
    if drop_last:
        assert len(set(seen)) == len(seen) == 13 // (2 * world_size) * 2 * world_size
        return
    assert set(seen) == set(index.image_ids.tolist())
    order = index.image_ids[plan.epoch_order(13, 11, 0)].tolist()
    extra = -(-13 // (2 * world_size)) * 2 * world_size - 13
    assert sorted(order + (order * 2)[:extra]) == seen, "the rest comes from the beginning of the same permutation"


def test_the_global_batch_does_not_depend_on_how_it_is_split(index):
    whole = take(train(index, batch_size=4), 3)
    halves = [take(train(index, batch_size=2, rank=r, world_size=2), 3) for r in range(2)]
    assert_same(whole, [Batch(*map(torch.cat, zip(*pair, strict=True))) for pair in zip(*halves, strict=True)])


@pytest.mark.parametrize(
    ("n", "batch", "world", "drop", "steps"),
    [
        (1_170_301, 32, 8, True, 4571),
        (1_170_301, 32, 8, False, 4572),
        (16, 4, 2, True, 2),
        (16, 4, 2, False, 2),
        (7, 8, 1, False, 1),
    ],
)
def test_steps_per_epoch(n, batch, world, drop, steps):
    assert plan.steps_per_epoch(n, batch, world, drop) == steps


def test_too_few_images(index):
    with pytest.raises(UserError, match=r"13 images do not fill one batch of 4 on each of 4 .*--no-drop-last"):
        train(index, batch_size=4, world_size=4)
    batch = take(train(index, batch_size=4, world_size=4, rank=3, drop_last=False), 2)
    assert len(set(ids(batch[:1]))) == 4


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (2, 3), (3, 4), (5, 7), (1, 13)])
def test_evaluation_sees_each_image_once(index, world_size, batch_size):
    seen = []
    for rank in range(world_size):
        batches = list(
            eval_batches(index, image_size=SIZE, batch_size=batch_size, rank=rank, world_size=world_size, workers=0)
        )
        assert len(batches) == -(-13 // (batch_size * world_size))
        for batch in batches:
            assert batch.images.shape == (batch_size, 3, *SIZE) and batch.boxes.shape == (batch_size, 1, 4)
            assert batch.labels.eq(-1).all() and batch.labels.dtype == torch.int64
            padding = batch.image_id == -1
            assert not batch.images[padding].any() and batch.size[padding].eq(1).all()
            assert batch.images[~padding].flatten(1).any(1).all()
            seen += batch.image_id[~padding].tolist()
    assert sorted(seen) == sorted(index.image_ids.tolist())


def test_evaluation_never_mirrors_and_workers_change_nothing(index):
    arguments = {"image_size": SIZE, "batch_size": 4, "rank": 0, "world_size": 1}
    alone = list(eval_batches(index, workers=0, **arguments))
    assert_same(alone, list(eval_batches(index, workers=2, **arguments)))
    plain = {int(b.image_id[k]): b.images[k] for b in take(train(index, hflip=0.0), 6) for k in range(2)}
    for batch in alone:
        for image_id, image in zip(batch.image_id.tolist(), batch.images, strict=True):
            assert image_id not in plain or torch.equal(image, plain[image_id])


def test_crowd_and_small_boxes(index):
    def boxes(**more):
        return sum(int((batch.labels >= 0).sum()) for batch in take(train(index, batch_size=13, **more), 1))

    everything = boxes()
    assert everything == len(index.ground_truth().bbox)
    assert boxes(crowd="drop") == everything - 1
    sides = []
    for i in range(13):
        corners = index.boxes(i)[0] * np.array([64 / index.widths[i], 48 / index.heights[i]] * 2)
        sides += (corners[:, 2:] - corners[:, :2]).min(1).tolist()
    assert boxes(min_box=10.0) == sum(side > 10 for side in sides) < everything
    with pytest.raises(ValueError, match="neither keep nor drop"):
        train(index, crowd="maybe")


def test_more_boxes_than_max_boxes_is_an_error_before_the_first_batch(index):
    with pytest.raises(UserError, match=r"000135\.jpg: image 135 has 5 boxes, more than 4; raise --max-boxes"):
        train(index, max_boxes=4)
    with pytest.raises(UserError, match=r"image 135 has 5 boxes, more than 1;"):  # the fullest, not the first
        train(index, max_boxes=1)
    take(train(index, max_boxes=5), 1)


def test_the_global_random_state_is_left_alone(index):
    torch.manual_seed(5)
    take(train(index, workers=1), 2)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_without_a_nested_traceback(coco, workers):
    coco.categories(1)
    for image_id in range(4):
        path = coco.add_image(image_id, 40, 30)
    path.write_bytes(path.read_bytes()[:300])
    coco.write()
    stream = train(CocoIndex.open(coco.file, coco.images), workers=workers, batch_size=4)
    with pytest.raises(UserError, match=r"000003\.jpg: image 3 does not decode") as caught:
        next(stream)
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)


def test_missing_images(coco):
    coco.categories(1)
    paths = [coco.add_image(image_id, 40, 30) for image_id in range(4)]
    coco.write()
    index = CocoIndex.open(coco.file, coco.images)
    stream = train(index, batch_size=4)
    paths[2].unlink()
    with pytest.raises(UserError, match=r"000002\.jpg: cannot read image 2"):
        next(stream)
    again = CocoIndex.open(coco.file, coco.images)
    assert again.counts["missing images"] == 0, "the folder was complete when the cache was built"
    coco.write()
    again = CocoIndex.open(coco.file, coco.images)
    for start in (
        lambda: train(again),
        lambda: eval_batches(again, image_size=SIZE, batch_size=2, rank=0, world_size=1, workers=0),
    ):
        with pytest.raises(UserError, match="1 of the 4 images"):
            start()


PROGRAM = """
import os, signal, sys, time
from detcore.data import torch_loader
from detcore.data.coco import CocoIndex
from detcore.data.plan import TrainPlan
from detcore.data.recipes import stretch

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.signal(signal.SIGUSR2, lambda *_: sys.exit("asked to fail"))
    index = CocoIndex.open(sys.argv[1], sys.argv[2])
    plan = TrainPlan(index, stretch((32, 32)), batch_size=2, max_boxes=6, seed=1)
    stream = torch_loader.batches(plan, plan.keys(0, 0), torch_loader.Options(workers=2))
    next(stream)
    print("ready", flush=True)
    for _ in stream:
        time.sleep(0.02)
"""


@pytest.fixture
def program(thirteen, tmp_path):
    """A training process with two workers, in a process group of its own, running until it is ended."""
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    command = [sys.executable, str(file), str(thirteen.file), str(thirteen.images)]
    root = str(Path(__file__).resolve().parents[3])
    process = subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)


def descendants(pid: int) -> list[int]:
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            children.append(int(stat.parent.name))
    return children + [below for child in children for below in descendants(child)]


def workers_of(process) -> list[int]:
    """The processes that decode: the leaves below the fork server."""
    return [pid for pid in descendants(process.pid) if not descendants(pid) and b"forkserver" in command_line(pid)]


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_killed_worker_is_a_clear_error_not_a_hang(program):
    workers = workers_of(program)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    error = program.communicate(timeout=60)[1]
    assert program.returncode == 1
    assert "detcore.UserError: a loader worker was killed" in error and "--workers" in error


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError(), FileNotFoundError(2, "no socket")])
def test_a_worker_killed_while_it_hands_a_batch_over(error, monkeypatch):
    """Then the connection over which its memory is shared ends, before torch sees that the process is gone."""

    class Broken:
        def __init__(self, *_, **__):
            pass

        def __iter__(self):
            raise error
            yield

    monkeypatch.setattr(torch_loader, "DataLoader", Broken)
    with pytest.raises(UserError, match="a loader worker was killed"):
        next(torch_loader.batches(None, iter([(0, 0)]), torch_loader.Options()))


def test_an_exit_with_the_stream_still_open_does_not_hang(program):
    everything = descendants(program.pid)
    os.kill(program.pid, signal.SIGUSR2)
    error = program.communicate(timeout=60)[1]
    assert program.returncode == 1 and "asked to fail" in error  # a worker may speak too, of a connection that ended
    assert_gone(everything)


def test_workers_outlive_signals_to_the_group_but_not_the_process(program):
    before = sorted(workers_of(program))
    for number in (signal.SIGUSR1, signal.SIGTERM):
        os.killpg(program.pid, number)
    time.sleep(1)
    assert program.poll() is None and sorted(workers_of(program)) == before and len(before) == 2
    everything = descendants(program.pid)
    program.kill()
    program.wait()
    assert_gone(everything)


def assert_gone(processes: list[int]) -> None:
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in processes) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not [pid for pid in processes if Path(f"/proc/{pid}").exists()]


def test_modules_may_be_imported_while_the_fork_server_starts(monkeypatch):
    """By another thread: sys.modules grew while it was gone through, and the first evaluation ended the run."""

    class Growing(dict):
        def __iter__(self):
            raise RuntimeError("dictionary changed size during iteration")

    monkeypatch.setattr(torch_loader.sys, "modules", Growing(sys.modules))
    assert torch_loader._fork_server().get_start_method() == "forkserver"
