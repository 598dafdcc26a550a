"""EfficientDet: `python -m efficientdet.train`."""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from mlperf_logging.mllog import constants as keys
from torch import nn

from detcore import UserError
from detcore.cli import run_main
from detcore.config import DEFAULT
from detcore.data.batch import Batch
from detcore.detection import inference
from detcore.detection.benchmark import PARTS, benchmark
from detcore.detection.config import adopt_checkpoint
from detcore.detection.detector import Inference, class_count, examples, open_data
from detcore.detection.program import draw_gallery, program
from detcore.nn import optim
from detcore.nn.efficientnet_weights import load_weights
from detcore.nn.layerwise import Lamb, NovoGrad
from detcore.nn.schedule import EpochSchedule, Noise
from detcore.processes import distributed
from detcore.processes.launcher import World
from detcore.training import engine
from detcore.training.checkpoint import load_checkpoint
from detcore.training.records import JsonSummary
from detcore.training.task import Context, Task
from efficientdet.config import ADOPTED, BENCHMARK, BENCHMARKS, IGNORED_FLAGS, OPTIMIZERS, Config
from efficientdet.data import DETECTOR
from efficientdet.flags import translate_flags
from efficientdet.loss import losses
from efficientdet.model import EfficientDet
from efficientdet.records import Records, checkpoint_file
from efficientdet.weights import CLASS_LAYER, load_original_state, refuse_other_model

INTRO = (
    "Trains EfficientDet; also evaluates a checkpoint, predicts on images and measures speed (--mode). Takes the flags "
    "of NVIDIA's train.py and validate.py, the data folder without a flag and -c FILE (YAML), and more. Every option "
    "can be given here; those with a variable also by the environment, as configs/*.sh do. A data set of your own in "
    "COCO format: --dataset custom DIR."
)


def build_model(config: Config, num_classes: int) -> EfficientDet:
    """The model of a config with its starting weights, on the CPU. Raises UserError if weights are missing."""
    model = EfficientDet(config.model, num_classes, config.image_size, config.redundant_bias)
    model.soft_nms = config.use_soft_nms
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = config.bn_momentum
    if config.checkpoint:
        saved, source = load_checkpoint(config.checkpoint, config.program), str(config.checkpoint)
        own = saved.get("ema")
        removed = config.remove_weights if config.mode == "train" else ()
        if not removed:  # what is left of another model may fit
            source = refuse_other_model(saved, source, config.model)
        average = config.use_ema and "state_dict_ema" in saved
        how = {"ema": average, "remove": removed, "other_classes": config.weights_only}
        if load_original_state(model, own or saved, source, **how):
            layer = CLASS_LAYER.rstrip(".")
            print(
                f"{source} knows another number of classes: the layer that predicts them ({layer}) begins with random "
                "weights", file=sys.stderr,
            )  # fmt: skip
    elif config.pretrained and not config.resume and not config.synthetic:
        load_weights(model.backbone, config.weights)
    return model


def freeze(model: nn.Module, parts: Sequence[str]) -> None:
    """Parameters whose names contain one of `parts` do not train. Raises UserError for a part that none contains, and
    where no parameter is left."""
    names = [name for name, _ in model.named_parameters()]
    unknown = [part for part in parts if not any(part in name for name in names)]
    if unknown:
        raise UserError(
            f"--freeze-layers {unknown[0]}: no parameter is called so; the parts of the model are backbone, fpn, "
            "class_net and box_net"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in parts))
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"--freeze-layers {' '.join(parts)}: nothing is left to train; leave some layers out")


