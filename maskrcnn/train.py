"""Mask R-CNN, Faster R-CNN and RPN: `python -m maskrcnn.train`."""

import dataclasses
import datetime
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mlperf_logging.mllog import constants as keys

from detcore import UserError
from detcore.cli import run_main
from detcore.config import DEFAULT
from detcore.data.batch import Batch
from detcore.detection import inference
from detcore.detection.config import adopt_checkpoint
from detcore.detection.detector import Inference, class_count, examples, open_data
from detcore.detection.program import draw_gallery, program
from detcore.nn import optim
from detcore.nn.schedule import warmup_multistep
from detcore.ops.mask_targets import mask_targets
from detcore.processes import launcher
from detcore.processes.launcher import World
from detcore.training import engine
from detcore.training.checkpoint import load_checkpoint
from detcore.training.records import JsonSummary
from detcore.training.task import Context, Task
from maskrcnn.config import ADOPTED, BENCHMARK, IGNORED_FLAGS, Config
from maskrcnn.data import DETECTOR
from maskrcnn.flags import translate_flags
from maskrcnn.last_checkpoint import LAST, last_checkpoint
from maskrcnn.loss import losses
from maskrcnn.model import MaskRCNN
from maskrcnn.records import METRICS, Records, checkpoint_file
from maskrcnn.weights import load_weights

INTRO = (
    "Trains Mask R-CNN, Faster R-CNN or a region proposal network; also evaluates a checkpoint, predicts on images and "
    "measures speed (--mode). Takes what train_net.py and test_net.py of maskrcnn-benchmark take: --config-file FILE "
    "and KEY VALUE pairs, as SOLVER.BASE_LR 0.01. Each key is an option, too; those with a variable can also be "
    "given by the environment, as configs/*.sh do. A data set of your own in COCO format: --dataset custom "
    "--dataset-path DIR."
)


def build_model(config: Config, num_classes: int) -> MaskRCNN:
    """The model of a config with its starting weights, on the CPU. Raises UserError if weights are missing."""
    config = dataclasses.replace(config, roi_box_head_num_classes=num_classes + 1)
    model = MaskRCNN(config)
    if config.checkpoint:
        if average := load_checkpoint(config.checkpoint).get("ema"):
            model.load_state_dict(average)
            return model
        config = dataclasses.replace(config, weights=str(config.checkpoint))
    elif not config.pretrained or config.resume or config.synthetic or not config.weights:
        return model
    for sentence in load_weights(model, config, config.mode == "train"):
        print(sentence, file=sys.stderr)
    return model


def make_optimizer(config: Config, model: MaskRCNN, fused: bool) -> torch.optim.Optimizer:
    """SGD with momentum, whose biases have a learning rate and a weight decay of their own."""
    rates = config.lr, config.weight_decay, config.lr * config.solver_bias_lr_factor, config.solver_weight_decay_bias
    groups = optim.bias_groups(model, *rates, fused=fused)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused)


def build_task(config: Config, context: Context, summary: JsonSummary | None = None) -> Task:
    """Mask R-CNN as the training loop sees it. summary: of a training, on rank 0."""
    classes = class_count(DETECTOR, config)
    model = context.backend.place(build_model(config, classes))
    evaluation = Inference(DETECTOR, config, context)
    decay = config.solver_steps, config.solver_gamma
    warmup = config.solver_warmup_method, config.solver_warmup_iters, config.solver_warmup_factor
    images_per_step = config.batch_size * config.accumulate * context.world.size
    box_target, mask_target = config.targets

    def loss(network: torch.nn.Module, batch: Batch) -> dict:
        return losses(model, batch, mask_targets, network=network)

    return Task(
        model=model,
        optimizer=make_optimizer(config, model, context.backend.fused_optimizers),
        lr=lambda step, per_epoch, base: warmup_multistep(step, base, *decay, *warmup),
        loss=loss,
        open_data=lambda: open_data(DETECTOR, config, context, evaluation),
        prepare_evaluation=lambda: evaluation.prepare(model, model.num_classes),
        targets={"AP": box_target} | ({"segm_AP": mask_target} if DETECTOR.masks(config) else {}),
        accuracy_names={"AP": "BBOX", "segm_AP": "SEGM"},
        eval_epochs=partial(evaluates, config),
        total_steps=None if config.epochs else config.solver_max_iter,
        hyperparameters=hyperparameters(config),
        notes=notes(config, classes),
        examples=lambda: examples(DETECTOR, config, model.num_classes, context.seed),
        observe=Records(config, summary, images_per_step, context.backend.peak_memory_gib) if summary else None,
        checkpoint_file=partial(checkpoint_file, config),
        warmup_option="SOLVER.WARMUP_ITERS",
    )


