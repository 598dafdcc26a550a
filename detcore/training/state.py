"""What changes while a run trains, and how it goes into a checkpoint and comes back."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detcore import UserError
from detcore.config import key_names, to_dict
from detcore.data.classes import differing_classes, some
from detcore.device.base import Backend
from detcore.nn import optim
from detcore.nn.weights import load_exactly
from detcore.processes import distributed
from detcore.processes.launcher import World
from detcore.training import checkpoint, mlperf
from detcore.training.config import RunConfig

CHECKPOINTS = ("last.pt", "best.pt", "evaluated.pt")
_CONTENTS = {
    "model": dict, "optimizer": dict, "scaler": dict, "step": int, "evaluations": list, "world_size": int, "seed": int,
    "generators": torch.Tensor, "steps_per_epoch": int, "config": dict,
}  # fmt: skip


@dataclass
class State:
    """The changing things of a run; with config and random generators they are what a checkpoint holds.

    evaluations: (epochs completed, `progress.merit`) of each result so far.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: optim.Ema | None
    step: int = 0
    evaluations: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        optim.remember_base_lr(self.optimizer)  # before a step or a checkpoint changes it

    def best(self) -> tuple[int, float] | None:
        """Epochs completed and value of the best evaluation; one that had nothing to score (-1) is none."""
        return max((e for e in self.evaluations if e[1] >= 0), key=lambda e: e[1], default=None)

    def contents(self) -> dict[str, Any]:
        """The state as a checkpoint holds it."""
        return {
            "model": self.model.state_dict(),
            "optimizer": optim.state_dict(self.optimizer),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "step": self.step,
            "evaluations": [list(e) for e in self.evaluations],
        }

    @contextmanager
    def unchanged(self, backend: Backend) -> Iterator[None]:
        """Puts back afterwards, in place, what its body changes of weights, buffers, optimizer, scaler, average and
        random generators.

        So a step can be warmed up and recorded. State that the optimizer has created meanwhile (its first step does)
        becomes zeros, which is how Adam, and SGD without dampening, begin.
        """
        tensors = [*self.model.parameters(), *self.model.buffers(), *(self.ema.tensors() if self.ema else ())]
        tensors = [tensor.detach() for tensor in tensors]
        before = [tensor.clone() for tensor in tensors]
        slots = {p: {name: value.clone() for name, value in s.items()} for p, s in self.optimizer.state.items()}
        scaler, generators = self.scaler.state_dict(), backend.rng_state()
        try:
            yield
        finally:
            torch._foreach_copy_(tensors, before)
            for parameter, values in self.optimizer.state.items():
                for name, value in values.items():
                    old = slots.get(parameter, {}).get(name)
                    value.zero_() if old is None else value.copy_(old)
            self.scaler.load_state_dict(scaler)
            backend.set_rng_state(generators)

    def restore(self, saved: dict[str, Any], config: RunConfig, world: World, backend: Backend) -> None:
        """Puts a checkpoint's contents back, and the random generators of this rank.

        Raises UserError if it does not fit the model.
        """
        try:
            load_exactly(self.model, saved["model"], f"--resume: {config.output_dir}/last.pt")
            optim.load_state_dict(self.optimizer, saved["optimizer"])
            if saved["scaler"]:  # empty where the run was on a device without one
                self.scaler.load_state_dict(saved["scaler"])
            if self.ema:
                self.ema.load_state_dict(saved["ema"])
                self.ema.resume(saved["step"])
            self.step = saved["step"]
            self.evaluations = [(int(epoch), float(value)) for epoch, value in saved["evaluations"]]
            known = backend.set_rng_state(saved["generators"][world.rank])
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"--resume: {config.output_dir}/last.pt does not fit this program: {error}") from error
        if not known and world.rank == 0:
            print("resumed on another kind of device: the same weights go on, with other last digits", file=sys.stderr)


def claim_folder(config: RunConfig, world: World) -> dict[str, Any] | None:
    """Makes the output folder ready; returns the checkpoint to resume from, or None for a new run.

    Nothing of an earlier run is lost yet: its log and progress are set aside as *.previous until `Claim.keep`.
    Raises UserError if the folder holds a run that nobody said to resume or to replace, if the run to resume had other
    settings that decide the weights or another number of processes or has reached its end, or if it can't be written.
    """
    last = config.output_dir / "last.pt"
    if config.resume:
        if not last.exists():
            named = key_names(type(config))["output_dir"].replace("output_dir", "--output-dir")
            raise UserError(
                f"--resume: there is no run to go on with in {config.output_dir}, it has no {last.name}. "
                f"Correct {named}, or leave out --resume to begin one."
            )
        return _check_resumable(checkpoint.load(last), config, world)
    if last.exists() and not config.overwrite:
        raise UserError(
            f"{config.output_dir} holds an earlier run. Add --resume to go on with it, --overwrite to replace it, or "
            "choose another --output-dir."
        )
    distributed.barrier()  # every rank has looked before rank 0 writes
    if world.rank == 0:
        try:
            config.output_dir.mkdir(parents=True, exist_ok=True)
            for name in _records(config):
                if name.exists():
                    os.replace(name, _set_aside(name))
        except OSError as error:
            raise UserError(f"--output-dir {config.output_dir} can't be written: {error.strerror}") from error
    return None