def make_optimizer(config: Config, model: nn.Module, fused: bool, scaled: bool = False) -> torch.optim.Optimizer:
    """The one of --opt, with no weight decay for biases and normalisation. fused: see `optim.adam`.

    scaled: the losses are, as with fp16; raises UserError for an optimizer that can't take part in it.
    """
    kind = OPTIMIZERS[config.opt]
    if scaled and kind in ("lamb", "novograd", "nvnovograd"):
        raise UserError(f"--opt {config.opt}: not with fp16, whose steps it can't leave out; choose --precision bf16")
    if kind in ("momentum", "nesterov"):
        nesterov = kind == "nesterov" and config.momentum > 0
        how = {"fused": fused, "nesterov": nesterov}
        return optim.sgd(model, config.lr, config.momentum, config.weight_decay, **how)
    groups = optim.decayed_groups(model, config.lr, config.weight_decay, fused=fused)
    common = {"lr": config.lr, "eps": config.opt_eps, "capturable": fused}
    match kind:
        case "lamb":
            return Lamb(groups, **common)
        case "novograd" | "nvnovograd":
            return NovoGrad(groups, **common, decoupled=kind == "novograd")
    return (torch.optim.AdamW if kind == "adamw" else torch.optim.Adam)(groups, **common, fused=fused)


def schedule(config: Config, seed: int) -> Callable[[int, float], float]:
    """rate(epoch, base): the learning rate of an epoch, from 0, of a parameter group whose own is `base`."""
    noise = None
    if config.lr_noise:
        first, last = (config.epochs * part for part in (*config.lr_noise, math.inf)[:2])
        noise = Noise(first, last, seed, config.lr_noise_pct)
    course = EpochSchedule(config.warmup_epochs, config.warmup_lr, noise)
    if config.sched == "step":
        return lambda epoch, base: course.step_decay(epoch, base, config.decay_epochs, config.decay_rate)
    cycles = config.epochs, config.min_lr, config.lr_cycle_mul, config.lr_cycle_limit
    return lambda epoch, base: course.cosine(epoch, base, *cycles)


