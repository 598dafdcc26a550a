"""Weights of other programs: their names, typed in here as those programs write them, against the network's."""

import pickle
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torchvision

from detcore import UserError
from detcore.config import load
from detcore.nn.detectron import CATALOG
from maskrcnn.config import IGNORED_FLAGS, Config
from maskrcnn.convert import convert
from maskrcnn.convert import main as convert_main
from maskrcnn.flags import CONFIGS, translate_flags
from maskrcnn.model import MaskRCNN
from maskrcnn.weight_files import find, read, state_of
from maskrcnn.weights import load_weights

SMALL = "MODEL.BACKBONE.OUT_CHANNELS 8 MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM 16 MODEL.ROI_MASK_HEAD.CONV_LAYERS (8,8)"
DEPTHS = (3, 4, 6, 3)
NORM = ("running_mean", "running_var")


def settings(name: str, weights: object, more: str = "") -> Config:
    words = ["--config-file", f"configs/{name}.yaml", "MODEL.WEIGHT", str(weights), *more.split()]
    return load(Config, translate_flags(words), {}, IGNORED_FLAGS)[0]


def fpn(weights: object, more: str = "") -> Config:
    return settings("e2e_mask_rcnn_R_50_FPN_1x", weights, f"{SMALL} {more}")


def c4(weights: object, more: str = "") -> Config:
    return settings("e2e_mask_rcnn_R_50_C4_1x", weights, more)


def body_names():
    """(Detectron's, maskrcnn-benchmark's without stem, detectron2's) name of each convolution and norm of R-50."""
    yield "conv1", "res_conv1_bn", "conv1", "bn1", "stem.conv1", None
    for stage, depth in enumerate(DEPTHS):
        for block in range(depth):
            theirs, ours, d2 = f"res{stage + 2}_{block}_", f"layer{stage + 1}.{block}.", f"res{stage + 2}.{block}."
            if block == 0:
                down = theirs + "branch1", theirs + "branch1_bn", ours + "downsample.0", ours + "downsample.1"
                yield *down, d2 + "shortcut", stage
            for i, letter in enumerate("abc", 1):
                branch = theirs + "branch2" + letter
                yield branch, branch + "_bn", f"{ours}conv{i}", f"{ours}bn{i}", f"{d2}conv{i}", stage


HEADS = {  # of Detectron's Mask R-CNN on R-50-FPN
    **{f"fpn_inner_res{s}_{b}_sum{'' if s == 5 else '_lateral'}": f"backbone.fpn.fpn_inner{s - 1}"
       for s, b in ((2, 2), (3, 3), (4, 5), (5, 2))},
    **{f"fpn_res{s}_{b}_sum": f"backbone.fpn.fpn_layer{s - 1}" for s, b in ((2, 2), (3, 3), (4, 5), (5, 2))},
    "conv_rpn_fpn2": "rpn.head.conv", "rpn_cls_logits_fpn2": "rpn.head.cls_logits",
    "rpn_bbox_pred_fpn2": "rpn.head.bbox_pred", "fc6": "roi_heads.box.feature_extractor.fc6",
    "fc7": "roi_heads.box.feature_extractor.fc7", "cls_score": "roi_heads.box.predictor.cls_score",
    "bbox_pred": "roi_heads.box.predictor.bbox_pred", "_[mask]_fcn1": "roi_heads.mask.feature_extractor.mask_fcn1",
    "_[mask]_fcn2": "roi_heads.mask.feature_extractor.mask_fcn2", "conv5_mask": "roi_heads.mask.predictor.conv5_mask",
    "mask_fcn_logits": "roi_heads.mask.predictor.mask_fcn_logits",
}  # fmt: skip


