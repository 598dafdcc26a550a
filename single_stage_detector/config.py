"""RetinaNet as MLPerf Training defined it (rounds 2.0 to 5.1), and what a run of it can choose."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detcore import UserError
from detcore.config import at_least, between, option, redefine
from detcore.detection.config import DetectionConfig

BENCHMARK = "retinanet"  # submission_benchmark in rulesets 5.0 and 5.1
TARGET_MAP = 0.34
BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "resnext101_32x8d")
SCORE_THRESHOLD, TOPK_PER_LEVEL, NMS_THRESHOLD, DETECTIONS_PER_IMAGE = 0.05, 1000, 0.5, 300


@dataclass(frozen=True)
class Config(DetectionConfig):
    """A run of the single-stage detector. The defaults are the MLPerf reference's."""

    epochs: int = redefine(DetectionConfig, "epochs", 26)
    batch_size: int = redefine(DetectionConfig, "batch_size", 2)
    eval_batch_size: int = redefine(DetectionConfig, "eval_batch_size", 0, flags=("-e",))
    lr: float = redefine(DetectionConfig, "lr", 1e-4)
    target_map: float | None = redefine(DetectionConfig, "target_map", TARGET_MAP)
    warmup_epochs: float = option(
        1.0, "epochs of linear warm-up", env="WARMUP_EPOCHS", check=at_least(0), group="Training"
    )
    warmup_factor: float = option(
        1e-3, "where the warm-up starts, as a part of the learning rate", check=between(0, 1), group="Training"
    )

    backbone: str = option("resnext50_32x4d", "ResNet of the feature pyramid", choices=BACKBONES, group="Model")
    trainable_backbone_layers: int = option(
        3, "stages of the backbone that train, from the last; 5: all", check=between(0, 5), group="Model"
    )
    norm: str = option(
        "frozen", "normalisation of the backbone: frozen as MLPerf has it, or batch, which training from scratch needs",
        choices=("frozen", "batch"), group="Model",
    )  # fmt: skip
    fpn_channels: int = option(
        256, "channels of the feature pyramid and the heads", check=between(1, 4096), group="Model"
    )
    head_convs: int = option(4, "convolutions in each head's tower", check=between(0, 64), group="Model")
    image_size: tuple[int, int] = option((800, 800), "height and width", check=between(32, 8192), group="Model")
    anchor_sizes: tuple[int, ...] = option(
        (32, 64, 128, 256, 512), "base anchor size in pixels of each of the five levels", check=at_least(1),
        group="Model",
    )  # fmt: skip

    dataset: str = redefine(DetectionConfig, "dataset", "openimages-mlperf")
    dataset_path: Path = redefine(DetectionConfig, "dataset_path", Path("/datasets/open-images-v6"))
    max_boxes: int = redefine(DetectionConfig, "max_boxes", 1000)
    antialias: bool = redefine(
        DetectionConfig, "antialias", False, help="anti-aliased resizing; the reference does without"
    )
    data_augmentation: str = option("hflip", "random horizontal flip, or none", choices=("hflip", "none"), group="Data")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.anchor_sizes) != 5:
            raise UserError(f"--anchor-sizes {self.anchor_sizes}: five sizes are needed, one for each pyramid level")
        if self.norm == "frozen" and not self.pretrained and not (self.checkpoint or self.resume or self.synthetic):
            raise UserError(
                "--no-pretrained with --norm frozen: a frozen normalisation cannot learn from random weights. "
                "Add --norm batch --trainable-backbone-layers 5, or give weights."
            )

    def departures(self) -> list[str]:
        """What keeps this run from being the MLPerf closed benchmark, in words; empty if nothing does."""
        fixed = {
            "backbone": "resnext50_32x4d", "trainable_backbone_layers": 3, "norm": "frozen", "pretrained": True,
            "fpn_channels": 256, "head_convs": 4, "image_size": (800, 800), "anchor_sizes": (32, 64, 128, 256, 512),
            "dataset": "openimages-mlperf", "synthetic": False, "data_augmentation": "hflip", "ema_decay": 0.0,
            "clip_norm": 0.0, "target_map": TARGET_MAP, "max_iters_per_epoch": 0, "seed": None, "checkpoint": None,
            "num_classes": 0, "exif": "auto", "train_data_path": None, "train_annotations_file": None,
            "val_data_path": None, "val_annotations_file": None,
        }  # fmt: skip
        return [f"{name} {getattr(self, name)}" for name, value in fixed.items() if getattr(self, name) != value]


