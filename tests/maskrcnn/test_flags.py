"""The flags and keys of the original programs, by their own names, and what they mean here."""

import shlex

import pytest

from detcore import UserError
from detcore.config import describe, from_dict, load, to_dict
from maskrcnn.config import ADOPTED, IGNORED_FLAGS, Config
from maskrcnn.flags import TRANSLATED, translate_flags
from maskrcnn.train import main


def read(line: str, **environ: str):
    return load(Config, translate_flags(shlex.split(line)), environ, IGNORED_FLAGS)


@pytest.fixture
def written(tmp_path):
    """A function that writes a YAML file and returns its name."""

    def write(text: str, name: str = "user.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("--skip-test", "skip_test", True), ("--skip_test", "skip_test", True), ("", "skip_test", False),
        ("--skip-eval", "skip_eval", True), ("--skip_eval", "skip_eval", True), ("", "infer_steps", -1),
        ("--infer_steps 7", "infer_steps", 7), ("--infer-steps -1", "infer_steps", -1),
        ("--max_steps 100", "solver_max_iter", 100), ("--max-steps 0", "solver_max_iter", 40000),
        ("--max_steps 100 SOLVER.MAX_ITER 7", "solver_max_iter", 100), ("--fp16", "precision", "auto"),
        ("--amp", "precision", "auto"), ("", "precision", "tf32"), ('DTYPE "float16"', "precision", "auto"),
        ("DTYPE float32", "precision", "tf32"), ("DTYPE bfloat16", "precision", "bf16"),
        ("--precision fp32", "precision", "fp32"), ("--skip_checkpoint", "save_checkpoint", False),
        ("--skip-checkpoint", "save_checkpoint", False), ("", "save_checkpoint", True),
        ("--json-summary d.out", "dllogger_file", "d.out"), ("--json_summary=d.out", "dllogger_file", "d.out"),
        ("--opts SOLVER.BASE_LR 0.02", "lr", 0.02), ("--opts --skip-test SOLVER.BASE_LR 0.02", "lr", 0.02),
        ("SOLVER.BASE_LR 2e-3", "lr", 0.002), ("SOLVER.BASE_LR=0.5", "lr", 0.5), ("--lr 0.5", "lr", 0.5),
        ("--solver-gamma 0.2", "solver_gamma", 0.2), ("SOLVER.MAX_ITER 9", "solver_max_iter", 9),
        ('SOLVER.STEPS "(360000, 480000)"', "solver_steps", (360000, 480000)),
        ("SOLVER.STEPS [1,2]", "solver_steps", (1, 2)), ("SOLVER.STEPS 5", "solver_steps", (5,)),
        ('SOLVER.STEPS "()"', "solver_steps", ()), ("--solver-steps 1 2", "solver_steps", (1, 2)),
        ("OUTPUT_DIR RESULTS", "output_dir", "RESULTS"), ("MODEL.DEVICE cpu", "device", "cpu"),
        ("MODEL.DEVICE cuda:0", "device", "cuda"), ("MODEL.MASK_ON True", "mask_on", True),
        ("MODEL.MASK_ON False", "mask_on", False), ("--mask-on", "mask_on", True),
        ('MODEL.WEIGHT ""', "weights", ""), ("MODEL.WEIGHT /data/R-50.pkl", "weights", "/data/R-50.pkl"),
        ('MODEL.WEIGHT "catalog://ImageNetPretrained/MSRA/R-101"', "weights",
         "catalog://ImageNetPretrained/MSRA/R-101"),
        ("""DATASETS.TRAIN '("my_dataset_train")'""", "datasets_train", ("my_dataset_train",)),
        ("""DATASETS.TRAIN '("my_dataset_train",)'""", "datasets_train", ("my_dataset_train",)),
        ("""DATASETS.TRAIN "('a_train', 'b_train')" """, "datasets_train", ("a_train", "b_train")),
        ("DATASETS.TEST my_dataset_val", "datasets_test", ("my_dataset_val",)),
        ("DATASETS.TEST ('a_val','b_val')", "datasets_test", ("a_val", "b_val")),
        ("MODEL.GROUP_NORM.DIM_PER_GP -1", "group_norm_dim_per_gp", -1), ("NHWC True", "mask_on", False),
        ("MODEL.RPN.STRADDLE_THRESH -1", "rpn_straddle_thresh", -1), ("INPUT.MIN_SIZE_TRAIN (640,)",
                                                                      "input_min_size_train", 640),
        ("PER_EPOCH_EVAL True", "per_epoch_eval", True), ("MIN_BBOX_MAP 0.3", "target_map", 0.3),
        ("MIN_MASK_MAP 0.2", "target_mask_map", 0.2), ("-b 4", "batch_size", 4), ("-b4", "batch_size", 4),
        ("MODEL.RESNETS.BACKBONE_OUT_CHANNELS 256", "backbone_out_channels", 256),
        ("DATALOADER.NUM_WORKERS 0", "workers", 0), ("--local_rank 3 --skip-test", "skip_test", True),
        ("--local-rank=3 --skip-test", "skip_test", True), ("--config-file ''", "lr", 0.001),
        ("""TEST.EXPECTED_RESULTS "[['bbox','AP',0.377,0.001]]" """, "test_expected_results", ("bbox:AP:0.377:0.001",)),
        ("""OUTPUT_DIR "results/Bob's (1" """, "output_dir", "results/Bob's (1"),
        ("DATASETS.TRAIN (a_train,b_train)", "datasets_train", ("a_train", "b_train")),
        ("SOLVER.GAMMA 0.2 --skip-test SOLVER.BASE_LR 0.5 -b 4", "lr", 0.5), ("MODEL.DEVICE cpu:0", "device", "cpu"),
        ("TEST.EXPECTED_RESULTS bbox:AP:0.377:0.001", "test_expected_results", ("bbox:AP:0.377:0.001",)),
    ],
)  # fmt: skip
def test_a_flag_or_key(line, name, value):
    found = getattr(read(line).config, name)
    assert (str(found) if name in ("output_dir", "dllogger_file") else found) == value