class Blobs:
    """Arrays of random numbers under another program's names, in the shapes of `model`, and what they should become."""

    def __init__(self, model: torch.nn.Module, seed: int = 0):
        self.shapes = {name: value.shape for name, value in model.state_dict().items()}
        self.random, self.theirs, self.ours = np.random.default_rng(seed), {}, {}

    def add(self, theirs: str, ours: str) -> np.ndarray:
        value = self.random.standard_normal(tuple(self.shapes[ours]), dtype=np.float32)
        self.theirs[theirs] = self.ours[ours] = value
        return value

    def body(self, prefix: str = "backbone.body.", stage: int | None = None) -> None:
        for conv, norm, our_conv, our_norm, _, of in body_names():
            if stage is None or of == stage:
                self.add(f"{conv}_w", f"{prefix}{our_conv}.weight")
                self.add(f"{norm}_s", f"{prefix}{our_norm}.weight")
                self.add(f"{norm}_b", f"{prefix}{our_norm}.bias")

    def heads(self, names: dict[str, str]) -> None:
        for theirs, ours in names.items():
            self.add(f"{theirs}_w", f"{ours}.weight")
            self.add(f"{theirs}_b", f"{ours}.bias")


def write(path, content) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=4))
    return str(path)


def same(model: torch.nn.Module, expected: dict[str, np.ndarray], scale: float = 1.0) -> None:
    """The network has the values; those of norms' weights times `scale`."""
    state = model.state_dict()
    for name, value in expected.items():
        is_norm = name.endswith(".weight") and name.replace(".weight", ".running_var") in state
        torch.testing.assert_close(state[name].numpy(), value * np.float32(scale if is_norm else 1), rtol=1e-6, atol=0)


def network(config: Config, device: str = "cpu") -> MaskRCNN:
    """Without the time that initial values take; on the device meta without values."""
    with torch.device("meta"):
        model = MaskRCNN(config)
    if device == "cpu":
        model = model.to_empty(device="cpu")
        for value in model.state_dict().values():
            value.fill_(0.25)
    return model


