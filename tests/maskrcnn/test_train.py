"""The whole program, as a user starts it, on a few generated scenes."""

import base64
import json
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
from detcore.data.coco import CocoIndex
from detcore.data.transforms import read_image
from detcore.evaluation.coco import evaluate
from detcore.training.records import JsonSummary
from maskrcnn.config import Config
from maskrcnn.flags import translate_flags
from maskrcnn.inference import main
from maskrcnn.last_checkpoint import LAST
from maskrcnn.records import Records
from maskrcnn.train import complete, notes
from tests import programs
from tests.programs import ROOT, kill_at

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


def command(out: Path, *more: str, scenes: Path | None = None) -> list[str]:
    data = ["--dataset", "custom", "--dataset-path", str(scenes)] if scenes else []
    return [
        sys.executable, "-m", "maskrcnn.train", *data, "--device", "cpu", "--workers", "0", "--seed", "3",
        "--log-interval", "1", "--max-boxes", "16", "OUTPUT_DIR", str(out), *more,
    ]  # fmt: skip


def run(out: Path, *more: str, scenes: Path | None = None, code: int | None = 0) -> subprocess.CompletedProcess:
    done = programs.run(command(out, *more, scenes=scenes))
    assert code is None or done.returncode == code, done.stderr[-3000:]
    return done


def training(*more: str) -> list[str]:
    """The words of eight steps."""
    file = "configs/gn_baselines/scratch_e2e_mask_rcnn_R_50_FPN_3x_gn.yaml"
    return ["--config-file", file, "DATASETS.TRAIN", "()", "DATASETS.TEST", "()", *NET, *RECIPE, *more]


def train(scenes: Path, out: Path, *more: str, code: int | None = 3) -> subprocess.CompletedProcess:
    """Eight steps, which reach no target: exit code 3."""
    return run(out, *training(*more), scenes=scenes, code=code)


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    said = train(scenes, folder, "--json-summary", str(folder / "dllogger.json"))
    (folder / "stderr.txt").write_text(said.stderr)
    (folder / "stdout.txt").write_text(said.stdout)
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
    assert len(lines) == 10
    for step, line in enumerate(lines[:8], 1):
        head = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} maskrcnn_benchmark\.trainer INFO: "
        assert re.fullmatch(rf"{head}eta: \d+:\d\d:\d\d  iter: {step}  {body}  lr: \d\.\d{{6}}  max mem: \d+", line)
    total = re.search(r"Total training time: 0:\d\d:\d\d \((\d+\.\d{4}) s / it\)$", lines[8])
    speed = re.fullmatch(r"Training perf is: (\d+\.\d{6}) FPS", lines[9])  # 2 images a step
    assert float(speed[1]) == pytest.approx(2 / float(total[1]), rel=0.01)
    assert lines[9] in (trained / "stdout.txt").read_text().splitlines()
    rates = [float(re.search(r"lr: (\S+)", line)[1]) for line in lines[:8]]
    assert rates == pytest.approx([0.01 / 3, 0.02 / 3, *[0.01] * 4, *[0.001] * 2], abs=1e-6)


def test_means_are_over_steps_and_the_last_evaluation_is_no_training(tmp_path, capsys):
    """Intervals of two, one and two steps; a resumed run begins to count anew."""
    config = Config(output_dir=tmp_path)
    records = Records(config, JsonSummary(tmp_path / "s.json"), 4, lambda: 0.5)
    records("start", {})
    records("run_start", {"step": 10})
    common = {"terms": {}, "lr": 0.1, "data_wait": 0.0, "epoch": 1, "last_step": 16}
    for step, loss, rate, time_s in ((12, 3.0, 4.0, 2.0), (13, 9.0, 2.0, 4.0), (15, 6.0, 1.0, 12.0)):
        records("step", {"step": step, "loss": loss, "images_per_s": rate, "time_s": time_s, **common})
    records("end", {"status": "aborted", "time_s": 50.0})
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert "loss: 6.0000 (5.0000)" in lines[1] and "time: 1.5000 (1.3333)" in lines[1]
    assert "loss: 6.0000 (5.4000)" in lines[2] and "time: 2.0000 (2.4000)" in lines[2] and "eta: 0:00:02 " in lines[2]
    assert lines[3].endswith("Total training time: 0:00:12 (2.4000 s / it)")
    assert lines[4] == "Training perf is: 1.666667 FPS" == capsys.readouterr().out.strip()
    last = json.loads((tmp_path / "s.json").read_text().splitlines()[-1].removeprefix("DLLL "))["data"]
    assert last == {"e2e_train_time": 12.0, "train_perf_fps": pytest.approx(5 * 4 / 12)}


