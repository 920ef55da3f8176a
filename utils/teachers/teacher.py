"""What a teacher is, of whichever kind: nets (nets.py), or a file of their logits (stored.py)."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from accelerate import Accelerator
from torch import Tensor

from losses.distillation import Undefined
from utils.data import Dataset
from utils.program import UserError
from utils.run_files import temperature_suffix

# What finds a teacher's temperature by the validation split, and what to give to one that may have
# been trained on that split.
RULES = {
    "auto": "a number",
    "views": "--teacher_accuracy, what it has on images that are new to it",
}


@dataclass(kw_only=True)
class Teacher(ABC):
    """What has logits of the training images, from nets or a file, and what divides these."""

    temperature: float | None = 1.0  # None until a rule has found it
    # The rule, if any: `auto` fits the temperature to validation logits, `views` makes the teacher
    # as sure of training views as it is right on validation (settling.py).
    rule: str | None = None
    accuracy: float | None = None  # a fraction: for `views`, in place of that on validation
    # How sure it is of training views and of validation; found at the same time, for the result.
    confidences: dict[str, float] | None = None

    @property
    @abstractmethod
    def model(self) -> str:
        """The name of its architecture, or what stands for one."""

    @property
    @abstractmethod
    def own_label(self) -> str:
        """Where its logits come from, whatever divides them."""

    @property
    @abstractmethod
    def own_identity(self) -> dict:
        """What decides its logits, and where it lies; ready for JSON, with seed, path and loss."""

    @abstractmethod
    def logits_of_splits(
        self, data: Dataset, accelerator: Accelerator, batch_size: int | None = None
    ) -> dict[str, Tensor]:
        """By split, val and test as far as known, logits (N, K) untempered, on the CPU."""

    def tempered(self, logits: Tensor) -> Tensor:
        """What the student learns from: this teacher's logits (B, K) over its temperature."""
        return logits if self.temperature == 1 else logits.float() / self.temperature

    @property
    def given_temperature(self) -> float | str:
        """As the command line says it: the name of a rule, or a number."""
        return self.rule or self.temperature

    @property
    def label(self) -> str:
        """Where its logits come from, and their temperature."""
        return self.own_label + temperature_suffix(self.given_temperature)

    @property
    def identity(self) -> dict:
        """What a student's result says of its teacher, ready for JSON."""
        identity = self.own_identity
        if self.given_temperature != 1:
            identity["teacher_temperature"] = self.given_temperature
        if self.accuracy is not None:
            identity["teacher_accuracy"] = self.accuracy
        return identity | {"model": self.model, "label": self.label}


def cannot_teach(undefined: Undefined) -> UserError:
    """What the user reads where a distillation has no value for a teacher's logits."""
    return UserError(f"--distill: {undefined}; give --distill KD or another teacher")
