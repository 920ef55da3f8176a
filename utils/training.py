"""fit(), the one training loop, and train_step(), the one step: for teachers and students alike."""

import random
import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from utils.averaging import WeightAverage
from utils.data import Split
from utils.data.shared import train_loader
from utils.data.views import Batch, Draw, TrainLoader
from utils.evaluation import predict
from utils.keeping import EpochEnd, Keeper, on_cpu, snapshot, weights_of
from utils.optimizers import build_optimizer, build_schedule
from utils.program import RunFailed, UserError
from utils.program.files import refused
from utils.program.processes import on_main
from utils.progress import epoch_bar, show_progress, size_line
from utils.runs import Run
from utils.settings import Recipe
from utils.steps import (
    Compiling,
    GraphedStep,
    Step,
    choose_compiling,
    compile_net,
    is_captured,
    uncounted,
)
from utils.sums import LOWER_THE_RATE, EpochSums, Sums, step_sums
from utils.tasks import Task
from utils.trackers import start_tracker

REPORT_SECONDS = 0.5
DRAWS = 2  # a stream beside those of utils/data


def train_step(
    model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> Sums:
    """Change a task's weights once; `model` is the task as accelerate has prepared it.

    Nothing in here waits for the device: what the step adds up to stays there, as tensors.
    """
    output = model(batch)

    # Gradients are averaged over processes. Where their shares of a step differ, so do the weights.
    accelerator.backward(output.loss * batch.weight)

    scaler = accelerator.scaler
    # The fused optimiser leaves a step with overflown gradients out on the device, and tells the
    # host nothing; but the scale falls. The scale's public getter would wait for the device.
    scale_before = None if scaler is None else scaler._scale.clone()
    optimizer.step()
    optimizer.zero_grad()
    skipped = torch.zeros((), device=output.loss.device)
    if scaler is not None:
        skipped = scaler._scale < scale_before

    return step_sums(output, batch, skipped)


def fit(run: Run, task: Task) -> list[dict]:
    """Train a task in place from where its run stands to the last epoch; validate and save each.

    Returns the records of all epochs, as in metrics.jsonl. Raises RunFailed when the loss or the
    net's outputs are no longer finite.
    """
    data = run.data
    recipe = run.experiment.recipe

    # Images lie on the device from here on: training views are made there, step by step.
    loader = train_loader(data, recipe, run.accelerator)
    val = replace(data.val, images=data.val.images.to(run.accelerator.device))

    # What is trained, and all that changes while it is trained.
    trainer = Trainer(task, recipe, run.accelerator, steps_per_epoch=len(loader))
    history, best = resume(run, trainer)
    run.say(size_line(recipe.model, task.net, data))
    step = launched_as_asked(run, trainer, loader)
    start_tracker(run, history)

    # From here on the history and the best epoch are the keeper's.
    with Keeper(run, recipe, data.val, history, best) as keeper:
        for epoch in range(len(history) + 1, recipe.epochs + 1):
            if keeper.ends_here():
                break
            started = time.perf_counter()
            record = {"epoch": epoch, "lr": trainer.rate}

            # Train.
            record |= train_epoch(trainer, step, loader, epoch)
            record["images_per_second"] = len(data.train.labels) / (time.perf_counter() - started)

            # Validate.
            logits = validation_logits(trainer, val, run.experiment.run.test_batch_size)
            on_main(run.accelerator, partial(check_logits, logits, epoch, record["lr"]))
            task.after_validation(logits, val.labels)

            # Keep: what a killed run goes on from, and the best epoch so far. Measured and written
            # while the next epoch trains.
            states = on_cpu(trainer.state_dict())
            weights = weights_of(trainer.evaluated)
            keeper.settle()  # an epoch's seconds include the wait for the files of the one before
            record["seconds"] = time.perf_counter() - started
            keeper.keep(EpochEnd(record, logits, states, weights))

    # Leaving the block has waited for the last epoch.
    run.save_last(snapshot(run, keeper.history[-1], weights_of(trainer.evaluated)))
    return keeper.history


class Trainer:
    """A task with its optimiser and schedule: what a step changes, and what a resumed run needs.

    `model` is the task as accelerate calls it, with its precision and processes.
    """

    def __init__(self, task: Task, recipe: Recipe, accelerator: Accelerator, steps_per_epoch: int):
        task.to(accelerator.device, memory_format=torch.channels_last)
        if recipe.sync_bn and accelerator.num_processes > 1:
            task.net = nn.SyncBatchNorm.convert_sync_batchnorm(task.net)
        optimizer = build_optimizer(task, recipe)
        # Copied before the net is compiled or wrapped.
        self.average = WeightAverage(task.net, recipe.ema) if recipe.ema else None

        self.task = task
        self.recipe = recipe
        self.accelerator = accelerator
        self.schedule = build_schedule(optimizer, recipe, steps_per_epoch)
        self.model, self.optimizer = accelerator.prepare(task, optimizer)
        if accelerator.num_processes > 1:
            # Not exchanged in every step: share_buffers does it where they are read.
            self.model.broadcast_buffers = False
        self.skipped_in_a_row = 0  # steps that fp16's scaler has left out, up to now

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return self.optimizer.param_groups[0]["lr"]

    @property
    def evaluated(self) -> nn.Module:
        """The net that is validated and kept: with --ema, that of the averaged weights."""
        return self.task.net if self.average is None else self.average.net

    def stateful(self) -> dict:
        """All that has a state of its own, by its name in checkpoint.pth."""
        stateful = {"task": self.task, "optimizer": self.optimizer, "schedule": self.schedule}
        if self.average is not None:
            stateful["average"] = self.average
        if self.accelerator.scaler is not None:
            stateful["scaler"] = self.accelerator.scaler
        return stateful

    def state_dict(self) -> dict:
        return {name: owner.state_dict() for name, owner in self.stateful().items()}

    def load_state_dict(self, states: dict) -> None:
        for name, owner in self.stateful().items():
            owner.load_state_dict(states[name])


def launched_as_asked(run: Run, trainer: Trainer, loader: TrainLoader) -> Step:
    """A step of this run, launched as its --step says; the run says and logs how that is."""
    mode = run.experiment.run.step
    views = trainer.recipe.epochs * len(loader.labels)
    compiling = choose_compiling(mode, trainer.accelerator, trainer.task.net, views)
    step = launched(
        eager_step(trainer, loader), trainer, loader, mode=mode, compiled=compiling.chosen
    )
    log_how_it_runs(run, trainer.accelerator, step, compiling)
    return step


def eager_step(trainer: Trainer, loader: TrainLoader) -> Step:
    """train_step on a draw of the loader, and the averaging of weights that follows it."""

    def step(draw: Draw) -> Sums:
        batch = loader.batch(draw)
        sums = train_step(trainer.model, batch, trainer.optimizer, trainer.accelerator)
        if trainer.average is not None:
            trainer.average.update(trainer.task.net)
        return sums

    return step


def launched(step: Step, trainer: Trainer, loader: TrainLoader, mode: str, compiled: bool) -> Step:
    """A step that changes the trainer's task, launched as --step says (`mode`, of steps.MODES)."""
    if compiled:
        compile_net(trainer.task.net, loader.images_per_process, required=mode == "compile")
    if not is_captured(mode, trainer.accelerator):
        return step
    return GraphedStep(
        step,
        variant=lambda: trainer.task.variant,
        loader=loader,
        optimizer=trainer.optimizer,
        required=mode == "graph",
    )


def validation_logits(trainer: Trainer, val: Split, batch_size: int | None) -> Tensor:
    """The net's logits (N, K) of the whole validation split, on every process.

    A loss may learn from them (AdaFocal).
    """
    task = trainer.task
    share_buffers(trainer.accelerator, task.net)
    if trainer.average is not None:
        trainer.average.copy_buffers(task.net)
    return predict(
        trainer.evaluated,
        val,
        mean=task.mean,
        std=task.std,
        accelerator=trainer.accelerator,
        batch_size=batch_size,
    )


def train_epoch(
    trainer: Trainer, step: Step, loader: TrainLoader, epoch: int, shown: bool = True
) -> dict[str, float]:
    """One pass over the training views: means of the loss, its parts and top-1 (a fraction).

    `shown`: with a progress bar, where there is a terminal.
    """
    accelerator = trainer.accelerator
    epochs = trainer.recipe.epochs
    seed_draws(trainer.recipe.seed, epoch, accelerator.process_index)
    sums = EpochSums(len(loader), accelerator.device, trainer.skipped_in_a_row)
    bar = epoch_bar(epoch, epochs, len(loader), shown=shown and accelerator.is_main_process)
    reported = time.perf_counter()

    trainer.task.train()
    with trainer.task.during_epoch(epoch), uncounted(trainer.task.net, steps=len(loader)):
        for draw in loader.epoch(epoch):
            rate = trainer.rate
            sums.add(step(draw), rate)
            trainer.schedule.step()
            bar.update()

            # To read the sums is to wait for the device, so it is done now and then. Of several
            # processes only one looks: what the others do must not hang on the clock.
            is_due = time.perf_counter() - reported > REPORT_SECONDS
            if is_due and accelerator.is_main_process:
                sums.check(epoch)
                show_progress(bar, sums, steps_after=(epochs - epoch) * len(loader))
                reported = time.perf_counter()
    bar.close()

    sums = sums.over_processes(accelerator)
    on_main(accelerator, partial(sums.check, epoch))
    trainer.skipped_in_a_row = sums.skipped_in_a_row()[-1]
    return sums.means()


def log_how_it_runs(run: Run, accelerator: Accelerator, step: Step, compiling: Compiling) -> None:
    if compiling.note:
        run.say(compiling.note)
    launch = "one CUDA graph" if isinstance(step, GraphedStep) else "kernel by kernel"
    compiled = ", compiled" if compiling.chosen else ""
    run.log(
        f"{accelerator.device}, steps: {launch}{compiled}, "
        f"mixed precision: {accelerator.mixed_precision}, "
        f"float32 products: {torch.get_float32_matmul_precision()}, "
        f"threads: {torch.get_num_threads()}"
    )


def check_logits(logits: Tensor, epoch: int, rate: float) -> None:
    """End a run whose net the last step of an epoch broke. Raises RunFailed."""
    if not logits.isfinite().all():
        raise RunFailed(
            f"the net's outputs are not finite after epoch {epoch}, at a learning rate of "
            f"{rate:.3g}; {LOWER_THE_RATE}"
        )


def seed_draws(seed: int, epoch: int, rank: int) -> None:
    """What the net itself draws in an epoch, as for dropout: other numbers in each process.

    They depend on these three alone, so that nothing of them has to be kept for a resumed run. A
    net of the user's own may draw by `random` or NumPy.
    """
    [draws] = np.random.SeedSequence([seed, epoch, rank, DRAWS]).generate_state(1).tolist()
    random.seed(draws)
    np.random.seed(draws)
    torch.manual_seed(draws)  # the GPU's, too


def resume(run: Run, trainer: Trainer) -> tuple[list[dict], dict | None]:
    """Put everything back to the end of the last saved epoch; its history and best snapshot."""
    saved = run.load("checkpoint.pth")
    if saved is None:
        return [], None
    path = run.folder / "checkpoint.pth"
    if "task" not in saved:
        raise UserError(
            f"{path} was begun by an older version of this code; finish it with the version that "
            "config.json names, or --overwrite starts the run anew"
        )
    with refused(f"{path} does not fit its run", "--overwrite starts the run anew"):
        trainer.load_state_dict(saved)
        history = saved["history"]
        if [record["epoch"] for record in history] != list(range(1, len(history) + 1)):
            raise ValueError("epochs are missing")
        best = saved["best"]
    # A kill may have fallen between the checkpoint and the files that repeat parts of it.
    run.save(saved, improved=True)
    run.say(f"going on after epoch {len(history)}")
    return history, best


def share_buffers(accelerator: Accelerator, net: nn.Module) -> None:
    """Give every process the main one's batch-norm statistics, so that all evaluate one net."""
    if accelerator.num_processes > 1:
        for buffer in net.buffers():
            broadcast(buffer)