@pytest.mark.parametrize("flag", ["--config-file", "--config_file"])
@pytest.mark.parametrize("join", [" ", "="])
def test_the_readmes_override_example(flag, join):
    example = (
        f"{flag}{join}configs/e2e_faster_rcnn_R_50_FPN_1x.yaml --skip-eval DTYPE \"float16\" OUTPUT_DIR RESULTS "
        'SOLVER.BASE_LR 0.002 SOLVER.STEPS "(360000, 480000)"'
    )  # fmt: skip
    config = read(example).config
    assert (config.lr, config.solver_steps, config.precision) == (0.002, (360000, 480000), "auto")
    assert (config.backbone_conv_body, config.solver_max_iter, config.mask_on) == ("R-50-FPN", 90000, False)


def test_the_original_container_path_finds_the_own_file():
    config = read("--config-file /workspace/object_detection/configs/e2e_mask_rcnn_R_50_FPN_1x.yaml").config
    assert config.mask_on and config.lr == 0.02


def test_the_command_line_counts_before_the_environment_before_the_file_before_the_default(written):
    file = written("SOLVER:\n  BASE_LR: 1.0\n  MAX_ITER: 5\n  GAMMA: 0.5\n")
    loaded = read(f"--config-file {file}")
    assert (loaded.config.lr, loaded.sources["lr"]) == (1.0, "file SOLVER.BASE_LR")
    loaded = read(f"--config-file {file}", LR="2")
    assert (loaded.config.lr, loaded.sources["lr"]) == (2.0, "environment LR")
    loaded = read(f"SOLVER.BASE_LR 3 --config-file {file}", LR="2")
    assert (loaded.config.lr, loaded.sources["lr"]) == (3.0, "command line SOLVER.BASE_LR")
    assert (loaded.config.solver_gamma, loaded.config.momentum) == (0.5, 0.9)
    assert loaded.sources["momentum"] == "default"