def evaluates(config: Config, completed: int, epochs: int) -> bool:
    """Whether to evaluate after so many epochs of so many."""
    if config.rpn_only:
        return False
    return not config.synthetic and (config.per_epoch_eval or (completed == epochs and not config.skip_test))


def hyperparameters(config: Config) -> dict:
    """What the rules of MLPerf 3.1 want in the log."""
    candidates = config.rpn_fpn_post_nms_top_n_train if config.rpn_use_fpn else config.rpn_post_nms_top_n_train
    return {
        keys.OPT_NAME: keys.SGD,
        keys.OPT_BASE_LR: config.lr,
        keys.OPT_WEIGHT_DECAY: config.weight_decay,
        keys.OPT_LR_WARMUP_STEPS: config.solver_warmup_iters,
        keys.OPT_LR_WARMUP_FACTOR: config.solver_warmup_factor,
        keys.OPT_LR_DECAY_FACTOR: config.solver_gamma,
        keys.OPT_LR_DECAY_STEPS: list(config.solver_steps),
        keys.NUM_IMAGE_CANDIDATES: candidates,
        keys.MIN_IMAGE_SIZE: config.input_min_size_train,
        keys.MAX_IMAGE_SIZE: config.input_max_size_train,
    }


STRIDES = {"FPN": (4, 8, 16, 32, 64), "C4": (16,), "C5": (32,)}
"""Of a body's maps, by where it ends."""


def notes(config: Config, classes: int) -> tuple[str, ...]:
    """What a reader of this run must know."""
    said = []
    if config.roi_box_head_num_classes != classes + 1:
        said.append(
            f"The heads have {classes + 1} outputs, for the data set's classes and the background; "
            f"MODEL.ROI_BOX_HEAD.NUM_CLASSES says {config.roi_box_head_num_classes}."
        )
    strides = STRIDES[config.backbone_conv_body.rpartition("-")[2]]
    if config.rpn_anchor_stride != strides:
        said.append(
            f"WARNING: MODEL.RPN.ANCHOR_STRIDE {config.rpn_anchor_stride}: the maps of {config.backbone_conv_body} "
            f"have strides {strides}, so that the anchors do not lie where their features do."
        )
    scales = tuple(1 / stride for stride in strides)
    for head in ("box", "mask"):
        own = getattr(config, f"roi_{head}_head_pooler_scales")
        used = not config.rpn_only and (head == "box" or (config.mask_on and config.roi_heads_use_fpn))
        if used and own != scales[: len(own)]:
            said.append(
                f"WARNING: MODEL.ROI_{head.upper()}_HEAD.POOLER_SCALES {own}: the maps of {config.backbone_conv_body} "
                f"have the scales {scales}, so that regions are read from other places."
            )
    if not config.dataloader_aspect_ratio_grouping:
        said.append("DATALOADER.ASPECT_RATIO_GROUPING False changes nothing: all images of a batch share a canvas.")
    if config.rpn_only:
        said.append("Proposals have no class, so there is no AP; --mode evaluate --skip-eval writes them.")
    return tuple(said)


def open_summary(config: Config, world: World) -> JsonSummary | None:
    """The summary of rank 0, with a file or without; opened at once, for what can't be written is refused first."""
    if world.rank:
        return None
    return JsonSummary(config.dllogger_file, append=config.resume)


def train(config: Config, world: World) -> int:
    """`--mode train`."""
    summary = open_summary(config, world)
    outcome = engine.train(config, BENCHMARK, lambda context: build_task(config, context, summary))
    draw_gallery(config, outcome, DETECTOR, build_model, world)
    return outcome.code