ADOPTED = (
    "backbone", "trainable_backbone_layers", "norm", "fpn_channels", "head_convs", "image_size", "anchor_sizes",
    "antialias", "exif", "num_classes", "dataset", "dataset_path", "train_data_path", "train_annotations_file",
    "val_data_path", "val_annotations_file", "shards",
)  # fmt: skip
"""What evaluation and prediction take from the checkpoint where the user says nothing else."""

_TRANSLATED = {
    "--dali": ["--loader", "dali"], "--no-dali": ["--loader", "torch"], "--test-only": ["--mode", "evaluate"],
    "--amp": ["--precision", "auto"], "--no-amp": ["--precision", "fp32"],
}  # fmt: skip


def translate_flags(argv: Sequence[str]) -> list[str]:
    """A command line for the original programs with the flags of this one."""
    return [word for old in argv for word in _TRANSLATED.get(old, [old])]


_NO_EFFECT = "no effect here: it switches a part of the original program that this one does not have"
_ELSEWHERE = "no effect here: see --resume, --mode, --synthetic, --log-interval and the launcher's own variables"
_LAYOUT = "no effect here: the memory layout follows the device"
IGNORED_FLAGS: dict[str, tuple[int, str]] = {
    # flags of the original programs: number of values, what to know
    **dict.fromkeys(
        ("--frozen-bn-opt", "--frozen-bn-fp16", "--jit", "--cuda-graphs", "--cuda-graphs-eval", "--cuda-graphs-syn",
         "--cls-head-pad", "--reg-head-pad", "--master-weights", "--apex-adam", "--apex-focal-loss",
         "--apex-backbone-fusion", "--apex-head-fusion", "--disable-ddp-broadcast-buffers", "--fp16-allreduce",
         "--no-gradient-as-bucket-view", "--cudnn-bench", "--deterministic", "--not-graphed-prologues",
         "--metric-loss", "--sync-after-graph-replay", "--allreduce-barrier", "--async-coco", "--cuda-profiler",
         "--cuda-profiler-eval", "--power-benchmark", "--not-power-benchmark", "--dali-matched-idxs", "--dali-eval",
         "--dali-eval-cache", "--dali-cpu-decode", "--dali-sync", "--dali-resize-first"),
        (0, _NO_EFFECT),
    ),
    **dict.fromkeys(
        ("--cocoeval", "--coco-threads", "--async-coco-check-freq", "--num-eval-ranks", "--model-warmup-epochs",
         "--ddp-bucket-sz", "--ddp-first-bucket-sz", "--cuda-profiler-start", "--cuda-profiler-stop",
         "--max-eval-iters-per-epoch", "--power-sustain-time", "--dali-prefetch-queue-depth",
         "--dali-pinned-memory-size", "--dali-cmn", "--dali-cmn-hint", "--dali-decoder-hint-height",
         "--dali-decoder-hint-width", "--dali-decoder-hw-load", "--dali-input-batch-multiplier",
         "--dali-eval-cmn-hint", "--dali-eval-decoder-hint-height", "--dali-eval-decoder-hint-width",
         "--dali-eval-decoder-hw-load", "--dali-eval-input-batch-multiplier"),
        (1, _NO_EFFECT),
    ),
    **dict.fromkeys(
        ("--eval-print-freq", "--world-size", "--dist-url", "--start-epoch", "--syn-dataset"), (1, _ELSEWHERE)
    ),
    "--skip-eval": (0, _ELSEWHERE),
    "--data-layout": (1, _LAYOUT),
}  # fmt: skip