def test_yaml_values_as_yacs_reads_them(written):
    config = read(
        "--config-file "
        + written(
            "MODEL:\n  RPN:\n    ANCHOR_SIZES: (8, 16)\n    NMS_THRESH: 7e-1\n    ASPECT_RATIOS: [1, 2]\n"
            'DATASETS:\n  TRAIN: ("x_train")\n  TEST: ["x_val"]\nSOLVER:\n  WARMUP_FACTOR: 1e-4\n'
        )
    ).config
    assert (config.rpn_anchor_sizes, config.rpn_nms_thresh, config.rpn_aspect_ratios) == ((8, 16), 0.7, (1.0, 2.0))
    assert (config.datasets_train, config.datasets_test) == (("x_train",), ("x_val",))
    assert config.solver_warmup_factor == 1e-4


def test_a_base_file_gives_what_the_file_leaves_out(written):
    written("MODEL:\n  MASK_ON: True\n  RPN:\n    NMS_THRESH: 0.6\n    MIN_SIZE: 3\n", "base.yaml")
    config = read("--config-file " + written("_BASE_: base.yaml\nMODEL:\n  RPN:\n    MIN_SIZE: 4\n")).config
    assert (config.mask_on, config.rpn_nms_thresh, config.rpn_min_size) == (True, 0.6, 4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("_BASE_: user.yaml\n", ["user.yaml", "leads back to itself"]), ("- 1\n", ["user.yaml", "YAML file"]),
        ("MODEL:\n  WEIGHT:\n", ["user.yaml", "MODEL.WEIGHT", "no value"]),
        ("MODEL: [\n", ["user.yaml", "YAML"]), ("_BASE_: none.yaml\n", ["none.yaml", "no such file"]),
        ("SOLVER:\n  BASE_LRR: 1\n", ["user.yaml", "SOLVER.BASE_LRR", "did you mean SOLVER.BASE_LR?"]),
        ("MODEL:\n  KEYPOINT_ON: True\n", ["user.yaml", "MODEL.KEYPOINT_ON True", "no keypoint head"]),
        ("SOLVER:\n  STEPS: (1, 2\n", ["user.yaml", "SOLVER.STEPS (1, 2", "no partner"]),
        ("DATASETS:\n  TRAIN: ('a_train', 'b_train'\n", ["user.yaml", "DATASETS.TRAIN", "no partner"]),
        ("SOLVER:\n  BASE_LR: fast\n", ["user.yaml", "SOLVER.BASE_LR", "'fast'"]),
        ("MODEL:\n  BACKBONE:\n    CONV_BODY: FBNet\n", ["user.yaml", "FBNet", "R-50-FPN"]),
    ],
)  # fmt: skip
def test_a_file_that_is_wrong(written, text, words):
    with pytest.raises(UserError) as error:
        read("--config-file " + written(text))
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("MODEL.RETINANET_ON True", ["MODEL.RETINANET_ON", "single_stage_detector"]),
        ("TEST.BBOX_AUG.ENABLED True", ["augmentation"]), ("INPUT.BRIGHTNESS 0.4", ["colours"]),
        ("MODEL.CLS_AGNOSTIC_BBOX_REG True", ["each class"]), ("INPUT.VERTICAL_FLIP_PROB 0.5", ["upside down"]),
        ('MODEL.RESNETS.STAGE_WITH_DCN "(False, True, True, True)"', ["deformable"]),
        ('INPUT.MIN_SIZE_TRAIN "(640, 800)"', ["INPUT.MIN_SIZE_TRAIN", "several scales"]),
        ("PATHS_CATALOG my/paths_catalog.py", ["--dataset-path", "my_dataset_train"]),
        ("MODEL.MASKON True", ["did you mean MODEL.MASK_ON?"]), ("model.mask_on True", ["did you mean MODEL.MASK_ON?"]),
        ("MODEL.MASK_ON maybe", ["MODEL.MASK_ON", "'maybe'", "True or False"]), ("MODEL.MASK_ON", ["needs a value"]),
        ("--lrr 0.1", ["unknown flag --lrr", "did you mean --lr?"]), ("SOLVER.GAMMA 0.1 --lrr 0.1 MODEL.MASK_ON True",
                                                                     ["unknown flag --lrr", "did you mean --lr?"]),
        ("--lrr=0.1", ["unknown flag --lrr"]), ("--no_such_thing", ["unknown flag --no-such-thing", "--help"]),
        ("-z 3", ["unknown flag -z"]), ("--lr 0.1 0.2", ["unexpected word '0.2'", "SOLVER.BASE_LR 0.01"]),
        ("MODEL.MASK_ON --lr 0.1", ["MODEL.MASK_ON", "needs a value"]),
        ("MODEL.DEVICE cuda:1", ["MODEL.DEVICE cuda:1", "CUDA_VISIBLE_DEVICES=1", "MODEL.DEVICE cuda"]),
        ('SOLVER.STEPS "(1, 2"', ["SOLVER.STEPS (1, 2", "no partner"]), ("SOLVER.STEPS 1,2)", ["SOLVER.STEPS 1,2)"]),
        ('SOLVER.STEPS "(1, 2]"', ["SOLVER.STEPS (1, 2]"]), ('--solver-steps "(1,2"', ["--solver-steps", "(1,2"]),
        ("""DATASETS.TRAIN '("a_train, "b_train")'""", ["DATASETS.TRAIN", "no partner"]),
        ("""DATASETS.TRAIN "('a_train'," """, ["DATASETS.TRAIN ('a_train',"]),
        ("""MODEL.WEIGHT "'R-50.pkl" """, ["MODEL.WEIGHT 'R-50.pkl", "no partner"]),
        ("MODEL.WEIGHT R-50.pkl)", ["MODEL.WEIGHT R-50.pkl)"]), ("""MODEL.MASK_ON "True'" """, ["MODEL.MASK_ON True'"]),
        ("SOLVER.WARMUP_METHOD exp", ["mlperf_linear"]), ("--skip-tests", ["did you mean --skip-test?"]),
        ("MODEL.RPN.USE_FPN True", ["R-50-C4", "-FPN"]),
        ("MODEL.BACKBONE.CONV_BODY R-50-FPN", ["MODEL.RPN.USE_FPN True is missing"]),
        ("MODEL.RPN.BG_IOU_THRESHOLD 0.8", ["MODEL.RPN.BG_IOU_THRESHOLD 0.8", "0.7"]),
        ("SOLVER.STEPS (2,1)", ["must rise"]),
        ("MODEL.GROUP_NORM.DIM_PER_GP 16", ["must be -1"]), ("--config-file none.yaml", ["none.yaml", "no such file"]),
        ("--config-file configs/e2e_mask_rcnn_R_50_FPN_1x.yml",
         ["did you mean configs/e2e_mask_rcnn_R_50_FPN_1x.yaml?"]),
        ("DTYPE float8", ["float8"]), ("SOLVER.MAX_ITER 1.5", ["SOLVER.MAX_ITER", "whole number"]),
    ],
)  # fmt: skip
def test_what_is_refused(line, words):
    with pytest.raises(UserError) as error:
        read(line)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    "line", ["NHWC True", "USE_TORCH_DDP False", "DATALOADER.HYBRID False", "AMP_VERBOSE True", "--local_rank 1"]
)
def test_what_has_no_effect_is_said(line):
    assert read(line).config == Config()
    assert len(read(line).notices) == 1


