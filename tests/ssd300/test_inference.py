"""Detections on images at hand: `main`, its steps, and torch.hub's entry points."""

import dataclasses
import functools
import http.server
import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import hubconf
from detcore import UserError
from detcore.data import transforms
from detcore.data.transforms import read_image
from detcore.training import checkpoint
from ssd300 import inference, train
from ssd300.config import BACKBONES, IMAGE_SIZE, Config
from ssd300.model import MEAN, SSD300, STD, Body, known_backbone, scale_as_the_originals_inference


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A picture, and a checkpoint that finds something everywhere."""
    folder = tmp_path_factory.mktemp("inference")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    torch.manual_seed(0)
    model = SSD300("resnet18", 2)
    for head in model.conf:
        torch.nn.init.constant_(head.bias, 0)
        head.bias.data.unflatten(0, (3, -1))[1] = 3
    state = {"model": model.state_dict(), "config": {"backbone": "resnet18"}, "classes": [[4, "cat"], [9, "dog"]]}
    checkpoint.save(folder / "epoch_0.pt", state)
    return folder


@pytest.fixture
def address(folder):
    """The folder's URL on a server of this machine."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_main_takes_paths_and_addresses(folder, address):
    uris = [folder / "picture.png", str(folder / "picture.png"), f"{address}/picture.png"]
    uris.append((folder / "picture.png").as_uri())
    found = inference.main(uris, folder / "epoch_0.pt", threshold=0.2, device="cpu")
    assert len(found) == 4
    boxes, classes, scores = found[0]
    assert boxes.shape == (20, 4) and classes.shape == scores.shape == (20,)
    assert (classes == 1).any() and set(classes) <= {1, 2} and (np.diff(scores) <= 0).all() and (scores > 0.2).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    for other in found[1:]:
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(found[0], other, strict=True))


def sure(path, score: float):
    """A checkpoint whose model finds class 1 with this score everywhere, whatever it sees."""
    model = SSD300("resnet18", 2)
    for head in model.conf:
        torch.nn.init.zeros_(head.weight)
        shares = torch.tensor([0.98 * (1 - score), score, 0.02 * (1 - score)])
        head.bias.data.unflatten(0, (3, -1)).copy_(shares.log()[:, None])
    checkpoint.save(path, {"model": model.state_dict(), "config": {"backbone": "resnet18"}})
    return path


def test_main_shows_what_has_a_score_above_three_tenths(folder, tmp_path):
    for score, count in ((0.31, 20), (0.29, 0)):
        path = sure(tmp_path / "a.pt", score)
        assert len(inference.main([folder / "picture.png"], path, device="cpu")[0][2]) == count


def test_main_with_legacy_sees_the_square_in_the_middle_scaled_otherwise(folder, tmp_path):
    with Image.open(folder / "picture.png") as picture:
        picture.crop((15, 0, 75, 60)).save(tmp_path / "square.png")

    def boxes(path, **options):
        return inference.main([path], folder / "epoch_0.pt", threshold=0.2, device="cpu", **options)[0][0]

    square = boxes(tmp_path / "square.png", legacy=True)
    assert np.array_equal(boxes(folder / "picture.png", legacy=True), square)
    assert not np.array_equal(boxes(tmp_path / "square.png"), square)


def test_prediction_scales_as_the_original_with_legacy_alone(folder):
    config = Config(mode="predict", checkpoint=folder / "epoch_0.pt", images=folder, backbone="resnet18")
    normal, legacy = (train.build_model(dataclasses.replace(config, legacy=legacy), 2) for legacy in (False, True))
    assert (200 * normal.pixel_scale + normal.pixel_shift).tolist() == pytest.approx(
        [(200 / 255 - mean) / std for mean, std in zip(MEAN, STD, strict=True)], rel=1e-5
    )
    assert (200 * legacy.pixel_scale + legacy.pixel_shift).tolist() == pytest.approx(
        [(200 / 255 * 256 - 128) / 128] * 3, rel=1e-5
    )
    trained = train.build_model(dataclasses.replace(config, legacy=True, mode="train"), 2)
    assert torch.equal(trained.pixel_scale, normal.pixel_scale)


