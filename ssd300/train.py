"""SSD300: `python -m ssd300.train`."""

import dataclasses
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from mlperf_logging.mllog import constants as keys

from detcore import UserError
from detcore.cli import run_main
from detcore.config import describe, format_config, load
from detcore.data import synthetic
from detcore.data.batch import Batch
from detcore.detection import inference
from detcore.detection.benchmark import PARTS, benchmark
from detcore.detection.config import adopt
from detcore.detection.detector import Inference, class_count, open_data
from detcore.detection.program import spread
from detcore.nn import optim
from detcore.nn.resnet import load_backbone
from detcore.nn.schedule import warmup_then_decay
from detcore.processes.launcher import World, discover
from detcore.training import checkpoint, engine, state
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
    own_words,
    refuse_missing_weights,
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
from ssd300.records import RATES, Records, Summary, coco_lines, epoch_file

PROGRAM = "python -m ssd300.train"
INTRO = (
    "Trains SSD300 with a ResNet; also evaluates a checkpoint, predicts on images and measures speed (--mode). Takes "
    "the flags of NVIDIA's main.py, and more. Every option can be given here; those with a variable also by the "
    "environment, as configs/*.sh do. A data set of your own in COCO format: --dataset custom --data DIR."
)


def build_model(config: Config, num_classes: int) -> SSD300:
    """The model of a config with its starting weights, on the CPU. Raises UserError if weights are missing."""
    model = SSD300(config.backbone, num_classes, config.predictor_norm)
    if config.checkpoint:
        saved = inference.load_checkpoint(config.checkpoint)
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
        optimizer=_optimizer(config, model, rate, context.backend.is_gpu),
        lr=lambda step, per_epoch: warmup_then_decay(
            step, per_epoch, rate, config.warmup or 0, config.decay_epochs, DECAY
        ),
        loss=loss,
        open_data=lambda: open_data(DETECTOR, config, context, evaluation),
        prepare_evaluation=lambda: evaluation.prepare(model, model.num_classes),
        metric="AP",
        target=config.target_map,
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
        example=lambda: next(
            synthetic.synthetic_batches(
                model.num_classes, config.image_size, config.batch_size, config.max_boxes, context.seed
            )
        ),
        observe=records,
        epoch_file=lambda completed: epoch_file(config, completed),
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
    saved = inference.load_checkpoint(config.checkpoint)
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
    path, saved = config.checkpoint, inference.load_checkpoint(config.checkpoint)
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


def evaluate(config: Config, summary: Summary, first: bool) -> int:
    """`--mode evaluation`. first: whether this process is rank 0."""
    summary.parameters(config, config.seed)
    code = inference.evaluate(config, DETECTOR, build_model)
    if first:
        result = json.loads((config.output_dir / "evaluation.json").read_text())
        print("\n".join(coco_lines(result)))
        summary.log((), {"mAP": result["AP"]})
    return code


def measure(config: Config, summary: Summary) -> int:
    """`--mode benchmark`, `benchmark-training` and `benchmark-inference`."""
    part = config.mode.removeprefix("benchmark").removeprefix("-")

    def tell(results: list[dict]) -> None:
        for result in results:
            rates = [f"{short} {result[name]:.1f}" for short, name in RATES.items()]
            print(f"{result['name']}: images/s {', '.join(rates)}")
        summary.parameters(config, json.loads((config.output_dir / "benchmark.json").read_text())["seed"])
        summary.benchmark(results)

    return benchmark(config, DETECTOR, build_task, (part,) if part else PARTS, tell)


def main(argv: Sequence[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(describe(Config, PROGRAM, INTRO))
        return 0
    given, argv = argv, own_words(argv)
    printing = "--print-config" in argv
    config, sources, notices = load(Config, [w for w in argv if w != "--print-config"], os.environ, IGNORED_FLAGS)
    refuse_missing_weights(config, sources)
    if config.checkpoint and not config.resume:
        config = adopt_checkpoint(config, sources)
    if config.mode == "benchmark-inference":  # its batch may be said either way
        images = config.eval_batch_size or config.batch_size
        config = dataclasses.replace(config, batch_size=images, eval_batch_size=images)
    if not printing:
        spread(config.num_cores, "ssd300.train", given)
    world, _ = discover(os.environ)
    speaks = world.rank == 0
    if speaks:
        print("\n".join([format_config(config, sources), *notices]), file=sys.stdout if printing else sys.stderr)
    if printing:
        return 0
    if config.mode == "predict":
        return inference.predict(config, DETECTOR, build_model, class_entries)
    if config.mode == "train":
        config = go_on(config, world)
    # What can't be written is refused here, before hours of work.
    summary = Summary(config.json_summary if speaks else None, append=config.resume)
    if config.mode == "evaluate":
        return evaluate(config, summary, speaks)
    if config.mode in BENCHMARKS:
        return measure(config, summary)
    records = Records(config, summary) if speaks else None
    outcome = engine.train(config, BENCHMARK, lambda context: build_task(config, context, records))
    if config.gallery and outcome.best is not None and speaks:
        inference.gallery(dataclasses.replace(config, legacy=False), DETECTOR, build_model)  # as validation sees images
    return outcome.code


if __name__ == "__main__":
    sys.exit(run_main(main))
