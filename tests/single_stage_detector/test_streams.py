"""From the config to the batches: which loader, on which device, how large for evaluation, and one ahead."""

import dataclasses
import json
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from detcore.data import dali, nvjpeg, torch_loader
from detcore.data.ahead import one_ahead
from detcore.detection import detector as detection
from detcore.device.cpu import CpuBackend
from detcore.device.cuda import CudaBackend
from detcore.processes.launcher import World
from detcore.training.task import Context
from single_stage_detector import data
from single_stage_detector.config import Config
from single_stage_detector.model import RetinaNet
from tests.detcore.device.tape import TapeRecorder

CPU = CpuBackend(torch.device("cpu"), "fp32")
ALONE = World(0, 1, 0, 1)
SIZE = (64, 64)


@pytest.fixture
def config(tmp_path) -> Config:
    """Eleven photographs in a custom data set, training and validation alike."""
    content: dict[str, list] = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "thing"}]}
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(11):
        pixels = rng.integers(0, 256, (9, 12, 3), np.uint8)
        Image.fromarray(pixels).resize((96, 72)).save(tmp_path / "images" / f"{number}.jpg")
        content["images"].append({"id": number, "file_name": f"{number}.jpg", "height": 72, "width": 96})
        content["annotations"].append({"id": number, "image_id": number, "category_id": 7, "bbox": [9, 8, 30, 40]})
    (tmp_path / "a.json").write_text(json.dumps(content))
    files = {f"{split}_annotations_file": tmp_path / "a.json" for split in ("train", "val")}
    folders = {f"{split}_data_path": tmp_path / "images" for split in ("train", "val")}
    return Config(dataset="custom", batch_size=2, image_size=SIZE, max_boxes=4, workers=0, **files, **folders)


@pytest.fixture
def model() -> RetinaNet:
    torch.manual_seed(0)
    return RetinaNet("resnet18", 1, SIZE, "batch", 5, 16, 1, (8, 16, 24, 32, 48)).eval()


class Ahead(CpuBackend):
    """A CPU on which the next batch is on its way as on a GPU."""

    def ahead(self, batches):
        return one_ahead(batches, next, lambda batch: batch, in_thread=True)


def train_stream(config, index, context, epoch, step):
    plan = detection.train_plan(data.DETECTOR, config, index, context)
    return detection.train_stream(config, plan, context.backend, epoch, step)


def eval_stream(config, index, world, device, size=0):
    return detection.eval_stream(data.DETECTOR, config, index, world, device, size)


def equal(ours, theirs) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(torch.equal(x, y) for a, b in pairs for x, y in zip(a, b, strict=True))


def test_nvjpeg_is_chosen_by_name_and_gives_the_same_on_the_cpu(config, monkeypatch):
    index, context = detection.open_index(config, "train"), Context(CPU, ALONE, 3)
    plain = list(islice(train_stream(config, index, context, 0, 2), 8))
    val = list(eval_stream(config, index, ALONE, CPU, 4))
    assert [len(batch.image_id) for batch in val] == [4, 4, 4] and val[-1].image_id[-1] == -1
    monkeypatch.setattr(torch_loader, "batches", None)
    other = dataclasses.replace(config, loader="nvjpeg")
    assert equal(list(islice(train_stream(other, index, context, 0, 2), 8)), plain)
    assert equal(list(eval_stream(other, index, ALONE, CPU, 4)), val)


@pytest.mark.parametrize("module", [dali, nvjpeg])
def test_the_gpu_of_a_loader_is_the_backends_also_where_each_process_sees_one_only(config, monkeypatch, module):
    """The process with local rank 3 then computes on device 0."""
    asked = []
    monkeypatch.setattr(module, "batches", lambda plan, keys, options: asked.append(options.device))
    gpu, world = CudaBackend(torch.device("cuda", 0), "bf16"), World(3, 4, 3, 4)
    config, index = (
        dataclasses.replace(config, loader=module.__name__.rpartition(".")[2]),
        detection.open_index(config, "train"),
    )
    train_stream(config, index, Context(gpu, world, 0), 0, 0)
    eval_stream(config, index, world, gpu)
    assert asked == [torch.device("cuda", 0)] * 2