def test_nothing_found_is_three_empty_arrays(folder):
    (found,) = inference.main([folder / "picture.png"], folder / "epoch_0.pt", threshold=1.0, device="cpu")
    assert [values.shape for values in found] == [(0, 4), (0,), (0,)]


def test_images_are_shown_as_in_validation(folder):
    image = read_image(folder / "picture.png")
    shown = transforms.resize(image, IMAGE_SIZE, flip=False, antialias=Config().antialias)
    assert np.array_equal(inference.prepare(image), shown.numpy())
    cut = transforms.resize(image[:, :, 15:75].contiguous(), IMAGE_SIZE, flip=False, antialias=Config().antialias)
    assert np.array_equal(inference.prepare(image, legacy=True), cut.numpy())


def test_images_that_shrink_are_anti_aliased():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 700, 600), np.uint8))
    sharp, smooth = (transforms.resize(image, IMAGE_SIZE, flip=False, antialias=smooth) for smooth in (False, True))
    assert np.array_equal(inference.prepare(image), smooth.numpy()) and not torch.equal(sharp, smooth)


def test_legacy_scales_as_the_original_script():
    model = SSD300("resnet18", 2)
    value = 200 * model.pixel_scale + model.pixel_shift
    assert value.tolist() == pytest.approx([(200 / 255 - m) / s for m, s in zip(MEAN, STD, strict=True)], rel=1e-5)
    scale_as_the_originals_inference(model)
    value = 200 * model.pixel_scale + model.pixel_shift
    assert value.tolist() == pytest.approx([(200 / 255 * 256 - 128) / 128] * 3, rel=1e-5)


