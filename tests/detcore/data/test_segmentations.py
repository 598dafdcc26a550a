"""Masks from annotation files: what pycocotools makes of them, what is wrong with them, and how they reach a batch."""

import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from detcore import UserError
from detcore.data import dali, nvjpeg, segmentations, torch_loader
from detcore.data.batch import Batch
from detcore.data.coco import CocoIndex
from detcore.data.joined import JoinedIndex
from detcore.data.plan import EvalPlan, TrainPlan
from detcore.data.recipes import letterbox, shortest_edge, stretch
from tests.detcore.data.conftest import Coco

HEIGHT, WIDTH = 23, 31
STAR = [4.0, 2.0, 9.5, 20.25, 1.0, 8.0, 13.0, 8.0, 3.0, 19.0]
SQUARE = [2, 3, 12, 3, 12, 9, 2, 9]
RECIPES = [stretch((48, 64)), letterbox((64, 64), (0, 0, 0)), shortest_edge(48, 80, multiple=16)]


def blobs(seed: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """uint8 [h, w]: rectangles, some touching the border, with a hole and single pixels."""
    rng = np.random.default_rng(seed)
    found = np.zeros((height, width), np.uint8)
    for _ in range(4):
        y, x = rng.integers(0, height), rng.integers(0, width)
        found[y : y + rng.integers(1, height), x : x + rng.integers(1, width)] ^= 1
    return found


def filled(edges: np.ndarray, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """The pixels whose middle is inside by the even-odd rule, straight from its definition."""
    found = np.zeros((height, width), np.uint8)
    for x1, y1, x2, y2 in edges.tolist():
        for x in range(width):
            if min(x1, x2) < x + 0.5 <= max(x1, x2):
                y = y1 + (y2 - y1) * (x + 0.5 - x1) / (x2 - x1)
                found[np.arange(height) + 0.5 > y, x] ^= 1
    return found


def rle(bitmap: np.ndarray, text: bool) -> dict:
    if text:
        found = coco_mask.encode(np.asfortranarray(bitmap))
        return {"size": found["size"], "counts": found["counts"].decode()}
    counts, inside = [0], 0
    for value in bitmap.ravel(order="F").tolist():
        if value != inside:
            counts.append(0)
            inside = value
        counts[-1] += 1
    return {"size": list(bitmap.shape), "counts": counts}


@pytest.fixture
def made(coco) -> Coco:
    """Two images of one size, no annotations yet."""
    coco.categories(1)
    coco.add_image(7, WIDTH, HEIGHT)
    coco.add_image(8, WIDTH, HEIGHT)
    return coco


def add(coco: Coco, segmentation, image_id: int = 7, **more) -> dict:
    return coco.add_box(image_id, 1, (1, 1, 20, 20), segmentation=segmentation, **more)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("form", ["text", "counts", "bitmap"])
def test_the_edges_of_pixels_enclose_just_those(made, form, seed):
    bitmap = blobs(seed) if seed else np.ones((HEIGHT, WIDTH), np.uint8)
    add(made, bitmap.tolist() if form == "bitmap" else rle(bitmap, form == "text"))
    made.write()
    edges, of = made.open(masks="edges").edges(0)
    assert edges.dtype == np.float32 and (edges[:, 1] == edges[:, 3]).all() and (of == 0).all()
    np.testing.assert_array_equal(filled(edges), bitmap)


def test_polygons_become_their_edges_but_those_straight_down(made):
    add(made, [SQUARE, STAR], image_id=8)
    add(made, rle(blobs(3), True))
    add(made, [STAR])
    made.write()
    index = made.open(masks="edges")
    edges, of = index.edges(1)
    star = [[*STAR[k : k + 2], *(STAR + STAR)[k + 2 : k + 4]] for k in range(0, 10, 2)]
    assert edges.tolist() == [[2, 3, 12, 3], [12, 9, 2, 9], *star]
    assert of.tolist() == [[0, 0]] * 2 + [[0, 1]] * 5
    edges, of = index.edges(0)
    assert edges[-5:].tolist() == star and of[-5:].tolist() == [[1, 0]] * 5
    np.testing.assert_array_equal(filled(edges[of[:, 0] == 0]), blobs(3))
    assert index.edge_count("keep").tolist() == [len(edges), 7]


def test_boxes_without_a_mask_and_thin_polygons_are_left_out_and_counted(made):
    add(made, [[1, 1, 5, 5]])
    add(made, None)
    made.add_box(7, 1, (3, 3, 5, 5))
    add(made, [[1, 1, 5, 5], STAR])
    add(made, [])
    add(made, [], iscrowd=1)
    made.write()
    index = made.open(masks="edges")
    assert index.counts["polygons under three points left out"] == 2
    assert index.counts["boxes without a mask left out"] == 4
    boxes, _, crowd = index.boxes(0)
    assert len(boxes) == 2 and crowd.tolist() == [False, True]
    edges, of = index.edges(0)
    assert len(edges) == 5 and (of == 0).all()
    assert "boxes without a mask left out 4" in index.summary()
    assert len(made.open().boxes(0)[0]) == 6, "a detector of boxes trains with all of them"


@pytest.mark.parametrize("kind", segmentations.KINDS)
def test_masks_outside_of_their_image_are_named(made, kind):
    """Beyond each side, with two parts, touching the border from outside; none that reaches in by any of its parts."""
    right, left, below, above = ((WIDTH, 0), (-WIDTH, 0), (0, HEIGHT), (0, -HEIGHT))
    moved = [np.add(np.reshape(SQUARE, (-1, 2)), shift).ravel().tolist() for shift in (right, left, below, above)]
    for part in moved:
        add(made, [part])
    add(made, [moved[0], moved[0]], image_id=8)
    add(made, [[WIDTH, 0, WIDTH + 9, 0, WIDTH + 9, 9]])
    add(made, [moved[0], moved[1]])
    empty = 7
    add(made, [moved[0], SQUARE])
    add(made, rle(blobs(1), True))
    add(made, [[WIDTH - 0.5, 0, WIDTH + 9, 0, WIDTH + 9, 9]])
    made.write()
    index = made.open(masks=kind)
    assert index.counts[segmentations.OUTSIDE] == empty and index.named[segmentations.OUTSIDE] == [1, 2, 3, 4, 5]
    warning = f"Warning: {made.file}: masks wholly outside of their image 7: annotations 1, 2, 3, 4, 5, ..."
    assert warning in index.summary() and warning in made.open(masks=kind).summary(), "from the cache too"
    if kind == segmentations.RLE:
        areas = [coco_mask.area(mask) for mask in index.masks().dictionaries()]
        assert areas[:empty] == [0] * empty and all(areas[empty : empty + 2])


def test_masks_that_are_left_out_are_named(made):
    add(made, [[1, 1, 5, 5], STAR])
    add(made, None)
    add(made, [], iscrowd=1)
    add(made, [[4, 1, 4, 9, 4, 5]])  # straight down, without width
    made.write()
    assert made.open(masks="edges").named == {segmentations.SHORT: [1], segmentations.BARE["edges"]: [2, 4]}
    assert made.open(masks="rle").named == {segmentations.SHORT: [1], segmentations.BARE["rle"]: [2, 3]}
    assert "boxes without a mask left out 2: annotations 2, 4" in made.open(masks="edges").summary()
    assert made.open().named == {}


@pytest.mark.parametrize("kind", segmentations.KINDS)
@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        ([[1, 2, 3, 4, 5, 6, 7]], "annotation 2 of image 8 has a polygon of 7 numbers; x and y come in pairs"),
        ([1, 2, 3, 4, 5, 6], r"annotations\[1\].segmentation\[0\]"),
        ("abc", r"annotations\[1\].segmentation"),
        ({"size": [4, 5], "counts": [20]}, "RLE of 4 x 5 (height, width), but its image has 23 x 31"),
        ({"size": [23, 31], "counts": [700, 12]}, "counts sum to 712"),
        ({"size": [23, 31], "counts": [720, -14, 7]}, "at least -14"),
        ({"size": [23, 31], "counts": "kQe18g73N1N2"}, "counts sum to"),
        ({"size": [23, 31], "counts": "no rle"}, "counts sum to"),
        ({"size": [23, 31], "counts": ""}, "counts sum to 0"),
        ({"size": [23, 31]}, "counts"),
        ({"size": [23, 31], "counts": [713.5]}, "counts"),
    ],
)  # fmt: skip
def test_broken_masks_are_refused_by_name(made, kind, segmentation, words):
    add(made, [STAR])
    add(made, segmentation, image_id=8)
    made.write()
    with pytest.raises(UserError) as caught:
        made.open(masks=kind)
    assert str(made.file) in str(caught.value) and words.replace("\\", "") in str(caught.value)
    assert len(made.open().boxes(1)[0]) == 1, "those who do not ask for masks do not look at them"


