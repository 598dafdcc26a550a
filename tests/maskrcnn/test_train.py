"""The whole program, as a user starts it, on a few generated scenes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

import hubconf
from detcore import UserError
from detcore.config import load
from detcore.data.transforms import read_image
from maskrcnn.config import Config
from maskrcnn.flags import translate_flags
from maskrcnn.inference import main
from maskrcnn.last_checkpoint import LAST
from maskrcnn.train import complete, notes

ROOT = Path(__file__).resolve().parents[2]
NET = [
    "MODEL.BACKBONE.CONV_BODY", "R-18-FPN", "MODEL.BACKBONE.OUT_CHANNELS", "16", "MODEL.GROUP_NORM.NUM_GROUPS", "4",
    "MODEL.RPN.ANCHOR_SIZES", "(8,16,32,64,128)", "MODEL.RPN.PRE_NMS_TOP_N_TRAIN", "50",
    "MODEL.RPN.PRE_NMS_TOP_N_TEST", "50", "MODEL.RPN.POST_NMS_TOP_N_TRAIN", "20", "MODEL.RPN.POST_NMS_TOP_N_TEST", "20",
    "MODEL.RPN.FPN_POST_NMS_TOP_N_TRAIN", "40", "MODEL.RPN.FPN_POST_NMS_TOP_N_TEST", "20",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16", "MODEL.ROI_HEADS.DETECTIONS_PER_IMG", "10",
    "MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM", "32", "MODEL.ROI_MASK_HEAD.CONV_LAYERS", "(16,)", "INPUT.MIN_SIZE_TRAIN", "64",
    "INPUT.MAX_SIZE_TRAIN", "96", "INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "96",
]  # fmt: skip
RECIPE = [
    "SOLVER.IMS_PER_BATCH", "2", "TEST.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "8", "SOLVER.STEPS", "(6,)",
    "SOLVER.BASE_LR", "0.01", "SOLVER.WARMUP_ITERS", "2", "SOLVER.CHECKPOINT_PERIOD", "4", "PER_EPOCH_EVAL", "True",
    "MODEL.ROI_HEADS.SCORE_THRESH", "0.001",
]  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Eight training and three validation scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    command = [sys.executable, "tools/make_scenes.py", "--out", folder, "--train", "8", "--val", "3", "--size", "64"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def run(out: Path, *more: str, scenes: Path | None = None, code: int | None = 0) -> subprocess.CompletedProcess:
    data = ["--dataset", "custom", "--dataset-path", str(scenes)] if scenes else []
    command = [
        sys.executable, "-m", "maskrcnn.train", *data, "--device", "cpu", "--workers", "0", "--seed", "3",
        "--log-interval", "1", "--max-boxes", "16", "OUTPUT_DIR", str(out), *more,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert code is None or done.returncode == code, done.stderr[-3000:]
    return done


def train(scenes: Path, out: Path, *more: str, code: int | None = 3) -> subprocess.CompletedProcess:
    """Eight steps, which reach no target: exit code 3."""
    file = "configs/gn_baselines/scratch_e2e_mask_rcnn_R_50_FPN_3x_gn.yaml"
    return run(out, "--config-file", file, "DATASETS.TRAIN", "()", "DATASETS.TEST", "()", *NET, *RECIPE, *more,
               scenes=scenes, code=code)  # fmt: skip


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(scenes, folder, "--json-summary", str(folder / "dllogger.json"))
    return folder


def events(folder: Path) -> list[dict]:
    lines = (folder / "result_0.txt").read_text().splitlines()
    return [json.loads(line.partition(":::MLLOG ")[2]) for line in lines]


def state(folder: Path, name: str = "last.pt") -> dict:
    return torch.load(folder / name, weights_only=True)


def test_the_log_has_what_the_rules_of_3_1_want(trained):
    found = {event["key"]: event["value"] for event in events(trained)}
    wanted = {
        "submission_benchmark": "maskrcnn", "global_batch_size": 2, "opt_base_learning_rate": 0.01,
        "opt_learning_rate_warmup_steps": 2, "opt_learning_rate_warmup_factor": pytest.approx(1 / 3),
        "num_image_candidates": 40, "opt_learning_rate_decay_factor": 0.1, "opt_learning_rate_decay_steps": [6],
        "min_image_size": 64, "max_image_size": 96, "train_samples": 8, "eval_samples": 3,
    }  # fmt: skip
    assert {key: found[key] for key in wanted} == wanted
    accuracies = [event for event in events(trained) if event["key"] == "eval_accuracy"]
    assert [event["metadata"]["epoch_num"] for event in accuracies] == [1, 2]
    assert all(event["value"].keys() == {"BBOX", "SEGM"} for event in accuracies)


def test_what_lies_in_the_folder(trained):
    assert {"last.pt", "best.pt", "model_0000004.pth", "model_final.pth"} <= {path.name for path in trained.iterdir()}
    assert (trained / LAST).read_text().strip() == str(trained / "model_final.pth")
    assert state(trained, "model_0000004.pth")["step"] == 4


def test_the_lines_of_the_original(trained):
    lines = (trained / "log.txt").read_text().splitlines()
    number = r"\d+\.\d{4} \(\d+\.\d{4}\)"
    terms = ("loss", "loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask", "time")
    body = "  ".join(f"{name}: {number}" for name in (*terms, "data"))
    assert len(lines) == 9
    for step, line in enumerate(lines[:8], 1):
        head = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} maskrcnn_benchmark\.trainer INFO: "
        assert re.fullmatch(rf"{head}eta: \d+:\d\d:\d\d  iter: {step}  {body}  lr: \d\.\d{{6}}  max mem: \d+", line)
    assert re.search(r"Total training time: 0:\d\d:\d\d \(\d+\.\d{4} s / it\)$", lines[8])
    rates = [float(re.search(r"lr: (\S+)", line)[1]) for line in lines[:8]]
    assert rates == pytest.approx([0.01 / 3, 0.02 / 3, *[0.01] * 4, *[0.001] * 2], abs=1e-6)


def test_the_summary_has_the_originals_keys(trained):
    data = [json.loads(line.removeprefix("DLLL "))["data"] for line in (trained / "dllogger.json").open()]
    assert {"learning_rate", "loss", "loss_mask", "loss_objectness"} <= data[0].keys()
    assert sum({"BBOX_mAP", "MASK_mAP"} <= one.keys() for one in data) == 2
    assert {"e2e_train_time", "train_perf_fps"} <= data[-1].keys()


def test_biases_learn_twice_as_fast_and_do_not_decay(trained):
    groups = state(trained)["optimizer"]["param_groups"]
    assert [g["lr"] for g in groups] == pytest.approx([0.001, 0.002])
    assert [g["weight_decay"] for g in groups] == [1e-4, 0]


def test_resumed_to_the_same_bits(trained, scenes, tmp_path):
    """From the checkpoint of the fourth step, with the samplers' random numbers; found by last_checkpoint alone."""
    (tmp_path / "last.pt").write_bytes((trained / "model_0000004.pth").read_bytes())
    (tmp_path / LAST).write_text(str(tmp_path / "last.pt"))
    said = train(scenes, tmp_path).stderr
    assert f"has a file {LAST}" in said
    again, whole = state(tmp_path), state(trained)
    assert again["step"] == whole["step"] == 8
    assert all(torch.equal(again["model"][name], value) for name, value in whole["model"].items())


