"""Mask R-CNN, Faster R-CNN and RPN: `python -m maskrcnn.train`."""

import dataclasses
import datetime
import json
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mlperf_logging.mllog import constants as keys

from detcore import UserError
from detcore.cli import OK, run_main
from detcore.config import DEFAULT
from detcore.data.batch import Batch
from detcore.detection import inference
from detcore.detection.benchmark import benchmark
from detcore.detection.config import adopt_checkpoint
from detcore.detection.detector import Inference, class_count, examples, open_data
from detcore.detection.program import draw_gallery, program
from detcore.device.base import Backend
from detcore.device.select import resolve
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
from maskrcnn.records import METRICS, Records, checkpoint_file, inference_speed
from maskrcnn.weights import load_weights

INTRO = (
    "Trains Mask R-CNN, Faster R-CNN or a region proposal network; also evaluates a checkpoint, predicts on images and "
    "measures speed (--mode). Takes what train_net.py and test_net.py of maskrcnn-benchmark take: --config-file FILE "
    "and KEY VALUE pairs, as SOLVER.BASE_LR 0.01. Each key is an option, too; those with a variable can also be "
    "given by the environment, as configs/*.sh do. A data set of your own in COCO format: --dataset custom "
    "--dataset-path DIR."
)

EPILOG = (
    "What users of the originals type, with - or _ in flags: --config-file FILE, their YAML file or one of configs/ by "
    "its published name; KEY VALUE pairs of its tree before or after it, also behind --opts, which override the "
    "file; --max-steps N for SOLVER.MAX_ITER N (0: as without); --fp16 and --amp for --precision auto; "
    "--skip-checkpoint for SAVE_CHECKPOINT False; --skip-test, --skip-eval, --infer-steps and --json-summary as they "
    "are. What test_net.py does is --mode evaluate. Accepted without effect: " + ", ".join(IGNORED_FLAGS) + "."
)


def build_model(config: Config, num_classes: int) -> MaskRCNN:
    """The model of a config with its starting weights, on the CPU. Raises UserError if weights are missing."""
    config = dataclasses.replace(config, roi_box_head_num_classes=num_classes + 1)
    model = MaskRCNN(config)
    if config.checkpoint:
        if average := load_checkpoint(config.checkpoint, config.program).get("ema"):
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

    def loss(network: torch.nn.Module, batch: Batch) -> dict:
        return losses(model, batch, mask_targets, network=network)

    return Task(
        model=model,
        optimizer=make_optimizer(config, model, context.backend.fused_optimizers),
        lr=lambda step, per_epoch, base: warmup_multistep(step, base, *decay, *warmup),
        loss=loss,
        open_data=lambda: open_data(DETECTOR, config, context, evaluation),
        prepare_evaluation=lambda: evaluation.prepare(model, model.num_classes),
        targets=targets(config),
        accuracy_names={"AP": "BBOX", "segm_AP": "SEGM"},
        eval_epochs=partial(evaluates, config),
        total_steps=None if config.epochs else config.solver_max_iter,
        hyperparameters=hyperparameters(config),
        notes=(*started_from(config), *notes(config, classes)),
        examples=lambda: examples(DETECTOR, config, model.num_classes, context.seed),
        observe=Records(config, summary, images_per_step, context.backend.peak_memory_gib) if summary else None,
        checkpoint_file=partial(checkpoint_file, config),
        warmup_option="SOLVER.WARMUP_ITERS",
    )


def targets(config: Config) -> dict[str, float | None]:
    """As `Task` has them: AP of boxes and of masks, or the recall of proposals, which has none."""
    boxes, masks = config.targets
    if config.rpn_only:
        return {"AR@1000": None}
    return {"AP": boxes} | ({"segm_AP": masks} if DETECTOR.masks(config) else {})


def evaluates(config: Config, completed: int, epochs: int) -> bool:
    """Whether to evaluate after so many epochs of so many."""
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


def started_from(config: Config) -> tuple[str, ...]:
    """What the weights of a run that begins are, in words."""
    if config.resume:
        return ()
    given = config.checkpoint or (config.pretrained and not config.synthetic and config.weights)
    return (f"The network begins with the weights of {given}." if given else "The network begins with random weights.",)


STRIDES = {"FPN": (4, 8, 16, 32, 64), "C4": (16,), "C5": (32,)}
"""Of a body's maps, by where it ends."""