@pytest.mark.parametrize(
    ("line", "environ", "processes", "training", "evaluation"),
    [
        ("", {}, 8, 2, 1), ("", {}, 1, 16, 8), ("", {}, 16, 1, 1), ("SOLVER.IMS_PER_BATCH 96", {}, 8, 12, 1),
        ("-b 4", {}, 8, 4, 1), ("", {"BATCHSIZE": "4", "EVALBATCHSIZE": "3"}, 8, 4, 3),
        ("SOLVER.IMS_PER_BATCH 32", {"BATCHSIZE": "9"}, 8, 4, 1),
        ("--config-file configs/e2e_mask_rcnn_R_50_FPN_1x_bs96.yaml", {"BATCHSIZE": "1"}, 8, 1, 1),
        ("--config-file configs/e2e_mask_rcnn_R_50_FPN_1x_1GPU.yaml", {}, 1, 4, 1),
    ],
)  # fmt: skip
def test_batches_of_a_process(line, environ, processes, training, evaluation):
    loaded = read(line, **environ)
    config = loaded.config.over_processes(processes, loaded.sources)
    assert (config.batch_size, config.eval_batch_size) == (training, evaluation)
    assert config.solver_ims_per_batch == training * processes
    assert "processes" in loaded.sources["batch_size"] + loaded.sources["solver_ims_per_batch"]


