"""The only training loop.

`train` reads top to bottom: INIT, RUN_START (no training data is touched above that line), epochs of steps, an
evaluation whose result arrives while the next epoch runs, target, RUN_STOP with success or aborted. The order of the
lines is the product; a benchmark brings values and functions in a `Task`.
"""

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from mlperf_logging.mllog import constants as keys
from torch import Tensor, nn

from detcore import UserError, cli
from detcore.config import to_dict
from detcore.device import backend, native
from detcore.nn import optim
from detcore.processes import distributed, launcher
from detcore.processes.watchdog import Watchdog
from detcore.training import checkpoint
from detcore.training.config import RunConfig
from detcore.training.mlperf import ABORTED, SUCCESS, MLPerfLog, drop_file_cache
from detcore.training.progress import Progress, duration
from detcore.training.state import State, claim_folder, forget_earlier_run
from detcore.training.step import make_train_step
from detcore.training.task import Context, Data, Outcome, Pending, Task, summary


class NotFinite(Exception):
    """A loss became NaN or infinite."""


def open_device(config: RunConfig, world: launcher.World) -> backend.Backend:
    """The device of this process by the config, and what computes the ops there."""
    native.choose(config.ops, config.variants)
    chosen = (config.device, config.precision, world.local_rank, config.graphs, world.size, world.local_size)
    return backend.select(*chosen, benchmark_limit=config.cudnn_benchmark_limit)


