"""SSD300 v1.1 as NVIDIA published it, and what a run of it can choose."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from detcore import UserError
from detcore.config import DEFAULT, above, at_least, between, option, redefine
from detcore.detection.config import DetectionConfig

BENCHMARK = "ssd300"  # submission_benchmark of the log; no ruleset of 5.1 has it
AUGMENTATIONS = ("ssd", "flip", "none")
BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet18_x0_25")
OPTIMIZERS = ("sgd", "adam")
IMAGE_SIZE = (300, 300)
SCORE_THRESHOLD, TOPK_PER_CLASS, NMS_THRESHOLD, DETECTIONS_PER_IMAGE = 0.05, 200, 0.5, 200
LR_BATCH = 32  # images of a step that --lr stands for
DECAY = 0.1  # of the learning rate, at each epoch of --multistep
MODES = {"training": "train", "evaluation": "evaluate"}
"""The original's names of the modes that have another one here."""
BENCHMARKS = ("benchmark", "benchmark-training", "benchmark-inference")
TRAINING_MODES = ("train", "benchmark", "benchmark-training")


@dataclass(frozen=True)
class Config(DetectionConfig):
    """A run of SSD300. The defaults are the original's, `legacy` says where they differ."""

    mode: str = redefine(
        DetectionConfig, "mode", "train", help="what to do; benchmark measures training and inference",
        choices=("train", "evaluate", "predict", *BENCHMARKS, *MODES),
    )  # fmt: skip
    precision: str = redefine(
        DetectionConfig, "precision", "tf32", help="arithmetic; tf32 is fp32 with the GPU's TF32 products (elsewhere "
        "fp32 alone); auto, or --amp, is bf16 on a GPU (fp16 on one without bf16) and fp32 on the CPU. With bf16 "
        "and fp16 the layers compute with narrow copies of fp32 weights; fp16 scales the loss as well",
    )  # fmt: skip
    save: Path | None = option(
        None, "folder that gets epoch_0.pt, epoch_1.pt, ... after each epoch; without a value ./models", group="Run"
    )
    json_summary: Path | None = option(None, "file that gets dllogger's JSON lines", group="Run")
    legacy: bool = option(
        False, "do as the original where it departs from its own description: hue jitter of half a degree, decay one "
        "epoch earlier, a rate that stays 1/W below its base after W steps of warm-up, prediction on centre crops of "
        "other scaling, images without objects train nothing and are left out of the validation (4,952 images of COCO "
        "2017)", group="Run",
    )  # fmt: skip

    mlperf_division: str = redefine(
        DetectionConfig, "mlperf_division", "open", choices=("open",),
        help="submission_division of the log; no ruleset has SSD300, so the log can't be of the closed division",
    )  # fmt: skip

    epochs: int = redefine(DetectionConfig, "epochs", 65, flags=("-e",))
    batch_size: int = redefine(DetectionConfig, "batch_size", 32, flags=("-b", "--bs"))
    eval_batch_size: int = redefine(DetectionConfig, "eval_batch_size", 0, flags=("--ebs",))
    lr: float = redefine(
        DetectionConfig, "lr", 2.6e-3, flags=("--learning-rate",),
        help="learning rate of 32 images a step; scaled by the images of a step, over all processes",
    )  # fmt: skip
    optimizer: str = option(
        "sgd", "sgd; or adam, which from random weights learns faster, with a --lr of about .004", choices=OPTIMIZERS,
        group="Training",
    )  # fmt: skip
    momentum: float = option(0.9, "of SGD", flags=("-m",), check=between(0, 0.99999), group="Training")
    weight_decay: float = option(
        5e-4, "of weights with more than one dimension; none for biases and normalisation", flags=("--wd",),
        check=between(0, 1), group="Training",
    )  # fmt: skip
    warmup: int | None = option(
        None, "steps of linear warm-up from 0; none: no warm-up", env="WARMUP_STEPS", check=at_least(0),
        group="Training",
    )  # fmt: skip
    multistep: tuple[int, ...] = option(
        (43, 54), "epochs, counted from 0, before which the learning rate falls to a tenth; without a value never",
        check=above(0), group="Training",
    )  # fmt: skip
    evaluation: tuple[int, ...] = option(
        (21, 31, 37, 42, 48, 53, 59, 64), "epochs, counted from 0, after which to evaluate, and always after the last; "
        "without a value after the last alone", check=at_least(0), group="Training",
    )  # fmt: skip

    backbone: str = option("resnet50", "ResNet that begins the network", choices=BACKBONES, group="Model")
    torchvision_weights_version: str = option(
        "IMAGENET1K_V2", "which of torchvision's ImageNet weights (resnet18 and resnet34 have V1 alone)",
        choices=("IMAGENET1K_V1", "IMAGENET1K_V2", "DEFAULT"), group="Model",
    )  # fmt: skip
    predictor_norm: bool = option(
        False, "batch normalisation after the predicting convolutions, which the original's text has and its code "
        "has not", group="Model",
    )  # fmt: skip

    dataset_path: Path = redefine(DetectionConfig, "dataset_path", Path("/coco"), flags=("--data", "-d", "--data-path"))
    max_boxes: int = redefine(
        DetectionConfig, "max_boxes", 100,
        help="boxes of an image at most, to which all are padded (COCO's fullest has 93)",
    )  # fmt: skip
    augmentation: str = option(
        "ssd", "of training images: ssd as the original, crops, mirroring and colours; flip mirrors half of them; none "
        "takes them as they are. Crops and colours want long training", choices=AUGMENTATIONS, group="Data",
    )  # fmt: skip
    antialias: bool = redefine(
        DetectionConfig, "antialias", True,
        help="anti-aliased resizing, as Pillow and DALI do in the original; without it faster",
    )  # fmt: skip
    workers: int = redefine(DetectionConfig, "workers", 8)
    benchmark_warmup: int = redefine(
        DetectionConfig, "benchmark_warmup", 20, help="benchmarks: iterations before the clock"
    )

    FREE_ON_RESUME: ClassVar[frozenset[str]] = DetectionConfig.FREE_ON_RESUME | {
        "mode", "save", "json_summary", "evaluation", "torchvision_weights_version",
    }  # fmt: skip

    def __post_init__(self) -> None:
        object.__setattr__(self, "mode", MODES.get(self.mode, self.mode))
        super().__post_init__()
        if list(self.multistep) != sorted(set(self.multistep)):
            raise UserError(f"--multistep {' '.join(map(str, self.multistep))}: give rising epochs")
        if self.mode in TRAINING_MODES and self.batch_size < 2 and not self.sync_bn:
            raise UserError(
                "--bs 1: the last map is one cell, of which batch normalisation has no statistics with a single image; "
                "train with 2 or more a forward pass"
            )

    @property
    def image_size(self) -> tuple[int, int]:
        return IMAGE_SIZE

    @property
    def original_mode(self) -> str:
        """The original's name of the mode."""
        return {own: name for name, own in MODES.items()}.get(self.mode, self.mode)

    @property
    def decay_epochs(self) -> tuple[int, ...]:
        """Epochs, counted from 0, that are the first of a lower learning rate."""
        return tuple(epoch - self.legacy for epoch in self.multistep)

    def evaluates(self, completed: int, epochs: int) -> bool:
        """Whether to evaluate after so many epochs of so many."""
        return not self.synthetic and (completed - 1 in self.evaluation or completed == epochs)

    def departures(self) -> list[str]:
        """What keeps this run from being the original's recipe, in words; empty if nothing does."""
        fixed = {
            "backbone": "resnet50", "predictor_norm": False, "pretrained": True, "dataset": "coco", "synthetic": False,
            "augmentation": "ssd", "optimizer": "sgd", "momentum": 0.9, "weight_decay": 5e-4, "epochs": 65,
            "multistep": (43, 54), "ema_decay": 0.0, "clip_norm": 0.0, "max_iters_per_epoch": 0, "checkpoint": None,
            "target_map": None, "train_data_path": None, "train_annotations_file": None, "val_data_path": None,
            "val_annotations_file": None,
        }  # fmt: skip
        return [f"{name} {getattr(self, name)}" for name, value in fixed.items() if getattr(self, name) != value]


