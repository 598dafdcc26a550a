"""SSD300: `python -m ssd300.train`."""

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from mlperf_logging.mllog import constants as keys

from detcore import UserError
from detcore.cli import run_main
from detcore.data.batch import Batch
from detcore.detection import inference
from detcore.detection.benchmark import PARTS, benchmark
from detcore.detection.config import adopt
from detcore.detection.detector import Inference, class_count, examples, open_data
from detcore.detection.program import draw_gallery, program
from detcore.nn import optim
from detcore.nn.resnet import load_backbone
from detcore.nn.schedule import warmup_then_decay
from detcore.processes.launcher import World
from detcore.training import checkpoint, engine, state
from detcore.training.checkpoint import load_checkpoint
from detcore.training.records import JsonSummary
from detcore.training.task import Context, Task
from ssd300.config import (
    ADOPTED,
    BENCHMARK,
    BENCHMARKS,
    DECAY,
    FIRST_WEIGHTS_ALONE,
    IGNORED_FLAGS,
    LR_BATCH,
    TRAINING_MODES,
    Config,
    refuse_missing_weights,
    translate_flags,
)
from ssd300.data import DETECTOR
from ssd300.inference import class_entries
from ssd300.loss import losses
from ssd300.model import (
    CUT_LAYERS,
    SSD300,
    known_backbone,
    known_classes,
    load_original_state,
    scale_as_the_originals_inference,
)
from ssd300.ops.multibox import NEGATIVES_PER_POSITIVE
from ssd300.records import RATES, Records, coco_lines, epoch_file, parameters, speeds

INTRO = (
    "Trains SSD300 with a ResNet; also evaluates a checkpoint, predicts on images and measures speed (--mode). Takes "
    "the flags of NVIDIA's main.py, and more. Every option can be given here; those with a variable also by the "
    "environment, as configs/*.sh do. A data set of your own in COCO format: --dataset custom --data DIR."
)


def build_model(config: Config, num_classes: int) -> SSD300:
    """The model of a config with its starting weights, on the CPU. Raises UserError if weights are missing."""
    model = SSD300(config.backbone, num_classes, config.predictor_norm)
    if config.checkpoint:
        saved = load_checkpoint(config.checkpoint, config.program)
        weights, source = saved.get("ema") or saved, str(config.checkpoint)
        if load_original_state(model, weights, source, other_classes=config.weights_only):
            print(f"{source} knows another number of classes: the layers that predict them start anew", file=sys.stderr)
    elif config.pretrained and not config.resume and not config.synthetic:
        only_first = config.backbone in FIRST_WEIGHTS_ALONE
        version = "IMAGENET1K_V1" if only_first else config.torchvision_weights_version
        load_backbone(model.backbone, config.backbone, config.weights, version, CUT_LAYERS)
    if config.legacy and config.mode == "predict":
        scale_as_the_originals_inference(model)
    return model


def build_task(config: Config, context: Context, records: Records | None = None) -> Task:
    """SSD300 as the training loop sees it. records: of a training, on rank 0."""
    place = context.backend.place(build_model(config, class_count(DETECTOR, config)))
    model = context.backend.sync_batch_norm(place) if config.sync_bn else place
    evaluation = Inference(DETECTOR, config, context)
    images = config.batch_size * config.accumulate * context.world.size
    rate = config.lr * images / LR_BATCH
    empty_negatives = 0 if config.legacy else NEGATIVES_PER_POSITIVE

    def loss(network, batch: Batch) -> dict:
        outputs = network(batch.images)
        return losses(outputs, model.priors, batch.boxes, batch.labels, empty_negatives)

    return Task(
        model=model,
        optimizer=_optimizer(config, model, rate, context.backend.fused_optimizers),
        lr=lambda step, per_epoch, base: warmup_then_decay(
            step, per_epoch, base, config.warmup or 0, config.decay_epochs, DECAY, stays_below=config.legacy
        ),
        loss=loss,
        open_data=lambda: open_data(DETECTOR, config, context, evaluation),
        prepare_evaluation=lambda: evaluation.prepare(model, model.num_classes),
        targets={"AP": config.target_map},
        eval_epochs=config.evaluates,
        hyperparameters={
            keys.OPT_NAME: config.optimizer,
            keys.OPT_BASE_LR: rate,
            keys.OPT_WEIGHT_DECAY: config.weight_decay,
            **({"opt_momentum": config.momentum} if config.optimizer == "sgd" else {}),
            keys.OPT_LR_WARMUP_STEPS: config.warmup or 0,
            keys.OPT_LR_DECAY_BOUNDARY_EPOCHS: list(config.decay_epochs),
            keys.OPT_LR_DECAY_FACTOR: DECAY,
        },
        notes=notes(config),
        examples=lambda: examples(DETECTOR, config, model.num_classes, context.seed),
        observe=records,
        checkpoint_file=lambda step, completed: epoch_file(config, completed),
        warmup_option="--warmup",
    )


def _optimizer(config: Config, model: torch.nn.Module, rate: float, fused: bool) -> torch.optim.Optimizer:
    if config.optimizer == "adam":
        return optim.adam(model, rate, config.weight_decay, fused=fused)
    return optim.sgd(model, rate, config.momentum, config.weight_decay, fused=fused)


def notes(config: Config) -> tuple[str, ...]:
    """What a reader of this run must know."""
    departures = ", ".join(config.departures())
    ruleless = "No MLPerf result: no ruleset of today has SSD300; the log has the events and their order alone."
    return (ruleless, f"Not the original's recipe: {departures}.") if departures else (ruleless,)