def before_and_after(config: Config, training: bool = True):
    model = network(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    return model, before, load_weights(model, config, training)


def test_imagenet_weights_of_detectron_fill_the_body_of_a_pyramid(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    config = fpn("catalog://ImageNetPretrained/MSRA/R-101")  # whose file may have any content
    blobs = Blobs(network(config, "meta"))
    blobs.body()
    extra = {"fc1000_w": np.ones((1000, 2048)), "fc1000_b": np.ones(1000), "conv1_b": np.zeros(64),
             "conv1_w_momentum": np.ones(3)}  # fmt: skip
    write(tmp_path / "hub/checkpoints/R-101.pkl", {"blobs": blobs.theirs | extra})
    model, before, notes = before_and_after(config)
    same(model, blobs.ours, (1 + 1e-5) ** 0.5)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if not name.startswith("backbone.body."))
    assert all((after[name] == kind.endswith("var")).all() for kind in NORM for name in after if name.endswith(kind))
    assert len(notes) == 6 and "has no backbone.fpn: it begins with random weights" in notes[0]
    norm = model.backbone.body.layer2[0].bn1
    torch.testing.assert_close(norm.scale.numpy(), blobs.theirs["res3_0_branch2a_bn_s"], rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.shift.numpy(), blobs.theirs["res3_0_branch2a_bn_b"], rtol=1e-6, atol=0)


def test_a_whole_network_of_detectron(tmp_path):
    config = fpn(tmp_path / "model_final.pkl")
    blobs = Blobs(network(config, "meta"))
    blobs.body()
    blobs.heads(HEADS)
    write(tmp_path / "model_final.pkl", {"blobs": blobs.theirs | {"lr": np.float32(0.1), "weight_order": "1"}})
    model, _, notes = before_and_after(config, training=False)
    same(model, blobs.ours, (1 + 1e-5) ** 0.5)
    assert notes == []


def test_a_c4_network_has_the_last_stage_in_its_heads(tmp_path):
    config = c4(tmp_path / "R-50.pkl.pkl")
    blobs = Blobs(network(config, "meta"))
    for stage in (None, 0, 1, 2):
        for conv, norm, our_conv, our_norm, _, of in body_names():
            if of == stage:
                blobs.add(f"{conv}_w", f"backbone.body.{our_conv}.weight")
                blobs.add(f"{norm}_s", f"backbone.body.{our_norm}.weight")
                blobs.add(f"{norm}_b", f"backbone.body.{our_norm}.bias")
    blobs.body("roi_heads.box.feature_extractor.head.", 3)
    write(tmp_path / "R-50.pkl.pkl", blobs.theirs)
    model, _, notes = before_and_after(config)
    same(model, blobs.ours, (1 + 1e-5) ** 0.5)
    assert [note.partition(" has no ")[2].partition(":")[0] for note in notes] == [
        "rpn", "roi_heads.box.predictor", "roi_heads.mask.predictor",
    ]  # fmt: skip


def test_proposals_alone_take_what_they_have_of_a_whole_network(tmp_path):
    whole = fpn(tmp_path / "model.pkl")
    blobs = Blobs(network(whole, "meta"))
    blobs.body()
    blobs.heads(HEADS)
    write(tmp_path / "model.pkl", {"blobs": blobs.theirs})
    model, _, notes = before_and_after(fpn(tmp_path / "model.pkl", "MODEL.RPN_ONLY True"), training=False)
    assert notes == []
    same(model, {name: value for name, value in blobs.ours.items() if not name.startswith("roi_heads.")},
         (1 + 1e-5) ** 0.5)  # fmt: skip


def benchmark_state(model: torch.nn.Module) -> OrderedDict:
    """A state of maskrcnn-benchmark, as DistributedDataParallel saves it."""
    torch.manual_seed(3)
    state = OrderedDict()
    for name, value in model.state_dict().items():
        value = torch.rand_like(value) + 0.5
        name = name.replace("backbone.body.conv1.", "backbone.body.stem.conv1.")
        state["module." + name.replace("backbone.body.bn1.", "backbone.body.stem.bn1.")] = value
    state["module.rpn.anchor_generator.cell_anchors.0"] = torch.zeros(3, 4)
    return state


def test_a_checkpoint_of_maskrcnn_benchmark(tmp_path):
    config = fpn(tmp_path / "model_0002500.pth")
    state = benchmark_state(network(config))
    dead = state["module.backbone.body.stem.bn1.running_var"]
    dead[3] = 0  # the original divides by it
    torch.save({"model": state, "optimizer": {"state": {}}, "iteration": 2500,
                "scheduler": {"last_epoch": np.int64(2500), "gamma": np.float64(0.1)}}, config.weights)  # fmt: skip
    model, _, notes = before_and_after(config, training=False)
    assert notes == []
    norm = model.backbone.body.bn1
    weight = state["module.backbone.body.stem.bn1.weight"]
    expected = weight / dead.sqrt()
    assert torch.isfinite(norm.scale).all()
    alive = dead > 0
    torch.testing.assert_close(norm.scale[alive], expected[alive], rtol=1e-6, atol=0)
    name = "roi_heads.mask.predictor.mask_fcn_logits.weight"
    assert torch.equal(model.state_dict()[name], state["module." + name])


def test_a_c4_checkpoint_of_maskrcnn_benchmark_lists_the_shared_stage_twice(tmp_path):
    config = c4(tmp_path / "model_final.pth")
    state = benchmark_state(network(config))
    box, mask = (f"module.roi_heads.{kind}.feature_extractor.head." for kind in ("box", "mask"))
    state |= {name.replace(box, mask): value for name, value in state.items() if name.startswith(box)}
    torch.save({"model": state}, config.weights)
    model, _, notes = before_and_after(config, training=False)
    name = "roi_heads.box.feature_extractor.head.layer4.0.conv1.weight"
    assert notes == [] and torch.equal(model.state_dict()[name], state["module." + name])


PIXELS = "INPUT.TO_BGR255 False INPUT.PIXEL_MEAN 0.485,0.456,0.406 INPUT.PIXEL_STD 0.229,0.224,0.225"
AS_TORCHVISION = f"{PIXELS} MODEL.RESNETS.STRIDE_IN_1X1 False --no-legacy-boxes"


def randomised(oracle: torch.nn.Module) -> torch.nn.Module:
    """Statistics that are not 0 and 1, so that eps and order count."""
    torch.manual_seed(5)
    for name, value in oracle.state_dict().items():
        if name.endswith(NORM):
            value.copy_(torch.rand_like(value) * 0.2 + (0.9 if name.endswith("var") else 0))
    return oracle.eval()


def test_a_residual_network_of_torchvision_computes_the_same(tmp_path):
    oracle = randomised(torchvision.models.resnet50())
    torch.save(oracle.state_dict(), tmp_path / "resnet50.pth")
    model, _, notes = before_and_after(fpn(tmp_path / "resnet50.pth", AS_TORCHVISION))
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        x = oracle.maxpool(oracle.relu(oracle.bn1(oracle.conv1(images))))
        expected = []
        for stage in (oracle.layer1, oracle.layer2, oracle.layer3, oracle.layer4):
            expected.append(x := stage(x))
        found = model.eval().backbone.body(images)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not any("whose networks want" in note for note in notes)
    stride = before_and_after(fpn(tmp_path / "resnet50.pth", AS_TORCHVISION.replace("False", "True", 1)))[2]
    assert "torchvision, whose networks want INPUT.TO_BGR255 False" in stride[-1]


def test_mask_rcnn_of_torchvision_computes_the_same(tmp_path):
    oracle = randomised(torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None))
    torch.save(oracle.state_dict(), tmp_path / "maskrcnn.pth")
    line = f"MODEL.WEIGHT {tmp_path}/maskrcnn.pth MODEL.ROI_BOX_HEAD.NUM_CLASSES 91 {AS_TORCHVISION}"
    config = settings("e2e_mask_rcnn_R_50_FPN_1x", f"{tmp_path}/maskrcnn.pth", line)
    model, _, notes = before_and_after(config, training=False)
    assert notes == []
    regions = torch.rand(4, 256, 7, 7)
    with torch.no_grad():
        images = torch.rand(1, 3, 64, 96)
        for ours, theirs in zip(model.eval().features(images), oracle.backbone(images).values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        theirs = oracle.roi_heads.box_predictor(oracle.roi_heads.box_head(regions))
        box = model.roi_heads["box"]
        ours = box.predictor(box.feature_extractor(regions))
        torch.testing.assert_close(ours[0], theirs[0])
        torch.testing.assert_close(ours[1].flatten(1), theirs[1])
    state = oracle.state_dict()
    for name, theirs in (
        ("roi_heads.mask.feature_extractor.mask_fcn3.weight", "roi_heads.mask_head.2.0.weight"),
        ("roi_heads.mask.predictor.conv5_mask.weight", "roi_heads.mask_predictor.conv5_mask.weight"),
        ("rpn.head.conv.bias", "rpn.head.conv.0.0.bias"), ("rpn.head.bbox_pred.bias", "rpn.head.bbox_pred.bias"),
    ):  # fmt: skip
        assert torch.equal(model.state_dict()[name], state[theirs])


def test_the_second_version_of_torchvision_is_refused(tmp_path):
    with torch.device("meta"):
        names = torchvision.models.detection.maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None).state_dict()
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "v2.pth")
    with pytest.raises(UserError, match=r"_fpn_v2, whose heads are others; take maskrcnn_resnet50_fpn"):
        before_and_after(fpn(tmp_path / "v2.pth"))


