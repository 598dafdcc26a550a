"""Mask R-CNN's configs of configs/ have the published recipes."""

import pytest

from tests.configs import FOLDER, configs_of, exports, settings

README = ((60000, 80000), 90000, 500, 1 / 3, "linear", 2000)
SHIPPED = ((36000, 48000), 50000, 500, 1 / 3, "linear", 4000)
SPEED = ((30000, 40000), 3665, 500, 1 / 3, "linear", 4000)
LATER = ((12000, 16000), 16667, 800, 1e-4, "linear", 12000)
ONE_NODE = ((12000, 16000), 40000, 625, 1.92e-4, "mlperf_linear", 12000)
TRAINING = {  # nodes, images, lr, (steps, iterations, warm-up, its factor, its method, proposals), precision
    "FP16_8xV100-16G": (1, 2, 0.02, README, "fp16"), "FP32_8xV100-16G": (1, 2, 0.02, README, "fp32"),
    "FP16_8xV100-16G_BS32": (1, 4, 0.04, SHIPPED, "fp16"), "FP32_8xV100-16G_BS32": (1, 4, 0.04, SHIPPED, "fp32"),
    "TRAIN_BENCHMARK_FP16_8xV100-16G": (1, 4, 0.04, SPEED, "fp16"),
    "TRAIN_BENCHMARK_FP32_8xV100-16G": (1, 4, 0.04, SPEED, "fp32"),
    "AMP_8xA100-80G": (1, 12, 0.12, LATER, "fp16"), "TF32_8xA100-80G": (1, 12, 0.12, LATER, "tf32"),
    "DGXA100_001x08x012": (1, 12, 0.12, ONE_NODE, "fp16"), "DGXH100_001x08x012": (1, 12, 0.12, ONE_NODE, "fp16"),
    "DGXH100_008x08x004": (
        8, 4, 0.24, ((6125, 8000), 20000, 2300, 0.24 / 2300, "mlperf_linear", 1000), "fp16",
    ),
    "DGXH100_032x08x001": (32, 1, 0.24, ((5625, 7500), 20000, 1800, 1.33e-4, "mlperf_linear", 1000), "fp16"),
}  # fmt: skip
CHECKPOINT = {  # GPUs, skip-eval, precision
    "EVAL_FP16_8xV100-16G": (8, False, "fp16"), "INFERENCE_FP16_1xV100-16G": (1, True, "fp16"),
    "INFERENCE_BENCHMARK_FP16_1xV100-16G": (1, True, "fp16"), "INFERENCE_BENCHMARK_FP32_1xV100-16G": (1, True, "fp32"),
}  # fmt: skip


def of(name: str, *more: str):
    exported = exports(FOLDER / f"config_MASKRCNN_{name}.sh")
    return exported, settings(exported, *more)


def test_all_systems_are_here():
    assert configs_of("maskrcnn").keys() == {f"MASKRCNN_{name}" for name in (*TRAINING, *CHECKPOINT)}


@pytest.mark.parametrize("name", TRAINING)
def test_recipe(name):
    exported, config = of(name)
    nodes, images, lr, schedule, precision = TRAINING[name]
    processes = nodes * int(exported["DGXNGPU"])
    assert (int(exported["DGXNNODES"]), config.batch_size, config.lr, config.precision) == (
        nodes,
        images,
        lr,
        precision,
    )
    found = (config.solver_steps, config.solver_max_iter, config.solver_warmup_iters, config.solver_warmup_factor)
    assert found[:3] == schedule[:3] and found[3] == pytest.approx(schedule[3], rel=1e-3)
    assert (config.solver_warmup_method, config.rpn_fpn_post_nms_top_n_train) == schedule[4:]
    sources = dict.fromkeys(vars(config), "file") | {"batch_size": "environment BATCHSIZE"}
    assert config.over_processes(processes, sources).solver_ims_per_batch == processes * images
    text = (FOLDER / f"config_MASKRCNN_{name}.sh").read_text()
    assert f"global batch {processes * images}." in text.splitlines()[0]
    assert (config.mode, config.epochs, config.mask_on, config.skip_test) == ("train", 0, True, "BENCHMARK" in name)
    assert config.weights == "catalog://ImageNetPretrained/MSRA/R-50" and config.backbone_conv_body == "R-50-FPN"


@pytest.mark.parametrize("name", [name for name in TRAINING if name.startswith("DGX")])
def test_mlperf(name):
    _, config = of(name)
    assert config.targets == (0.377, 0.339) and config.datasets_train == ("coco_2017_train",)
    assert (config.input_min_size_train, config.input_max_size_train) == (800, 1333)
    candidates = config.rpn_fpn_post_nms_top_n_train
    per_image = candidates / config.batch_size if config.rpn_fpn_post_nms_per_batch else candidates
    assert per_image == 1000


@pytest.mark.parametrize("name", CHECKPOINT)
def test_checkpoints(name):
    gpus, skips, precision = CHECKPOINT[name]
    exported, config = of(name, "--checkpoint", "x.pth")
    assert (config.mode, config.skip_eval, config.precision) == ("evaluate", skips, precision)
    assert config.eval_batch_size == 1 and int(exported["DGXNGPU"]) == gpus
    assert config.datasets_test == ("coco_2014_minival",)