def adopt_checkpoint(config: Config, sources: dict[str, str]) -> Config:
    """The config with what its checkpoint knows, wherever the user said nothing else.

    So `--mode evaluation --checkpoint epoch_64.pt` needs no further option, and a training that goes on with such a
    file of --save has its settings. Where training takes the weights alone, it is the network alone. The original's
    checkpoints have no config; their weights tell the backbone.
    """
    saved = load_checkpoint(config.checkpoint, config.program)
    known = saved.get("config") or {"backbone": known_backbone(saved.get("model", saved))}
    names = ADOPTED
    if config.mode in TRAINING_MODES:
        whole = config.mode == "train" and not config.weights_only and _goes_on(config.checkpoint, saved)
        names = known.keys() - config.FREE_ON_RESUME - {"mode"} if whole else ("backbone", "predictor_norm")
    return adopt(config, known, names, sources)


def _goes_on(path: Path, saved: dict) -> bool:
    """Whether a checkpoint is one of --save, which holds a whole state."""
    return bool(re.fullmatch(r"epoch_\d+\.pt", path.name)) and "generators" in saved


def go_on(config: Config, world: World) -> Config:
    """The config of a training that goes on from `--checkpoint epoch_12.pt` with epoch 13, as the original does.

    Such a file (--save) holds a whole state. It becomes last.pt of the output folder, which must hold no other run;
    rank 0 sees to that, before any other looks. Other files, those of the original, and all with --weights-only give
    their weights alone, which rank 0 says. Raises UserError, before anything is written, for other settings than the
    file's.
    """
    if not config.checkpoint or config.resume:
        return config
    path, saved = config.checkpoint, load_checkpoint(config.checkpoint, config.program)
    if config.weights_only or not _goes_on(path, saved):
        if world.rank == 0:
            print(f"{path}: its weights alone are taken; training starts with epoch 0", file=sys.stderr)
        return config
    differ = state.differing_settings(saved, config, world)
    then, now = known_classes(saved["model"]), class_count(DETECTOR, config)
    if differ or then != now:
        words = "; ".join(differ or [f"classes were {then}, are {now}"])
        raise UserError(
            f"--checkpoint {path}: its run had other settings ({words}). Give the same ones to go on with it, or start "
            "anew from its weights with --weights-only."
        )
    last = config.output_dir / "last.pt"
    if world.rank == 0 and not (last.exists() and last.samefile(path)):
        if last.exists() and not config.overwrite:
            raise UserError(
                f"--checkpoint {path}: {config.output_dir} holds a run already. Go on in another --output-dir, or "
                "replace it with --overwrite; --resume goes on with what is there."
            )
        config.output_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.link_or_copy(path, last)
    return dataclasses.replace(config, resume=True, overwrite=False, checkpoint=None)


def train(config: Config, world: World) -> int:
    """`--mode train`."""
    config = go_on(config, world)
    summary = open_summary(config, world)
    records = Records(config, summary) if world.rank == 0 else None
    outcome = engine.train(config, BENCHMARK, lambda context: build_task(config, context, records))
    as_validation = dataclasses.replace(config, legacy=False)  # how the gallery sees images
    draw_gallery(as_validation, outcome, DETECTOR, build_model, world)
    return outcome.code


def evaluate(config: Config, world: World) -> int:
    """`--mode evaluation`."""
    summary = open_summary(config, world)
    summary.log("PARAMETER", parameters(config, config.seed))
    code = inference.evaluate(config, DETECTOR, build_model)
    if world.rank == 0:
        result = json.loads((config.output_dir / "evaluation.json").read_text())
        print("\n".join(coco_lines(result)))
        summary.log((), {"mAP": result["AP"]})
    return code


def measure(config: Config, world: World) -> int:
    """`--mode benchmark`, `benchmark-training` and `benchmark-inference`."""
    summary = open_summary(config, world)
    part = config.mode.removeprefix("benchmark").removeprefix("-")

    def report(results: list[dict]) -> None:
        for result in results:
            rates = [f"{short} {result[name]:.1f}" for short, name in RATES.items()]
            print(f"{result['name']}: images/s {', '.join(rates)}")
        seed = json.loads((config.output_dir / "benchmark.json").read_text())["seed"]
        summary.log("PARAMETER", parameters(config, seed))
        summary.log((), speeds(results))

    return benchmark(config, DETECTOR, build_task, (part,) if part else PARTS, report)


def open_summary(config: Config, world: World) -> JsonSummary:
    """The file of --json-summary, on rank 0; opened at once, for what can't be written is refused before the work."""
    return JsonSummary(config.json_summary if world.rank == 0 else None, append=config.resume)


def complete(config: Config, sources: dict[str, str]) -> Config:
    """The config with what its checkpoint knows, and one batch for both ways of saying it."""
    refuse_missing_weights(config, sources)
    if config.checkpoint and not config.resume:
        config = adopt_checkpoint(config, sources)
    if config.mode == "benchmark-inference":  # its batch may be said either way
        images = config.eval_batch_size or config.batch_size
        config = dataclasses.replace(config, batch_size=images, eval_batch_size=images)
    return config


def main(argv: Sequence[str]) -> int:
    return program(
        argv,
        module="ssd300.train",
        intro=INTRO,
        config_class=Config,
        benchmark=BENCHMARK,
        detector=DETECTOR,
        build_model=build_model,
        build_task=build_task,
        ignored_flags=IGNORED_FLAGS,
        translate=translate_flags,
        complete=complete,
        modes={
            "train": train,
            "evaluate": evaluate,
            "predict": lambda config, world: inference.predict(config, DETECTOR, build_model, class_entries),
            **dict.fromkeys(BENCHMARKS, measure),
        },
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
