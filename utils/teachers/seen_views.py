"""How sure a teacher is of what its student learns from: training images, each in a random view.

Of images that validate a teacher is less sure, most of all an ensemble or a net that knows its
training images by heart. A temperature that is fitted on those says nothing of these.
"""

from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor

from utils.calibration.temperature import mean_confidence
from utils.data import Dataset
from utils.data.shared import train_loader
from utils.program.bars import progress_bar
from utils.settings import Recipe
from utils.teachers.answers import Answers


class SeenViews:
    """A teacher's logits of the training views of the first epoch, before its temperature.

    Each process has those of its share of every step. Of images that are mixed or blotted out it
    has them as they were before. A cache that has the epoch is read, and else keeps it for the
    training.
    """

    def __init__(self, answers: Answers, data: Dataset, recipe: Recipe, accelerator: Accelerator):
        self.accelerator = accelerator
        self.logits = view_logits(answers, data, recipe, accelerator)
        self.images = len(data.train.labels)

    def confidence(self, temperature: float = 1.0) -> float:
        """The mean, a fraction, of the logits over a temperature; the same on every process."""
        own = mean_confidence(self.logits, temperature) * len(self.logits)
        total = torch.tensor(own, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(total, "sum").item() / self.images


@torch.no_grad()
def view_logits(
    answers: Answers, data: Dataset, recipe: Recipe, accelerator: Accelerator
) -> Tensor:
    """This process's logits (n, K), in the order of the first epoch."""
    loader = train_loader(data, replace(recipe, mix=None, cutout=None), accelerator)
    draws = progress_bar(
        loader.epoch(1),
        "teacher: training views",
        shown=accelerator.is_main_process,
        total=len(loader),
    )
    logits = []
    with answers.during_epoch(1):
        for draw in draws:
            answer = answers(loader.batch(draw))
            # A process without a share of a step is given an image that counts for nothing.
            logits.append(answer if draw.weight > 0 else answer[:0])
    return torch.cat(logits)