def test_numbers_beyond_float32_are_refused(made):
    add(made, [[1, 1, 1e300, 5, 3, 3]])
    made.write()
    with pytest.raises(UserError, match="annotation 1 of image 7 has a polygon with numbers beyond"):
        made.open(masks="edges")


def texts(index: CocoIndex) -> list[str]:
    letters, counts = index._columns["rle_text"].tobytes().decode(), index._columns["rle_counts"].tolist()
    ends = np.cumsum(counts)
    return [letters[end - count : end] for count, end in zip(counts, ends, strict=True)]


def test_rle_to_score_with_is_that_of_pycocotools(made):
    from pycocotools.coco import COCO

    add(made, [STAR, SQUARE])
    add(made, rle(blobs(1), True), iscrowd=1)
    add(made, [STAR], image_id=8)
    add(made, rle(blobs(2), False))
    made.write()
    index = made.open(masks="rle")
    truth = COCO(made.file)
    found = [truth.annToRLE(annotation)["counts"] for annotation in truth.dataset["annotations"]]
    assert texts(index) == [text if isinstance(text, str) else text.decode() for text in found]
    add(made, None)
    add(made, blobs(4).tolist())
    made.write()
    nothing, bitmap = texts(made.open(masks="rle"))[-2:]
    assert coco_mask.area({"size": [HEIGHT, WIDTH], "counts": nothing}) == 0
    assert made.open(masks="rle").counts["annotations scored as empty masks"] == 1
    assert bitmap == rle(blobs(4), True)["counts"]