class Claim:
    """The records of a new run, as a context: wrong input that ends it before `keep` takes them away again, and what
    was set aside comes back. new: False where there is nothing to undo, on other ranks and in a run that goes on."""

    def __init__(self, config: RunConfig, *, new: bool):
        self.config, self.new, self.kept = config, new, False

    def keep(self) -> None:
        """Removes what --overwrite replaces, now that the new run has its data."""
        self.kept = True
        old = (*(self.config.output_dir / n for n in CHECKPOINTS), *map(_set_aside, _records(self.config)))
        for name in old if self.new else ():
            name.unlink(missing_ok=True)

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if not self.new or self.kept or kind is None or not issubclass(kind, UserError):
            return
        for name in _records(self.config):
            with suppress(OSError):  # what the run was refused for is said, whatever else is wrong with the folder
                name.unlink(missing_ok=True)
                if (aside := _set_aside(name)).exists():
                    os.replace(aside, name)


def _records(config: RunConfig) -> list[Path]:
    return [config.output_dir / f"result_{config.result_index}.txt", config.output_dir / "progress.jsonl"]


def _set_aside(path: Path) -> Path:
    return path.with_name(path.name + ".previous")


def _check_resumable(saved: dict[str, Any], config: RunConfig, world: World) -> dict[str, Any]:
    last = config.output_dir / "last.pt"
    checkpoint.refuse_other_program(saved, last, config.program)
    wrong = [name for name, kind in _CONTENTS.items() if not isinstance(saved.get(name), kind)]
    if wrong or saved["step"] < 0 or not saved["generators"].ndim:
        what = ", ".join(wrong) or "step or generators"
        raise UserError(f"--resume: {last} was not written by a training run of this program ({what} wrong)")
    differ = differing_settings(saved, config, world)
    if differ:
        raise UserError(
            f"--resume: the run in {config.output_dir} was started with other settings ({'; '.join(differ)}). "
            "Give the same ones to go on with it, or start a new run in another --output-dir, or here with --overwrite."
        )
    log = _records(config)[0]
    field, option = config.length
    if log.exists() and mlperf.succeeded(log) and getattr(config, field) <= (had := saved["config"].get(field, 0)):
        raise UserError(
            f"the run in {config.output_dir} has ended with success, at step {saved['step']}. To train on, copy the "
            f"folder and give a higher {option} than {had}; --overwrite begins anew."
        )
    return saved


def check_same_data(
    saved: dict[str, Any] | None, steps_per_epoch: int, classes: Sequence[tuple[int, str]], config: RunConfig
) -> None:
    """Raises UserError if the run of a checkpoint had other classes, or another number of steps an epoch, than the data
    gives now."""
    if not saved:
        return
    if differ := differing_classes(saved.get("classes") or [], classes):
        raise UserError(
            f"--resume: the run in {config.output_dir} was trained on other classes than the annotation files list: "
            f"{some(differ)}. Give the same files to go on, or start a new run in another --output-dir."
        )
    if saved["steps_per_epoch"] != steps_per_epoch:
        raise UserError(
            f"--resume: the run in {config.output_dir} had {saved['steps_per_epoch']} steps an epoch, this "
            f"data set gives {steps_per_epoch}: it is another one. Give the same to go on."
        )


def differing_settings(saved: dict[str, Any], config: RunConfig, world: World) -> list[str]:
    """In words, the settings that decide the weights and are others than those of a checkpoint of a training run."""
    now, then = to_dict(config), saved["config"]
    decisive = [key for key in now if key not in config.FREE_ON_RESUME and key != "seed"]
    if "mode" in then:  # else it is no config of ours, and all differs
        then = to_dict(type(config)()) | then  # a setting that is younger than the checkpoint was at its default
    called = key_names(type(config))
    differ = [f"{called[key]} was {then.get(key)}, is {now[key]}" for key in decisive if then.get(key) != now[key]]
    if saved["world_size"] != world.size:
        differ.append(f"processes were {saved['world_size']}, are {world.size}")
    return differ