def test_the_summary_has_the_originals_keys(trained):
    data = [json.loads(line.removeprefix("DLLL "))["data"] for line in (trained / "dllogger.json").open()]
    assert {"learning_rate", "loss", "loss_mask", "loss_objectness"} <= data[0].keys()
    assert sum({"BBOX_mAP", "MASK_mAP"} <= one.keys() for one in data) == 2
    assert {"e2e_train_time", "train_perf_fps"} <= data[-1].keys()


def test_the_console_says_what_goes_on(trained):
    said = (trained / "stderr.txt").read_text()
    lines = (
        r"model: [\d,]+ parameters, [\d,]+ of them train", "ops: ", "steps: ",
        "The network begins with random weights.", "training: instances_train.json: 8 images", "validation: ",
        r"epoch 1/2 \[####............\] 1/4  loss .*loss_mask .* images/s  data wait .*ETA ",
        "evaluating after epoch 1: 3 images", r"evaluation after epoch 1: AP .*segm_AP ",
    )  # fmt: skip
    at = 0
    for line in lines:
        found = re.compile(f"^{line}", re.MULTILINE).search(said, at)
        assert found, f"{line!r} does not come after character {at} of {said}"
        at = found.end()


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


def test_killed_and_resumed_to_the_same_bits(trained, scenes, tmp_path):
    """In the second epoch, after a checkpoint in the middle of the first: order, draws and momentum go on."""
    words = training("SOLVER.CHECKPOINT_PERIOD", "3")
    kill_at(command(tmp_path, *words, scenes=scenes), tmp_path, 5)
    assert state(tmp_path)["step"] < 8
    run(tmp_path, *words, "--resume", scenes=scenes, code=3)
    again, whole = state(tmp_path), state(trained)
    assert again["step"] == whole["step"] == 8 and again["model"].keys() == whole["model"].keys()
    assert all(torch.equal(again["model"][name], value) for name, value in whole["model"].items())
    momenta = [[one["momentum_buffer"] for one in found["optimizer"]["state"].values()] for found in (again, whole)]
    assert all(torch.equal(mine, other) for mine, other in zip(*momenta, strict=True)) and momenta[0]


def test_a_finished_run_goes_on_to_a_higher_max_iter_as_if_it_had_it_from_the_start(trained, scenes, tmp_path):
    """Stopped within an epoch. PER_EPOCH_EVAL and MAX_ITER decide nothing about the weights."""
    short = ("PER_EPOCH_EVAL", "False", "SOLVER.MAX_ITER", "6")
    train(scenes, tmp_path, *short, code=0)
    said = train(scenes, tmp_path, *short, code=2).stderr
    assert "has ended with success, at step 6" in said and "give a higher SOLVER.MAX_ITER than 6" in said
    assert "--overwrite begins anew" in said and "--epochs" not in said.rpartition("error: ")[2]
    other = train(scenes, tmp_path, "SOLVER.MAX_ITER", "8", "SOLVER.GAMMA", "0.5", code=2).stderr
    assert "SOLVER.GAMMA was 0.1, is 0.5" in other and "--overwrite" in other
    train(scenes, tmp_path, "SOLVER.MAX_ITER", "8")
    again, whole = state(tmp_path), state(trained)
    assert again["step"] == whole["step"] == 8 and state(tmp_path, "model_final.pth")["step"] == 8
    assert all(torch.equal(again["model"][name], value) for name, value in whole["model"].items())
    lines = [json.loads(line) for line in (tmp_path / "progress.jsonl").open()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 9))


def test_evaluates_the_last_checkpoint_with_masks(trained):
    summary = trained / "inference.json"
    done = run(trained, "--mode", "evaluate", "--json-summary", str(summary))
    said = done.stdout
    rate = r"Total inference time: 0:\d\d:\d\d \(\d+\.\d{4} s / img per device, on 1 devices\)"
    assert re.search(rf"^{rate}\nInference perf is: \d+\.\d\d FPS", said, re.MULTILINE)
    assert "evaluating instances_val.json, with " in done.stderr and "images: 3 of 3 (100%)" in done.stderr
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
    assert data["inference_perf_fps"] == pytest.approx(3 / data["e2e_infer_time"]) and "latency_avg" not in data