def test_evaluates_the_last_checkpoint_with_masks(trained):
    summary = trained / "inference.json"
    said = run(trained, "--mode", "evaluate", "--json-summary", str(summary)).stdout
    assert "Total inference time: 0:00:" in said
    found = json.loads((trained / "evaluation.json").read_text())
    last = [json.loads(line) for line in (trained / "progress.jsonl").open()]
    metrics = [line["metrics"] for line in last if line["kind"] == "eval"][-1]
    names = ("AP", "AP50", "segm_AP", "segm_AR100")
    assert {name: found[name] for name in names} == pytest.approx({name: metrics[name] for name in names})
    boxes, masks = (json.loads((trained / f"inference/custom/{kind}.json").read_text()) for kind in ("bbox", "segm"))
    assert len(boxes) == len(masks) > 0
    assert boxes[0].keys() == {"image_id", "category_id", "bbox", "score"}
    assert masks[0].keys() == {"image_id", "category_id", "segmentation", "score"}
    data = json.loads(summary.read_text().splitlines()[-1].removeprefix("DLLL "))["data"]
    assert data["BBOX_mAP"] == found["AP"] and data["MASK_mAP"] == found["segm_AP"] and data["e2e_infer_time"] > 0


def test_part_of_the_images_without_their_numbers(trained, tmp_path):
    said = run(tmp_path, "--mode", "evaluate", "--checkpoint", str(trained / "last.pt"), "--skip-eval",
               "--infer_steps", "1", "TEST.IMS_PER_BATCH", "2").stdout  # fmt: skip
    assert said.startswith("2 images, ") and "images/s" in said and not (tmp_path / "evaluation.json").exists()
    rows = json.loads((tmp_path / "inference/custom/bbox.json").read_text())
    assert len({row["image_id"] for row in rows}) == 2  # a batch