FIRST_WEIGHTS_ALONE = ("resnet18", "resnet34")
"""Backbones of which torchvision has no second version of the weights."""


def refuse_missing_weights(config: Config, sources: Mapping[str, str]) -> None:
    """Raises UserError where the user asks for weights that nobody has. The default says nothing of these backbones."""
    version = config.torchvision_weights_version
    said = sources["torchvision_weights_version"] != DEFAULT
    if said and version == "IMAGENET1K_V2" and config.backbone in FIRST_WEIGHTS_ALONE:
        raise UserError(
            f"--torchvision-weights-version {version}: torchvision has IMAGENET1K_V1 alone of {config.backbone}; leave "
            "the option out, or give --backbone resnet50, resnet101 or resnet152"
        )


ADOPTED = (
    "backbone", "predictor_norm", "antialias", "exif", "num_classes", "dataset", "dataset_path", "train_data_path",
    "train_annotations_file", "val_data_path", "val_annotations_file", "shards",
)  # fmt: skip
"""What evaluation and prediction take from the checkpoint where the user says nothing else."""

_WHERE = "the launcher's variables say it"
_LAYOUT = "the memory layout follows the device"
IGNORED_FLAGS: dict[str, tuple[int, str]] = {
    # flags of the original programs: number of values, what to know
    "--local-rank": (1, _WHERE),
    "--data-layout": (1, _LAYOUT),
    "--parallel-loader": (0, "batches are always moved ahead of the step"),
    "--suppress-loss-report": (0, "losses are read once in --log-interval steps"),
}