def test_each_set_is_evaluated_in_its_turn(trained, scenes, tmp_path):
    """By one process, and by two that share the work; each gets the numbers that it has alone."""
    for name, split in (("one", "val"), ("two", "train")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "images_val").symlink_to(scenes / split)
        (tmp_path / name / "instances_val.json").symlink_to(scenes / f"annotations/instances_{split}.json")
    sets = ("--dataset-path", str(tmp_path), "--mode", "evaluate", "--checkpoint", str(trained / "last.pt"))
    both = (*sets, "DATASETS.TEST", '("one_val", "two_val")')
    summary = tmp_path / "log.json"
    said = run(tmp_path / "both", *both, "--json-summary", str(summary)).stdout
    assert said.count("Total inference time: ") == 2 and "3 images, " in said and "8 images, " in said
    data = [json.loads(line.removeprefix("DLLL "))["data"] for line in summary.open()]
    assert [one["eval_dataset_name"] for one in data] == ["one_val", "two_val"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc_per_node=2",
         *command(tmp_path / "shared", *both)[1:]],
        cwd=ROOT, capture_output=True, text=True, env=programs.environment(), timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for k, name in enumerate(("one_val", "two_val")):
        alone = tmp_path / name
        run(alone, *sets, "DATASETS.TEST", name)
        wanted = json.loads((alone / "evaluation.json").read_text())
        assert wanted["AP"] == data[k]["BBOX_mAP"]
        for folder in ("both", "shared"):
            assert json.loads((tmp_path / folder / f"inference/{name}/evaluation.json").read_text()) == wanted
            assert (tmp_path / folder / f"inference/{name}/segm.json").is_file()
    (tmp_path / "two/instances_val.json").unlink()
    refused = run(tmp_path / "gone", *both, code=2)
    assert "two_val: there is no" in refused.stderr and "Total inference" not in refused.stdout


def test_part_of_the_images_without_their_numbers(trained, tmp_path):
    summary = tmp_path / "log.json"
    said = run(tmp_path, "--mode", "evaluate", "--checkpoint", str(trained / "last.pt"), "--skip-eval",
               "--infer_steps", "1", "TEST.IMS_PER_BATCH", "2", "--json-summary", str(summary)).stdout  # fmt: skip
    data = json.loads(summary.read_text().splitlines()[-1].removeprefix("DLLL "))["data"]
    assert 0 < data["latency_avg"] == data["latency_90"] == data["latency_95"] == data["latency_99"]  # of one batch
    assert data["latency_avg"] < data["e2e_infer_time"] and data["inference_perf_fps"] > 0
    assert "a batch of 2 a process" in said and re.search(r"mean ms +median +p90 +p95 +p99\n( +[\d.]+){5}\n", said)
    assert said.startswith("2 images, ") and "images/s" in said and not (tmp_path / "evaluation.json").exists()
    rows = json.loads((tmp_path / "inference/custom/bbox.json").read_text())
    assert len({row["image_id"] for row in rows}) == 2  # a batch


def test_the_benchmark_has_the_originals_keys(trained, scenes, tmp_path):
    summary = tmp_path / "log.json"
    short = ("--benchmark-iterations", "2", "--benchmark-warmup", "0", "--json-summary", str(summary))
    train(scenes, tmp_path, "--mode", "benchmark", "--checkpoint", str(trained / "last.pt"), *short, code=0)
    data = [json.loads(line.removeprefix("DLLL "))["data"] for line in summary.open()]
    assert [sorted(one) for one in data] == 2 * [
        ["train_perf_fps"], ["inference_perf_fps", "latency_90", "latency_95", "latency_99", "latency_avg"],
    ]  # fmt: skip
    results = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    assert data[3]["inference_perf_fps"] == results[3]["images_per_s"]
    assert data[3]["latency_99"] == pytest.approx(results[3]["p99_ms"] / 1e3)
    assert data[3]["latency_90"] <= data[3]["latency_95"] <= data[3]["latency_99"]


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