def test_a_stream_one_ahead_goes_on_exactly_from_any_step(config):
    index, ahead = detection.open_index(config, "train"), Context(Ahead(CPU.device, "fp32"), ALONE, 3)
    whole = list(islice(train_stream(config, index, ahead, 0, 0), 12))
    for used in (1, 4, 5):
        first = ahead.backend.prefetch(train_stream(config, index, ahead, 0, 0))
        assert equal(list(islice(first, used)), whole[:used])
        first.close()  # the run ends; one batch more had been fetched
        again = ahead.backend.prefetch(train_stream(config, index, ahead, *divmod(used, 5)))
        assert equal(list(islice(again, 12 - used)), whole[used:])


def test_detections_are_the_same_one_ahead(config, model):
    with torch.no_grad():  # new weights find nothing else
        for name, value in model.named_parameters():
            if name.endswith("cls_logits.bias"):
                value.fill_(-1)
    index = detection.open_index(config, "val")
    found = [
        detection.detect_all(
            detection.compiled_detect(data.DETECTOR, model, index.category_ids.tolist(), device),
            eval_stream(config, index, ALONE, device, 4),
            device,
            lambda *told: None,
        ).rows
        for device in (CPU, Ahead(CPU.device, "fp32"))
    ]
    assert len(found[0]) and torch.equal(*found)


class TestEvalBatchSize:
    def test_what_the_config_says(self, config, model):
        config = dataclasses.replace(config, eval_batch_size=3)
        assert (
            detection.eval_batch_size(data.DETECTOR, config, model, detection.open_index(config, "val"), ALONE, CPU)
            == 3
        )

    def test_on_the_cpu_that_of_training(self, config, model):
        assert (
            detection.eval_batch_size(data.DETECTOR, config, model, detection.open_index(config, "val"), ALONE, CPU)
            == 2
        )

    @pytest.mark.parametrize(("world", "limit"), [(ALONE, 11), (World(1, 2, 1, 2), 6)])
    def test_what_fits_on_all_ranks(self, config, model, monkeypatch, world, limit):
        asked: list = []

        class Doubles(CpuBackend):
            def largest_batch(self, try_batch, start, limit):
                asked.append((start, limit))
                for size in (2, 4, 8):
                    try_batch(size)
                return 8

        seen: list[tuple] = []
        model.register_forward_hook(lambda module, given, out: seen.append(tuple(given[0].shape)))
        monkeypatch.setattr(
            detection.distributed, "all_reduce_max", lambda values, device: [max(*values, -4)]
        )  # another rank's is 4
        gpu = Doubles(torch.device("cpu"), "fp32")
        assert (
            detection.eval_batch_size(data.DETECTOR, config, model, detection.open_index(config, "val"), world, gpu)
            == 4
        )
        assert asked == [(2, limit)] and seen == [(n, 3, *SIZE) for n in (2, 4, 8)]

    def test_never_more_than_the_largest(self, config, model, monkeypatch):
        monkeypatch.setattr(detection, "LARGEST_EVAL_BATCH", 4)
        limits = []
        monkeypatch.setattr(CpuBackend, "largest_batch", lambda self, tried, start, limit: limits.append(limit) or 1)
        detection.eval_batch_size(data.DETECTOR, config, model, detection.open_index(config, "val"), ALONE, CPU)
        assert limits == [4]

    @pytest.mark.parametrize(("elements", "limit"), [(40, 5), (39, 4), (16, 2)])
    def test_no_tensor_is_larger_than_a_gpu_takes(self, config, model, monkeypatch, elements, limit):
        limits = []

        class Gpu(CpuBackend):
            probes_batch_size = True

            def largest_batch(self, try_batch, start, limit):
                limits.append(limit)
                return 1

        gpu = Gpu(torch.device("cpu"), "fp32")
        monkeypatch.setattr(detection, "widest", lambda *given: 8)
        monkeypatch.setattr(detection, "LARGEST_TENSOR", elements)
        monkeypatch.setattr(detection.distributed, "all_reduce_max", lambda values, device: values)
        detection.eval_batch_size(data.DETECTOR, config, model, detection.open_index(config, "val"), ALONE, gpu)
        assert limits == [limit]

    def test_found_once_and_used_in_every_evaluation(self, config, model, monkeypatch):
        sizes, calls = [], []
        monkeypatch.setattr(detection, "eval_batch_size", lambda *arguments: calls.append(True) or 5)
        inner = detection.eval_stream
        monkeypatch.setattr(
            detection, "eval_stream", lambda *arguments: sizes.append(arguments[-1]) or inner(*arguments)
        )
        opened = detection.open_data(data.DETECTOR, config, Context(CPU, ALONE, 0))
        try:
            for _ in range(2):
                pending = opened.evaluate(model, lambda *told: None)
                while pending.poll() is None:
                    pass
        finally:
            opened.close()
        assert sizes == [5, 5] and calls == [True]


