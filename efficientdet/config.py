"""EfficientDet as NVIDIA published it, and what a run of it can choose."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from detcore import UserError
from detcore.config import above, at_least, between, option, redefine
from detcore.detection.config import DetectionConfig
from detcore.nn.schedule import cosine_epochs
from efficientdet.architectures import ARCHITECTURES, architecture

BENCHMARK = "efficientdet"  # submission_benchmark of the log; no ruleset of 5.1 has it
OPTIMIZERS = {  # the original's names: what they are here
    "sgd": "nesterov", "nesterov": "nesterov", "momentum": "momentum", "adam": "adam", "adamw": "adamw",
    "fusedsgd": "nesterov", "fusedmomentum": "momentum", "fusedadam": "adam", "fusedadamw": "adamw",
    "lamb": "lamb", "fusedlamb": "lamb", "fusednovograd": "novograd", "novograd": "nvnovograd",
    "nvnovograd": "nvnovograd",
}  # fmt: skip
BENCHMARKS = ("benchmark", "benchmark-training", "benchmark-inference")
WAYMO_CLASSES = (1, 2, 3)
COCO_CLASSES = tuple(range(1, 91))
"""COCO's own ids: the originals' networks have an output for each number up to 90, ten of which never occur."""


@dataclass(frozen=True)
class Config(DetectionConfig):
    """A run of EfficientDet. The defaults are the original's, `legacy` says where they differ."""

    mode: str = redefine(
        DetectionConfig, "mode", "train", help="what to do; benchmark measures training and inference",
        choices=("train", "evaluate", "predict", *BENCHMARKS),
    )  # fmt: skip
    precision: str = redefine(
        DetectionConfig, "precision", "tf32", help="arithmetic; tf32 is fp32 with the GPU's TF32 products (elsewhere "
        "fp32 alone); auto, or --amp, is bf16 on a GPU (fp16 on one without bf16) and fp32 on the CPU. With bf16 "
        "and fp16 the layers compute with narrow copies of fp32 weights; fp16 scales the loss as well",
    )  # fmt: skip
    output_dir: Path = redefine(DetectionConfig, "output_dir", Path("results/run"), flags=("--output",))
    checkpoint: Path | None = redefine(
        DetectionConfig, "checkpoint", None, flags=("--initial-checkpoint",),
        help="weights to start from, to evaluate or to predict with, of this program, the original or effdet",
    )  # fmt: skip
    remove_weights: tuple[str, ...] = option(
        (), "training: what of --initial-checkpoint is left out, by parts of names, as class_net box_net", group="Run"
    )
    use_ema: bool = option(
        False, "take an original checkpoint's average, if it has one (this program's is always taken)", group="Run"
    )
    save_checkpoint_interval: int = option(
        10, "epochs from one lasting checkpoint_<epochs>.pt to the next; 0: none", check=at_least(0), group="Run"
    )
    log_interval: int = redefine(DetectionConfig, "log_interval", 50, flags=("--print-freq", "--log-freq"))
    dllogger_file: Path | None = option(None, "file that gets dllogger's JSON lines", group="Run")
    results: Path | None = option(
        None, "evaluate: file that gets all detections as COCO results (JSON)", group="Predict and benchmark"
    )
    inference: bool = option(
        False, "evaluate: write --results and the speed, compute no mAP", group="Predict and benchmark"
    )
    use_soft_nms: bool = option(
        False, "lower the scores of overlapping boxes instead of dropping them", group="Predict and benchmark"
    )
    legacy: bool = option(
        False, "do as the original where it departs from its own description: each process has a normaliser of its "
        "own, box coordinates whose target is exactly 0 train nothing, and validation images without annotations are "
        "not scored", group="Run",
    )  # fmt: skip
    mlperf_division: str = redefine(
        DetectionConfig, "mlperf_division", "open", choices=("open",),
        help="submission_division of the log; no ruleset has EfficientDet, so the log can't be of the closed division",
    )  # fmt: skip

    epochs: int = redefine(
        DetectionConfig, "epochs", 300, help="epochs of the schedule; the run has --cooldown-epochs more"
    )
    batch_size: int = redefine(DetectionConfig, "batch_size", 32)
    validation_batch_size_multiplier: int = option(
        0, "evaluation batch in training batches; 0: as --eval-batch-size says", flags=("-vb",), check=between(0, 1024),
        group="Training",
    )  # fmt: skip
    eval_after: int = option(
        0, "evaluate after epochs from this one on, counted from 0, and always after the last", check=at_least(0),
        group="Training",
    )  # fmt: skip
    clip_norm: float = redefine(DetectionConfig, "clip_norm", 10.0, flags=("--clip-grad",))
    opt: str = option(
        "momentum", "optimizer; sgd and nesterov are the same, the fused ones are those of their names here, but that "
        "fusednovograd is apex's and the other two are the paper's",
        choices=tuple(OPTIMIZERS), group="Training",
    )  # fmt: skip
    opt_eps: float = option(1e-3, "epsilon of all optimizers but SGD", check=above(0), group="Training")
    momentum: float = option(0.9, "of SGD", check=between(0, 0.99999), group="Training")
    weight_decay: float = option(
        4e-5, "of weights with more than one dimension; none for biases and normalisation", check=between(0, 1),
        group="Training",
    )  # fmt: skip
    smoothing: float = option(0.0, "label smoothing of the class loss", check=between(0, 1), group="Training")
    lr: float = redefine(DetectionConfig, "lr", 0.01, help="learning rate, of the images of a step over all processes")
    sched: str = option("cosine", "course of the learning rate", choices=("cosine", "step"), group="Training")
    warmup_epochs: int = option(
        5, "epochs in which it rises from --warmup-lr", env="WARMUP_EPOCHS", check=at_least(0), group="Training"
    )
    warmup_lr: float = option(1e-4, "learning rate of the first epoch", check=at_least(0), group="Training")
    min_lr: float = option(1e-5, "cosine: its lowest value", check=at_least(0), group="Training")
    cooldown_epochs: int = option(10, "cosine: epochs at --min-lr after --epochs", check=at_least(0), group="Training")
    lr_cycle_mul: float = option(1.0, "cosine: length of a cycle in those of the one before", check=at_least(1),
                                 group="Training")  # fmt: skip
    lr_cycle_limit: int = option(1, "cosine: cycles", check=at_least(1), group="Training")
    decay_epochs: int = option(30, "step: epochs from one decay to the next", check=at_least(1), group="Training")
    decay_rate: float = option(0.1, "step: factor of a decay", flags=("--dr",), check=above(0), group="Training")
    lr_noise: tuple[float, ...] = option(
        (), "part of the epochs from which, or from which to which, a random factor changes the learning rate",
        check=between(0, 1), group="Training",
    )  # fmt: skip
    lr_noise_pct: float = option(0.67, "limit of that factor's distance from 1", check=above(0), group="Training")
    freeze_layers: tuple[str, ...] = option(
        (), "parts of names of parameters that are not trained, as backbone", group="Training"
    )

    model: str = option("efficientdet_d0", "network: " + ", ".join(ARCHITECTURES), flags=("-m",), group="Model")
    bn_momentum: float = option(
        0.01, "share of a batch in the running statistics of the normalisation; short runs want more, as 0.1",
        check=between(0, 1), group="Model",
    )  # fmt: skip
    input_size: int = option(
        0, "height and width of the image that it sees; 0: as the model has it", check=between(0, 8192), group="Model"
    )
    redundant_bias: bool | None = option(
        None, "biases of convolutions before a normalisation; none: as the model has it", group="Model"
    )
    weights: Path | None = redefine(
        DetectionConfig, "weights", None, flags=("--backbone-path", "--pretrained-backbone-path")
    )

    dataset_path: Path = redefine(
        DetectionConfig, "dataset_path", Path("/datasets/coco2017"), flags=("--data-path", "--data")
    )
    waymo: bool = option(
        False, "Waymo's three classes and their metrics, of a set of the layout waymo (waymo_to_coco.py writes it) "
        "unless --dataset names another; parts that lie elsewhere: --waymo-train, ...", group="Data",
    )  # fmt: skip
    train_data_path: Path | None = redefine(DetectionConfig, "train_data_path", None, flags=("--waymo-train",))
    train_annotations_file: Path | None = redefine(
        DetectionConfig, "train_annotations_file", None, flags=("--waymo-train-annotation",)
    )
    val_data_path: Path | None = redefine(DetectionConfig, "val_data_path", None, flags=("--waymo-val",))
    val_annotations_file: Path | None = redefine(
        DetectionConfig, "val_annotations_file", None, flags=("--waymo-val-annotation",)
    )
    augmentation: str = option(
        "jitter", "of training images: jitter as the original, a random scale and half of them mirrored; flip mirrors "
        "alone; none", choices=("jitter", "flip", "none"), group="Data",
    )  # fmt: skip
    train_interpolation: str = option(
        "bilinear", "how training images are scaled; random: one of the two, drawn for each image",
        choices=("bilinear", "bicubic", "random"), group="Data",
    )  # fmt: skip
    interpolation: str = option(
        "bilinear", "how images are scaled in evaluation and prediction", choices=("bilinear", "bicubic"), group="Data"
    )
    fill_color: str = option(
        "mean", "of the canvas beside the image: mean, of the model's pixels, or a grey value", group="Data"
    )

    FREE_ON_RESUME: ClassVar[frozenset[str]] = (DetectionConfig.FREE_ON_RESUME - {"epochs"}) | {
        "mode", "dllogger_file", "results", "inference", "use_soft_nms", "use_ema", "eval_after", "remove_weights",
        "save_checkpoint_interval", "validation_batch_size_multiplier",
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        architecture(self.model)
        self.fill  # noqa: B018  # refuses what is no colour
        if self.input_size % 32:
            raise UserError(f"--input-size {self.input_size}: give a multiple of 32, better of 128")
        if len(self.lr_noise) > 2:
            raise UserError(f"--lr-noise {' '.join(map(str, self.lr_noise))}: give one or two parts of the epochs")
        if list(self.lr_noise) != sorted(self.lr_noise):
            raise UserError(f"--lr-noise {' '.join(map(str, self.lr_noise))}: it would end before it begins")
        if self.loader == "dali" and {self.train_interpolation, self.interpolation} != {"bilinear"}:
            raise UserError(
                "--loader dali scales images bilinearly alone; take --loader torch or nvjpeg for --interpolation and "
                "--train-interpolation"
            )
        if self.inference and not self.results:
            raise UserError("--inference: say where the detections go with --results FILE")

    @property
    def image_size(self) -> tuple[int, int]:
        size = self.input_size or architecture(self.model).image_size
        return size, size

    @property
    def class_ids(self) -> Sequence[int] | None:
        return WAYMO_CLASSES if self.waymo else COCO_CLASSES if self.dataset == "coco" else None

    @property
    def fill(self) -> tuple[int, int, int]:
        """Colour of the canvas, RGB in 0..255. Raises UserError for what is none."""
        if self.fill_color == "mean":
            return tuple(round(255 * value) for value in architecture(self.model).pixels[0])
        if not self.fill_color.isdecimal() or int(self.fill_color) > 255:
            raise UserError(f"--fill-color {self.fill_color}: give mean or a grey value from 0 to 255")
        return (int(self.fill_color),) * 3

    @property
    def metric(self) -> str:
        """What --target-map is about, and by which best.pt is chosen."""
        return "L2_ALL_NS" if self.waymo else "AP"

    @property
    def total_epochs(self) -> int:
        """Of a training: those of the schedule and of its cool-down."""
        if self.sched != "cosine":
            return self.epochs
        return cosine_epochs(self.epochs, self.cooldown_epochs, self.lr_cycle_mul, self.lr_cycle_limit)

    def evaluates(self, completed: int, epochs: int) -> bool:
        """Whether to evaluate after so many epochs of so many."""
        return not self.synthetic and (completed > self.eval_after or completed == epochs)

    def departures(self) -> list[str]:
        """What keeps this run from being the original's recipe, in words; empty if nothing does."""
        fixed = {
            "pretrained": True, "dataset": "coco", "waymo": False, "synthetic": False, "augmentation": "jitter",
            "train_interpolation": "bilinear", "interpolation": "bilinear", "fill_color": "mean", "checkpoint": None,
            "freeze_layers": (), "momentum": 0.9, "weight_decay": 4e-5,
            "clip_norm": 10.0, "bn_momentum": 0.01, "sched": "cosine", "cooldown_epochs": 10, "max_iters_per_epoch": 0,
            "target_map": None, "train_data_path": None, "train_annotations_file": None, "val_data_path": None,
            "val_annotations_file": None,
        }  # fmt: skip
        return [f"{name} {getattr(self, name)}" for name, value in fixed.items() if getattr(self, name) != value]


ADOPTED = (
    "model", "input_size", "redundant_bias", "fill_color", "interpolation", "antialias", "dataset", "waymo",
    "dataset_path", "train_data_path", "train_annotations_file", "val_data_path", "val_annotations_file", "shards",
)  # fmt: skip
"""What evaluation and prediction take from the checkpoint where the user says nothing else."""

_WHERE = "the launcher's variables say it"
_KERNELS = "the program's own kernels are used wherever they are built (--ops)"
_STREAM = "batches are always moved ahead of the step"
IGNORED_FLAGS: dict[str, tuple[int, str]] = {
    # flags of the original programs: number of values, what to know
    "--local-rank": (1, _WHERE),
    "--num-gpu": (1, _WHERE),
    "--fused-focal-loss": (0, _KERNELS),
    "--torchscript": (0, "inference is recorded and replayed on a GPU instead (--graphs)"),
    "--memory-format": (1, "the memory layout follows the device"),
    "--no-prefetcher": (0, _STREAM),
    "--no-pin-mem": (0, _STREAM),
    "--pin-mem": (0, _STREAM),
    "--patience-epochs": (1, "it belongs to the schedule plateau, which is not offered"),
}
