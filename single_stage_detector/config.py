"""RetinaNet as MLPerf Training defined it (rounds 2.0 to 5.1), and what a run of it can choose."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from detcore import UserError
from detcore.config import at_least, between, option
from detcore.data.layouts import LAYOUTS, Layout
from detcore.run_config import RunConfig

BENCHMARK = "retinanet"  # submission_benchmark in rulesets 5.0 and 5.1
TARGET_MAP = 0.34
BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "resnext101_32x8d")
SCORE_THRESHOLD, TOPK_PER_LEVEL, NMS_THRESHOLD, DETECTIONS_PER_IMAGE = 0.05, 1000, 0.5, 300


@dataclass(frozen=True)
class Config(RunConfig):
    """A run of the single-stage detector. The defaults are the MLPerf reference's."""

    lr: float = option(1e-4, "learning rate", env="LR", check=between(1e-12, 100), group="Training")
    warmup_epochs: float = option(
        1.0, "epochs of linear warm-up", env="WARMUP_EPOCHS", check=at_least(0), group="Training"
    )
    warmup_factor: float = option(
        1e-3, "where the warm-up starts, as a part of the learning rate", check=between(0, 1), group="Training"
    )
    target_map: float | None = option(
        TARGET_MAP, "stop with success at this mAP; none: train all epochs", check=between(0, 1), group="Training"
    )

    backbone: str = option("resnext50_32x4d", "ResNet of the feature pyramid", choices=BACKBONES, group="Model")
    trainable_backbone_layers: int = option(
        3, "stages of the backbone that train, from the last; 5: all", check=between(0, 5), group="Model"
    )
    norm: str = option(
        "frozen", "normalisation of the backbone: frozen as MLPerf has it, or batch, which training from scratch needs",
        choices=("frozen", "batch"), group="Model",
    )  # fmt: skip
    sync_bn: bool = option(False, "with --norm batch on GPUs: statistics over all processes", group="Model")
    pretrained: bool = option(
        True, "start from ImageNet weights, found in TORCH_HOME or at --weights; never downloaded", group="Model"
    )
    weights: Path | None = option(None, "the file of the ImageNet weights", group="Model")
    fpn_channels: int = option(
        256, "channels of the feature pyramid and the heads", check=between(1, 4096), group="Model"
    )
    head_convs: int = option(4, "convolutions in each head's tower", check=between(0, 64), group="Model")
    image_size: tuple[int, int] = option((800, 800), "height and width", check=between(32, 8192), group="Model")
    anchor_sizes: tuple[int, ...] = option(
        (32, 64, 128, 256, 512), "base anchor size in pixels of each of the five levels", check=at_least(1),
        group="Model",
    )  # fmt: skip

    dataset: str = option("openimages-mlperf", "layout of the data set", choices=tuple(LAYOUTS), group="Data")
    dataset_path: Path = option(
        Path("/datasets/open-images-v6"), "its root", env="DATASET_DIR", flags=("--data-path",), group="Data"
    )
    train_data_path: Path | None = option(None, "training images; none: as the layout has it", group="Data")
    train_annotations_file: Path | None = option(None, "training JSON; none: as the layout has it", group="Data")
    val_data_path: Path | None = option(None, "validation images; none: as the layout has it", group="Data")
    val_annotations_file: Path | None = option(None, "validation JSON; none: as the layout has it", group="Data")
    num_classes: int = option(
        0, "number of classes; 0: as the data set has. Another number than the data set's is an error",
        check=between(0, 100000), group="Data",
    )  # fmt: skip
    max_boxes: int = option(
        1000, "boxes of an image at most, to which all are padded", check=between(1, 100000), group="Data"
    )
    data_augmentation: str = option("hflip", "random horizontal flip, or none", choices=("hflip", "none"), group="Data")
    antialias: bool = option(False, "anti-aliased resizing; the reference does without", group="Data")
    drop_last: bool = option(True, "leave out an epoch's last, incomplete batch instead of filling it", group="Data")
    loader: str = option(
        "torch", "what decodes the images: torch on the processors; dali (where installed) or nvjpeg (torchvision) on "
        "the GPU", choices=("torch", "dali", "nvjpeg"), group="Data",
    )  # fmt: skip
    shards: Path | None = option(
        None, "folder that public-scripts/pack_dataset.py wrote: read the images from its shards; none: from files",
        group="Data",
    )  # fmt: skip
    read_ahead: bool = option(
        False, "read all shards into the page cache while training begins, where memory holds them", group="Data"
    )
    workers: int = option(
        4, "loader processes per rank; threads with dali and nvjpeg", flags=("-j",), check=at_least(0), group="Data"
    )
    synthetic: bool = option(
        False, "random images and boxes instead of a data set; no evaluation", env="USE_SYNTHETIC_DATA", group="Data"
    )
    cache_dir: Path | None = option(None, "where the annotation index is cached; none: beside the JSON", group="Data")

    gallery: int = option(0, "validation images to draw for the report after training", check=at_least(0), group="Run")
    images: Path | None = option(None, "--mode predict: an image or a folder of images", group="Predict and benchmark")
    score_threshold: float = option(
        0.3, "--mode predict: score from which detections are written and drawn", check=between(0, 1),
        group="Predict and benchmark",
    )  # fmt: skip
    benchmark_warmup: int = option(
        5, "--mode benchmark: iterations before the clock", check=at_least(0), group="Predict and benchmark"
    )
    benchmark_iterations: int = option(
        20, "--mode benchmark: iterations measured", check=at_least(1), group="Predict and benchmark"
    )

    FREE_ON_RESUME: ClassVar[frozenset[str]] = RunConfig.FREE_ON_RESUME | {
        "target_map", "dataset_path", "train_data_path", "train_annotations_file", "val_data_path",
        "val_annotations_file", "shards", "read_ahead", "workers", "cache_dir", "gallery", "images", "score_threshold",
        "weights", "pretrained", "benchmark_warmup", "benchmark_iterations",
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.anchor_sizes) != 5:
            raise UserError(f"--anchor-sizes {self.anchor_sizes}: five sizes are needed, one for each pyramid level")
        if self.norm == "frozen" and not self.pretrained and not (self.checkpoint or self.resume or self.synthetic):
            raise UserError(
                "--no-pretrained with --norm frozen: a frozen normalisation cannot learn from random weights. "
                "Add --norm batch --trainable-backbone-layers 5, or give weights."
            )
        if self.read_ahead and not self.shards:
            raise UserError("--read-ahead: only shards are read ahead; say where they are with --shards FOLDER")
        if self.mode == "predict" and not self.images:
            raise UserError("--mode predict: say what to look at with --images FILE_OR_FOLDER")
        if self.mode in ("predict", "evaluate") and not self.checkpoint:
            raise UserError(f"--mode {self.mode}: say which weights to use with --checkpoint FILE, e.g. .../best.pt")

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.dataset]

    def root(self) -> Path:
        """The data set's folder: dataset_path, or its one child that holds the layout (a DATADIR around the set)."""
        path, sign = self.dataset_path, self.layout.train_annotations if self.shards else self.layout.train_images
        if (path / sign).exists() or not path.is_dir():
            return path
        inside = [child for child in path.iterdir() if (child / sign).exists()]
        return inside[0] if len(inside) == 1 else path

    def split(self, name: str) -> tuple[Path, Path]:
        """Annotation file and image folder (of files or of shards) of "train" or "val"."""
        annotations = getattr(self, f"{name}_annotations_file")
        images = getattr(self, f"{name}_data_path")
        annotations = annotations or self.root() / getattr(self.layout, f"{name}_annotations")
        if not images and self.shards:
            images = self.shards / name
        return annotations, images or self.root() / getattr(self.layout, f"{name}_images")

    def data_paths(self) -> list[Path]:
        if self.synthetic:
            return []
        parts = [path for name in ("train", "val") for path in self.split(name)]
        return [path.parent if path.suffix == ".json" else path for path in parts]  # with the index beside the JSON

    def departures(self) -> list[str]:
        """What keeps this run from being the MLPerf closed benchmark, in words; empty if nothing does."""
        fixed = {
            "backbone": "resnext50_32x4d", "trainable_backbone_layers": 3, "norm": "frozen", "pretrained": True,
            "fpn_channels": 256, "head_convs": 4, "image_size": (800, 800), "anchor_sizes": (32, 64, 128, 256, 512),
            "dataset": "openimages-mlperf", "synthetic": False, "data_augmentation": "hflip", "ema_decay": 0.0,
            "clip_norm": 0.0, "target_map": TARGET_MAP, "max_iters_per_epoch": 0, "seed": None, "checkpoint": None,
            "num_classes": 0, "train_data_path": None, "train_annotations_file": None, "val_data_path": None,
            "val_annotations_file": None,
        }  # fmt: skip
        return [f"{name} {getattr(self, name)}" for name, value in fixed.items() if getattr(self, name) != value]


ADOPTED = (
    "backbone", "trainable_backbone_layers", "norm", "fpn_channels", "head_convs", "image_size", "anchor_sizes",
    "antialias", "dataset", "dataset_path", "train_data_path", "train_annotations_file", "val_data_path",
    "val_annotations_file", "shards",
)  # fmt: skip
"""What evaluation and prediction take from the checkpoint where the user says nothing else."""

TRANSLATED_FLAGS = {
    "--dali": ["--loader", "dali"], "--no-dali": ["--loader", "torch"], "--test-only": ["--mode", "evaluate"],
    "--amp": ["--precision", "auto"], "--no-amp": ["--precision", "fp32"],
}  # fmt: skip
"""Flags of the original programs that are another option here."""

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
