"""The only training loop.

`train` reads top to bottom: INIT, RUN_START (no training data is touched above that line), epochs of steps, an
evaluation whose result arrives while the next epoch runs, targets, RUN_STOP with success or aborted. The order of the
lines is the product; a benchmark brings values and functions in a `Task`.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from mlperf_logging.mllog import constants as keys

from detcore import UserError, cli
from detcore.config import to_dict
from detcore.device import native
from detcore.device.base import Backend
from detcore.device.select import select_backend
from detcore.nn import optim
from detcore.processes import distributed, launcher
from detcore.processes.watchdog import Watchdog
from detcore.training.config import RunConfig
from detcore.training.mlperf import ABORTED, SUCCESS, MLPerfLog
from detcore.training.progress import Progress, about_model, closing_words
from detcore.training.run import NotFinite, Run
from detcore.training.state import Claim, State, check_same_data, claim_folder
from detcore.training.step import make_train_step
from detcore.training.task import Context, Outcome, Task


def open_device(config: RunConfig, world: launcher.World) -> Backend:
    """The device of this process by the config, and what computes the ops there."""
    native.choose(config.ops, config.variants)
    chosen = (config.device, config.precision, world.local_rank, config.graphs, world.size, world.local_size)
    return select_backend(*chosen, benchmark_limit=config.cudnn_benchmark_limit)


@contextmanager
def joined(config: RunConfig) -> Iterator[tuple[launcher.World, Backend]]:
    """Which process of the job this one is, and its device; they can speak to each other meanwhile."""
    world, _ = launcher.discover(os.environ)
    device = open_device(config, world)
    try:
        distributed.init(
            device.collective_backend, config.hang_timeout or 7 * 24 * 3600, device=device.collective_device
        )
        yield world, device
    finally:
        device.close()
        distributed.shutdown()


def train(config: RunConfig, benchmark: str, build_task: Callable[[Context], Task]) -> Outcome:
    """Runs one training from INIT to RUN_STOP; every process of the job calls it with the same arguments.

    build_task is called between INIT_START and INIT_STOP. Raises UserError for wrong input; a signal, a loss that is
    not finite and a target that was not reached are outcomes (`detcore.cli` lists the codes).
    """
    with ExitStack() as stack:
        world, device = stack.enter_context(joined(config))
        saved = claim_folder(config, world)
        seed = saved["seed"] if saved else distributed.choose_seed(config.seed, device.collective_device)
        context = Context(device, world, seed)
        folder = config.output_dir if world.rank == 0 else None
        claim = stack.enter_context(Claim(config, new=folder is not None and not saved))
        log = MLPerfLog(folder and folder / f"result_{config.result_index}.txt", append=config.resume)
        stack.callback(log.close)
        progress = Progress(folder and folder / "progress.jsonl", append=config.resume)
        stack.callback(progress.close)
        stop = stack.enter_context(cli.StopRequest())

        log.cache_clear(config, drops=world.local_rank == 0)
        log.submission(benchmark, config)
        log.start(keys.INIT_START)
        limits = (config.hang_timeout, config.dead_timeout, config.output_dir, device.collective_device)
        watchdog = stack.enter_context(Watchdog(world, *limits, lambda: log.run_stop(ABORTED)))
        watchdog.beat("building the model", 0)  # it may wait for a data set's file, or for who builds its index
        torch.manual_seed(distributed.derive_seed(seed, 0))  # the same initial weights in every process
        task = build_task(context)
        progress.observe = task.observe
        state = State(task.model, task.optimizer, device.scaler(), None)
        if config.ema_decay:
            state.ema = optim.Ema(task.model, config.ema_decay, warm_up=config.ema_warmup)
        torch.manual_seed(distributed.derive_seed(seed, 1, world.rank))
        if saved:
            state.restore(saved, config, world, device)
        epochs = None if task.total_steps else config.epochs  # then known once the data is open
        log.settings(config, seed, world.size, epochs, [name for name, _ in task.model.named_parameters()])
        for key, value in task.hyperparameters.items():
            log.event(key, value)
        about = {"environment": device.describe() | {"processes": world.size}, "notes": task.notes}
        chosen = {"config": to_dict(config) | {"seed": seed}, "targets": dict(task.targets)}
        progress.write("start", benchmark=benchmark, **chosen, **about)
        known = about_model(task.model.parameters(), state.step), native.describe(config.program, device.device)
        for note in (*known, f"steps: {device.step_execution}", *task.notes):
            progress.say(note)
        watchdog.beat("preparing the step", 0)
        if note := device.adapt_threads():
            progress.say(note)
        train_step = make_train_step(task, state, device.parallel(task.model, world.size), config, device)
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
            check_same_data(saved, data.steps_per_epoch, data.classes, config)
            claim.keep()  # only now that the new run has its data
            log.event(keys.TRAIN_SAMPLES, data.train_samples)
            log.event(keys.EVAL_SAMPLES, data.eval_samples)
            progress.say(data.summary)
            run = Run(task, data, state, train_step, context, config, log, progress, watchdog, stop)
            stack.callback(run.close)
            run.evaluate_again()
            for epoch in range(run.epochs_completed(), run.epochs):
                run.begin_epoch(epoch)
                while state.step < run.end_of(epoch) and run.code is None:
                    run.poll_checkpoint()
                    run.step(run.next_batches())
                    if run.at_interval(epoch):
                        run.report_interval(epoch)
                    if run.at_interval(epoch) or world.size == 1:  # several processes agree, which costs time
                        run.poll_evaluation()
                    if run.checkpoint_is_due(epoch):
                        run.report_interval(epoch)
                        run.poll_evaluation(wait=True)
                        run.save_checkpoint()
                run.end_epoch(epoch)
                run.poll_evaluation(wait=True)  # that of the epoch before, before a new one starts
                if run.code is not None:
                    break
                evaluated = task.eval_epochs(epoch + 1, run.epochs)
                run.save_checkpoint(evaluated=evaluated)
                if evaluated:
                    run.start_evaluation(epoch + 1)
            code = run.finish()
        except NotFinite as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            code = cli.NOT_FINITE
        except UserError:
            code = cli.BAD_INPUT
            raise
        finally:
            distributed.barrier() if code == cli.OK else None
            status, seconds = SUCCESS if code == cli.OK else ABORTED, progress.elapsed()
            log.run_stop(status)
            epoch, best = state.best() or (None, None)
            progress.write("end", status=status, time_s=seconds, seconds=progress.seconds, best=best)
        outcome = Outcome(code, state.step, best, epoch, seconds)
        length = f"{task.total_steps} steps" if task.total_steps else f"{config.epochs} epochs"
        ended = (code, state.step, state.best(), task.targets, seconds, config.output_dir, length, stop.agreed)
        progress.say(closing_words(*ended, evaluated=bool(state.evaluations)))
        return outcome