def test_a_file_in_pieces_is_the_same(made, monkeypatch):
    from detcore.data import coco_json

    for k in range(60):
        add(made, [STAR] if k % 3 else rle(blobs(k), bool(k % 2)), image_id=7 + k % 2)
    made.write()
    for kind in segmentations.KINDS:
        whole = coco_json.parse(made.file, kind)
        with monkeypatch.context() as change:
            change.setattr(coco_json, "_PIECE", 1500)
            pieces = coco_json.parse(made.file, kind)
        assert whole.columns.keys() == pieces.columns.keys() and whole.counts == pieces.counts
        for name, column in whole.columns.items():
            np.testing.assert_array_equal(column, pieces.columns[name])


def masked(thirteen: Coco, folder) -> CocoIndex:
    """The set of thirteen with masks: ellipses and pixels in their boxes."""
    content = json.loads(thirteen.file.read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    for k, annotation in enumerate(content["annotations"]):
        x, y, w, h = annotation["bbox"]
        angles = np.linspace(0, 6, 5 + k % 4)
        points = np.stack([x + w * (1 + np.cos(angles)) / 2, y + h * (1 + np.sin(angles)) / 2], 1)
        annotation["segmentation"] = [points.ravel().tolist(), SQUARE]
        if k % 3 == 0:
            bitmap = np.zeros(sizes[annotation["image_id"]], np.uint8)
            bitmap[int(y) : int(y + h), int(x) : int(x + w)] = 1
            annotation["segmentation"] = rle(bitmap, True)
    file = folder / "masked.json"
    file.write_text(json.dumps(content))
    return CocoIndex.open(file, thirteen.images, masks="edges")


@pytest.fixture
def index(thirteen, tmp_path) -> CocoIndex:
    return masked(thirteen, tmp_path)


@pytest.mark.parametrize("recipe", RECIPES, ids=["stretch", "letterbox", "shortest_edge"])
@pytest.mark.parametrize("crowd", ["keep", "drop"])
def test_edges_go_where_the_view_puts_them_with_their_boxes(index, recipe, crowd):
    plan = TrainPlan(index, recipe, 2, 6, 11, crowd=crowd)
    assert plan.max_edges == index.edge_count(crowd).max()
    seen = 0
    for epoch in range(2):
        for step in range(plan.steps):
            choice = plan.choose(epoch, step)
            batch = plan.targets(choice)
            assert batch["edges"].shape == (2, plan.max_edges, 4) and batch["edge_of"].shape == (2, plan.max_edges, 2)
            for row, i in enumerate(choice.images.tolist()):
                boxes, _, crowds = index.boxes(i)
                edges, of = index.edges(i)
                moved = choice.view.edges(row, edges)
                real = int((batch["labels"][row] >= 0).sum())
                got, got_of = batch["edges"][row].numpy(), batch["edge_of"][row].numpy()
                used = int((got_of[:, 0] >= 0).sum())
                assert (got_of[used:] == -1).all() and (got[used:] == 0).all()
                assert (np.diff(got_of[:used, 0] * 100 + got_of[:used, 1]) >= 0).all()
                whole = choice.view.boxes(row, boxes)
                for box in range(real):
                    wanted = batch["boxes"][row, box].numpy()
                    clipped = np.clip(whole, 0, np.tile(choice.view.extents[row, ::-1], 2)) if recipe.clip else whole
                    trained = np.flatnonzero((crowd == "keep") | ~crowds)
                    place = trained[np.abs(clipped[trained] - wanted).max(1).argmin()]
                    np.testing.assert_array_equal(got[:used][got_of[:used, 0] == box], moved[of[:, 0] == place])
                    seen += 1
    assert seen > 20


@pytest.mark.parametrize("loader", [torch_loader, nvjpeg, dali], ids=["torch", "nvjpeg", "dali"])
def test_every_loader_brings_them(index, loader):
    if loader is dali:
        pytest.importorskip("nvidia.dali")
    plan = TrainPlan(index, RECIPES[0], 2, 6, 11)
    stream = loader.batches(plan, plan.keys(0, 1), torch_loader.Options())
    batch = next(stream)
    stream.close()
    wanted = plan.targets(plan.choose(0, 1))
    for name in ("boxes", "labels", "edges", "edge_of"):
        np.testing.assert_array_equal(getattr(batch, name), wanted[name])
    assert (batch.edge_of[..., 0] >= 0).any()


def test_without_masks_there_are_no_edges(thirteen, index):
    boxes_only = CocoIndex.open(thirteen.file, thirteen.images)
    plans = [TrainPlan(one, RECIPES[0], 2, 6, 11) for one in (boxes_only, index)]
    without, with_masks = (plan.targets(plan.choose(0, 0)) for plan in plans)
    assert without["edges"].shape == (2, 0, 4) and without["edge_of"].shape == (2, 0, 2)
    for name in Batch._fields[1:6]:
        np.testing.assert_array_equal(without[name], with_masks[name])
    evaluation = EvalPlan(index, RECIPES[0], 2)
    assert evaluation.targets(evaluation.choose(0, 0))["edges"].shape == (2, 0, 4)


def test_more_edges_than_allowed_are_refused_and_fewer_are_padded(index):
    most = int(index.edge_count("keep").max())
    assert TrainPlan(index, RECIPES[0], 2, 6, 11, max_edges=most + 5).max_edges == most + 5
    with pytest.raises(UserError, match=f"have {most} edges, more than {most - 1}; raise --max-edges"):
        TrainPlan(index, RECIPES[0], 2, 6, 11, max_edges=most - 1)


def test_a_set_without_masks_does_not_train_them(thirteen):
    index = CocoIndex.open(thirteen.file, thirteen.images, masks="edges")
    with pytest.raises(UserError, match="no annotation of its images has a mask that trains"):
        TrainPlan(index, RECIPES[0], 2, 6, 11, crowd="drop")


def test_joined_sets_and_pickled_indexes_keep_them(index, thirteen, tmp_path):
    import pickle

    (tmp_path / "other").mkdir()
    joined = pickle.loads(pickle.dumps(JoinedIndex([index, masked(thirteen, tmp_path / "other")])))
    assert joined.has_edges and joined.edge_count("keep").tolist() == 2 * index.edge_count("keep").tolist()
    for i in (1, 5, 13 + 5):
        for got, wanted in zip(joined.edges(i), index.edges(i % 13), strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_real_masks(shared_data, tmp_path):
    """Nuclei in RLE, COCO's polygons and crowds: every RLE's edges enclose its pixels."""
    for name, part in (("dsb2018", "val"), ("coco_permissive", "val2017")):
        file = shared_data / name / "annotations" / f"instances_{part}.json"
        index = CocoIndex.open(file, shared_data / name / part, cache_dir=tmp_path, masks="edges")
        content = json.loads(file.read_text())
        images = {image["id"]: image for image in content["images"]}
        crowds = [a for a in content["annotations"] if isinstance(a["segmentation"], dict)][:40]
        assert crowds and index.counts["boxes without a mask left out"] == 0
        for annotation in crowds:
            size = [images[annotation["image_id"]][side] for side in ("height", "width")]
            counts = segmentations._counts_of(annotation["segmentation"]["counts"])
            edges = segmentations.run_edges(counts, size[0])
            wanted = coco_mask.decode(annotation["segmentation"])
            toggles = np.zeros((size[0] + 1, size[1]), np.int64)
            for x1, y, x2, _ in edges.astype(int).tolist():
                toggles[y, x1:x2] += 1
            np.testing.assert_array_equal(toggles.cumsum(0)[:-1] % 2, wanted)
        assert index.edge_count("drop").max() > 1000
