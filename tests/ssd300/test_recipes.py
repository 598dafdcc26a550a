"""The recipes of configs/ for SSD300 are those of the original's scripts and of its fork for TPUs."""

import pytest

from tests.configs import FOLDER, configs_of, exports, settings

GPU = {  # GPUs, images a GPU, learning rate of 32 images, warm-up steps, precision, as in the original's scripts
    "A100_FP16_1GPU": (1, 256, 2.6e-3, 300, "fp16"),
    "A100_FP16_4GPU": (4, 256, 2.7e-3, 1200, "fp16"),
    "A100_FP16_8GPU": (8, 128, 2.7e-3, 1200, "fp16"),
    "A100_FP32_8GPU": (8, 128, 2.7e-3, 1200, "tf32"),
    "A100_TF32_1GPU": (1, 64, 2.6e-3, 300, "tf32"),
    "A100_TF32_4GPU": (4, 64, 2.6e-3, 300, "tf32"),
    "A100_TF32_8GPU": (8, 128, 2.7e-3, 1200, "tf32"),
    **{f"FP16_{n}GPU": (n, 64, 2.6e-3, 300, "fp16") for n in (1, 4, 8)},
    **{f"FP32_{n}GPU": (n, 32, 2.6e-3, 300, "fp32") for n in (1, 4, 8)},
    "DGXH100_001x08x128": (8, 128, 2.7e-3, 1200, "bf16"),
    "DGXH200_001x08x128": (8, 128, 2.7e-3, 1200, "bf16"),
    "DGXH100_002x08x064": (16, 64, 2.7e-3, 1200, "bf16"),
}
MODES = {  # mode, images, precision
    "FP16_EVAL": ("evaluate", 32, "fp16"),
    "FP32_EVAL": ("evaluate", 32, "fp32"),
    "FP16_INFERENCE_BENCHMARK": ("benchmark-inference", 64, "fp16"),
    "FP32_INFERENCE_BENCHMARK": ("benchmark-inference", 32, "fp32"),
}
TPU = {  # cores, images a core, micro-batches, warm-up steps, precision, log interval, workers
    "1CORE_BS64": (1, 64, 1, 1848, "fp32", 10, 4),
    "1CORE_BS128": (1, 128, 1, 924, "fp32", 10, 4),
    "1CORE_BS128_BF16": (1, 128, 1, 924, "bf16", 10, 4),
    "1CORE_BS1024": (1, 128, 8, 300, "fp32", 16, 8),
    "1CORE_BS2048": (1, 128, 16, 300, "fp32", 16, 8),
    "8CORE_BS1024": (8, 128, 1, 300, "bf16", 16, 8),
}


def test_all_systems_are_here():
    assert configs_of("ssd300").keys() == {f"SSD300_{name}" for name in (*GPU, *MODES, *TPU)}


@pytest.mark.parametrize("name", GPU)
def test_recipe(name):
    path = FOLDER / f"config_SSD300_{name}.sh"
    exported = exports(path)
    config, gpus = settings(exported), int(exported["DGXNNODES"]) * int(exported["DGXNGPU"])
    assert (gpus, config.batch_size, config.lr, config.warmup, config.precision) == GPU[name]
    assert f"global batch {gpus * config.batch_size}." in path.read_text().splitlines()[0]
    assert config.departures() == [] and config.mode == "train"


@pytest.mark.parametrize("name", TPU)
def test_recipe_on_a_tpu(name):
    path = FOLDER / f"config_SSD300_{name}.sh"
    exported = exports(path)
    config = settings(exported)
    found = (max(config.num_cores, 1), config.batch_size, config.accumulate, config.warmup, config.precision)
    assert (*found, config.log_interval, config.workers) == TPU[name]
    images = found[0] * config.batch_size * config.accumulate
    assert f"_BS{images}" in path.stem and f"global batch {images}." in path.read_text().splitlines()[0]
    assert config.device == "tpu" and config.lr == 2.6e-3 and config.departures() == []
    assert exported["SEED"] == "42" and config.seed == 42
    assert exported["DGXNNODES"] == exported["DGXNGPU"] == "1", "the program starts the cores' processes"
    assert str(config.save) == "{output}/checkpoints" and str(config.json_summary) == "{output}/summary.json"


@pytest.mark.parametrize("name", TPU)
def test_the_data_of_a_tpu_by_any_of_its_names(name):
    given: dict[str, str] = {}
    for variable in ("COCO_DIR", "DATA_DIR", "DATASET_DIR"):  # each counts before those in front of it
        given[variable] = f"/a folder/{variable}"
        assert exports(FOLDER / f"config_SSD300_{name}.sh", **given)["DATASET_DIR"] == given[variable]


@pytest.mark.parametrize("name", MODES)
def test_evaluation_and_benchmark(name):
    exported = exports(FOLDER / f"config_SSD300_{name}.sh")
    more = ["--checkpoint", "x.pt"] if name.endswith("EVAL") else []
    config = settings(exported, *more)
    images = config.eval_batch_size or config.batch_size
    assert (config.mode, images, config.precision) == MODES[name]
    assert exported["DGXNNODES"] == exported["DGXNGPU"] == "1"


def test_demo_is_small_and_open():
    exported = exports(FOLDER / "config_ssd300_cpu_demo.sh")
    config = settings(exported)
    assert exported["DGXNNODES"] == exported["DGXNGPU"] == "1" and config.device == "cpu" and not config.pretrained
    assert config.backbone == "resnet18_x0_25" and config.dataset == "custom" and config.target_map
    assert config.mlperf_org == "demonstration" and config.overwrite and config.gallery > 0 and config.departures()