def test_a_network_of_detectron2_has_its_background_last(tmp_path):
    config = fpn(tmp_path / "d2.pkl", "--no-legacy-boxes INPUT.PIXEL_MEAN 103.53,116.28,123.675")
    blobs = Blobs(network(config, "meta"))
    for _, _, our_conv, our_norm, theirs, _ in body_names():
        blobs.add(f"backbone.bottom_up.{theirs}.weight", f"backbone.body.{our_conv}.weight")
        for kind in ("weight", "bias", *NORM):
            value = blobs.add(f"backbone.bottom_up.{theirs}.norm.{kind}", f"backbone.body.{our_norm}.{kind}")
            np.abs(value, out=value)
    names = {f"backbone.fpn_lateral{i}": f"backbone.fpn.fpn_inner{i - 1}" for i in range(2, 6)}
    names |= {f"backbone.fpn_output{i}": f"backbone.fpn.fpn_layer{i - 1}" for i in range(2, 6)}
    names |= {
        "proposal_generator.rpn_head.conv": "rpn.head.conv",
        "proposal_generator.rpn_head.objectness_logits": "rpn.head.cls_logits",
        "proposal_generator.rpn_head.anchor_deltas": "rpn.head.bbox_pred",
        "roi_heads.box_head.fc1": "roi_heads.box.feature_extractor.fc6",
        "roi_heads.box_head.fc2": "roi_heads.box.feature_extractor.fc7",
        "roi_heads.box_predictor.cls_score": "roi_heads.box.predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred": "roi_heads.box.predictor.bbox_pred",
        "roi_heads.mask_head.mask_fcn1": "roi_heads.mask.feature_extractor.mask_fcn1",
        "roi_heads.mask_head.mask_fcn2": "roi_heads.mask.feature_extractor.mask_fcn2",
        "roi_heads.mask_head.deconv": "roi_heads.mask.predictor.conv5_mask",
        "roi_heads.mask_head.predictor": "roi_heads.mask.predictor.mask_fcn_logits",
    }
    for theirs, ours in names.items():
        for kind in ("weight", "bias"):
            blobs.add(f"{theirs}.{kind}", f"{ours}.{kind}")
    content = dict(blobs.theirs)
    for kind in ("weight", "bias"):
        scores = content[f"roi_heads.box_predictor.cls_score.{kind}"]
        content[f"roi_heads.box_predictor.cls_score.{kind}"] = np.concatenate([scores[1:], scores[:1]])
        content[f"roi_heads.box_predictor.bbox_pred.{kind}"] = content[f"roi_heads.box_predictor.bbox_pred.{kind}"][4:]
        content[f"roi_heads.mask_head.predictor.{kind}"] = content[f"roi_heads.mask_head.predictor.{kind}"][1:]
        blobs.ours[f"roi_heads.box.predictor.bbox_pred.{kind}"][:4] = 0
        blobs.ours[f"roi_heads.mask.predictor.mask_fcn_logits.{kind}"][:1] = 0
    content |= {"pixel_mean": np.zeros((3, 1, 1)), "proposal_generator.anchor_generator.cell_anchors.0": np.zeros(4)}
    write(tmp_path / "d2.pkl", {"model": content, "__author__": "Detectron2 Model Zoo"})
    model, _, notes = before_and_after(config, training=False)
    same(model, blobs.ours)
    assert notes == []
    words = ["--config-file", "configs/e2e_mask_rcnn_R_50_FPN_1x.yaml", *SMALL.split()]
    out = tmp_path / "a" / "folder" / "ours.pth"  # made where it is missing
    said = convert(config.weights, out, words)
    wish = "of detectron2, whose networks want --no-legacy-boxes INPUT.PIXEL_MEAN"
    assert f"80 classes {wish}" in said[0]
    again, _, notes = before_and_after(fpn(out), training=False)
    same(again, blobs.ours)
    assert len(notes) == 1 and f"{out} is {wish}" in notes[0]
    assert before_and_after(fpn(out, notes[0].partition("want ")[2]), training=False)[2] == []
    assert wish in convert(str(out), tmp_path / "twice.pth", words)[0]
    assert sorted(path.name for path in out.parent.iterdir()) == ["ours.pth"]
    with pytest.raises(OSError, match=r"ours\.pth"):  # what `run_main` says in a line
        convert(str(out), out / "below a file" / "x.pth", words)