def test_what_cannot_be_read_is_named(folder, address):
    for uri in (folder / "none.jpg", f"{address}/none.jpg", folder / "epoch_0.pt"):
        with pytest.raises(UserError, match=r"none\.jpg|epoch_0\.pt"):
            inference.main([uri], folder / "epoch_0.pt", device="cpu")
    torch.save({"weight": torch.zeros(3)}, folder / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt holds no SSD300"):
        inference.load_model(folder / "other.pt")


def test_names_of_the_classes(folder):
    assert inference.load_model(folder / "epoch_0.pt")[1] == ["cat", "dog"]
    assert len(set(inference.COCO_NAMES)) == 80 and all(name == name.strip() for name in inference.COCO_NAMES)


def test_torch_hub_as_the_original_documents_it(folder, address, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    root = hubconf.__file__.rpartition("/")[0]
    utils = torch.hub.load(root, "nvidia_ssd_processing_utils", source="local")
    model = torch.hub.load(
        root, "nvidia_ssd", source="local", checkpoint=f"{address}/epoch_0.pt", map_location=torch.device("cpu")
    )
    assert list((tmp_path / "checkpoints").rglob("epoch_0.pt")) and not model.training
    tensor = utils.prepare_tensor([utils.prepare_input(folder / "picture.png")] * 2)
    assert tensor.shape == (2, 3, 300, 300)
    with torch.no_grad():
        results = utils.decode_results(model(tensor))
    best = [utils.pick_best(result, 0.2) for result in results]
    expected = inference.main([folder / "picture.png"], folder / "epoch_0.pt", threshold=0.2, device="cpu")[0]
    for found in best:
        assert np.allclose(found[0], expected[0], atol=1e-5) and np.array_equal(found[1], expected[1])
    assert all(len(values) == 0 for values in utils.pick_best(results[0], 1.0))
    assert utils.get_coco_object_dictionary()[0] == "person"


def test_torch_hub_takes_model_math_and_says_that_it_has_no_effect(capsys):
    for math, said in (("fp16", True), ("fp32", False)):
        model = hubconf.nvidia_ssd(pretrained=False, backbone="resnet18", num_classes=5, model_math=math)
        assert model.priors.dtype == torch.float32 and ("no effect" in capsys.readouterr().err) is said


def test_torch_hub_wants_no_more_than_it_lists(tmp_path):
    """Its users have not installed this project; torch.hub looks for the listed packages alone."""
    script = f"""
import sys
class Missing:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("mlperf_logging", "hotcoco", "pycocotools"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
sys.path.insert(0, {hubconf.__file__.rpartition("/")[0]!r})
import hubconf
hubconf.nvidia_ssd_processing_utils(), hubconf.nvidia_ssd(pretrained=False, backbone="resnet18", num_classes=2)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_torch_hub_without_weights():
    with pytest.raises(UserError, match="checkpoint=FILE_OR_URL"):
        hubconf.nvidia_ssd()
    assert hubconf.nvidia_ssd(pretrained=False, backbone="resnet18", num_classes=5).num_classes == 5
    with pytest.raises(UserError, match="can't be fetched"):
        hubconf.nvidia_ssd(checkpoint="http://127.0.0.1:9/never_there.pt")


def test_torch_hub_tells_addresses_of_one_name_apart(folder, tmp_path, address, monkeypatch):
    """Each is fetched once."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    files = []
    for number, classes in enumerate((2, 3)):
        files.append(folder / str(number) / "model_final.pt")
        files[-1].parent.mkdir()
        torch.save({"model": SSD300("resnet18", classes).state_dict()}, files[-1])
    urls = [f"{address}/{number}/model_final.pt" for number in range(2)]
    assert [hubconf.nvidia_ssd(checkpoint=url).num_classes for url in urls] == [2, 3]
    for file in files:
        file.unlink()
    assert [hubconf.nvidia_ssd(checkpoint=url).num_classes for url in urls] == [2, 3]


def originals(path, backbone, classes=80, **more):
    """A file as the original writes it, in its names."""
    numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6}
    state = {}
    for name, value in SSD300(backbone, classes).state_dict().items():
        if name.startswith("backbone."):
            _, part, rest = name.split(".", 2)
            name = f"feature_extractor.feature_extractor.{numbers[part]}.{rest}"
        state[f"module.{name}"] = value
    torch.save({"epoch": 1, "model": state, **more}, path)
    return path


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34"])
def test_the_originals_files_tell_their_backbone(tmp_path, backbone):
    model, names = inference.load_model(originals(tmp_path / "a.pt", backbone))
    assert len(model.backbone.layer3) == {"resnet18": 2, "resnet34": 6}[backbone] and names[79] == "toothbrush"


@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbones_are_told_by_their_weights(backbone):
    with torch.device("meta"):
        assert known_backbone(Body(backbone).state_dict(prefix="backbone.")) == backbone
    assert known_backbone({}) is None
    assert known_backbone({f"backbone.layer3.{block}.conv1.weight": "text" for block in range(2)}) == "resnet18"


def test_classes_of_the_originals_files(tmp_path):
    named = {0: "background", 1: "cat", 2: "dog"}
    saved = torch.load(originals(tmp_path / "a.pt", "resnet18", 2, label_map=named), weights_only=True)
    assert inference.class_entries(saved) == [(1, "cat"), (2, "dog")]
    assert inference.class_entries(saved | {"label_map": {0: "background", 1: "cat"}}) == []
    assert inference.class_entries(saved | {"classes": [[7, "a"], [9, "b"]]}) == [(7, "a"), (9, "b")]
    coco = inference.class_entries({"conf.0.bias": torch.zeros(4 * 81)})
    assert len(coco) == 80 and coco[0] == (1, "person") and coco[11] == (13, "stop sign")
    assert coco[79] == (90, "toothbrush")


def test_prediction_with_an_originals_file_needs_no_annotations(folder, tmp_path):
    path = originals(tmp_path / "a.pt", "resnet18")
    words = ["--mode", "predict", "--checkpoint", str(path), "--backbone", "resnet18", "--no-cuda", "--data", "/none"]
    assert train.main([*words, "--images", str(folder / "picture.png"), "--output-dir", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out/predictions/detections.json").read_text())
    assert found["categories"][79] == {"id": 90, "name": "toothbrush"}