@pytest.mark.parametrize("images", [0, 4])
def test_inference_is_made_before_there_is_data(config, model, images):
    """Recorded with ids that are not known yet, at a size that fits the few images that a rank may have."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("cls_logits.bias"):
                value.fill_(-1)
    config, val = dataclasses.replace(config, eval_batch_size=images), detection.open_index(config, "val")
    recorder = TapeRecorder()
    found = []
    for device in (CPU, dataclasses.replace(CPU, recorder=recorder)):
        made = detection.Inference(data.DETECTOR, config, Context(device, ALONE, 0))
        made.prepare(model, 1)
        assert model.training == (device is not CPU)
        model.eval()
        found += [made.evaluate(model, val, lambda *told: None).rows for _ in range(2)]
    assert recorder.recordings == 1 and len(found[0]) and set(found[0][:, 6].tolist()) == {7}
    assert all(torch.equal(one, found[0]) for one in found)


def test_a_recording_takes_no_memory_from_steps_that_are_not(config, model, monkeypatch):
    monkeypatch.setattr(CpuBackend, "largest_batch", None)
    device = dataclasses.replace(CPU, recorder=TapeRecorder(), eager="several GPUs")
    assert (
        detection.eval_batch_size(data.DETECTOR, config, model, detection.open_index(config, "val"), ALONE, device) == 2
    )


@pytest.mark.parametrize("size, kept", [(128, 11), (8, 8), (11, 11)])
def test_a_size_found_without_data_is_found_again_for_few_images(config, model, monkeypatch, size, kept):
    sizes = []
    monkeypatch.setattr(detection, "eval_batch_size", lambda *arguments: 11)
    inner = detection.eval_stream
    monkeypatch.setattr(detection, "eval_stream", lambda *arguments: sizes.append(arguments[-1]) or inner(*arguments))
    made = detection.Inference(data.DETECTOR, config, Context(CPU, ALONE, 0))
    made.images = size
    made.evaluate(model, detection.open_index(config, "val"), lambda *told: None)
    assert sizes == [kept]


@pytest.mark.parametrize(
    "accumulate, most, expected",
    [(1, 0, [1] * 5), (2, 0, [2, 2, 1]), (8, 0, [5]), (2, 2, [2, 2]), (3, 1, [3]), (3, 9, [3, 2])],
)
def test_an_epoch_of_eleven_images_gives_all_micro_batches_to_its_steps(config, accumulate, most, expected):
    config = dataclasses.replace(config, accumulate=accumulate, max_iters_per_epoch=most)
    opened = detection.open_data(data.DETECTOR, config, Context(CPU, ALONE, 3))
    try:
        steps = opened.steps_per_epoch
        assert [opened.passes(step, accumulate) for step in range(2 * steps)] == 2 * expected
        stream = opened.train_batches(0, 0)
        first, second = (list(islice(stream, sum(expected))) for _ in range(2))
        stream.close()
        assert equal(second, islice(opened.train_batches(1, 0), sum(expected))), "the next epoch begins where it must"
        assert equal(
            first[accumulate:], islice(opened.train_batches(0, accumulate), max(sum(expected) - accumulate, 0))
        )
    finally:
        opened.close()