@pytest.mark.parametrize("words", [[], ["a.pkl"], ["--help-me", "b.pth"], ["a.pkl", "b.pkl"]])
def test_the_converter_wants_two_files(words):
    with pytest.raises(UserError, match=r"convert_weights.sh IN OUT.pth"):
        convert_main(words)


def test_the_converter_names_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"^IN model.pkl: there is no model.pkl; correct the path$"):
        convert_main(["model.pkl", str(tmp_path / "out.pth")])


def test_another_number_of_classes_drops_the_predictors(tmp_path):
    known = fpn(tmp_path / "coco.pth")
    torch.save({"model": network(known).state_dict()}, known.weights)
    wanted = fpn(tmp_path / "coco.pth", "MODEL.ROI_BOX_HEAD.NUM_CLASSES 4")
    model, before, notes = before_and_after(wanted)
    assert len(notes) == 1 and "knows 80 classes, the network has 3" in notes[0] and "begin anew" in notes[0]
    state, saved = model.state_dict(), torch.load(known.weights)["model"]
    anew = [name for name in state if state[name].shape != saved[name].shape]
    assert len(anew) == 6 and all(torch.equal(state[name], before[name]) for name in anew)
    assert all(torch.equal(state[name], saved[name]) for name in state if name not in anew)
    with pytest.raises(UserError, match=r"knows 80 classes, the network has 3: give MODEL.ROI_BOX_HEAD.NUM_CLASSES 81"):
        before_and_after(wanted, training=False)


