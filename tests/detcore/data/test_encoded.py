"""Files read ahead: which, how far, in which order, and where an error comes."""

import numpy as np
import pytest

from detcore import UserError
from detcore.data.coco import CocoIndex
from detcore.data.encoded import AHEAD, EncodedFiles
from detcore.data.plan import EvalPlan, TrainPlan
from detcore.data.recipes import stretch


@pytest.fixture
def index(thirteen) -> CocoIndex:
    return CocoIndex.open(thirteen.file, thirteen.images)


def test_files_are_those_of_the_plan_in_its_order(index):
    plan = TrainPlan(index, stretch((48, 64)), 3, 6, 1, 0, 2, drop_last=False)
    files = EncodedFiles(plan, plan.keys(0, 1), threads=3)
    other = TrainPlan(index, stretch((48, 64)), 3, 6, 1, 0, 2, drop_last=False)
    for key, (choice, data), _ in zip(other.keys(0, 1), files, range(7), strict=False):
        expected = other.choose(*key)
        assert np.array_equal(choice.images, expected.images) and np.array_equal(
            choice.view.mirrored, expected.view.mirrored
        )
        assert [one.tobytes() for one in data] == [index.path(i).read_bytes() for i in choice.images.tolist()]
    files.close()


def test_the_end_and_what_was_spent(index):
    plan = EvalPlan(index, stretch((48, 64)), 4, 1, 2)
    files = EncodedFiles(plan, plan.keys(), threads=2)
    assert [len(data) for _, data in files] == [4, 1]
    size, seconds, waited = files.spent()
    assert size == sum(index.path(i).stat().st_size for i in (4, 5, 6, 7, 12)) and seconds > 0 and waited >= 0
    assert files.spent() == (0, 0.0, 0.0)
    files.close()


def test_two_more_batches_are_read_and_nothing_before_the_first(index, monkeypatch):
    read = []
    monkeypatch.setattr(CocoIndex, "read", lambda self, i: read.append(i) or np.zeros(1, np.uint8))
    plan = EvalPlan(index, stretch((48, 64)), 2, 0, 1)
    files = EncodedFiles(plan, plan.keys(), threads=1)
    assert read == []
    next(files)
    files.pool.shutdown(wait=True)
    assert read == list(range(2 * (1 + AHEAD)))


def test_an_error_comes_with_its_own_batch(index):
    plan = EvalPlan(index, stretch((48, 64)), 4, 0, 1)
    files = EncodedFiles(plan, plan.keys(), threads=2)
    index.path(9).unlink()
    next(files), next(files)
    with pytest.raises(UserError, match=str(index.image_ids[9])):
        next(files)
    files.close()
