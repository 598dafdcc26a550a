"""Mask R-CNN, Faster R-CNN and RPN as maskrcnn-benchmark and NVIDIA published them, and what a run of them can choose.

Each key of the original's configuration tree is one field: lower case, dots as underscores, without "MODEL.". The key
itself is an alias of the field's flag: `MODEL.RPN.NMS_THRESH 0.7` is `--rpn-nms-thresh 0.7` (`maskrcnn.flags`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from detcore import UserError
from detcore.config import DEFAULT, above, at_least, between, option, redefine
from detcore.data.layouts import LAYOUTS, Layout
from detcore.detection.config import DetectionConfig
from detcore.nn.schedule import WARMUPS
from maskrcnn.catalog import find, is_coco
from maskrcnn.last_checkpoint import last_checkpoint
from maskrcnn.model_config import ModelConfig, key_option

BENCHMARK = "maskrcnn"  # submission_benchmark of the log
_EVALUATION = {
    "rpn_pre_nms_top_n_test", "rpn_post_nms_top_n_test", "rpn_fpn_post_nms_top_n_test", "roi_heads_score_thresh",
    "roi_heads_nms", "roi_heads_detections_per_img", "roi_mask_head_postprocess_masks",
    "roi_mask_head_postprocess_masks_threshold", "input_min_size_test", "input_max_size_test", "datasets_test",
    "test_ims_per_batch", "test_expected_results", "test_expected_results_sigma_tol",
}  # fmt: skip
"""What only evaluation reads."""


@dataclass(frozen=True)
class Config(ModelConfig):
    """A run. The defaults are the original's, of config/defaults.py."""

    device: str = redefine(DetectionConfig, "device", "auto", flags=("MODEL.DEVICE",))
    precision: str = redefine(
        DetectionConfig, "precision", "tf32", flags=("DTYPE",), help="arithmetic; tf32 is fp32 with the GPU's TF32 "
        "products (elsewhere fp32 alone). DTYPE float32 is tf32; DTYPE float16, --fp16 and --amp are auto: bf16 on a "
        "GPU (fp16 on one without bf16), fp32 on the CPU. fp16 scales the loss as well",
    )  # fmt: skip
    output_dir: Path = redefine(DetectionConfig, "output_dir", Path("results/run"), flags=("OUTPUT_DIR",))
    weights: str = redefine(
        DetectionConfig, "weights", "", flags=("--backbone-path", "MODEL.WEIGHT"),
        help="weights to start from: catalog://ImageNetPretrained/MSRA/R-50 and the like, found in TORCH_HOME; a file "
        "of this program, maskrcnn-benchmark, Caffe2 or torchvision; without: random ones",
    )  # fmt: skip
    pretrained: bool = redefine(
        DetectionConfig, "pretrained", True, help="start from --weights, where it says something; never downloaded"
    )
    save_checkpoint: bool = key_option(
        "SAVE_CHECKPOINT",
        True,
        "write model_<iteration>.pth files",
    )
    dllogger_file: Path | None = option(
        None, "file that gets dllogger's JSON lines", flags=("--json-summary",), group="Run"
    )
    skip_test: bool = option(False, "no evaluation after training", group="Run")
    skip_eval: bool = option(
        False, "detections are made and written, and no mAP is computed", group="Predict and benchmark"
    )
    infer_steps: int = option(-1, "evaluation: batches at most; -1: all", group="Predict and benchmark")

    epochs: int = redefine(
        DetectionConfig, "epochs", 0, help="epochs; 0: as many as SOLVER.MAX_ITER needs", check=at_least(0)
    )
    batch_size: int = redefine(
        DetectionConfig, "batch_size", 0, help="images per process and forward pass; 0: SOLVER.IMS_PER_BATCH over the "
        "processes", check=between(0, 65536),
    )  # fmt: skip
    eval_batch_size: int = redefine(
        DetectionConfig, "eval_batch_size", 0, help="images per process in evaluation; 0: TEST.IMS_PER_BATCH over the "
        "processes",
    )  # fmt: skip
    accumulate: int = redefine(
        DetectionConfig, "accumulate", 1, flags=("--gradient-accumulation-steps", "SOLVER.ACCUMULATE_STEPS"),
        help="forward passes per optimizer step; all other counts of the schedule are of optimizer steps",
    )  # fmt: skip
    solver_accumulate_grad: bool = key_option(
        "SOLVER.ACCUMULATE_GRAD", False, "SOLVER.ACCUMULATE_STEPS counts (--accumulate always does)"
    )
    lr: float = redefine(
        DetectionConfig, "lr", 0.001, flags=("SOLVER.BASE_LR",), help="learning rate, of the images of a step over "
        "all processes",
    )  # fmt: skip
    solver_ims_per_batch: int = key_option(
        "SOLVER.IMS_PER_BATCH", 16, "images of a forward pass over all processes", check=at_least(1)
    )
    solver_max_iter: int = key_option("SOLVER.MAX_ITER", 40000, "optimizer steps of the run", check=at_least(1))
    solver_bias_lr_factor: float = key_option(
        "SOLVER.BIAS_LR_FACTOR", 2.0, "learning rate of biases to that of weights", check=above(0)
    )
    momentum: float = option(
        0.9, "of SGD", flags=("SOLVER.MOMENTUM",), check=between(0, 0.99999), group="SOLVER"
    )  # fmt: skip
    weight_decay: float = option(
        5e-4, "of weights", flags=("SOLVER.WEIGHT_DECAY",), check=between(0, 1), group="SOLVER"
    )  # fmt: skip
    solver_weight_decay_bias: float = key_option("SOLVER.WEIGHT_DECAY_BIAS", 0.0, "of biases", check=between(0, 1))
    solver_gamma: float = key_option(
        "SOLVER.GAMMA", 0.1, "factor of the learning rate at each of STEPS", check=above(0)
    )
    solver_steps: tuple[int, ...] = key_option("SOLVER.STEPS", (30000,), "optimizer steps at which it falls")
    solver_warmup_factor: float = key_option(
        "SOLVER.WARMUP_FACTOR", 1 / 3, "part of the learning rate at the start; mlperf_linear: rise of a step",
        check=at_least(0),
    )  # fmt: skip
    solver_warmup_iters: int = key_option(
        "SOLVER.WARMUP_ITERS", 500, "optimizer steps of the warm-up", env="WARMUP_STEPS", check=at_least(0)
    )
    solver_warmup_method: str = key_option("SOLVER.WARMUP_METHOD", "linear", "its course", choices=WARMUPS)
    solver_checkpoint_period: int = key_option(
        "SOLVER.CHECKPOINT_PERIOD", 2500, "optimizer steps from one checkpoint to the next", check=at_least(1)
    )
    per_epoch_eval: bool = key_option(
        "PER_EPOCH_EVAL", False, "evaluate every epoch, and stop where both targets are reached"
    )
    target_map: float | None = redefine(
        DetectionConfig, "target_map", 0.377, flags=("MIN_BBOX_MAP",), help="AP of boxes to reach, with PER_EPOCH_EVAL"
    )
    target_mask_map: float | None = option(
        0.342, "AP of masks to reach, with PER_EPOCH_EVAL", flags=("MIN_MASK_MAP",), check=between(0, 1),
        group="Training",
    )  # fmt: skip

    input_min_size_train: int = key_option("INPUT.MIN_SIZE_TRAIN", 800, "short side in training", check=at_least(1))
    input_max_size_train: int = key_option(
        "INPUT.MAX_SIZE_TRAIN", 1333, "long side in training at most", check=at_least(1)
    )
    input_min_size_test: int = key_option("INPUT.MIN_SIZE_TEST", 800, "short side in evaluation", check=at_least(1))
    input_max_size_test: int = key_option(
        "INPUT.MAX_SIZE_TEST", 1333, "long side in evaluation at most", check=at_least(1)
    )
    input_pixel_mean: tuple[float, float, float] = key_option(
        "INPUT.PIXEL_MEAN", (102.9801, 115.9465, 122.7717), "taken off the channels, in the order that they have"
    )
    input_pixel_std: tuple[float, float, float] = key_option(
        "INPUT.PIXEL_STD", (1.0, 1.0, 1.0), "the channels' divisors", check=above(0)
    )
    input_to_bgr255: bool = key_option("INPUT.TO_BGR255", True, "channels B, G, R of 0 to 255; else R, G, B of 0 to 1")
    dataset_path: Path = redefine(DetectionConfig, "dataset_path", Path("/datasets"))
    max_boxes: int = redefine(DetectionConfig, "max_boxes", 512)
    max_edges: int = option(
        0, "edges of an image's masks that a batch has room for; 0: what the fullest image of the data set has",
        check=at_least(0), group="Data",
    )  # fmt: skip
    datasets_train: tuple[str, ...] = key_option(
        "DATASETS.TRAIN", (), "names of training sets below --dataset-path; without: --dataset says where they are"
    )
    datasets_test: tuple[str, ...] = key_option(
        "DATASETS.TEST", (), "names of the sets to evaluate on; in training the first"
    )
    workers: int = redefine(
        DetectionConfig, "workers", 4, flags=("-j", "--num-workers", "DATALOADER.NUM_WORKERS")
    )  # fmt: skip
    dataloader_size_divisibility: int = key_option(
        "DATALOADER.SIZE_DIVISIBILITY", 0, "canvases are multiples of it; 0: of 32", check=at_least(0)
    )
    dataloader_aspect_ratio_grouping: bool = key_option(
        "DATALOADER.ASPECT_RATIO_GROUPING", True, "upright and wide images in steps of their own"
    )
    test_ims_per_batch: int = key_option("TEST.IMS_PER_BATCH", 8, "images over all processes", check=at_least(1))
    test_expected_results: tuple[str, ...] = key_option(
        "TEST.EXPECTED_RESULTS", (), "results to compare with, each as task:metric:mean:deviation (bbox:AP:0.377:0.001)"
    )
    test_expected_results_sigma_tol: float = key_option(
        "TEST.EXPECTED_RESULTS_SIGMA_TOL", 4.0, "deviations that are no surprise", check=above(0)
    )

    FREE_ON_RESUME: ClassVar[frozenset[str]] = DetectionConfig.FREE_ON_RESUME | _EVALUATION | {
        "save_checkpoint", "dllogger_file", "skip_test", "skip_eval", "infer_steps", "solver_max_iter",
        "solver_checkpoint_period", "per_epoch_eval", "target_mask_map",
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.rpn_use_fpn or self.roi_heads_use_fpn) and not self.has_fpn:
            raise UserError(
                f"MODEL.BACKBONE.CONV_BODY {self.backbone_conv_body} makes no pyramid; choose one that ends in -FPN, "
                "or leave out MODEL.RPN.USE_FPN and MODEL.ROI_HEADS.USE_FPN"
            )
        if self.has_fpn and not self.rpn_use_fpn:
            raise UserError(f"MODEL.BACKBONE.CONV_BODY {self.backbone_conv_body}: MODEL.RPN.USE_FPN True is missing")
        if self.rpn_use_fpn and len(self.rpn_anchor_sizes) != len(self.rpn_anchor_stride):
            raise UserError("MODEL.RPN.ANCHOR_SIZES and MODEL.RPN.ANCHOR_STRIDE: a pyramid has one of each a level")
        for part in ("rpn", "roi_heads"):
            low, high = (getattr(self, f"{part}_{kind}_iou_threshold") for kind in ("bg", "fg"))
            if low > high:
                raise UserError(
                    f"MODEL.{part.upper()}.BG_IOU_THRESHOLD {low} is above MODEL.{part.upper()}.FG_IOU_THRESHOLD {high}"
                )
        if (self.group_norm_dim_per_gp > 0) == (self.group_norm_num_groups > 0):
            raise UserError("MODEL.GROUP_NORM: one of DIM_PER_GP and NUM_GROUPS must be -1, and the other above 0")
        for name in (
            "roi_mask_head_conv_layers", "roi_box_head_pooler_scales", "roi_mask_head_pooler_scales",
            "rpn_aspect_ratios", "rpn_anchor_sizes", "rpn_anchor_stride",
        ):  # fmt: skip
            if not getattr(self, name):
                raise UserError(f"MODEL.{name.upper()} (): at least one value is needed")
        for part in ("train", "test"):
            low, high = (getattr(self, f"input_{kind}_size_{part}") for kind in ("min", "max"))
            if low > high:
                raise UserError(f"INPUT.MIN_SIZE_{part.upper()} {low} is above INPUT.MAX_SIZE_{part.upper()} {high}")
        threshold = self.roi_mask_head_postprocess_masks_threshold
        if self.roi_mask_head_postprocess_masks and threshold != 0.5:  # else the original doesn't look at it either
            raise UserError(
                f"MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS_THRESHOLD {threshold}: masks begin at a probability of 0.5; "
                "leave the key out"
            )
        if list(self.solver_steps) != sorted(set(self.solver_steps)):
            raise UserError(f"SOLVER.STEPS {self.solver_steps}: they must rise")

    @property
    def has_weights(self) -> bool:
        return bool(self.checkpoint or self.weights) or last_checkpoint(self.output_dir) is not None

    @property
    def has_fpn(self) -> bool:
        return self.backbone_conv_body.endswith("-FPN")

    @property
    def length(self) -> tuple[str, str]:
        return super().length if self.epochs else ("solver_max_iter", "SOLVER.MAX_ITER")

    @property
    def targets(self) -> tuple[float | None, float | None]:
        """AP of boxes and of masks that end the run, None for none; only with PER_EPOCH_EVAL, not of proposals."""
        if not self.per_epoch_eval or self.rpn_only:
            return None, None
        return self.target_map, self.target_mask_map if self.mask_on else None

    @property
    def layout(self) -> Layout:
        trains = self.mode not in ("evaluate", "benchmark-inference", "predict")
        names = self.datasets_train or self.datasets_test if trains else self.datasets_test or self.datasets_train
        if not names:
            return super().layout
        return LAYOUTS[_layout_of(names)]

    @property
    def class_ids(self) -> Sequence[int] | None:
        """With 91 classes on COCO its own ids, as torchvision's networks have them: ten of the 90 never occur."""
        known = self.layout == LAYOUTS["coco"] and self.roi_box_head_num_classes == 91
        return range(1, 91) if known else None

    def split(self, name: str) -> tuple[Path, Path]:
        """As of every detector; of several sets by name the first."""
        names = {"train": self.datasets_train, "val": self.datasets_test}[name]
        if not names:
            return super().split(name)
        annotations, images = find(names[0], self.dataset_path)
        own = getattr(self, f"{name}_data_path") or (self.shards and self.shards / name)
        return getattr(self, f"{name}_annotations_file") or annotations, own or images

    def train_sets(self) -> list[tuple[Path, Path]]:
        """As of every detector; the sets by name first."""
        if not self.datasets_train:
            return super().train_sets()
        named = [find(name, self.dataset_path) for name in self.datasets_train[1:]]
        others = dataclasses.replace(self, datasets_train=()).train_sets()[1:] if self.also_train_on else []
        return [self.split("train"), *named, *others]

    def with_said_dataset(self, sources: dict[str, str]) -> tuple["Config", list[str]]:
        """The config without those DATASETS.TRAIN and DATASETS.TEST of a file that --dataset overrules; and what to
        know, in sentences.

        sources: as `detcore.config.load` has them; is told. Names of the layout that --dataset says stay. Raises
        UserError where names of the command line are of another layout than its --dataset.
        """
        changes, notes = {}, []
        for name, key in (("datasets_train", "DATASETS.TRAIN"), ("datasets_test", "DATASETS.TEST")):
            sets = getattr(self, name)
            if sources["dataset"] == DEFAULT or not sets or _layout_of(sets) == self.dataset:
                continue
            if _weight(sources[name]) >= _weight(sources["dataset"]):
                raise UserError(
                    f"--dataset {self.dataset} and {key} {','.join(sets)} name different data sets: leave --dataset "
                    f'out to take the names, or give {key} "()" to take --dataset'
                )
            changes[name], sources[name] = (), "command line --dataset"
            notes.append(f"--dataset {self.dataset} overrules {key} {','.join(sets)} of the configuration file")
        return dataclasses.replace(self, **changes), notes

    def over_processes(self, processes: int, sources: dict[str, str]) -> "Config":
        """The config with the batches of a process, and without accumulation where the original has none.

        sources: as `detcore.config.load` has them: whether IMS_PER_BATCH or the size of a process counts. Is told what
        came of it. Raises UserError where a training batch can't be divided by the processes.
        """
        changes = {}
        for name, whole in (("batch_size", "solver_ims_per_batch"), ("eval_batch_size", "test_ims_per_batch")):
            own, total = getattr(self, name), getattr(self, whole)
            if own and _weight(sources[name]) >= _weight(sources[whole]):
                changes[whole], sources[whole] = own * processes, f"{name} of {processes} processes"
                continue
            if name == "batch_size" and total % processes:
                raise UserError(
                    f"SOLVER.IMS_PER_BATCH {total} can't be divided by {processes} processes; choose a multiple"
                )
            changes[name], sources[name] = -(-total // processes), f"{whole} over {processes} processes"
        if sources["accumulate"].endswith("SOLVER.ACCUMULATE_STEPS") and not self.solver_accumulate_grad:
            changes["accumulate"], sources["accumulate"] = 1, "SOLVER.ACCUMULATE_GRAD False"
        return dataclasses.replace(self, **changes)


def _layout_of(names: Sequence[str]) -> str:
    """The layout, as --dataset names it, of data sets by name: COCO's classes, or their own."""
    return "coco" if all(is_coco(name) for name in names) else "custom"


def _weight(source: str) -> int:
    """Which of two sources counts: the higher."""
    return (DEFAULT, "file", "environment", "command").index(source.split()[0])


ADOPTED = (
    *(f.name for f in dataclasses.fields(ModelConfig) if f.name not in DetectionConfig.__dataclass_fields__),
    "input_min_size_test", "input_max_size_test", "input_pixel_mean", "input_pixel_std", "input_to_bgr255",
    "dataloader_size_divisibility", "antialias", "dataset", "datasets_test", "dataset_path", "val_data_path",
    "val_annotations_file", "shards",
)  # fmt: skip
"""What evaluation and prediction take from the checkpoint where the user says nothing else."""

_DEVICE = "the program does it as the device wants it"
IGNORED_FLAGS: Mapping[str, tuple[int, str]] = {
    # flags and keys of the original programs: number of values, what to know
    "--local-rank": (1, "the launcher's variables say it"),
    "NHWC": (1, "the memory layout follows the device"),
    "USE_TORCH_DDP": (1, _DEVICE),
    "DATALOADER.HYBRID": (1, "--loader chooses who decodes"),
    "AMP_VERBOSE": (1, "there is no loss scaler that talks; progress.jsonl has what it does"),
}