def test_what_does_not_fit_is_listed(tmp_path):
    config = fpn(tmp_path / "part.pth")
    state = network(config).state_dict()
    del state["backbone.body.layer1.0.conv1.weight"]
    state["rpn.head.conv.weight"] = torch.zeros(2, 2)
    state["rpn.head.more"] = torch.zeros(1)
    torch.save(state, config.weights)
    with pytest.raises(UserError) as error:
        before_and_after(config)
    for words in ("part.pth", "missing backbone.body.layer1.0.conv1.weight", "unexpected rpn.head.more", "[2, 2]"):
        assert words in str(error.value)


def test_evaluation_wants_a_whole_network(tmp_path):
    config = fpn(tmp_path / "body.pth")
    state = network(config).state_dict()
    torch.save({name: value for name, value in state.items() if name.startswith("backbone.")}, config.weights)
    with pytest.raises(UserError, match=r"has no rpn: it begins with random weights.*take weights of a whole network"):
        before_and_after(config, training=False)


@pytest.mark.parametrize("kind", ["detectron", "benchmark"])
def test_another_kind_of_normalisation_is_refused(tmp_path, kind):
    batch, group = fpn(""), settings("gn_baselines/e2e_mask_rcnn_R_50_FPN_1x_gn", tmp_path / "w.pkl")
    if kind == "detectron":
        blobs = Blobs(network(batch, "meta"))
        blobs.body()
        write(tmp_path / "w.pkl", blobs.theirs)
        with pytest.raises(UserError, match=r"has batch normalisation, the network group normalisation.*TRANS_FUNC"):
            before_and_after(group)
    else:
        torch.save(benchmark_state(network(group)), tmp_path / "w.pth")
        with pytest.raises(UserError, match="has group normalisation, the network batch normalisation"):
            before_and_after(fpn(tmp_path / "w.pth"))


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_any_pickle_are_read(tmp_path, protocol):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    for array in (values, np.asfortranarray(values), values.astype(">f4")):
        content = OrderedDict(blobs={"conv1_w": array, "lr": np.float32(0.1)}, cfg="text")
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
        state = state_of(read(tmp_path / "a.pkl"))
        assert state.keys() == {"conv1_w"} and state["conv1_w"].tolist() == values.tolist()