def test_expected_results_are_compared(trained, tmp_path):
    expected = ("TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 0.9, 0.001], ['segm', 'AP', 0.0, 0.3]]")
    said = run(tmp_path, "--mode", "evaluate", "--checkpoint", str(trained / "last.pt"), *expected).stdout
    assert re.search(r"^FAIL: bbox AP 0\.\d{4}, expected 0\.9 \+- 0\.004$", said, re.MULTILINE)
    assert re.search(r"^PASS: segm AP 0\.\d{4}, expected 0 \+- 1\.2$", said, re.MULTILINE)


def test_a_last_checkpoint_that_names_an_older_one_is_refused(trained, scenes, tmp_path):
    for name in ("last.pt", "model_0000004.pth"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    (tmp_path / LAST).write_text("model_0000004.pth")
    said = train(scenes, tmp_path, "SOLVER.MAX_ITER", "12", code=2).stderr
    assert "names model_0000004.pth, of step 4, but the run is at step 8" in said


def test_proposals_have_no_ap(scenes, tmp_path):
    train(scenes, tmp_path, "MODEL.RPN_ONLY", "True", "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "(1,)", code=None)
    assert not any(event["key"] == "eval_accuracy" for event in events(tmp_path))
    refused = run(tmp_path, "--mode", "evaluate", "--checkpoint", str(tmp_path / "model_final.pth"), code=2).stderr
    assert "proposals have no class" in refused


def test_settings_that_do_not_fit_the_body_are_said():
    words = ["--config-file", "configs/e2e_mask_rcnn_R_50_FPN_1x.yaml"]

    def said(*more: str) -> str:
        return " ".join(notes(load(Config, translate_flags([*words, *more]), {}).config, 80))

    assert said() == ""
    assert "ANCHOR_STRIDE (8, 16, 32, 64, 128)" in said("MODEL.RPN.ANCHOR_STRIDE", "(8,16,32,64,128)")
    assert "ROI_BOX_HEAD.POOLER_SCALES" in said("MODEL.ROI_BOX_HEAD.POOLER_SCALES", "(.5,.25,.125,.0625)")
    assert "81 outputs" in said("MODEL.ROI_BOX_HEAD.NUM_CLASSES", "21")
    assert "changes nothing" in said("DATALOADER.ASPECT_RATIO_GROUPING", "False")


def test_prediction_goes_down_to_the_score_that_is_asked_for(trained):
    """Also below the threshold that the checkpoint's run evaluated with, .001."""
    words = ["--mode", "predict", "--images", ".", "--checkpoint", str(trained / "last.pt"), "--score-threshold"]

    def threshold(score: str) -> float:
        found = load(Config, translate_flags([*words, score]), {})
        return complete(found.config, found.sources).roi_heads_score_thresh

    assert threshold("0.5") == 0.001 and threshold("0.0001") == 0.0001


@pytest.mark.parametrize(
    "words",
    ["MODEL.ROI_MASK_HEAD.CONV_LAYERS ()", "MODEL.RPN.ASPECT_RATIOS ()", "INPUT.MAX_SIZE_TRAIN 100",
     "MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS_THRESHOLD 0.4"],
)  # fmt: skip
def test_settings_that_nothing_fits_are_refused(words):
    with pytest.raises(UserError, match=re.escape(words.split()[0].rpartition(".")[2])):
        load(Config, translate_flags(words.split()), {})


def test_predicts_masks_with_the_checkpoint_alone(trained, scenes, tmp_path):
    image = sorted((scenes / "val").iterdir())[0]
    checkpoint = ("--checkpoint", str(trained / "last.pt"), "--images", str(image), "--score-threshold", "0.001")
    run(tmp_path, "--mode", "predict", *checkpoint)
    content = json.loads((tmp_path / "predictions/detections.json").read_text())
    size = [content["images"][0]["height"], content["images"][0]["width"]]
    assert content["annotations"]
    for one in content["annotations"]:
        assert one["segmentation"]["size"] == size
        assert coco_mask.area(one["segmentation"]) == one["area"]


def test_both_targets_end_the_run(scenes, tmp_path):
    train(scenes, tmp_path, "MIN_BBOX_MAP", "0", "MIN_MASK_MAP", "0", code=0)
    assert state(tmp_path)["step"] == 4  # after the first epoch
    (stop,) = (event for event in events(tmp_path) if event["key"] == "run_stop")
    assert stop["metadata"]["status"] == "success"
    assert (tmp_path / LAST).read_text().strip() == str(tmp_path / "model_final.pth")
    assert state(tmp_path, "model_final.pth")["step"] == 4


def test_a_last_checkpoint_that_is_gone_is_named(tmp_path):
    (tmp_path / LAST).write_text("gone.pth")
    said = run(tmp_path, "--mode", "evaluate", code=None)
    assert said.returncode == 2 and "gone.pth, which does not exist" in said.stderr


def test_the_demo_of_the_original(trained, scenes):
    """As on one's own program: the network sees what prediction sees, and draws what it finds."""
    path = sorted((scenes / "val").iterdir())[0]
    image = read_image(path)
    demo = hubconf.maskrcnn(trained / "last.pt", confidence_threshold=0.001, device="cpu")
    (found,) = main([path], trained / "last.pt", confidence_threshold=0.001, device="cpu")
    again = demo.compute_prediction(np.ascontiguousarray(image.permute(1, 2, 0).numpy()[..., ::-1]))
    assert len(found.labels) == len(found.boxes) == len(found.scores) == len(found.masks) > 0
    assert set(found.labels) <= {"circle", "cross", "ring", "square", "star", "triangle"}
    assert np.array_equal(found.masks, again.masks) and np.array_equal(found.boxes, again.boxes)
    assert (np.diff(found.scores) <= 0).all() and found.masks.shape[1:] == image.shape[1:]
    for box, mask in zip(found.boxes, found.masks, strict=True):
        rows, columns = np.nonzero(mask)
        inside = (columns >= box[0] - 2) & (columns <= box[2] + 2) & (rows >= box[1] - 2) & (rows <= box[3] + 2)
        assert inside.all()
    bgr = np.ascontiguousarray(image.permute(1, 2, 0).numpy()[..., ::-1])
    drawn = demo.run_on_opencv_image(bgr)
    assert drawn.shape == bgr.shape and (drawn != bgr).any()
    with pytest.raises(UserError, match="uint8"):
        demo.compute_prediction(np.zeros((4, 4), np.uint8))


def test_the_notebook_runs_and_shows_pictures(trained, scenes, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "maskrcnn/inference.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    monkeypatch.setenv("MASKRCNN_CHECKPOINT", str(trained / "last.pt"))
    monkeypatch.setenv("MASKRCNN_IMAGES", str(scenes / "val"))
    monkeypatch.setenv("MASKRCNN_THRESHOLD", "0.001")
    there = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(notebook, timeout=200, kernel_name="python3", resources=there).execute()
    outputs = [output for cell in code for output in cell.outputs]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert text.count(".jpg") == 3 and "pixels)" in text
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
