"""The loader whose JPEG files torchvision decodes on the device: on the CPU every pixel is the torch loader's."""

import itertools

import pytest
import torch
from PIL import Image

from dataprep import shard_writer
from detcore import UserError
from detcore.data import nvjpeg, torch_loader
from detcore.data.coco import CocoIndex
from detcore.data.pace import Pace
from detcore.data.plan import EvalPlan
from detcore.data.recipes import stretch
from detcore.data.torch_loader import Options
from tests.detcore.data.streams import eval_batches, train_batches

CPU, SIZE = torch.device("cpu"), (48, 64)
TRAIN = {"image_size": SIZE, "max_boxes": 6, "seed": 11, "epoch": 0, "workers": 2}
EVAL = {"image_size": SIZE, "batch_size": 3, "rank": 0, "world_size": 1}


@pytest.fixture
def index(thirteen) -> CocoIndex:
    return CocoIndex.open(thirteen.file, thirteen.images)


@pytest.fixture
def decoded(monkeypatch):
    """How many files went to torchvision's list decoder at a time, after the first trial."""
    counts: list[int] = []
    inner = nvjpeg.decode_jpeg

    def decode_jpeg(files, **more):
        counts.append(len(files))
        return inner(files, **more)

    monkeypatch.setattr(nvjpeg, "decode_jpeg", decode_jpeg)
    return counts


