"""What a run keeps of its epochs, written in another thread while the next epoch trains.

A small net trains an epoch on a GPU in a fifth of a second. Metrics and files take a good part of
that, and need no device. So an epoch is copied to the CPU and handed over.
"""

import copy
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from torch import Tensor, nn

from utils.data import Split
from utils.progress import epoch_line
from utils.runs import Run
from utils.selection import is_better, is_stalled, stall_line
from utils.settings import Recipe
from utils.split_metrics import evaluate
from utils.trackers import track

EPOCH_METRICS = ("nll", "top1", "ece", "sce", "adaece", "refinement")


class EpochEnd(NamedTuple):
    """A run at the end of an epoch, in memory that no later step changes (`on_cpu`)."""

    record: dict[str, float]  # without what validation says
    logits: Tensor  # (N, K) of the validation split
    states: dict  # all that a resumed run needs
    weights: dict[str, Tensor]  # of the net that was validated


class Keeper:
    """The history of a run and its best epoch, in memory and on disk.

    Epochs are kept one at a time and in order. What is on disk is whole at any time: it is that of
    the last epoch that was kept. Leaving the `with` block waits for it.
    """

    def __init__(
        self, run: Run, recipe: Recipe, val: Split, history: list[dict], best: dict | None
    ):
        self.run = run
        self.recipe = recipe
        self.val = val
        self.history = history
        self.best = best
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.pending: Future | None = None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self.settle()
        finally:
            self.thread.shutdown()  # after what it is writing

    def keep(self, end: EpochEnd) -> None:
        """Hand an epoch over. Raises what `settle` raises."""
        self.settle()
        self.pending = self.thread.submit(self._keep, end)

    def settle(self) -> None:
        """Wait until the epoch that was handed over is kept. Raises RunFailed where it was not."""
        if self.pending is not None:
            record = self.pending.result()
            self.pending = None
            # Here, since some trackers know their run only in the thread that began it.
            track(self.run, record, record["epoch"])

    def ends_here(self) -> bool:
        """Whether --patience ends the run after the epochs so far, waited for; a line says so."""
        if self.recipe.patience is None:
            return False
        self.settle()
        if not is_stalled(self.history, self.best, self.recipe):
            return False
        self.run.say(stall_line(self.history, self.best, self.recipe))
        return True

    def _keep(self, end: EpochEnd) -> dict[str, float]:
        """Measure an epoch, write it down and say it; its whole record."""
        record = end.record | validation_metrics(end.logits, self.val)
        self.history.append(record)
        improved = self.best is None or is_better(record, self.best["metrics"], self.recipe.select)
        if improved:
            self.best = snapshot(self.run, record, end.weights)
        checkpoint = end.states | {"history": self.history, "best": self.best}
        self.run.save(checkpoint, improved)
        self.run.say(epoch_line(record, self.recipe.epochs, improved))
        return record


def validation_metrics(logits: Tensor, val: Split) -> dict[str, float]:
    """As an epoch's record has them: fractions; NLL and refinement in nats."""
    metrics = evaluate(logits, val)
    return {f"val_{name}": metrics[name] for name in EPOCH_METRICS}


def snapshot(run: Run, record: dict, weights: dict[str, Tensor]) -> dict:
    """What model_best.pth and model_last.pth hold: the weights and what is needed to use them."""
    return {
        **run.identity,
        "epoch": record["epoch"],
        "metrics": {name: value for name, value in record.items() if name.startswith("val_")},
        "state_dict": weights,
    }


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    """A copy on the CPU, buffers included."""
    return {name: on_cpu(tensor) for name, tensor in net.state_dict().items()}


def on_cpu(states):
    """A copy with every tensor on the CPU, where no later step changes it."""
    if isinstance(states, Tensor):
        return states.detach().to("cpu", copy=True)
    if isinstance(states, dict):
        copied = copy.copy(states)  # with the versions that torch notes beside a state dict
        for name, value in states.items():
            copied[name] = on_cpu(value)
        return copied
    if isinstance(states, list):
        return [on_cpu(value) for value in states]
    return states