def test_proposals_have_an_average_recall(scenes, tmp_path):
    """In training, where it makes best.pt and ends nothing, and of the checkpoint: the same from what was written."""
    short = ("SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "(3,)", "--json-summary", str(tmp_path / "log.json"))
    said = train(scenes, tmp_path, "MODEL.RPN_ONLY", "True", *short, code=0).stderr
    (score,) = (event["value"] for event in events(tmp_path) if event["key"] == "eval_accuracy")
    assert 0 < score <= 1 and (tmp_path / "best.pt").is_file()
    assert f"evaluation after epoch 1: AR@1000 {score:.4f} (no target)" in said
    expected = ("TEST.EXPECTED_RESULTS", f"[['box_proposal', 'AR@1000', {score}, 0.001]]")
    done = run(tmp_path, "--mode", "evaluate", "--checkpoint", str(tmp_path / "model_final.pth"), *expected)
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["AR@1000"] == pytest.approx(score) and found["AR@100"] <= found["AR@1000"] and "AP" not in found
    assert f"AR@1000 {score:.4f}" in done.stdout and "PASS: box_proposal AR@1000" in done.stdout
    rows = [(one["image_id"], *one["bbox"], one["score"], 1) for one in
            json.loads((tmp_path / "inference/custom/bbox.json").read_text())]  # fmt: skip
    truth = CocoIndex.open(scenes / "annotations/instances_val.json", scenes / "val").ground_truth()
    again = evaluate(truth, np.array(rows), proposals=True)
    assert again == pytest.approx({name: found[name] for name in again})
    data = [json.loads(line.removeprefix("DLLL "))["data"] for line in (tmp_path / "log.json").open()]
    assert [one["AR@1000"] for one in data if "AR@1000" in one] == [score]


def test_settings_that_do_not_fit_the_body_are_said():
    words = ["--config-file", "configs/e2e_mask_rcnn_R_50_FPN_1x.yaml"]

    def said(*more: str) -> str:
        return " ".join(notes(load(Config, translate_flags([*words, *more]), {}).config, 80))

    assert said() == ""
    assert "ANCHOR_STRIDE (8, 16, 32, 64, 128)" in said("MODEL.RPN.ANCHOR_STRIDE", "(8,16,32,64,128)")
    assert "ROI_BOX_HEAD.POOLER_SCALES" in said("MODEL.ROI_BOX_HEAD.POOLER_SCALES", "(.5,.25,.125,.0625)")
    assert "81 outputs" in said("MODEL.ROI_BOX_HEAD.NUM_CLASSES", "21")
    several = said("DATASETS.TEST", '("coco_2014_val", "my_dataset_val")')
    assert "Evaluates on coco_2014_val, the first of DATASETS.TEST" in several
    assert "changes nothing" in said("DATALOADER.ASPECT_RATIO_GROUPING", "False")
    for random in (["--no-pretrained"], ["MODEL.WEIGHT", ""]):
        assert "FREEZE_CONV_BODY_AT 2 keeps the first stages at their random weights" in said(*random)
        assert said(*random, "MODEL.BACKBONE.FREEZE_CONV_BODY_AT", "0") == said("--synthetic", *random) == ""


def test_prediction_goes_down_to_the_score_that_is_asked_for(trained):
    """Also below the threshold that the checkpoint's run evaluated with, .001."""
    words = ["--mode", "predict", "--images", ".", "--checkpoint", str(trained / "last.pt"), "--score-threshold"]

    def threshold(score: str) -> float:
        found = load(Config, translate_flags([*words, score]), {})
        return complete(found.config, found.sources).roi_heads_score_thresh

    assert threshold("0.5") == 0.001 and threshold("0.0001") == 0.0001


def test_a_tpu_is_refused():
    found = load(Config, translate_flags(["--device", "tpu"]), {})
    with pytest.raises(UserError, match="one step for each of the 2000 proposals"):
        complete(found.config, found.sources)


@pytest.mark.parametrize(
    "words",
    ["MODEL.ROI_MASK_HEAD.CONV_LAYERS ()", "MODEL.RPN.ASPECT_RATIOS ()", "INPUT.MAX_SIZE_TRAIN 100",
     "MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS_THRESHOLD 0.4 MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS True"],
)  # fmt: skip
def test_settings_that_nothing_fits_are_refused(words):
    with pytest.raises(UserError, match=re.escape(words.split()[0].rpartition(".")[2])):
        load(Config, translate_flags(words.split()), {})


def test_a_threshold_that_the_original_does_not_look_at_changes_nothing():
    words = "MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS_THRESHOLD 0.4 MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS False"
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


def test_the_notebook_is_committed_with_its_outputs():
    """Those of one execution, in order: small, without errors, warnings and paths of a machine."""
    text = (ROOT / "maskrcnn/inference.ipynb").read_text()
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [1, 2, 3] and len(text) < 300_000
    outputs = [output for cell in code for output in cell["outputs"]]
    assert [output["output_type"] for output in outputs] == ["stream"] + ["display_data"] * 4
    assert outputs[0]["name"] == "stdout" and len(outputs[0]["text"]) == 4
    assert all(re.match(r"\d{6}\.jpg (\w+ 0\.\d\d \(\d+ pixels\)(, )?)+$", line) for line in outputs[0]["text"])
    for output in outputs[1:]:
        assert base64.b64decode(output["data"]["image/jpeg"])[:2] == b"\xff\xd8"
    assert not re.search(r"/(home|root|tmp|work|Users|usr|opt)/", text)


def test_the_notebook_runs_and_shows_pictures(trained, scenes, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "maskrcnn/inference.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        cell.outputs, cell.execution_count = [], None
    monkeypatch.setenv("MASKRCNN_CHECKPOINT", str(trained / "last.pt"))
    monkeypatch.setenv("MASKRCNN_IMAGES", str(scenes / "val"))
    monkeypatch.setenv("MASKRCNN_THRESHOLD", "0.001")
    there = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(notebook, timeout=200, kernel_name="python3", resources=there).execute()
    outputs = [output for cell in code for output in cell.outputs]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert text.count(".jpg") == 3 and "pixels)" in text
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