class _Run:
    """The parts of the loop that `train` puts in order, and what they share."""

    def __init__(
        self, task: Task, data: Data, state: State, context: Context, config: RunConfig, log: MLPerfLog,
        progress: Progress, watchdog: Watchdog, stop: cli.StopRequest, parallel: nn.Module, train_step: Callable,
    ):  # fmt: skip
        self.task, self.data, self.state, self.context, self.config = task, data, state, context, config
        self.log, self.progress, self.watchdog, self.stop = log, progress, watchdog, stop
        self.parallel, self.train_step = parallel, train_step
        self.lr = 0.0  # of the last step
        self.images_per_step = config.batch_size * config.accumulate * context.world.size
        # Since the last report: step, terms, image ids, and when the device began and ended it.
        self.window: list[tuple[int, dict[str, Tensor], list[Tensor], tuple[Any, Any]]] = []
        self.pending: tuple[int, Pending | None] | None = None  # epochs completed; the result, on rank 0
        self.code: int | None = None  # set once the run is to end
        self.saved_step = state.step  # of last.pt
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        # Step of a last.pt that is not known to be written yet, and its epoch's own file.
        self.writing: tuple[int, Path | None, Future] | None = None
        epoch, step = divmod(state.step, data.steps_per_epoch)
        self.stream = context.backend.ahead(data.train_batches(epoch, step * config.accumulate))

    def close(self) -> None:
        """Ends the stream of batches, and what makes them; a checkpoint that is being written is written."""
        if hasattr(self.stream, "close"):
            self.stream.close()
        self.writer.shutdown()
        if self.writing and (error := self.writing[-1].exception()):  # the run ends for another reason
            print(f"error: {error}", file=sys.stderr, flush=True)

    def train_epoch(self, epoch: int) -> None:
        """Steps to the end of the epoch (from 0), or until something sets self.code."""
        state, config, progress = self.state, self.config, self.progress
        end, passes, began = (epoch + 1) * self.data.steps_per_epoch, 0, progress.elapsed()
        self.log.start(keys.EPOCH_START, epoch + 1, epoch_num=epoch + 1)
        self.parallel.train()
        while state.step < end and self.code is None:
            self.settle(wait=False)
            self.watchdog.beat("waiting for data", state.step)
            with progress.clock("data"):
                batches = [next(self.stream) for _ in range(self.data.passes(state.step, config.accumulate))]
            passes += len(batches)
            self.watchdog.beat("training step", state.step)
            with progress.clock("train"):
                self.lr, device = self.task.lr(state.step, self.data.steps_per_epoch), self.context.backend
                optim.set_lr(self.task.optimizer, self.lr)
                start = device.mark()
                terms = self.train_step([device.to_device(b) for b in batches])
                state.step += 1
                self.window.append((state.step, terms, [b.image_id for b in batches], (start, device.mark())))
                at_interval = state.step % config.log_interval == 0 or state.step == end
                if at_interval:
                    self.report(epoch)
            if at_interval or self.context.world.size == 1:
                self.look_around(wait=False)
            if config.checkpoint_interval and state.step % config.checkpoint_interval == 0 and state.step < end:
                self.report(epoch)
                self.look_around(wait=True)
                self.save()
        if self.code is None:
            self.log.end(keys.EPOCH_STOP, epoch + 1, epoch_num=epoch + 1)
            seconds = progress.elapsed() - began
            progress.tell("epoch", epoch=epoch + 1, time_s=seconds)
            rate = passes * self.images_per_step / config.accumulate / max(seconds, 1e-9)
            memory = self.context.backend.peak_memory_gib()
            stats = {"throughput": round(rate, 3), "max_memory_usage": round(memory, 3)}
            self.log.event("tracked_stats", stats, step=epoch + 1)

    def report(self, epoch: int) -> None:
        """The one host synchronisation of a logging interval: losses to the host, NaN guard, progress line."""
        if not self.window:
            return
        names = list(self.window[0][1])
        losses = torch.stack([torch.stack(list(terms.values())) for _, terms, *_ in self.window]).cpu()
        finite = losses.isfinite().all(dim=1).tolist()
        weights = optim.finite(self.task.optimizer)
        if distributed.agree([int(not (all(finite) and weights))], self.context.backend.exchange)[0]:
            raise NotFinite(self.explain(names, losses, finite, weights, epoch))
        busy = self.context.backend.seconds([marks for *_, marks in self.window])
        self.window.clear()
        step, steps, progress = self.state.step, self.data.steps_per_epoch, self.progress
        rate, wait = progress.interval(step=step, images_per_step=self.images_per_step, busy=busy)
        over_ranks = distributed.average(losses.mean(0), self.context.backend.exchange)
        means = dict(zip(names, over_ranks.tolist(), strict=True))
        total = sum(means.values())
        fields = {
            "loss": total,
            "terms": means,
            "lr": self.lr,
            "images_per_s": rate,
            "data_wait": wait,
        }
        progress.write("step", step=step, epoch=epoch + 1, time_s=progress.elapsed(), **fields)
        evaluations = sum(self.task.eval_epochs(e + 1) for e in range(epoch, self.config.epochs))
        left = progress.time_left(step, self.config.epochs * steps, evaluations)
        parts = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
        done = step - epoch * steps
        bar = ("#" * (done * 16 // steps)).ljust(16, ".")
        progress.bar(
            f"epoch {epoch + 1}/{self.config.epochs} [{bar}] {done}/{steps}  loss {total:.3f} ({parts})  "
            f"{rate:.1f} images/s  data wait {wait:.0%}  {left}"
        )
        progress.advise(rate, wait, self.data.advise)

    def explain(self, names: list[str], losses: Tensor, finite: list[bool], weights: bool, epoch: int) -> str:
        rank, steps = self.context.world.rank, [step for step, *_ in self.window]
        if all(finite) and not weights:
            return (
                f"rank {rank}: the weights are no longer finite after step {steps[-1]} (epoch {epoch + 1}), though the "
                f"losses of steps {steps[0]} to {steps[-1]} are: a gradient overflowed in one of them. The checkpoints "
                "from before are kept. Try a lower --lr, --clip-norm 10 or --precision fp32."
            )
        if all(finite):
            return f"rank {rank} stops: the loss of another rank is not finite, its own message names the images"
        step, _, ids, _ = self.window[finite.index(False)]
        warmup = f"a longer {self.task.warmup_option}, " if self.task.warmup_option else ""
        values = ", ".join(f"{n} = {v:g}" for n, v in zip(names, losses[finite.index(False)].tolist(), strict=True))
        return (
            f"rank {rank}: the loss is not finite at step {step} (epoch {epoch + 1}): {values}; image ids "
            f"{torch.cat(ids).tolist()}. The checkpoints from before are kept. Look at these images and their boxes, "
            f"and at those of the step before, whose gradient may be the cause; else try a lower --lr, {warmup}"
            "--clip-norm 10 or --precision fp32."
        )

    def look_around(self, *, wait: bool) -> None:
        """Takes in a metric that has arrived, and signals; all ranks come to the same decision (self.code)."""
        result = None
        if self.pending and self.pending[1]:
            with self.progress.clock("evaluation") if wait else nullcontext():
                while (result := self.pending[1].poll()) is None and wait:
                    self.watchdog.beat("waiting for the metric", self.state.step)
                    time.sleep(0.02)
        reached = self.take(result) if result is not None else False
        flags = [int(result is not None), int(reached), self.stop.signal]
        arrived, reached, stopped = distributed.agree(flags, self.context.backend.exchange)
        if arrived:
            self.pending = None
        if reached:
            self.code = cli.OK
        elif stopped and self.code is None:
            self.code, self.stop.agreed = cli.STOPPED, stopped

    def take(self, result: dict[str, Any]) -> bool:
        """Rank 0: logs an evaluation's result and keeps its checkpoint if it is the best; True if it is the target."""
        self.settle(wait=True)
        epoch = self.pending[0]
        value = result[self.task.metric]
        self.log.event(keys.EVAL_ACCURACY, value, epoch_num=epoch)
        self.log.end(keys.EVAL_STOP, epoch, epoch_num=epoch)
        self.state.evaluations.append((epoch, value))
        evaluated = self.config.output_dir / "evaluated.pt"
        if self.state.best() == (epoch, value):
            os.replace(evaluated, self.config.output_dir / "best.pt")
        else:
            evaluated.unlink()
        self.progress.write("eval", step=self.state.step, epoch=epoch, time_s=self.progress.elapsed(), metrics=result)
        goal = f"target {self.task.target:g}" if self.task.target is not None else "no target"
        best, passed = self.state.best()[1], duration(self.progress.elapsed())
        self.progress.say(
            f"evaluation after epoch {epoch}: {self.task.metric} {value:.4f} ({goal}), best {best:.4f}, after {passed}"
        )
        return self.task.target is not None and value >= self.task.target

    def evaluate(self, completed: int) -> None:
        """Starts the evaluation after so many epochs; its metric arrives through look_around."""
        self.log.start(keys.EVAL_START, completed, epoch_num=completed)
        with self.progress.clock("evaluation"), ExitStack() as stack:
            self.watchdog.beat("evaluation", 0)
            if self.state.ema:
                stack.enter_context(self.state.ema.applied(self.task.model))
            # Running statistics are rank 0's, as in the checkpoint.
            distributed.broadcast_buffers(self.task.model, self.context.backend.exchange)
            self.task.model.eval()
            self.pending = (completed, self.data.evaluate(self.task.model, self.watchdog.beat))
            self.task.model.train()
        self.progress.evaluations += 1
        self.progress.pause(self.state.step)

    def save(self, *, evaluated: bool = False) -> None:
        """Copies the state to the host, with the random generators of every rank; rank 0 writes last.pt from it in a
        thread, evaluated.pt if it is to be evaluated, and an epoch's own file. `settle` tells how that went."""
        self.settle(wait=True)
        with self.progress.clock("checkpoint"):
            self.watchdog.beat("checkpoint", self.state.step)
            device = self.context.backend
            generators = distributed.gather_rows(device.rng_state()[None].to(device.exchange))
            if self.context.world.rank == 0:
                run = {"world_size": self.context.world.size, "seed": self.context.seed, "generators": generators}
                about = {"steps_per_epoch": self.data.steps_per_epoch, "classes": [list(c) for c in self.data.classes]}
                contents = device.to_host(self.state.contents() | run | about) | {"config": to_dict(self.config)}
                completed, rest = divmod(self.state.step, self.data.steps_per_epoch)
                own = None if rest else self.task.epoch_file(completed)
                links = [self.config.output_dir / "evaluated.pt"] * evaluated + [own] * bool(own)
                last = self.config.output_dir / "last.pt"
                self.writing = self.state.step, own, self.writer.submit(checkpoint.save, last, contents, links)
        self.saved_step = self.state.step
        self.progress.pause(self.state.step)

    def settle(self, *, wait: bool) -> None:
        """Rank 0: whether last.pt is written. Raises what went wrong, as `checkpoint.save` does."""
        if not self.writing or not (wait or self.writing[-1].done()):
            return
        (step, own, written), self.writing = self.writing, None
        with self.progress.clock("checkpoint"):
            self.watchdog.beat("checkpoint", step)
            written.result()
        self.progress.tell("saved", path=self.config.output_dir / "last.pt", epoch_file=own)

    def epochs(self) -> int:
        """All epochs that are still to do; returns the exit code of the run."""
        state, task, steps = self.state, self.task, self.data.steps_per_epoch
        completed = state.step // steps
        between = state.step and state.step % steps == 0 and task.eval_epochs(completed)
        if between and completed not in [epoch for epoch, _ in state.evaluations]:
            self.save(evaluated=True)
            self.evaluate(completed)  # the run that is resumed ended between an epoch and its result
        for epoch in range(completed, self.config.epochs):
            self.train_epoch(epoch)
            self.look_around(wait=True)  # the result of the epoch before, before a new evaluation starts
            if self.code is not None:
                break
            evaluated = task.eval_epochs(epoch + 1)
            self.save(evaluated=evaluated)
            if evaluated:
                self.evaluate(epoch + 1)
        if self.code != cli.OK:
            self.look_around(wait=True)
        if self.code == cli.STOPPED and state.step > self.saved_step:
            self.report((state.step - 1) // steps)
            self.save()
        self.settle(wait=True)
        if self.code is None:
            return cli.OK if task.target is None else cli.TARGET_NOT_REACHED
        return self.code


def train(config: RunConfig, benchmark: str, build_task: Callable[[Context], Task]) -> Outcome:
    """Runs one training from INIT to RUN_STOP; every process of the job calls it with the same arguments.

    build_task is called between INIT_START and INIT_STOP. Raises UserError for wrong input; a signal, a loss that is
    not finite and a target that was not reached are outcomes (`detcore.cli` lists the codes).
    """
    world, _ = launcher.discover(os.environ)
    device = open_device(config, world)
    with ExitStack() as stack:
        stack.callback(distributed.shutdown)
        distributed.init(device.collectives, config.hang_timeout or 7 * 24 * 3600, device=device.own)
        stack.callback(device.close)
        saved = claim_folder(config, world)
        seed = saved["seed"] if saved else distributed.choose_seed(config.seed, device.exchange)
        context = Context(device, world, seed)
        folder = config.output_dir if world.rank == 0 else None
        log = MLPerfLog(folder and folder / f"result_{config.result_index}.txt", append=config.resume)
        stack.callback(log.close)
        progress = Progress(folder and folder / "progress.jsonl", append=config.resume)
        stack.callback(progress.close)
        stop = stack.enter_context(cli.StopRequest())

        if config.caches_cleared:
            log.event(keys.CACHE_CLEAR, True)
        if config.drop_file_cache:
            dropped = drop_file_cache(config.data_paths()) if world.local_rank == 0 else 0
            if dropped:
                log.event(keys.CACHE_CLEAR, True)
        log.submission(benchmark, config)
        log.start(keys.INIT_START)
        torch.manual_seed(distributed.derive_seed(seed, 0))  # the same initial weights in every process
        task = build_task(context)
        progress.observe = task.observe
        state = State(task.model, task.optimizer, device.scaler(), None)
        if config.ema_decay:
            state.ema = optim.Ema(task.model, config.ema_decay)
        torch.manual_seed(distributed.derive_seed(seed, 1, world.rank))
        if saved:
            state.restore(saved, config, world, device)
        log.event(keys.SEED, seed)
        log.event("local_batch_size", config.batch_size)
        log.event(keys.GLOBAL_BATCH_SIZE, config.batch_size * config.accumulate * world.size)
        log.event(keys.GRADIENT_ACCUMULATION_STEPS, config.accumulate)
        log.event(keys.EPOCH_COUNT, config.epochs)
        log.event(keys.FIRST_EPOCH_NUM, 1)
        for name, _ in task.model.named_parameters():
            log.event(keys.WEIGHTS_INITIALIZATION, tensor=name)
        for key, value in task.hyperparameters.items():
            log.event(key, value)
        computing = (native.describe(config.program, device.device), f"steps: {device.steps}")
        about = {"environment": device.describe() | {"processes": world.size}, "notes": task.notes}
        progress.write("start", benchmark=benchmark, config=to_dict(config) | {"seed": seed}, **about)
        for note in (*computing, *task.notes):
            progress.say(note)
        limits = (config.hang_timeout, config.dead_timeout, config.output_dir, device.exchange)
        watchdog = stack.enter_context(Watchdog(world, *limits, lambda: log.run_stop(ABORTED)))
        watchdog.beat("preparing the step", 0)
        parallel = device.parallel(task.model, world.size)
        train_step = make_train_step(task, state, parallel, config, device)
        watchdog.beat("preparing the evaluation", 0)
        task.prepare_evaluation()
        distributed.barrier()
        log.end(keys.INIT_STOP)
        distributed.barrier()
        log.run_start()
        progress.run_started(state.step)
        code = cli.CRASH
        try:
            watchdog.beat("opening the data", 0)
            data = task.open_data()
            stack.callback(data.close)
            if saved and saved["steps_per_epoch"] != data.steps_per_epoch:
                raise UserError(
                    f"--resume: the run in {config.output_dir} had {saved['steps_per_epoch']} steps an epoch, this "
                    f"data set gives {data.steps_per_epoch}: it is another one. Give the same to go on."
                )
            if folder and not saved:  # only now that the new run has its data
                forget_earlier_run(config)
            log.event(keys.TRAIN_SAMPLES, data.train_samples)
            log.event(keys.EVAL_SAMPLES, data.eval_samples)
            progress.say(data.summary)
            parts = (task, data, state, context, config, log, progress, watchdog, stop, parallel, train_step)
            run = _Run(*parts)
            stack.callback(run.close)
            code = run.epochs()
        except NotFinite as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            code = cli.NOT_FINITE
        except UserError:
            code = cli.BAD_INPUT
            raise
        finally:
            distributed.barrier() if code == cli.OK else None
            log.run_stop(SUCCESS if code == cli.OK else ABORTED)
            seconds = progress.elapsed()
            epoch, best = state.best() or (None, None)
            status = SUCCESS if code == cli.OK else ABORTED
            progress.write("end", status=status, time_s=seconds, seconds=progress.seconds, best=best)
        outcome = Outcome(code, state.step, best, epoch, seconds)
        progress.say(summary(outcome, task, config.output_dir, config.epochs, stop.agreed))
        return outcome