class Trap:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pickle.dumps({"conv1_w": Trap()}), "wants to run builtins.print"),
        (pickle.dumps({"conv1_w": torch.zeros(1)}), "wants to run torch."),
        (pickle.dumps([1, 2]), "holds list"), (b"not a pickle", "is text .* and should hold weights"),
        (pickle.dumps({"conv1_w": np.zeros(9)})[:-20], "can't be read as weights"),
    ],
)  # fmt: skip
def test_a_pickle_runs_nothing_and_holds_arrays(tmp_path, capsys, content, words):
    (tmp_path / "bad.pkl").write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        before_and_after(fpn(tmp_path / "bad.pkl"))
    assert "bad.pkl" in str(error.value) and capsys.readouterr().out == ""


def test_the_published_file_is_known_by_its_hash(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    write(tmp_path / "hub/checkpoints/R-50.pkl", {"conv1_w": np.zeros(3)})
    with pytest.raises(UserError, match=r"R-50.pkl is not the published file: its md5 is not b19105fd"):
        before_and_after(fpn("catalog://ImageNetPretrained/MSRA/R-50"))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("catalog://ImageNetPretrained/MSRA/R-50", "download_backbone.sh -d DIR ImageNetPretrained/MSRA/R-50"),
        ("catalog://ImageNetPretrained/MSRA/R-99", "after catalog:// stands one of ImageNetPretrained/MSRA/R-50"),
        (
            "https://server/folder/some%20file.pth",
            "download.py file -d DIR/hub/checkpoints/1d32597a5cc48519 https://server",
        ),
        ("https://server/resnet50-0676ba61.pth", "download.py file -d DIR/hub/checkpoints https://server"),
        ("nowhere/model.pth", "nowhere/model.pth; correct the path"),
    ],
)
def test_weights_that_are_not_there(tmp_path, monkeypatch, weights, words):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError) as error:
        before_and_after(fpn(weights))
    assert weights in str(error.value) and words in str(error.value)


def test_addresses_of_one_name_have_files_of_their_own(tmp_path, monkeypatch, capsys):
    """Where the program says that they belong; what torch.hub has put beside them is taken, and said."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    urls = [f"https://server/{number}/model%20final.pkl" for number in range(3)]
    for url in urls[:2]:
        with pytest.raises(UserError) as error:
            find(url)
        (where,) = re.findall(r"-d DIR/(\S+) https", str(error.value))
        write(tmp_path / where / "model final.pkl", {"of": url})
    assert [read(find(url))["of"] for url in urls[:2]] == urls[:2]
    assert not capsys.readouterr().err
    write(tmp_path / "hub/checkpoints/model final.pkl", {"of": "torch.hub"})
    assert [read(find(url))["of"] for url in urls] == [*urls[:2], "torch.hub"]
    said = capsys.readouterr().err
    assert said.count("is taken for it") == 1 and said.startswith(urls[2])
    hashed = tmp_path / "hub/checkpoints/net-0676ba61.pkl"
    write(hashed, {})
    assert find("https://one/net-0676ba61.pkl") == find("https://other/net-0676ba61.pkl") == hashed
    assert not capsys.readouterr().err


def test_every_weight_of_the_published_files_is_in_the_catalog():
    for path in CONFIGS.rglob("e2e_*.yaml"):
        weights = settings(path.relative_to(CONFIGS).with_suffix("").as_posix(), "none").weights
        assert weights == "none"
        for line in path.read_text().splitlines():
            if "WEIGHT:" in line:
                assert line.partition("catalog://")[2].rstrip('"') in CATALOG