def assert_same(ours, theirs) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for name, x, y in zip(a._fields, a, b, strict=True):
            assert torch.equal(x, y) and x.dtype == y.dtype and x.stride() == y.stride(), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rank": 1, "world_size": 2, "drop_last": False},
        {"step": 4, "antialias": True, "crowd": "drop", "min_box": 5.0},
        {"hflip": 1.0, "image_size": (20, 100)},
    ],
)
def test_training_batches(index, decoded, changes):
    arguments = {**TRAIN, "batch_size": 3, "rank": 0, "world_size": 1, "step": 0} | changes
    ours = list(itertools.islice(train_batches(index, by=nvjpeg, device=CPU, **arguments), 9))
    assert_same(ours, list(itertools.islice(train_batches(index, **arguments | {"workers": 0}), 9)))
    assert decoded == [1, *[3] * 9]


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (2, 3), (4, 5)])
def test_evaluation_batches(index, rank, world_size):
    arguments = {**EVAL, "batch_size": 4, "rank": rank, "world_size": world_size}
    ours = list(eval_batches(index, by=nvjpeg, workers=1, device=CPU, **arguments))
    assert len(ours) == -(-13 // (4 * world_size))
    assert_same(ours, list(eval_batches(index, workers=0, **arguments)))


def test_a_start_in_the_middle_gives_the_rest(index):
    arguments = {**TRAIN, "batch_size": 3, "rank": 0, "world_size": 1, "device": CPU}
    whole = list(itertools.islice(train_batches(index, by=nvjpeg, step=0, **arguments), 9))
    assert_same(list(itertools.islice(train_batches(index, by=nvjpeg, step=5, **arguments), 4)), whole[5:])


def test_shards_and_the_clock(thirteen, index, tmp_path):
    shard_writer.pack(index, tmp_path / "shards", shard_bytes=10_240, shuffle=2)
    packed = CocoIndex.open(thirteen.file, tmp_path / "shards")
    arguments = {**TRAIN, "batch_size": 3, "rank": 0, "world_size": 1, "step": 0, "device": CPU}
    clock = Pace(1, loader="nvjpeg")
    ours = list(itertools.islice(train_batches(packed, by=nvjpeg, **arguments, pace=clock), 9))
    assert_same(ours, list(itertools.islice(train_batches(index, by=nvjpeg, **arguments), 9)))
    assert clock.images == 27 and clock.bytes and all(clock.seconds) and clock.cpu
    assert "torchvision's decoder in the training process could give" in clock.words(1.0, 0.5)


def test_other_formats_go_the_common_way(coco, decoded):
    coco.categories(1)
    exif = Image.Exif()
    exif[0x112] = 6
    coco.add_image(1, 40, 30, exif=exif)
    coco.add_image(2, 40, 30, name="two.png")
    for image_id, mode in ((3, "L"), (4, "CMYK")):
        path = coco.add_image(image_id, 40, 30)
        Image.open(path).convert(mode).save(path)
    coco.add_image(5, 40, 30, keep_rgb=True)
    coco.add_image(6, 40, 30, progressive=True, subsampling="4:4:4")
    coco.add_image(7, 40, 30, subsampling="4:2:2")
    coco.write()
    index = CocoIndex.open(coco.file, coco.images)
    arguments = {**EVAL, "batch_size": 7}
    ours = list(eval_batches(index, by=nvjpeg, workers=1, device=CPU, **arguments))
    assert_same(ours, list(eval_batches(index, workers=0, **arguments)))
    assert decoded == [1, 3]


@pytest.mark.parametrize("turn", ["auto", "apply", "ignore"])
def test_exif_turns_the_same_images(coco, decoded, turn):
    """Listed upright, listed as stored, a half turn and a square."""
    coco.categories(1)
    for number, (size, orientation, listed) in enumerate(
        [((40, 30), 6, (30, 40)), ((40, 30), 6, (40, 30)), ((40, 30), 3, (40, 30)), ((32, 32), 8, (32, 32))]
    ):
        exif = Image.Exif()
        exif[0x112] = orientation
        coco.add_image(number, *size, exif=exif)
        coco.content["images"][-1] |= dict(zip(("width", "height"), listed, strict=True))
    coco.write()
    plan = EvalPlan(CocoIndex.open(coco.file, coco.images), stretch((24, 24)), 4)
    ours, theirs = (list(by.batches(plan, plan.keys(), Options(turn=turn))) for by in (nvjpeg, torch_loader))
    assert_same(ours, theirs)
    assert decoded == [1, 1 if turn == "apply" else 3], "only what is not turned goes to the list decoder"


@pytest.mark.parametrize("mistake", ["truncated", "text", "empty", "gone", "size", "rotated"])
def test_a_bad_image_is_named_in_the_same_words(coco, mistake):
    coco.categories(1)
    for image_id in range(8):
        path = coco.add_image(image_id, 40, 30)
    if mistake == "size":
        coco.content["images"][-1]["width"] = 41
    if mistake == "rotated":
        coco.content["images"][-1].update(width=30, height=40)
    coco.write()
    index = CocoIndex.open(coco.file, coco.images)
    if mistake == "gone":
        path.unlink()
    elif mistake in ("truncated", "text", "empty"):
        path.write_bytes({"truncated": path.read_bytes()[:300], "text": b"hello" * 20, "empty": b""}[mistake])
    words = []
    for stream in (
        eval_batches(index, by=nvjpeg, workers=1, device=CPU, **EVAL),
        eval_batches(index, workers=0, **EVAL),
    ):
        with pytest.raises(UserError, match=r"000007\.jpg.*image 7|image 7 .*000007\.jpg") as caught:
            list(stream)
        words.append(str(caught.value))
    assert words[0] == words[1]


def test_only_files_that_the_decoder_refuses_go_the_common_way(index, monkeypatch):
    """A stand-in for a GPU's decoder, which fails as a whole where it cannot decode one file of a batch."""
    inner, asked, refused = nvjpeg.decode_jpeg, [], len(index.read(4))
    stream = eval_batches(index, by=nvjpeg, workers=1, device=CPU, **EVAL)

    def decode_jpeg(files, **more):
        asked.append(len(files))
        if refused in map(len, files):
            raise RuntimeError("nvjpegDecodeBatched failed: 2")
        return inner(files, **more)

    monkeypatch.setattr(nvjpeg, "decode_jpeg", decode_jpeg)
    assert_same(list(stream), list(eval_batches(index, workers=0, **EVAL)))
    assert asked[:6] == [3, 3, 1, 1, 1, 3]


def test_memory_that_ends_is_no_damaged_file(index, monkeypatch):
    stream = eval_batches(index, by=nvjpeg, workers=1, device=CPU, **EVAL)

    def decode_jpeg(files, **more):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(nvjpeg, "decode_jpeg", decode_jpeg)
    with pytest.raises(torch.OutOfMemoryError):
        next(stream)


def test_a_torchvision_that_cannot_says_so_before_training(index, monkeypatch):
    def decode_jpeg(files, **more):
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support\nmore")

    monkeypatch.setattr(nvjpeg, "decode_jpeg", decode_jpeg)
    with pytest.raises(UserError, match=r"not compiled with nvJPEG support\); take --loader torch or dali"):
        eval_batches(index, by=nvjpeg, workers=1, device=CPU, **EVAL)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("antialias", [False, True])
def test_on_a_gpu_the_pixels_are_within_a_few_levels(coco, antialias):
    """More where colours have half the resolution: nvJPEG repeats them, libjpeg interpolates. On these pictures, of
    random colours every 8 pixels, that is 4.5 levels in the mean."""
    from detcore.device.select import select_backend

    coco.categories(1)
    for image_id in range(24):
        coco.add_image(image_id, 400 + 8 * image_id, 300, [(1, 10, 10, 50, 60)], subsampling=image_id % 2 * 2)
    grey = coco.add_image(24, 200, 100)
    Image.open(grey).convert("L").save(grey)
    coco.write()
    index, device = CocoIndex.open(coco.file, coco.images), select_backend("cuda", "fp32")
    arguments = {**TRAIN, "image_size": (320, 320), "batch_size": 5, "rank": 0, "world_size": 1, "step": 0}
    arguments["antialias"] = antialias
    ours = device.prefetch(itertools.islice(train_batches(index, by=nvjpeg, device=device.device, **arguments), 10))
    theirs = itertools.islice(train_batches(index, **arguments | {"workers": 0}), 10)
    for a, b in zip(ours, theirs, strict=True):
        assert a.images.device == device.device and a.images.stride() == b.images.stride()
        assert torch.equal(a.image_id.cpu(), b.image_id) and torch.equal(a.boxes.cpu(), b.boxes)
        difference = (a.images.cpu().int() - b.images.int()).abs().float()
        assert (difference.mean(dim=(1, 2, 3)) < torch.where(b.image_id % 2 == 1, 8, 3)).all()
