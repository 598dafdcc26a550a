"""The settings that every benchmark's run shares."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from detcore import UserError
from detcore.config import above, at_least, between, option
from detcore.device.base import DEVICES, GRAPHS, PRECISIONS
from detcore.device.native import POLICIES, VARIANTS

MODES = ("train", "evaluate", "predict", "benchmark")


@dataclass(frozen=True)
class RunConfig:
    """What every benchmark's run can choose; a benchmark's Config adds its own fields to these, and the defaults of its
    recipe (`detcore.config.redefine`).

    All fields decide the weights and must be equal when a run is resumed, but for those in FREE_ON_RESUME.
    """

    mode: str = option("train", "what to do", choices=MODES, group="Run")
    seed: int | None = option(
        None, "seed of the run; none draws one from the system", env="SEED", flags=("-s",), check=between(0, 2**31 - 1),
        group="Run",
    )  # fmt: skip
    device: str = option(
        "auto", "where to compute; auto takes a GPU if there is one, else a TPU", choices=DEVICES, group="Run"
    )
    num_cores: int = option(
        0, "start so many processes of this program on this machine, one for each core of a TPU (or to share a CPU); "
        "0: this process alone, or those of a launcher", flags=("--num_cores",), check=between(0, 1024), group="Run",
    )  # fmt: skip
    precision: str = option(
        "auto", "arithmetic; auto is bf16 on a GPU (fp16 on one without bf16) or TPU, fp32 on the CPU. With bf16 "
        "and fp16 the layers compute "
        "with narrow copies of fp32 weights, which are what is trained and kept; fp16 scales the loss as well",
        choices=PRECISIONS, group="Run",
    )  # fmt: skip
    ops: str = option(
        "auto", "the program's own kernels where they are built for the device (auto), never (reference), or always, "
        "an error where one is missing (native)", env="OPS", choices=POLICIES, group="Run",
    )  # fmt: skip
    variants: tuple[str, ...] = option(
        (), "faster ways to compute the same that no GPU has confirmed yet, separated by commas; docs/LOG.md has what "
        "each is expected to win", env="VARIANTS", choices=tuple(VARIANTS), group="Run",
    )  # fmt: skip
    cudnn_benchmark_limit: int = option(
        10, "algorithms that cuDNN tries for each convolution before the first step; 0: all of them",
        env="CUDNN_BENCHMARK_LIMIT", check=at_least(0), group="Run",
    )  # fmt: skip
    graphs: str = option(
        "auto", "record a training step, and inference, once and replay them as a whole, which spares a GPU the wait "
        "for the processor: on, off, or auto: inference always, a step with one GPU. The operations are the same",
        env="GRAPHS",
        choices=GRAPHS, group="Run",
    )  # fmt: skip
    compile: bool = option(
        False, "let torch.compile write the kernels of forward pass and loss: the alternative to the program's own, to "
        "measure against; the first step takes minutes", group="Run",
    )  # fmt: skip
    output_dir: Path = option(
        Path("results/run"), "folder of the log, the checkpoints and the pictures", env="OUTPUT_DIR", group="Run"
    )
    overwrite: bool = option(False, "replace an earlier run in the output folder", group="Run")
    resume: bool = option(False, "go on from last.pt of the output folder", group="Run")
    checkpoint: Path | None = option(None, "weights to start from, to evaluate or to predict with", group="Run")
    checkpoint_interval: int = option(
        0, "optimizer steps between checkpoints within an epoch; 0: only at its end", check=at_least(0), group="Run"
    )
    log_interval: int = option(
        20, "optimizer steps between progress lines, NaN checks and polls", env="LOG_INTERVAL", flags=("--print-freq",),
        check=at_least(1), group="Run",
    )  # fmt: skip
    hang_timeout: float = option(
        900.0, "seconds without progress until a process counts as hung (sooner, from 40 s on, where a familiar step "
        "takes 20 times as long as it ever did); 0: no limit", env="HANG_MONITOR_TIMEOUT", check=at_least(0),
        group="Run",
    )  # fmt: skip
    dead_timeout: float = option(
        30.0, "seconds without a sign of life until a process counts as dead", check=above(2), group="Run"
    )

    epochs: int = option(1, "epochs at most", env="NUMEPOCHS", check=at_least(1), group="Training")
    batch_size: int = option(
        1, "images per process and forward pass", env="BATCHSIZE", flags=("-b",), check=between(1, 65536),
        group="Training",
    )  # fmt: skip
    eval_batch_size: int = option(
        0, "images per process in evaluation; 0: as in training, on a GPU as many as fit, up to 128",
        env="EVALBATCHSIZE", check=between(0, 65536), group="Training",
    )  # fmt: skip
    accumulate: int = option(
        1, "forward passes per optimizer step; the last step of an epoch takes what is left",
        flags=("--gradient-accumulation-steps", "--accumulation"), check=at_least(1),
        group="Training",
    )  # fmt: skip
    clip_norm: float = option(0.0, "largest norm of the gradient; 0: no clipping", check=at_least(0), group="Training")
    ema_decay: float = option(
        0.0, "decay of the moving average of the weights, which is then what is evaluated; 0: none",
        check=between(0, 0.999999), group="Training",
    )  # fmt: skip
    ema_warmup: bool = option(
        False, "at step n (from 0) a decay of (1 + n) / (10 + n) at most, so that the average soon forgets the random "
        "weights of the beginning", group="Training",
    )  # fmt: skip
    max_iters_per_epoch: int = option(
        0, "optimizer steps per epoch at most; 0: the whole data set", check=at_least(0), group="Training"
    )

    mlperf_org: str = option("unset", "submission_org of the log", env="MLPERF_SUBMISSION_ORG", group="MLPerf log")
    mlperf_platform: str = option(
        "unset", "submission_platform of the log", env="MLPERF_SUBMISSION_PLATFORM", group="MLPerf log"
    )
    mlperf_division: str = option(
        "closed", "submission_division of the log", env="MLPERF_DIVISION", flags=("--division",),
        choices=("closed", "open"), group="MLPerf log",
    )  # fmt: skip
    mlperf_status: str = option(
        "onprem", "submission_status of the log", env="MLPERF_STATUS",
        choices=("onprem", "cloud", "preview", "research"), group="MLPerf log",
    )  # fmt: skip
    result_index: int = option(
        0, "k of the log's name result_<k>.txt", env="RESULT_INDEX", check=at_least(0), group="MLPerf log"
    )
    drop_file_cache: bool = option(
        False, "before the run, drop the data set's files from the page cache (no root needed) and log cache_clear",
        group="MLPerf log",
    )  # fmt: skip
    caches_cleared: bool = option(
        False, "log cache_clear: the launcher has dropped the page cache of every node", env="CACHES_CLEARED",
        group="MLPerf log",
    )  # fmt: skip

    FREE_ON_RESUME: ClassVar[frozenset[str]] = frozenset(
        {"output_dir", "overwrite", "resume", "checkpoint", "checkpoint_interval", "log_interval", "hang_timeout"}
        | {"dead_timeout", "epochs", "eval_batch_size", "mlperf_org", "mlperf_platform", "mlperf_division"}
        | {"mlperf_status", "result_index", "drop_file_cache", "caches_cleared", "graphs", "num_cores", "device"}
        | {"cudnn_benchmark_limit"}
    )

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise UserError("--resume and --overwrite exclude each other: one goes on with a run, one replaces it")
        if self.ema_warmup and not self.ema_decay:
            raise UserError("--ema-warmup: there is no average to warm up; give its decay with --ema-decay")
        if self.mode == "predict" and self.num_cores > 1:
            raise UserError("--num-cores: one process predicts; leave it out with --mode predict")
        if self.graphs == "on" and self.device in ("cpu", "tpu"):
            raise UserError(f"--graphs on --device {self.device}: only a GPU can record steps; leave one of them out")

    @property
    def length(self) -> tuple[str, str]:
        """The field that ends the run where no target does, and what its users call it."""
        return "epochs", "--epochs"

    @property
    def program(self) -> str:
        """The folder of the benchmark whose settings these are, as `native` names it."""
        return type(self).__module__.partition(".")[0]

    def data_paths(self) -> list[Path]:
        """Files and folders of the data set, for --drop-file-cache; a benchmark's Config says which."""
        return []
