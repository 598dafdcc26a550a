"""EfficientDet's configs of configs/ have the published recipes."""

import pytest

from detcore.detection.detector import open_index
from tests.configs import FOLDER, configs_of, exports, settings
from tests.dataprep.waymo_cases import CONTEXTS, frames_of, run, write_v1

TRAINING = {  # nodes, images, lr, warm-up epochs, noise, epochs, precision, seed
    "D0_AMP_8xA100-80G": (1, 150, 1.63, 50, (0.4, 0.9), 300, "fp16", 12711),
    "D0_TF32_8xA100-80G": (1, 80, 0.9, 50, (0.4, 0.9), 300, "tf32", 12711),
    "D0_AMP_8xV100-32G": (1, 60, 0.65, 20, (0.4, 0.9), 300, "fp16", 12711),
    "D0_FP32_8xV100-32G": (1, 30, 0.375, 20, (0.4, 0.9), 300, "fp32", 12711),
    "D0_AMP_32xV100-32G": (4, 60, 2.42, 90, (0.55, 0.9), 400, "fp16", 31),
    "D0_FP32_32xV100-32G": (4, 30, 1.5, 120, (0.55, 0.9), 400, "fp32", 31),
    "DGXH100_001x08x150": (1, 150, 1.63, 50, (0.4, 0.9), 300, "bf16", 12711),
    "DGXH200_001x08x150": (1, 150, 1.63, 50, (0.4, 0.9), 300, "bf16", 12711),
    "DGXH100_004x08x060": (4, 60, 2.42, 90, (0.55, 0.9), 400, "bf16", 31),
    "DGXH200_004x08x060": (4, 60, 2.42, 90, (0.55, 0.9), 400, "bf16", 31),
}
SPEED = {  # images, precision
    "AMP_A100-80G": (150, "fp16"), "TF32_A100-80G": (80, "tf32"), "AMP_V100-32G": (60, "fp16"),
    "FP32_V100-32G": (30, "fp32"),
}  # fmt: skip
WAYMO = {"WAYMO_AMP_8xA100-80G": ("backbone",), "WAYMO_UNFROZEN_AMP_8xA100-80G": ()}
WAYMO_VALIDATION = "WAYMO_VALIDATION_AMP_8xA100-80G"


def of(name: str, *more: str):
    exported = exports(FOLDER / f"config_EFFICIENTDET_{name}.sh")
    return exported, settings(exported, *more)


def test_all_systems_are_here():
    modes = [f"D0_{what}_{name}" for what in ("BENCHMARK", "VALIDATION", "INFERENCE") for name in SPEED]
    named = {f"EFFICIENTDET_{name}" for name in (*TRAINING, *modes, *WAYMO, WAYMO_VALIDATION)}
    assert configs_of("efficientdet").keys() == named


@pytest.mark.parametrize("name", TRAINING)
def test_recipe(name):
    exported, config = of(name)
    nodes, gpus = int(exported["DGXNNODES"]), int(exported["DGXNGPU"])
    found = (nodes, config.batch_size, config.lr, config.warmup_epochs, config.lr_noise, config.epochs)
    assert (*found, config.precision, config.seed) == TRAINING[name] and gpus == 8
    text = (FOLDER / f"config_EFFICIENTDET_{name}.sh").read_text()
    assert f"global batch {nodes * gpus * config.batch_size}." in text.splitlines()[0]
    assert config.mode == "train" and config.departures() == [] and config.total_epochs == config.epochs + 10
    assert (config.model, config.opt, config.ema_decay, config.eval_after) == (
        "efficientdet_d0",
        "momentum",
        0.999,
        200,
    )
    assert config.sync_bn and config.smoothing == 0 and config.clip_norm == 10


@pytest.mark.parametrize("name", SPEED)
def test_speed_and_checkpoints(name):
    images, precision = SPEED[name]
    exported, config = of(f"D0_BENCHMARK_{name}")
    assert (config.mode, config.batch_size, config.precision) == ("benchmark-training", images, precision)
    assert config.benchmark_iterations == 500 and exported["DGXNGPU"] == "8"
    for what, inference in (("VALIDATION", False), ("INFERENCE", True)):
        exported, config = of(f"D0_{what}_{name}", "--checkpoint", "x.pth")
        assert (config.mode, config.eval_batch_size, config.precision) == ("evaluate", 8, precision)
        assert config.use_ema and config.inference == inference and exported["DGXNGPU"] == "1"


@pytest.mark.parametrize("name", WAYMO)
def test_waymo(name):
    _, config = of(name)
    assert (config.batch_size, config.lr, config.warmup_epochs, config.epochs) == (8, 0.2, 1, 24)
    assert config.image_size == (1536, 1536) and config.class_ids == (1, 2, 3) and config.metric == "L2_ALL_NS"
    assert config.freeze_layers == WAYMO[name] and config.remove_weights == ("class_net", "box_net", "anchor")
    assert config.eval_after == 24 and config.save_checkpoint_interval == 1 and not config.lr_noise


def test_waymo_validation():
    exported, config = of(WAYMO_VALIDATION, "--checkpoint", "x.pth")
    assert config.waymo and config.eval_batch_size == 10 and exported["DGXNGPU"] == "8"
    assert config.image_size == (1536, 1536) and config.mode == "evaluate" and config.use_ema


def test_waymos_configs_read_what_the_converter_writes(tmp_path):
    """Records of both splits, converted here, are found by each config's own words and DATASET_DIR."""
    for seed, split in enumerate(("training", "validation")):
        write_v1(tmp_path / "raw" / split, frames_of(CONTEXTS[seed], seed=seed))
        assert run(tmp_path / "raw", tmp_path / "waymo" / split, "--dataset", split) == 0
    for name in (*WAYMO, WAYMO_VALIDATION):
        exported = exports(FOLDER / f"config_EFFICIENTDET_{name}.sh", DATASET_DIR=str(tmp_path / "waymo"))
        config = settings(exported, "--checkpoint", "x.pth")
        config.check_folders()
        for part in ("val",) if config.mode == "evaluate" else ("train", "val"):
            index = open_index(config, part)
            assert len(index) == 15 and index.box_count().sum() > 0 and index.category_ids.tolist() == [1, 2, 3]
            assert index.path(0).is_file()


def test_demo_is_small_and_open():
    exported = exports(FOLDER / "config_efficientdet_cpu_demo.sh")
    config = settings(exported)
    assert exported["DGXNNODES"] == exported["DGXNGPU"] == "1" and config.device == "cpu" and not config.pretrained
    assert config.dataset == "custom" and config.target_map and config.total_epochs == config.epochs
    assert config.mlperf_org == "demonstration" and config.overwrite and config.gallery > 0 and config.departures()
