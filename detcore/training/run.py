"""The parts of the training loop, which `detcore.training.engine.train` puts in order."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from mlperf_logging.mllog import constants as keys
from torch import Tensor

from detcore import cli
from detcore.config import to_dict
from detcore.data.batch import Batch
from detcore.nn import optim
from detcore.processes import distributed
from detcore.processes.watchdog import Watchdog
from detcore.training import checkpoint
from detcore.training.config import RunConfig
from detcore.training.mlperf import MLPerfLog
from detcore.training.progress import Progress, explain_not_finite, merit
from detcore.training.state import State
from detcore.training.task import Context, Data, Pending, Task


class NotFinite(Exception):
    """A loss, or a weight, became NaN or infinite; the text says which and where."""


class Run:
    """What `train` puts in order: the parts of the loop, and what they share.

    code: the exit code of the run, once it is to end before its last step. epochs: that it has at most; last_step: the
    step that it ends with then.
    """

    def __init__(
        self, task: Task, data: Data, state: State, train_step: Callable, context: Context, config: RunConfig,
        log: MLPerfLog, progress: Progress, watchdog: Watchdog, stop: cli.StopRequest,
    ):  # fmt: skip
        self.task, self.data, self.state, self.train_step = task, data, state, train_step
        self.context, self.device, self.config = context, context.backend, config
        self.log, self.progress, self.watchdog, self.stop = log, progress, watchdog, stop
        self.code: int | None = None
        self.last_step = task.total_steps or config.epochs * data.steps_per_epoch
        self.epochs = -(-self.last_step // data.steps_per_epoch)
        if task.total_steps:
            log.event(keys.EPOCH_COUNT, self.epochs)
        self.images_per_step = config.batch_size * config.accumulate * context.world.size
        self.lr = 0.0  # of the last step and the first parameter group
        # Since the last report: step, terms, image ids, and when the device began and ended it.
        self.window: list[tuple[int, dict[str, Tensor], list[Tensor], tuple[Any, Any]]] = []
        self.epoch_passes, self.epoch_began = 0, 0.0
        self.pending: tuple[int, Pending | None] | None = None  # epochs completed; the result, on rank 0
        self.saved_step = state.step  # of last.pt
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        # Step of a last.pt that is not known to be written yet, and the further file that it is.
        self.writing: tuple[int, Path | None, Future] | None = None
        epoch, step = divmod(state.step, data.steps_per_epoch)
        self.stream = self.device.prefetch(data.train_batches(epoch, step * config.accumulate))

    def close(self) -> None:
        """Ends the stream of batches, and what makes them; a checkpoint that is being written is written."""
        if hasattr(self.stream, "close"):
            self.stream.close()
        self.writer.shutdown()
        if self.writing and (error := self.writing[-1].exception()):  # the run ends for another reason
            print(f"error: {error}", file=sys.stderr, flush=True)

    def end_of(self, epoch: int) -> int:
        """The step that an epoch (from 0) ends with."""
        return min((epoch + 1) * self.data.steps_per_epoch, self.last_step)

    def epochs_completed(self) -> int:
        """Epochs that lie behind, the last one also where total_steps cuts it short."""
        done = self.state.step >= self.last_step
        return self.epochs if done else self.state.step // self.data.steps_per_epoch

    def at_interval(self, epoch: int) -> bool:
        """Whether a logging interval ends with the step that was done last."""
        return self.state.step % self.config.log_interval == 0 or self.state.step == self.end_of(epoch)

    def checkpoint_is_due(self, epoch: int) -> bool:
        """Whether --checkpoint-interval asks for one within an epoch."""
        every, step = self.config.checkpoint_interval, self.state.step
        return bool(every) and step % every == 0 and step < self.end_of(epoch)

    def begin_epoch(self, epoch: int) -> None:
        self.epoch_passes, self.epoch_began = 0, self.progress.elapsed()
        self.log.start(keys.EPOCH_START, epoch + 1, epoch_num=epoch + 1)
        self.task.model.train()

    def end_epoch(self, epoch: int) -> None:
        """Logs the epoch's end and its speed, unless the run is to end within it."""
        if self.code is not None:
            return
        self.log.end(keys.EPOCH_STOP, epoch + 1, epoch_num=epoch + 1)
        seconds = self.progress.elapsed() - self.epoch_began
        self.progress.notify("epoch", epoch=epoch + 1, time_s=seconds)
        images = self.epoch_passes * self.config.batch_size * self.context.world.size
        memory = self.device.peak_memory_gib()
        stats = {"throughput": round(images / max(seconds, 1e-9), 3), "max_memory_usage": round(memory, 3)}
        self.log.event("tracked_stats", stats, step=epoch + 1)

    def next_batches(self) -> list[Batch]:
        """The micro-batches of the next step."""
        self.watchdog.beat("waiting for data", self.state.step)
        with self.progress.clock("data"):
            return [next(self.stream) for _ in range(self.data.passes(self.state.step, self.config.accumulate))]

    def step(self, batches: Sequence[Batch]) -> None:
        """One optimizer step, which the host does not wait for."""
        state, device, per_epoch = self.state, self.device, self.data.steps_per_epoch
        self.watchdog.beat("training step", state.step)
        with self.progress.clock("train"):
            rate = lambda base: self.task.lr(state.step, per_epoch, base)  # noqa: E731
            self.lr = optim.schedule_lr(self.task.optimizer, rate)
            start = device.record_event()
            terms = self.train_step([device.to_device(b) for b in batches])
            state.step += 1
            self.window.append((state.step, terms, [b.image_id for b in batches], (start, device.record_event())))
        self.epoch_passes += len(batches)
        self.progress.alive(state.step, self.last_step, lambda: self.evaluations_left((state.step - 1) // per_epoch))

    def report_interval(self, epoch: int) -> None:
        """The one host synchronisation of a logging interval: losses to the host, NaN guard, progress line."""
        if not self.window:
            return
        with self.progress.clock("train"):
            names = list(self.window[0][1])
            losses = torch.stack([torch.stack(list(terms.values())) for _, terms, *_ in self.window]).cpu()
            weights_finite = optim.finite(self.task.optimizer)
            finite = bool(losses.isfinite().all()) and weights_finite
            if distributed.all_reduce_max([int(not finite)], self.device.collective_device)[0]:
                steps = [(step, torch.cat(ids).tolist()) for step, _, ids, _ in self.window]
                where = (self.context.world.rank, epoch, steps, names, losses.tolist())
                raise NotFinite(explain_not_finite(*where, weights_finite, self.task.warmup_option))
            busy = self.device.seconds_between([marks for *_, marks in self.window])
            self.window.clear()
            over_ranks = distributed.all_reduce_mean(losses.mean(0), self.device.collective_device)
        images = self.images_per_step
        rate, wait = self.progress.interval(step=self.state.step, images_per_step=images, busy=busy)
        begin = epoch * self.data.steps_per_epoch
        self.progress.report_step(
            step=self.state.step, epoch=epoch, epochs=self.epochs, epoch_steps=(begin, self.end_of(epoch)),
            terms=dict(zip(names, over_ranks.tolist(), strict=True)), lr=self.lr, rate=rate, wait=wait,
            last_step=self.last_step,
            note=self.device.adapt_threads(rate),
            evaluations_left=self.evaluations_left(epoch),
        )  # fmt: skip
        self.progress.advise(rate, wait, self.data.advise)

    def evaluations_left(self, epoch: int) -> int:
        """How many there are from an epoch (from 0) on."""
        return sum(self.task.eval_epochs(e + 1, self.epochs) for e in range(epoch, self.epochs))

    def start_evaluation(self, completed: int) -> None:
        """Starts the evaluation after so many epochs; `poll_evaluation` gets its result."""
        self.log.start(keys.EVAL_START, completed, epoch_num=completed)
        with self.progress.clock("evaluation"), ExitStack() as stack:
            self.watchdog.beat("evaluation", 0)
            if self.state.ema:
                stack.enter_context(self.state.ema.applied(self.task.model))
            # Running statistics are rank 0's, as in the checkpoint.
            distributed.broadcast_buffers(self.task.model, self.device.collective_device)
            self.task.model.eval()
            self.progress.say(f"evaluating after epoch {completed}: {self.data.eval_samples:,} images")

            def beat(phase: str, count: int) -> None:
                self.watchdog.beat(phase, count)
                self.progress.evaluating(completed, count)

            self.pending = (completed, self.data.evaluate(self.task.model, beat))
            self.task.model.train()
        self.progress.evaluations += 1
        self.progress.pause(self.state.step)

    def evaluate_again(self) -> None:
        """Makes up for the evaluation of a run that is resumed and had ended between an epoch and its result."""
        state, completed = self.state, self.epochs_completed()
        at_end = state.step % self.data.steps_per_epoch == 0 or state.step >= self.last_step
        if not state.step or not at_end or completed in [epoch for epoch, _ in state.evaluations]:
            return
        if self.task.eval_epochs(completed, self.epochs):
            self.save_checkpoint(evaluated=True)
            self.start_evaluation(completed)

    def poll_evaluation(self, *, wait: bool = False) -> None:
        """Takes in a result that has arrived, and signals; all ranks come to the same decision (self.code)."""
        result = None
        if self.pending and self.pending[1]:
            with self.progress.clock("evaluation") if wait else nullcontext():
                while (result := self.pending[1].poll()) is None and wait:
                    self.watchdog.beat("waiting for the metric", self.state.step)
                    time.sleep(0.02)
        reached = self.record_result(self.pending[0], result) if result is not None else False
        flags = [int(result is not None), int(reached), self.stop.signal]
        arrived, reached, stopped = distributed.all_reduce_max(flags, self.device.collective_device)
        if arrived:
            self.pending = None
        if reached:
            self.code = cli.OK
        elif stopped and self.code is None:
            self.code, self.stop.agreed = cli.STOPPED, stopped

    def record_result(self, epoch: int, metrics: dict[str, Any]) -> bool:
        """Rank 0: logs an evaluation's result, keeps its checkpoint if it is the best; whether it reached the targets.

        epoch: completed when it started.
        """
        self.wait_for_checkpoint()
        self.log.event(keys.EVAL_ACCURACY, self.task.accuracy(metrics), epoch_num=epoch)
        self.log.end(keys.EVAL_STOP, epoch, epoch_num=epoch)
        result = (epoch, merit(metrics, self.task.targets))
        self.state.evaluations.append(result)
        evaluated = self.config.output_dir / "evaluated.pt"
        if self.state.best() == result:
            os.replace(evaluated, self.config.output_dir / "best.pt")
        else:
            evaluated.unlink()
        best = self.state.best()
        self.progress.report_evaluation(self.state.step, epoch, metrics, self.task.targets, best and best[1])
        if warning := self.task.judge(epoch, metrics):
            self.progress.say(warning)
        return self.task.reached(metrics)

    def save_checkpoint(self, *, evaluated: bool = False) -> None:
        """Copies the state to the host, with the random generators of every rank; rank 0 writes last.pt from it in a
        thread, evaluated.pt if it is to be evaluated, and the task's further file. `poll_checkpoint` and
        `wait_for_checkpoint` raise what went wrong."""
        self.wait_for_checkpoint()
        with self.progress.clock("checkpoint"):
            self.watchdog.beat("checkpoint", self.state.step)
            generators = distributed.gather_rows(self.device.rng_state()[None].to(self.device.collective_device))
            if self.context.world.rank == 0:
                run = {"world_size": self.context.world.size, "seed": self.context.seed, "generators": generators}
                about = {"steps_per_epoch": self.data.steps_per_epoch, "classes": [list(c) for c in self.data.classes]}
                about |= {"program": self.config.program}
                contents = self.device.to_host(self.state.contents() | run | about) | {"config": to_dict(self.config)}
                completed, rest = divmod(self.state.step, self.data.steps_per_epoch)
                further = self.task.checkpoint_file(self.state.step, None if rest else completed)
                links = [self.config.output_dir / "evaluated.pt"] * evaluated + [further] * bool(further)
                last = self.config.output_dir / "last.pt"
                self.writing = self.state.step, further, self.writer.submit(checkpoint.save, last, contents, links)
        self.saved_step = self.state.step
        self.progress.pause(self.state.step)

    def poll_checkpoint(self) -> None:
        """Raises what went wrong with a checkpoint's writing, as `checkpoint.save` does, once that is known."""
        if self.writing and self.writing[-1].done():
            self.wait_for_checkpoint()

    def wait_for_checkpoint(self) -> None:
        """Rank 0: until last.pt is written. Raises what went wrong."""
        if not self.writing:
            return
        (step, further, written), self.writing = self.writing, None
        with self.progress.clock("checkpoint"):
            self.watchdog.beat("checkpoint", step)
            written.result()
        self.progress.notify("saved", path=self.config.output_dir / "last.pt", step=step, file=further)

    def finish(self) -> int:
        """Waits for the last result, saves a run that is stopped; the exit code."""
        if self.code != cli.OK:
            self.poll_evaluation(wait=True)
        if self.code == cli.STOPPED and self.state.step > self.saved_step:
            self.report_interval((self.state.step - 1) // self.data.steps_per_epoch)
            self.save_checkpoint()
        self.wait_for_checkpoint()
        if self.code is None:
            return cli.TARGET_NOT_REACHED if self.task.goals else cli.OK
        return self.code
