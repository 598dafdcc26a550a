"""RetinaNet: `python -m single_stage_detector.train`."""

import sys
from collections.abc import Sequence
from dataclasses import replace

from mlperf_logging.mllog import constants as keys

from detcore.cli import run_main
from detcore.data.batch import Batch
from detcore.detection.config import adopt_checkpoint
from detcore.detection.detector import Inference, class_count, examples, open_data
from detcore.detection.program import program
from detcore.nn import optim
from detcore.nn.resnet import load_backbone
from detcore.nn.schedule import warmup_then_constant
from detcore.training.checkpoint import load_checkpoint
from detcore.training.task import Context, Task
from single_stage_detector import convergence
from single_stage_detector.config import ADOPTED, BENCHMARK, IGNORED_FLAGS, Config, translate_flags
from single_stage_detector.data import DETECTOR
from single_stage_detector.loss import losses
from single_stage_detector.model import RetinaNet, load_reference_state

INTRO = (
    "Trains RetinaNet to a target mAP and logs by MLPerf's rules; also evaluates a checkpoint, predicts on images and "
    "measures speed (--mode). Every option can be given here; those with a variable also by the environment, as "
    "configs/*.sh do. A data set of your own in COCO format: --dataset custom --dataset-path DIR."
)


def build_model(config: Config, num_classes: int) -> RetinaNet:
    """The model of a config with its starting weights, on the CPU. Raises UserError if weights are missing."""
    model = RetinaNet(
        backbone=config.backbone,
        num_classes=num_classes,
        image_size=config.image_size,
        norm=config.norm,
        trainable_layers=config.trainable_backbone_layers,
        fpn_channels=config.fpn_channels,
        head_convs=config.head_convs,
        anchor_sizes=config.anchor_sizes,
    )
    if config.checkpoint:
        saved, source = load_checkpoint(config.checkpoint, config.program), str(config.checkpoint)
        if load_reference_state(model, saved.get("ema") or saved, source, other_classes=config.weights_only):
            print(f"{source} knows other classes: the layer that predicts them starts anew", file=sys.stderr)
    elif config.pretrained and not config.resume and not config.synthetic:
        load_backbone(model.backbone["body"], config.backbone, config.weights)
    return model


def build_task(config: Config, context: Context) -> Task:
    """RetinaNet as the training loop sees it."""
    place = context.backend.place(build_model(config, class_count(DETECTOR, config)))
    model = context.backend.sync_batch_norm(place) if config.sync_bn else place
    evaluation = Inference(DETECTOR, config, context)

    def loss(network, batch: Batch) -> dict:
        outputs = network(batch.images)
        return losses(outputs, model.anchors, batch.boxes, batch.labels)

    return Task(
        model=model,
        optimizer=optim.adam(model, config.lr, fused=context.backend.fused_optimizers),
        lr=lambda step, per_epoch, base: warmup_then_constant(
            step, base, config.warmup_epochs * per_epoch, config.warmup_factor
        ),
        loss=loss,
        open_data=lambda: open_data(DETECTOR, config, context, evaluation),
        prepare_evaluation=lambda: evaluation.prepare(model, model.num_classes),
        targets={"AP": config.target_map},
        eval_epochs=lambda completed, epochs: not config.synthetic,
        hyperparameters={
            keys.OPT_NAME: "adam",
            keys.OPT_BASE_LR: config.lr,
            keys.OPT_WEIGHT_DECAY: 0,
            keys.OPT_LR_WARMUP_EPOCHS: config.warmup_epochs,
            keys.OPT_LR_WARMUP_FACTOR: config.warmup_factor,
        },
        notes=notes(config),
        examples=lambda: examples(DETECTOR, config, model.num_classes, context.seed),
        warmup_option="--warmup-epochs",
        judge=lambda epoch, metrics: far_from_public_runs(config, context.world.size, epoch, metrics["AP"]),
    )


def far_from_public_runs(config: Config, processes: int, epoch: int, value: float) -> str | None:
    """A sentence where the mAP of the MLPerf benchmark is far from that of public runs after as many epochs."""
    if replace(config, seed=None).departures():
        return None
    batch = config.batch_size * config.accumulate * processes
    far = convergence.far_off(batch, config.lr, config.warmup_epochs, epoch, value)
    return f"warning: {far}" if far else None


def notes(config: Config) -> tuple[str, ...]:
    """What a reader of this run must know: whether it can be an MLPerf result at all."""
    idle = idle_variants(config)
    told = (
        (f"--variants {','.join(idle)}: nothing here for {'it' if len(idle) == 1 else 'them'} to do.",) if idle else ()
    )
    departures = ", ".join(config.departures())
    if not departures:
        return told
    if config.mlperf_division == "closed":
        return (
            f"Warning: the log says division closed, but this run departs from the closed benchmark: {departures}. "
            "Log it with --division open.",
            *told,
        )
    return (f"Not the MLPerf benchmark and no MLPerf result: {departures}.", *told)


def idle_variants(config: Config) -> list[str]:
    """Which of the chosen variants change nothing in this model, whatever the device."""
    for_nothing = set(config.variants) if config.ops == "reference" else set()
    if not config.backbone.startswith("resnext"):  # the others have no grouped convolutions
        for_nothing.add("merged_groups")
    if config.norm != "frozen":
        for_nothing.add("stem")
    return [name for name in config.variants if name in for_nothing]


def main(argv: Sequence[str]) -> int:
    return program(
        argv,
        module="single_stage_detector.train",
        intro=INTRO,
        config_class=Config,
        benchmark=BENCHMARK,
        detector=DETECTOR,
        build_model=build_model,
        build_task=build_task,
        ignored_flags=IGNORED_FLAGS,
        translate=translate_flags,
        complete=lambda config, sources: adopt_checkpoint(config, ADOPTED, sources),
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