def build_task(config: Config, context: Context, summary: JsonSummary | None = None) -> Task:
    """EfficientDet as the training loop sees it. summary: of a training, on rank 0."""
    place = context.backend.place(build_model(config, class_count(DETECTOR, config)))
    model = context.backend.sync_batch_norm(place) if config.sync_bn else place
    freeze(model, config.freeze_layers)
    evaluation = Inference(DETECTOR, config, context)
    rate = schedule(config, context.seed)
    ranks = context.world.size
    parameters, images_per_step = (
        sum(p.numel() for p in model.parameters()),
        config.batch_size * config.accumulate * ranks,
    )
    together = ranks > 1 and not config.legacy
    over_ranks = partial(distributed.all_reduce_mean, device=context.backend.collective_device) if together else None

    def loss(network, batch: Batch) -> dict:
        outputs = network(batch.images)
        how = {"smoothing": config.smoothing, "skip_zero_targets": config.legacy}
        return losses(
            outputs, model.anchors, batch.boxes, batch.labels, mean_over_ranks=over_ranks, ranks=ranks, **how
        )  # fmt: skip

    return Task(
        model=model,
        optimizer=make_optimizer(
            config, model, context.backend.fused_optimizers, context.backend.scaler().is_enabled()
        ),
        lr=lambda step, per_epoch, base: rate(step // per_epoch, base),
        loss=loss,
        open_data=lambda: open_data(DETECTOR, config, context, evaluation),
        prepare_evaluation=lambda: evaluation.prepare(model, model.num_classes),
        targets={config.metric: config.target_map},
        eval_epochs=config.evaluates,
        hyperparameters={
            keys.OPT_NAME: OPTIMIZERS[config.opt],
            keys.OPT_BASE_LR: config.lr,
            keys.OPT_WEIGHT_DECAY: config.weight_decay,
            keys.OPT_LR_WARMUP_EPOCHS: config.warmup_epochs,
        },
        notes=notes(config),
        examples=lambda: examples(DETECTOR, config, model.num_classes, context.seed),
        observe=Records(config, summary, parameters, images_per_step) if summary else None,
        checkpoint_file=lambda step, completed: checkpoint_file(config, completed),
        warmup_option="--warmup-epochs",
    )


def notes(config: Config) -> tuple[str, ...]:
    """What a reader of this run must know."""
    departures = ", ".join(config.departures())
    ruleless = "No MLPerf result: no ruleset has EfficientDet; the log has the events and their order alone."
    return (ruleless, f"Not the original's recipe: {departures}.") if departures else (ruleless,)


def open_summary(config: Config, world: World) -> JsonSummary | None:
    """The file of --dllogger-file, on rank 0; opened at once, for what can't be written is refused before the work."""
    if world.rank or not config.dllogger_file:
        return None
    return JsonSummary(config.dllogger_file, append=config.resume, option="--dllogger-file")


def train(config: Config, world: World) -> int:
    """`--mode train`: the epochs of the schedule and its cool-down."""
    summary = open_summary(config, world)
    whole = dataclasses.replace(config, epochs=config.total_epochs)
    outcome = engine.train(whole, BENCHMARK, lambda context: build_task(config, context, summary))
    draw_gallery(config, outcome, DETECTOR, build_model, world)
    return outcome.code


def evaluate(config: Config, world: World) -> int:
    """`--mode evaluate`."""
    summary = open_summary(config, world)
    found: dict[str, float] = {}
    code = inference.evaluate(config, DETECTOR, build_model, config.results, not config.inference, report=found.update)
    if summary and config.inference:
        times = {"total_inference_time": found["seconds"]}
        if "mean_ms" in found:  # of a batch, where there were more than the first ones
            times["inference_time"] = found["mean_ms"] / 1e3
        summary.log((), {"inference_throughput": found["images_per_s"], **times})
    if summary and not config.inference:
        result = json.loads((config.output_dir / "evaluation.json").read_text())
        times = {"total_eval_time": found["seconds"], "eval_throughput": found["images_per_s"]}
        summary.log((), {"map": result[config.metric], **times})
    return code


def measure(config: Config, world: World) -> int:
    """`--mode benchmark`, `benchmark-training` and `benchmark-inference`."""
    summary = open_summary(config, world)
    part = config.mode.removeprefix("benchmark").removeprefix("-")
    names = {"training": "train_throughput", "inference": "inference_throughput"}

    def report(results: list[dict]) -> None:
        for result in results if summary else ():  # those with data come last and are what counts
            summary.log((), {names[result["name"].split(",")[0]]: result["images_per_s"]})

    return benchmark(config, DETECTOR, build_task, (part,) if part else PARTS, report)


def complete(config: Config, sources: dict[str, str]) -> Config:
    """The config with what follows from others of its values, and what its checkpoint knows.

    --resume begins a run where the output folder has none, as the original's scripts want it. A checkpoint gives
    evaluation and prediction its model and data set, wherever the user said nothing else; another program's has none.
    --waymo is of the layout waymo where nobody, the checkpoint included, said another.
    """
    if config.resume and not (config.output_dir / "last.pt").exists():
        config = dataclasses.replace(config, resume=False)
    if config.validation_batch_size_multiplier and not config.eval_batch_size:
        images = config.batch_size * config.validation_batch_size_multiplier
        config = dataclasses.replace(config, eval_batch_size=images)
    config = adopt_checkpoint(config, ADOPTED, sources)
    if config.waymo and sources["dataset"] == DEFAULT:
        config, sources["dataset"] = dataclasses.replace(config, dataset="waymo"), "--waymo"
    return config


def main(argv: Sequence[str]) -> int:
    return program(
        argv,
        module="efficientdet.train",
        intro=INTRO,
        config_class=Config,
        benchmark=BENCHMARK,
        detector=DETECTOR,
        build_model=build_model,
        build_task=build_task,
        ignored_flags=IGNORED_FLAGS,
        translate=translate_flags,
        complete=complete,
        modes={"train": train, "evaluate": evaluate, **dict.fromkeys(BENCHMARKS, measure)},
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