def notes(config: Config, classes: int) -> tuple[str, ...]:
    """What a reader of this run must know."""
    said = []
    if config.roi_box_head_num_classes != classes + 1 and not config.rpn_only:
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
    begins = config.mode == "train" and not (config.checkpoint or config.resume or config.synthetic)
    if begins and not (config.pretrained and config.weights) and config.backbone_freeze_conv_body_at:
        said.append(
            f"WARNING: MODEL.BACKBONE.FREEZE_CONV_BODY_AT {config.backbone_freeze_conv_body_at} keeps the first stages "
            "at their random weights; give 0, and a body with group normalisation (configs/gn_baselines/scratch_*), "
            "since batch normalisation is frozen in the others."
        )
    if not config.dataloader_aspect_ratio_grouping:
        said.append("DATALOADER.ASPECT_RATIO_GROUPING False changes nothing: all images of a batch share a canvas.")
    if config.mode == "train" and len(config.datasets_test) > 1:
        said.append(
            f"Evaluates on {config.datasets_test[0]}, the first of DATASETS.TEST; --mode evaluate scores each of them."
        )
    if config.rpn_only:
        said.append("Proposals have no class, so that there is no AP: evaluation gives their average recall, AR.")
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
    """`--mode evaluate`: as all detectors, on each set of DATASETS.TEST, with the results where the original has them.

    The numbers of several sets lie beside the results of each.
    """
    summary = open_summary(config, world)
    folders = {name: config.output_dir / "inference" / name for name in config.datasets_test or [config.dataset]}
    sets = {name: dataclasses.replace(config, datasets_test=(name,), output_dir=folder)
            for name, folder in folders.items()} if len(folders) > 1 else dict.fromkeys(folders, config)  # fmt: skip
    for one in sets.values():
        one.check_folders()
    with engine.joined(config) as processes:
        for name, one in sets.items():
            _evaluate_set(one, name, folders[name], summary, processes)
    return OK


def _evaluate_set(
    config: Config, name: str, results: Path, summary: JsonSummary | None, processes: tuple[World, Backend]
) -> None:
    """`evaluate` on one set, with the original's line on speed. results: the folder of the detections."""
    size, part = processes[0].size, max(config.infer_steps, 0)
    found: dict[str, float] = {}
    inference.evaluate(config, DETECTOR, build_model, results, not config.skip_eval, part, found.update, processes)
    if summary is None:
        return
    each = found["seconds"] * size / found["images"]
    took = datetime.timedelta(seconds=round(found["seconds"]))
    print(f"Total inference time: {took} ({each:.4f} s / img per device, on {size} devices)")
    print(f"Inference perf is: {found['images_per_s']:.2f} FPS; the results lie in {results}")
    data = {"e2e_infer_time": found["seconds"], "eval_dataset_name": name, **inference_speed(found)}
    if not config.skip_eval and not part:
        scores = json.loads((config.output_dir / "evaluation.json").read_text(encoding="utf-8"))
        data |= {key: scores[metric] for metric, key in METRICS.items() if metric in scores}
        print("".join(compared(config, scores)), end="")
    summary.log((), data)


def measure(config: Config, world: World) -> int:
    """`--mode benchmark`: as all detectors, with the original's keys in the summary."""
    summary = open_summary(config, world)

    def report(results: list[dict[str, Any]]) -> None:
        for result in results:  # those with data come last and are what counts
            inferring = result["name"].startswith("inference")
            data = inference_speed(result) if inferring else {"train_perf_fps": result["images_per_s"]}
            summary.log((), data)

    return benchmark(config, DETECTOR, build_task, report=report)


def compared(config: Config, found: Mapping[str, Any]) -> list[str]:
    """A line for each of TEST.EXPECTED_RESULTS. Raises UserError for a result that there is not."""
    lines = []
    for one in config.test_expected_results:
        kind, metric, mean, deviation = one.split(":")
        name = {"bbox": metric, "segm": f"segm_{metric}", "box_proposal": metric}.get(kind)
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
    Raises UserError on a TPU.
    """
    if resolve(config.device, config.precision)[0] == "tpu":
        most = max(config.rpn_post_nms_top_n_train, config.rpn_post_nms_top_n_test)
        raise UserError(
            f"Mask R-CNN does not run on a TPU: suppression takes one step for each of the {most} proposals that may "
            "stay, and a TPU's compiler would write them all out (docs/tpu.md). Choose --device cpu, or a GPU"
        )
    world, _ = launcher.discover(os.environ)
    config, overruled = config.with_said_dataset(sources)
    if world.rank == 0 and overruled:
        print("\n".join(overruled), file=sys.stderr)
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
    known = [name for name in ADOPTED if name != "datasets_test" or sources["dataset"] == DEFAULT]
    config = adopt_checkpoint(dataclasses.replace(config, **changes), known, sources)
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
        epilog=EPILOG,
        config_class=Config,
        benchmark=BENCHMARK,
        detector=DETECTOR,
        build_model=build_model,
        build_task=build_task,
        ignored_flags=IGNORED_FLAGS,
        translate=translate_flags,
        complete=complete,
        modes={"train": train, "evaluate": evaluate, "benchmark": measure},
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
