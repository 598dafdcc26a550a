"""Training sets that are joined, and the categories of a file on given classes."""

import pickle

import numpy as np
import pytest
import torch

from detcore import UserError
from detcore.data import torch_loader
from detcore.data.joined import JoinedIndex
from detcore.data.plan import TrainPlan
from detcore.data.recipes import stretch
from tests.detcore.data.conftest import Coco


@pytest.fixture
def other(tmp_path) -> Coco:
    """Another set with the categories of `thirteen`: three images, of which one has the id of one there."""
    coco = Coco(tmp_path / "other")
    coco.categories(3, 5, 9)
    for number, boxes in enumerate(([(5, 1, 2, 30, 20)], [], [(9, 0, 0, 8, 8), (3, 4, 4, 9, 9)])):
        coco.add_image(100 + number, 64, 48, boxes)
    coco.write()
    return coco


def test_a_joined_set_is_its_parts_one_after_the_other(thirteen, other):
    parts = [thirteen.open(), other.open()]
    joined = pickle.loads(pickle.dumps(JoinedIndex(parts)))
    every = [(part, i) for part in parts for i in range(len(part))]
    assert len(joined) == len(every) == 16 and joined.num_classes == 3
    assert joined.box_count().tolist() == [n for part in parts for n in part.box_count()]
    for i, (part, at) in enumerate(every):
        assert joined.path(i) == part.path(at) and np.array_equal(joined.read(i), part.read(at))
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(joined.boxes(i), part.boxes(at), strict=True))
        facts = (joined.image_ids[i], joined.heights[i], joined.widths[i])
        assert facts == (part.image_ids[at], part.heights[at], part.widths[at])
    assert joined.summary().count("annotations.json: ") == 2
    images = np.random.default_rng(0).integers(0, 16, 40)
    of, *found = joined.boxes_of(images)
    per_image = [joined.boxes(i) for i in images.tolist()]
    assert of.tolist() == [k for k, (own, _, _) in enumerate(per_image) for _ in own]
    assert all(np.array_equal(a, np.concatenate(b)) for a, b in zip(found, zip(*per_image, strict=True), strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_takes_every_image_of_a_joined_set_once(thirteen, other, workers):
    parts = [thirteen.open(), other.open()]
    plan = TrainPlan(JoinedIndex(parts), stretch((32, 32)), 4, 8, seed=1)
    stream = torch_loader.batches(plan, plan.keys(0, 0), torch_loader.Options(workers, torch.device("cpu"), True))
    batches = [next(stream) for _ in range(plan.steps)]
    stream.close()
    assert plan.steps == 4
    found = sorted(
        zip(torch.cat([b.image_id for b in batches]).tolist(), torch.cat([b.size for b in batches]).tolist())
    )
    expected = [(int(p.image_ids[i]), [int(p.heights[i]), int(p.widths[i])]) for p in parts for i in range(len(p))]
    assert found == sorted(expected)
    boxes = sum(len(part.boxes(i)[0]) for part in parts for i in range(len(part)))
    assert sum(int((b.labels >= 0).sum()) for b in batches) == boxes


def test_sets_of_other_categories_are_not_joined(thirteen, other):
    other.content["categories"][1]["name"] = "horse"
    other.write()
    with pytest.raises(
        UserError, match=r"other/annotations.json list different categories: id 5 is 'class 5' in .* and 'horse' in "
    ):
        JoinedIndex([thirteen.open(), other.open()])
    other.categories(3, 5)
    other.content["annotations"] = []
    other.write()
    with pytest.raises(UserError, match=r"id 9 \('class 9'\) is only in "):
        JoinedIndex([thirteen.open(), other.open()])


def test_missing_images_of_any_part_are_refused(thirteen, other):
    other.images.joinpath("000101.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of the 3 images .* are not there \(000101.jpg"):
        JoinedIndex([thirteen.open(), other.open()]).check_images()


def test_categories_are_mapped_onto_given_classes(coco):
    """Raw ids as outputs: a box of category 9 has class index 8 of 1..10."""
    index = coco.simple().open()
    mapped = pickle.loads(pickle.dumps(index.with_classes(range(1, 11))))
    assert mapped.num_classes == 10 and mapped.category_ids.tolist() == list(range(1, 11))
    assert mapped.category_names == ["1", "2", "class 3", "4", "class 5", "6", "7", "8", "class 9", "10"]
    assert mapped.boxes(0)[1].tolist() == [2, 8] and mapped.annotations(0, 2)[1].tolist() == [2, 8]
    truth, before = mapped.ground_truth(), index.ground_truth()
    assert truth.ann_category_id.tolist() == before.ann_category_id.tolist() == [3, 9]
    assert truth.category_ids.tolist() == list(range(1, 11))
    assert index.boxes(0)[1].tolist() == [0, 2] and index.category_ids.tolist() == [3, 5, 9]  # as it was
    again = mapped.with_classes(range(0, 20))
    assert again.boxes(0)[1].tolist() == [3, 9] and again.category_names[3] == "class 3"


def test_a_category_that_is_no_class_is_refused(coco):
    with pytest.raises(UserError, match=r"annotations.json: category 9 is none of the 8 classes of this model, 1 to 8"):
        coco.simple().open().with_classes(range(1, 9))
    with pytest.raises(ValueError, match="do not rise"):
        coco.open().with_classes([5, 3, 9])


def test_a_class_without_boxes_changes_no_average(thirteen):
    from detcore.evaluation.coco import METRICS, evaluate

    index = thirteen.open()
    truth = index.ground_truth()
    rows = np.column_stack(
        [truth.ann_image_id, truth.bbox, np.linspace(0.9, 0.1, len(truth.bbox)), truth.ann_category_id]
    )
    plain = evaluate(truth, rows)
    mapped = evaluate(index.with_classes(range(1, 91)).ground_truth(), rows)
    assert {name: mapped[name] for name in METRICS} == {name: plain[name] for name in METRICS} and plain["AP"] > 0.5
