"""The DALI pipeline on the CPU against the torch loader: equal boxes, pixels within the rounding of the resize."""

import itertools
import sys

import pytest
import torch

from dataprep import shard_writer
from detcore import UserError
from detcore.data import dali, torch_loader
from detcore.data.coco import CocoIndex
from detcore.data.pace import Pace
from tests.detcore.data.streams import eval_batches, train_batches

SIZE = (48, 64)
TRAIN = {"image_size": SIZE, "max_boxes": 6, "seed": 11, "epoch": 0, "workers": 2}


@pytest.fixture(scope="module")
def index(thirteen) -> CocoIndex:
    return CocoIndex.open(thirteen.file, thirteen.images)


def assert_close(ours, theirs) -> None:
    """Everything but the pixels is equal; a pixel differs by one level at most, and few do by that."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for name in ("boxes", "labels", "image_id", "size"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert a.images.shape == b.images.shape and a.images.stride() == b.images.stride()
        difference = (a.images.int() - b.images.int()).abs()
        assert difference.max() <= 1 and difference.float().mean() < 0.3


def test_without_dali_the_error_says_what_to_install(index, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match=r"pip install \.\[dali\]"):
        train_batches(index, by=dali, batch_size=2, rank=0, world_size=1, step=0, **TRAIN)


@pytest.mark.dali
class TestWithDali:
    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("nvidia.dali")

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"rank": 1, "world_size": 2, "drop_last": False},
            {"step": 4, "antialias": True, "crowd": "drop", "min_box": 5.0},
            {"hflip": 1.0, "image_size": (20, 100)},
        ],
    )
    def test_training_batches(self, index, changes):
        arguments = {**TRAIN, "batch_size": 3, "rank": 0, "world_size": 1, "step": 0} | changes
        theirs = list(itertools.islice(train_batches(index, by=dali, **arguments), 9))
        ours = list(itertools.islice(train_batches(index, **arguments | {"workers": 0}), 9))
        assert_close(ours, theirs)

    @pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (2, 3), (4, 5)])
    def test_evaluation_batches(self, index, rank, world_size):
        arguments = {"image_size": SIZE, "batch_size": 4, "rank": rank, "world_size": world_size}
        theirs = list(eval_batches(index, by=dali, workers=1, **arguments))
        assert len(theirs) == -(-13 // (4 * world_size))
        assert_close(list(eval_batches(index, workers=0, **arguments)), theirs)

    @pytest.mark.parametrize("workers", [1, 3])
    def test_shards_give_the_batches_of_the_files(self, thirteen, index, tmp_path, workers):
        shard_writer.pack(index, tmp_path / "shards", shard_bytes=10_240, shuffle=2)
        packed = CocoIndex.open(thirteen.file, tmp_path / "shards")
        arguments = {**TRAIN, "batch_size": 3, "rank": 1, "world_size": 2, "step": 0, "workers": workers}
        clock = Pace(1, loader="dali")
        first = list(itertools.islice(train_batches(index, by=dali, **arguments), 9))
        second = list(itertools.islice(train_batches(packed, by=dali, **arguments, pace=clock), 9))
        for a, b in zip(first, second, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert clock.images == 27 and clock.bytes and "DALI could give reading" not in clock.words(1.0, 0.5)

    def test_a_damaged_shard_is_named(self, thirteen, index, tmp_path):
        shard_writer.pack(index, tmp_path / "shards", shard_bytes=1)
        path = tmp_path / "shards" / "00004.tar"
        path.write_bytes(path.read_bytes().replace(b"\xff\xda", b"\xff\xdb"))
        packed = CocoIndex.open(thirteen.file, tmp_path / "shards")
        stream = eval_batches(packed, by=dali, image_size=SIZE, batch_size=3, rank=0, world_size=1, workers=2)
        with pytest.raises(UserError, match=r"00004\.tar: member 000128\.jpg \(image 128\).*CRC-32"):
            list(stream)

    def test_grey_cmyk_png_and_exif(self, coco):
        from PIL import Image

        coco.categories(1)
        exif = Image.Exif()
        exif[0x112] = 6
        coco.add_image(1, 40, 30, exif=exif)
        coco.add_image(2, 40, 30, name="two.png")
        for image_id, mode in ((3, "L"), (4, "CMYK")):
            path = coco.add_image(image_id, 40, 30)
            Image.open(path).convert(mode).save(path)
        coco.add_image(5, 40, 30, exif=exif)
        coco.content["images"][-1] |= {"width": 30, "height": 40}  # upright: it is turned
        coco.write()
        index = CocoIndex.open(coco.file, coco.images)
        arguments = {"image_size": SIZE, "batch_size": 5, "rank": 0, "world_size": 1, "workers": 1}
        ours, theirs = (list(eval_batches(index, by=by, **arguments | {"workers": 0})) for by in (torch_loader, dali))
        assert_close(ours, theirs)

    @pytest.mark.parametrize("mistake", ["truncated", "text", "empty", "gone", "size"])
    def test_a_bad_image_is_named(self, coco, mistake):
        coco.categories(1)
        for image_id in range(8):
            path = coco.add_image(image_id, 40, 30)
        if mistake == "size":
            coco.content["images"][-1]["width"] = 41
        coco.write()
        index = CocoIndex.open(coco.file, coco.images)
        if mistake == "gone":
            path.unlink()
        elif mistake != "size":
            path.write_bytes({"truncated": path.read_bytes()[:300], "text": b"hello" * 20, "empty": b""}[mistake])
        stream = eval_batches(index, by=dali, image_size=SIZE, batch_size=3, rank=0, world_size=1, workers=1)
        with pytest.raises(UserError, match=r"000007\.jpg.*image 7"):
            list(stream)