_LISTS = ("--evaluation", "--multistep")
_PRECISION = ("--amp", "--no-amp", "--no-allow-tf32")
_TRANSLATED = {"--no-cuda": ["--device", "cpu"], "--allow-tf32": []}


def translate_flags(argv: Sequence[str]) -> list[str]:
    """A command line for the original programs with the flags of this one.

    Underscores in flags become dashes, as the TPU variant's have them; a bare --save gets its folder, a bare list is
    empty. What says the precision becomes --precision (`_precision`). Raises UserError for --image-size.
    """
    words: list[str] = []
    dashed = [_dashed(word) for word in argv]
    precision = _precision(dashed)
    for word, after in zip(dashed, [*dashed[1:], "--"]):
        if word.partition("=")[0] == "--image-size":
            raise UserError(f"{word}: SSD300 sees images of {IMAGE_SIZE[0]}x{IMAGE_SIZE[1]} pixels only; leave it out")
        if word == "--save" and after.startswith("-"):
            words += ["--save", "models"]
        elif word in _LISTS and after.startswith("-") and not after[1:2].isdigit():
            words.append(f"{word}=")
        elif word in _PRECISION:
            words += ["--precision", precision]
        else:
            words += _TRANSLATED.get(word, [word])
    return words


def _precision(words: Sequence[str]) -> str:
    """What --amp, --allow-tf32, their opposites and --precision say together.

    Of --amp, --no-amp and --precision the last one holds. TF32 is for what is not mixed: --no-allow-tf32 makes fp32 of
    tf32, before or after --amp; a later --precision tf32 takes it back.
    """
    precision, allowed = "tf32", True
    for word, after in zip(words, [*words[1:], "--"]):
        flag, _, value = word.partition("=")
        if flag == "--precision":
            precision, allowed = value or after, True
        elif word in ("--amp", "--no-amp"):
            precision = "auto" if word == "--amp" else "tf32"
        elif word in ("--allow-tf32", "--no-allow-tf32"):
            allowed = word == "--allow-tf32"
    return "fp32" if precision == "tf32" and not allowed else precision


def _dashed(word: str) -> str:
    flag, equals, value = word.partition("=")
    return (flag.replace("_", "-") if flag.startswith("--") else flag) + equals + value
