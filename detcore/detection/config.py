"""The settings that every detector shares: its data set, its loader, and what its modes look at."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from detcore import UserError
from detcore.config import DEFAULT, at_least, between, from_dict, option, to_dict
from detcore.data import exif
from detcore.data.layouts import LAYOUTS, Layout
from detcore.training.checkpoint import load_checkpoint
from detcore.training.config import RunConfig


@dataclass(frozen=True)
class DetectionConfig(RunConfig):
    """What every detector's run can choose. A benchmark gives its own defaults, and `image_size` (height, width)."""

    lr: float = option(1e-3, "learning rate", env="LR", check=between(1e-12, 100), group="Training")
    target_map: float | None = option(
        None, "stop with success at this mAP; none: train all epochs", check=between(0, 1), group="Training"
    )
    sync_bn: bool = option(False, "batch normalisation that learns: statistics over all processes", group="Model")
    pretrained: bool = option(
        True, "start from ImageNet weights, found in TORCH_HOME or at --weights; never downloaded", group="Model"
    )
    weights: Path | None = option(None, "the file of the ImageNet weights", flags=("--backbone-path",), group="Model")
    weights_only: bool = option(
        False, "train from the weights of --checkpoint alone, from the first epoch on; where it knows another number "
        "of classes, without those of the layers that predict them", group="Run",
    )  # fmt: skip

    dataset: str = option("coco", "layout of the data set", choices=tuple(LAYOUTS), group="Data")
    dataset_path: Path = option(Path("data"), "its root", env="DATASET_DIR", flags=("--data-path",), group="Data")
    also_train_on: tuple[str, ...] = option(
        (), "further data sets to train with, separated by commas: folders of the same layout, with its categories",
        group="Data",
    )  # fmt: skip
    train_data_path: Path | None = option(None, "training images; none: as the layout has it", group="Data")
    train_annotations_file: Path | None = option(None, "training JSON; none: as the layout has it", group="Data")
    val_data_path: Path | None = option(None, "validation images; none: as the layout has it", group="Data")
    val_annotations_file: Path | None = option(None, "validation JSON; none: as the layout has it", group="Data")
    num_classes: int = option(
        0, "number of classes; 0: as the data set has. With more than it has, class k is the category with id k, as in "
        "models of torchvision and the MLPerf reference that know COCO as 91 classes", check=between(0, 100000),
        group="Data",
    )  # fmt: skip
    exif: str = option(
        "auto", "whether EXIF turns an image whose listed size does not tell (half turns, mirror images, squares): "
        "apply, ignore, or auto, which turns in --mode predict alone", choices=exif.MODES, group="Data",
    )  # fmt: skip
    max_boxes: int = option(
        100, "boxes of an image at most, to which all are padded", check=between(1, 100000), group="Data"
    )
    antialias: bool = option(True, "anti-aliased resizing, as Pillow and DALI do; without it faster", group="Data")
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
        4, "loader processes per rank; threads with dali and nvjpeg", flags=("-j", "--num-workers"), check=at_least(0),
        group="Data",
    )  # fmt: skip
    synthetic: bool = option(
        False, "random images and boxes instead of a data set; no evaluation", env="USE_SYNTHETIC_DATA",
        flags=("--fake-data",), group="Data",
    )  # fmt: skip
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
        "target_map", "dataset_path", "also_train_on", "train_data_path", "train_annotations_file", "val_data_path",
        "val_annotations_file", "shards", "read_ahead", "workers", "cache_dir", "gallery", "images", "score_threshold",
        "weights", "weights_only", "pretrained", "benchmark_warmup", "benchmark_iterations",
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.read_ahead and not self.shards:
            raise UserError("--read-ahead: only shards are read ahead; say where they are with --shards FOLDER")
        if self.mode == "predict" and not self.images:
            raise UserError("--mode predict: say what to look at with --images FILE_OR_FOLDER")
        if self.weights_only and (self.mode in ("predict", "evaluate") or not self.checkpoint):
            raise UserError("--weights-only: training starts from the weights of --checkpoint FILE; say which")
        if self.mode in ("predict", "evaluate") and not self.has_weights:
            raise UserError(f"--mode {self.mode}: say which weights to use with --checkpoint FILE, e.g. .../best.pt")

    @property
    def has_weights(self) -> bool:
        """Whether there is something to evaluate and to predict with."""
        return self.checkpoint is not None

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
        root, own = self.root(), annotations
        annotations = own or root / getattr(self.layout, f"{name}_annotations")
        roboflow = root / getattr(LAYOUTS["roboflow"], f"{name}_annotations")
        if not own and self.dataset == "custom" and not annotations.exists() and roboflow.exists():
            raise UserError(f"{root} looks like an export of Roboflow, with {roboflow}: give --dataset roboflow")
        if not images and self.shards:
            images = self.shards / name
        return annotations, images or self.root() / getattr(self.layout, f"{name}_images")

    def check_folders(self) -> None:
        """Raises UserError, naming the option, if a folder or an annotation file of a data set that --mode reads is
        missing, or the data set does not begin where it should. Looks at names alone, so that it can come before
        everything slow.
        """
        if self.synthetic or self.mode == "predict":
            return
        own = [("--dataset-path", self.dataset_path)] if self._reads_root() else []
        for flag, folder in (*own, *(("--also-train-on", Path(more)) for more in self.also_train_on)):
            if not folder.is_dir():
                raise UserError(f"{flag} {folder}: there is no such folder; say where the data set lies with {flag}")
        for name in self._splits():
            annotations, _ = self.split(name)
            above = self.dataset_path.absolute().parent
            begins = above / getattr(self.layout, f"{name}_annotations")
            if not annotations.exists() and not getattr(self, f"{name}_annotations_file") and begins.exists():
                raise UserError(
                    f"--dataset-path {self.dataset_path}: the data set begins one folder above, where {begins} is: "
                    f"give --dataset-path {above}"
                )
            for places in self.train_sets() if name == "train" else [self.split(name)]:
                self._check_places(name, *places)

    def _check_places(self, name: str, annotations: Path, images: Path) -> None:
        """`check_folders` of one set of "train" or "val"."""
        what = {"train": "training", "val": "validation"}[name]
        if not annotations.is_file():
            raise UserError(
                f"{annotations}: there is no such file, the {what} annotations; say where the data set lies with "
                f"--dataset-path FOLDER, how with --dataset LAYOUT, or correct --{name}-annotations-file"
            )
        if not images.is_dir():
            elsewhere = f"say where the data set lies with --dataset-path FOLDER, or correct --{name}-data-path"
            raise UserError(
                f"{images}: there is no such folder, the {what} images of {annotations.name}; "
                + (f"correct --shards {self.shards}" if self.shards else elsewhere)
            )

    def _splits(self) -> tuple[str, ...]:
        """Which of "train" and "val" --mode reads."""
        return {"evaluate": ("val",), "benchmark-inference": ("val",), "benchmark-training": ("train",)}.get(
            self.mode, ("train", "val")
        )

    def _reads_root(self) -> bool:
        """Whether a part of the data set is looked for below its folder."""
        return not all(
            getattr(self, f"{name}_annotations_file") and (getattr(self, f"{name}_data_path") or self.shards)
            for name in self._splits()
        )

    @property
    def class_ids(self) -> Sequence[int] | None:
        """Category id of each class of the model, rising, where a benchmark fixes them; None: the data set's own."""
        return None

    def train_sets(self) -> list[tuple[Path, Path]]:
        """Annotation file and image folder of each data set to train with; those of `also_train_on` hold files."""
        here = {"also_train_on": (), "train_data_path": None, "train_annotations_file": None}
        here |= {"shards": None, "read_ahead": False}
        others = [dataclasses.replace(self, dataset_path=Path(folder), **here) for folder in self.also_train_on]
        return [config.split("train") for config in (self, *others)]

    def data_paths(self) -> list[Path]:
        if self.synthetic:
            return []
        parts = [path for places in (*self.train_sets(), self.split("val")) for path in places]
        return [path.parent if path.suffix == ".json" else path for path in parts]  # with the index beside the JSON


