"""What the loader says when training waits for it: right rates, the right part blamed, one thing to do."""

import os
import re

import pytest

from detcore.data.coco import CocoIndex
from detcore.data.pace import Pace
from tests.detcore.data.streams import train_batches


def pace(reading: float, decoding: float, resizing: float, workers: int = 2, **more) -> Pace:
    """A hundred images of 300 kB that took so many seconds in all workers together."""
    made = Pace(workers, **more)
    cpu = decoding + resizing
    for _ in range(10):
        made.add(10, 3_000_000, [reading / 10, decoding / 10, resizing / 10], cpu / 10)
    return made


@pytest.fixture(autouse=True)
def sixteen_processors(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))


def test_rates():
    words = pace(2, 4, 1).words(rate=20, wait=0.5)
    assert "waits 50% of the time" in words and "2 workers could give" in words
    assert "reading 100 (30 MB/s), decoding 50, resizing and flipping 200" in words
    assert "all together 29; training could take about 40" in words


def test_rates_of_several_processes():
    words = pace(2, 4, 1, processes=8, local_processes=4).words(rate=160, wait=0.5)
    assert "2 workers in each of 8 processes" in words and "decoding 400" in words and "about 320" in words
    assert "(4 processors for each process)" in words


def test_counts_begin_anew():
    made = pace(2, 4, 1)
    assert made.words(20, 0.5) and made.words(20, 0.5) == ""


def test_decoding_wants_more_workers_while_there_are_processors():
    assert "bottleneck is decoding: try --workers 3 (16 processors" in pace(1, 4, 1).words(20, 0.5)
    assert "try --workers 16 " in pace(1, 4, 1, workers=8).words(1000, 0.5)
    assert "bottleneck is resizing and flipping: try --workers" in pace(1, 2, 4).words(20, 0.5)


def test_all_processors_in_use():
    words = pace(1, 40, 1, workers=16, more="--loader dali decodes on the GPU").words(100, 0.5)
    assert "16 processors of this process are all in use: more processors; --loader dali" in words


def test_crowded_processors():
    made = Pace(16)
    made.add(100, 10**6, [1.0, 40.0, 1.0], 20.0)
    assert "(they even wait for processors)" in made.words(100, 0.5)


def test_reading():
    words = pace(40, 4, 1).words(20, 0.5)
    assert re.search(r"bottleneck is reading: --workers 1[89] to wait for several at once; pack the images", words)
    assert "--read-ahead where memory holds" in pace(40, 4, 1, sharded=True).words(20, 0.5)


def test_workers_that_are_fast_enough():
    assert "The workers are fast enough" in pace(0.1, 0.4, 0.1).words(20, 0.5)


def test_dali():
    words = pace(1, 40, 0, workers=1, loader="dali").words(2, 0.5)
    assert "DALI could give" in words and "resizing and flipping" not in words
    assert "bottleneck is DALI's decoding and resizing: more --workers" in words
    assert "bottleneck is reading: more --workers" in pace(40, 1, 0, workers=1, loader="dali").words(2, 0.5)


def test_nvjpeg_names_the_alternatives():
    words = pace(2, 40, 10, workers=1, loader="nvjpeg").words(2, 0.5)
    assert "torchvision's decoder in the training process could give reading" not in words
    assert "that torchvision's decoder in the training process could give" in words and "all together 2;" in words
    assert "bottleneck is decoding, which --loader nvjpeg does a batch at a time" in words
    assert "--loader dali does it on the GPU beside them" in words and "--loader torch --workers 16" in words
    reading = pace(40, 4, 1, workers=1, loader="nvjpeg", sharded=True).words(2, 0.5)
    assert "all together 2;" in reading  # threads read while the batch before is decoded
    assert "bottleneck is reading: more --workers, which are threads" in reading and "--read-ahead" in reading


def test_too_little_was_measured():
    assert Pace(2).words(20, 0.5) == ""


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_measures(thirteen, workers):
    index = CocoIndex.open(thirteen.file, thirteen.images)
    made = Pace(1)
    stream = train_batches(
        index, image_size=(48, 64), batch_size=13, max_boxes=6, seed=1, rank=0, world_size=1, workers=workers, epoch=0,
        step=0, pace=made,
    )  # fmt: skip
    batch = next(stream)
    stream.close()
    assert not isinstance(batch, dict) and made.images == 13
    assert made.bytes == sum(index.path(i).stat().st_size for i in range(13))
    assert all(s > 0 for s in made.seconds) and made.cpu > 0
    assert "all together" in made.words(1.0, 0.9)


def test_loading_in_the_training_process():
    words = pace(1, 4, 1, workers=0).words(20, 0.5)
    assert "that the training process could give" in words and "take turns (--workers 0): try --workers 4." in words
