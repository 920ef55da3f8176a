"""What an epoch's steps add up to, kept on the device, and the checks that end a hopeless run."""

import math

import torch
from accelerate import Accelerator
from torch import Tensor

from utils.data.views import Batch
from utils.program import RunFailed
from utils.tasks import StepOutput

MOST_SKIPPED = 100  # steps in a row
LOWER_THE_RATE = (
    "most likely the learning rate is too high; give a smaller --lr, or --scheduler warmupcosine "
    "--warmup STEPS, or a smaller --beta where the loss reads it; and add --exp_name or --overwrite"
)

STEP_SUMS = ("loss", "right", "images", "skipped")  # what every step has; the loss' parts follow

Sums = dict[str, Tensor]


def step_sums(output: StepOutput, batch: Batch, skipped: Tensor) -> Sums:
    """Sums over the step's images, float64 scalars on the device: `loss`, `right`, the loss' parts.

    With `images`, their number, and `skipped`, 1 where fp16's scaler left the step out. A mixed
    image has the label of its larger share, as torchvision's own training script counts it.
    """
    labels = batch.labels
    if batch.partners is not None:
        labels = torch.where(batch.share >= 0.5, batch.labels, batch.partners)
    predictions = output.logits.detach().argmax(dim=1)
    right = (predictions == labels).double().mean()

    # A process without a share of this step has taken part with an image that counts for nothing.
    images = torch.full_like(right, len(batch.labels) if batch.weight > 0 else 0)
    sums = {
        "loss": images * output.loss.detach().double(),
        "right": images * right,
        "images": images,
        "skipped": skipped.double(),
    }
    for name, part in output.parts.items():
        sums[name] = images * part.double()
    return sums


class EpochSums:
    """The sums of an epoch's steps, which stay on the device until they are read.

    `skipped_before`: how many steps in a row the scaler had left out when the epoch began.
    """

    def __init__(self, steps: int, device: torch.device, skipped_before: int = 0):
        self.steps = steps
        self.device = device
        self.skipped_before = skipped_before
        self.names: list[str] = []
        self.table = torch.empty(0)  # (steps, names)
        self.rates: list[float] = []

    def add(self, sums: Sums, rate: float) -> None:
        """What a step at this learning rate has returned."""
        if not self.names:
            self.names = list(sums)
            shape = (self.steps, len(self.names))
            self.table = torch.zeros(shape, dtype=torch.float64, device=self.device)
        torch.stack(list(sums.values()), out=self.table[len(self.rates)])
        self.rates.append(rate)

    def column(self, name: str) -> list[float]:
        """One sum, a number for each step so far. Waits for the device."""
        return self.table[: len(self.rates), self.names.index(name)].tolist()

    def totals(self) -> dict[str, float]:
        """Waits for the device."""
        return dict(zip(self.names, self.table.sum(dim=0).tolist(), strict=True))

    def means(self) -> dict[str, float]:
        """Over the images so far: `train_loss`, `train_top1` (a fraction), and the loss' parts.

        A loss of one part is that part, which is not said twice. Waits for the device.
        """
        totals = self.totals()
        images = totals["images"]
        means = {"train_loss": totals["loss"] / images, "train_top1": totals["right"] / images}
        parts = [name for name in self.names if name not in STEP_SUMS]
        if len(parts) > 1:
            for name in parts:
                means[f"train_{name}"] = totals[name] / images
        return means

    def over_processes(self, accelerator: Accelerator) -> "EpochSums":
        """The sums of all processes together."""
        together = EpochSums(self.steps, self.device, self.skipped_before)
        together.names = self.names
        together.rates = self.rates
        together.table = accelerator.reduce(self.table, "sum")
        return together

    def skipped_in_a_row(self) -> list[int]:
        """After each step: how many in a row, up to it, the scaler has left out."""
        in_a_row = self.skipped_before
        counts = []
        for skipped in self.column("skipped"):
            in_a_row = in_a_row + 1 if skipped else 0
            counts.append(in_a_row)
        return counts

    def check(self, epoch: int) -> None:
        """End a run that cannot succeed any more: RunFailed. The last checkpoint is kept.

        fp16's scaler finds its scale by leaving steps out; many in a row are a fault.
        """
        # A step without images has the sum 0, or NaN, which must not be lost.
        means = [
            loss / images if images else loss
            for loss, images in zip(self.column("loss"), self.column("images"), strict=True)
        ]
        for step, mean in enumerate(means):
            if math.isfinite(mean):
                continue
            if epoch == 1 and step == 0:
                raise RunFailed(
                    f"the loss is {mean} in the first step, before any weight has changed, so it "
                    "has no value for these logits; look at the loss, the net and the teacher"
                )
            before = f"{means[step - 1]:.3g} a step before, " if step else ""
            raise RunFailed(
                f"the loss is {mean} in epoch {epoch}, step {step + 1}, {before}at a learning rate "
                f"of {self.rates[step]:.3g}; {LOWER_THE_RATE}"
            )
        for step, in_a_row in enumerate(self.skipped_in_a_row()):
            if in_a_row >= MOST_SKIPPED:
                raise RunFailed(
                    f"fp16: the gradients of {MOST_SKIPPED} steps in a row were not finite, up to "
                    f"epoch {epoch}, step {step + 1}; try bf16, or {LOWER_THE_RATE}"
                )