PLACES = (
    "train_data_path", "train_annotations_file", "val_data_path", "val_annotations_file", "shards",
)  # fmt: skip
"""Where the parts of a data set are that do not lie in its folder."""


def adopt(config: Any, known: Mapping[str, Any], names: Collection[str], sources: dict[str, str]) -> Any:
    """A benchmark's config with those of `names` that its checkpoint knows, wherever the user said nothing else.

    known: the checkpoint's settings. sources: where each of the config's values comes from; is told what comes from the
    checkpoint. Where the user names a data set or its folder, its parts are not taken from elsewhere. Raises UserError
    for values that are none.
    """
    own_data = any(sources[name] != DEFAULT for name in ("dataset", "dataset_path"))
    free = [name for name in names if sources.get(name) == DEFAULT and not (own_data and name in PLACES)]
    adopted = {name: known[name] for name in free if known.get(name) is not None}
    sources |= dict.fromkeys(adopted, config.checkpoint.name)
    try:
        return from_dict(type(config), to_dict(config) | adopted)
    except UserError as error:
        raise UserError(f"{config.checkpoint}: {error}") from error


def adopt_checkpoint(config: Any, names: Collection[str], sources: dict[str, str]) -> Any:
    """`adopt` from the config in --checkpoint, so that evaluation and prediction with it need no further option.

    Training takes the weights alone. A checkpoint of another program has no config: then nothing is adopted.
    """
    if not config.checkpoint or config.mode == "train":
        return config
    known = load_checkpoint(config.checkpoint, config.program).get("config")
    return adopt(config, known, names, sources) if known else config