def evaluate(config: Config, world: World) -> int:
    """`--mode evaluate`: as all detectors, with the results where the original has them and its line on speed."""
    if config.rpn_only and not config.skip_eval:
        raise UserError(
            "MODEL.RPN_ONLY True: proposals have no class and so no AP; --skip-eval writes them to "
            f"{config.output_dir}/inference"
        )
    summary = open_summary(config, world)
    name = config.datasets_test[0] if config.datasets_test else config.dataset
    results = config.output_dir / "inference" / name
    began = time.perf_counter()
    part = max(config.infer_steps, 0)
    code = inference.evaluate(config, DETECTOR, build_model, results, not config.skip_eval, part)
    if summary is None:
        return code
    seconds = time.perf_counter() - began
    took = datetime.timedelta(seconds=round(seconds))
    print(f"Total inference time: {took} on {world.size} devices; the results lie in {results}")
    data = {"e2e_infer_time": seconds, "eval_dataset_name": name}
    if not config.skip_eval and not part:
        found = json.loads((config.output_dir / "evaluation.json").read_text(encoding="utf-8"))
        data |= {key: found[metric] for metric, key in METRICS.items() if metric in found}
        print("".join(compared(config, found)), end="")
    summary.log((), data)
    return code


def compared(config: Config, found: Mapping[str, Any]) -> list[str]:
    """A line for each of TEST.EXPECTED_RESULTS. Raises UserError for a result that there is not."""
    lines = []
    for one in config.test_expected_results:
        kind, metric, mean, deviation = one.split(":")
        name = {"bbox": metric, "segm": f"segm_{metric}"}.get(kind)
        if name not in found:
            raise UserError(
                f"TEST.EXPECTED_RESULTS {one}: there is no {kind} {metric}; evaluation.json has what there is"
            )
        reach = config.test_expected_results_sigma_tol * float(deviation)
        verdict = "PASS" if abs(found[name] - float(mean)) <= reach else "FAIL"
        lines.append(f"{verdict}: {kind} {metric} {found[name]:.4f}, expected {float(mean):g} +- {reach:g}\n")
    return lines


def complete(config: Config, sources: dict[str, str]) -> Config:
    """The config with what follows from the processes, from the output folder and from its checkpoint.

    As in the original a folder with a file last_checkpoint goes on from there, which is said: a training with --resume,
    or from the weights if the checkpoint is another program's; evaluation and prediction with that checkpoint.
    """
    world, _ = launcher.discover(os.environ)
    config = config.over_processes(world.size, sources)
    changes = {}
    if config.save_checkpoint and sources["checkpoint_interval"] == DEFAULT:
        changes["checkpoint_interval"] = config.solver_checkpoint_period
    newest = None if config.checkpoint or config.resume or config.overwrite else last_checkpoint(config.output_dir)
    if newest and config.mode == "train" and (config.output_dir / "last.pt").is_file():
        _same_step(newest, config.output_dir / "last.pt")
        changes["resume"], sources["resume"] = True, LAST
    elif newest:
        changes["checkpoint"], sources["checkpoint"] = newest, LAST
    if newest and world.rank == 0:
        print(
            f"{config.output_dir} has a file {LAST}: goes on from {newest} (--overwrite begins anew)", file=sys.stderr
        )
    config = adopt_checkpoint(dataclasses.replace(config, **changes), ADOPTED, sources)
    if config.mode == "predict":  # what is asked for is not left out by another threshold, also the checkpoint's own
        least = min(config.roi_heads_score_thresh, config.score_threshold)
        config = dataclasses.replace(config, roi_heads_score_thresh=least)
    return config


def _same_step(newest: Path, last: Path) -> None:
    """Raises UserError where last_checkpoint was changed to name another checkpoint than the run wrote last."""
    if (newest.parent / LAST).stat().st_mtime <= last.stat().st_mtime or newest.samefile(last):
        return
    named, own = (load_checkpoint(path).get("step") for path in (newest, last))
    if named != own:
        raise UserError(
            f"{newest.parent / LAST} names {newest.name}, of step {named}, but the run is at step {own} ({last.name}). "
            f"To go back, copy {newest.name} over {last.name}; to go on, remove the file {LAST} and give --resume"
        )


def main(argv: Sequence[str]) -> int:
    return program(
        argv,
        module="maskrcnn.train",
        intro=INTRO,
        config_class=Config,
        benchmark=BENCHMARK,
        detector=DETECTOR,
        build_model=build_model,
        build_task=build_task,
        ignored_flags=IGNORED_FLAGS,
        translate=translate_flags,
        complete=complete,
        modes={"train": train, "evaluate": evaluate},
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