def test_a_batch_that_the_processes_do_not_divide_is_refused():
    loaded = read("SOLVER.IMS_PER_BATCH 10")
    with pytest.raises(UserError, match=r"SOLVER.IMS_PER_BATCH 10 can't be divided by 4 processes"):
        loaded.config.over_processes(4, loaded.sources)


@pytest.mark.parametrize(
    ("line", "passes"),
    [
        ("SOLVER.ACCUMULATE_GRAD True SOLVER.ACCUMULATE_STEPS 4", 4), ("SOLVER.ACCUMULATE_STEPS 4", 1),
        ("SOLVER.ACCUMULATE_GRAD True", 1), ("--accumulate 4", 4), ("--accumulate 2 SOLVER.ACCUMULATE_GRAD True", 2),
    ],
)  # fmt: skip
def test_accumulation_is_on_where_the_original_has_it_on(line, passes):
    loaded = read(line)
    assert loaded.config.over_processes(1, loaded.sources).accumulate == passes


@pytest.mark.parametrize(
    ("line", "targets"),
    [
        ("", (None, None)), ("MIN_BBOX_MAP 0.3", (None, None)), ("PER_EPOCH_EVAL True", (0.377, None)),
        ("PER_EPOCH_EVAL True MODEL.MASK_ON True", (0.377, 0.342)),
        ("PER_EPOCH_EVAL True MIN_BBOX_MAP 0.3 MIN_MASK_MAP 0.2 MODEL.MASK_ON True", (0.3, 0.2)),
        ("--per-epoch-eval --target-map none --mask-on", (None, 0.342)),
        ("PER_EPOCH_EVAL True MIN_BBOX_MAP None MIN_MASK_MAP None MODEL.MASK_ON True", (None, None)),
    ],
)  # fmt: skip
def test_targets(line, targets):
    assert read(line).config.targets == targets


@pytest.mark.parametrize("mode", ["evaluate", "predict --images x"])
def test_evaluation_and_prediction_take_weights_of_others_too(mode):
    assert read(f"--mode {mode} MODEL.WEIGHT model_final.pth").config.checkpoint is None
    assert read(f"--mode {mode} --checkpoint best.pt").config.weights == ""
    with pytest.raises(UserError, match=r"say which weights to use with --checkpoint FILE"):
        read(f"--mode {mode}")


def test_help_names_every_key():
    text = describe(Config, "python -m maskrcnn.train", "")
    assert "MODEL.RPN.NMS_THRESH, --rpn-nms-thresh" in text and "SOLVER.BASE_LR, --lr" in text


def test_help_tells_the_originals_users_what_their_words_mean(capsys):
    """Of the flags that are no option here, and of those that are."""
    assert main(["--help"]) == 0
    _, _, epilog = capsys.readouterr().out.rpartition("show this text\n")
    flags = ("--skip-test", "--skip-eval", "--infer-steps", "--json-summary", "KEY VALUE", "--mode evaluate")
    assert all(word in epilog.replace("\n", " ") for word in (*TRANSLATED, *IGNORED_FLAGS, *flags))


def test_a_configuration_survives_a_checkpoint():
    config = read("--config-file configs/e2e_mask_rcnn_R_50_FPN_1x_bs64.yaml PER_EPOCH_EVAL True -b 4").config
    assert from_dict(Config, to_dict(config)) == config


def test_what_a_checkpoint_tells_evaluation_is_a_field():
    assert set(ADOPTED) <= set(Config.__dataclass_fields__) and "mask_on" in ADOPTED and "lr" not in ADOPTED
    assert len(set(ADOPTED)) == len(ADOPTED)
