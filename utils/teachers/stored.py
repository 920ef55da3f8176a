"""A teacher without a net: what a file says of the training images, whoever made it.

docs/teachers.md describes the file. How its answers reach a student's step stands in
answers.py.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from utils.data import Dataset
from utils.data.views import NUM_VIEWS
from utils.program import UserError
from utils.program.files import safe_name, sha256
from utils.program.words import counted
from utils.run_files import STORED
from utils.settings import TeacherSource
from utils.teachers.logit_file import Arrays, labels_in, logits_in, read_stored
from utils.teachers.teacher import RULES, Teacher


@dataclass
class StoredTeacher(Teacher):
    """Logits of the training split, and of validation and test where the file has them.

    It has no net that could be run on other images.
    """

    path: Path
    sha256: str
    training: Tensor  # float32 (V, N, K): V stored views, N in the order of the training split
    val_and_test: dict[str, Tensor]  # of both, one or none of them, float32 (N, K) in its order
    loss: str | None = None  # what --teacher_loss says

    def epoch_logits(self, epoch: int, order: Tensor, views: Tensor) -> Tensor:
        """Logits (N, K) of an epoch's images in its order; the first epoch is 1.

        162 stored views are those of utils/data/views.py, by their numbers. Of fewer, one or more,
        each epoch takes the next for all of its images, and after the last the first again.
        """
        stored_views = len(self.training)
        if stored_views == NUM_VIEWS:
            return self.training[views, order]
        return self.training[(epoch - 1) % stored_views, order]

    def logits_of_splits(
        self, data: Dataset, accelerator: Accelerator, batch_size: int | None = None
    ) -> dict[str, Tensor]:
        return self.val_and_test

    @property
    def model(self) -> str:
        return STORED

    @property
    def own_label(self) -> str:
        return safe_name(self.path.stem)

    @property
    def own_identity(self) -> dict:
        return {
            "seed": None,
            "sha256": self.sha256,
            "views": len(self.training),
            "path": str(self.path),
            "loss": self.loss,
        }


def load_stored(source: TeacherSource, data: Dataset) -> StoredTeacher:
    """The teacher that the file of --teacher_logits is. Raises UserError."""
    path = Path(source.logits)
    where = f"--teacher_logits {path}"
    arrays = read_stored(path, where)
    training, validation = training_logits(arrays, data, where)

    val_and_test = {}
    for split in ("val", "test"):
        logits = split_logits(arrays, split, data, where)
        if logits is not None:
            val_and_test[split] = logits

    if source.rule is not None and source.accuracy is None and "val" not in val_and_test:
        raise UserError(
            f"--teacher_temperature {source.rule}: {path} has no val_logits or val_probs, and the "
            "rows of its training logits may come from a net that was trained on the images that "
            "validate the student, which say nothing of its temperature then; give "
            f"{RULES[source.rule]}"
        )
    # Such rows are shown all the same, as those of a third party's net are.
    if validation is not None:
        val_and_test.setdefault("val", validation)
    return StoredTeacher(
        path,
        sha256=sha256(path),
        training=training,
        val_and_test=val_and_test,
        temperature=source.number,
        rule=source.rule,
        accuracy=source.accuracy,
        loss=source.loss,
    )


def training_logits(arrays: Arrays, data: Dataset, where: str) -> tuple[Tensor, Tensor | None]:
    """Logits (V, N, K) of the training split, and (N, K) of validation if it is among the images.

    The number of images says whether it is; of several stored views none stands for validation.
    Raises UserError.
    """
    logits = logits_in(arrays, "train", where)
    if logits is None:
        raise UserError(f"{where}: holds neither train_logits nor train_probs; add one of them")
    if logits.ndim == 2:
        logits = logits.unsqueeze(0)
    check_classes(logits, "train", data, where)
    if logits.ndim > 3:
        raise UserError(
            f"{where}: train logits have shape {tuple(logits.shape)}; save (N, K), or (V, N, K) "
            "for V views"
        )

    images = logits.shape[1]
    labels = data.train.labels
    every_label = labels_in_own_order(data)
    if images == len(labels):
        check_labels(arrays, "train", labels, where)
        return logits, None
    if images == len(every_label):
        check_labels(arrays, "train", every_label, where)
        validation = logits[0, data.val.rows] if len(logits) == 1 else None
        return logits[:, data.train.rows], validation

    wanted = f"{len(labels)}"
    if len(every_label) > len(labels):
        wanted += f", or {len(every_label)} with the validation split"
    raise UserError(
        f"{where}: has training logits of {counted(images, 'image')}, and --dataset {data.name} "
        f"has {wanted}; save a row for each, in the data set's own order"
    )


def labels_in_own_order(data: Dataset) -> Tensor:
    """The labels of all training images, int64 (N,), those drawn for validation included."""
    if data.train.rows is None:
        return data.train.labels
    labels = torch.empty(len(data.train.rows) + len(data.val.rows), dtype=torch.int64)
    labels[data.train.rows] = data.train.labels
    labels[data.val.rows] = data.val.labels
    return labels


def split_logits(arrays: Arrays, split: str, data: Dataset, where: str) -> Tensor | None:
    """Logits (N, K) of val or test; None where the file has none. Raises UserError."""
    labels = getattr(data, split).labels
    check_labels(arrays, split, labels, where)
    logits = logits_in(arrays, split, where)
    if logits is None:
        return None
    check_classes(logits, split, data, where)
    if logits.shape[:-1] != labels.shape:
        raise UserError(
            f"{where}: {split} logits have shape {tuple(logits.shape)}, and --dataset {data.name} "
            f"has {counted(len(labels), 'image')} in its {split} split; save a row for each"
        )
    return logits


def check_classes(logits: Tensor, split: str, data: Dataset, where: str) -> None:
    """Raises UserError."""
    if logits.shape[-1] != data.num_classes:
        raise UserError(
            f"{where}: {split} logits have {logits.shape[-1]} classes, and --dataset {data.name} "
            f"has {data.num_classes}; give another file or --dataset"
        )


def check_labels(arrays: Arrays, split: str, labels: Tensor, where: str) -> None:
    """Refuse rows in another order, where the file has labels that tell. Raises UserError."""
    stored = labels_in(arrays, split, where)
    if stored is not None and not torch.equal(stored, labels):
        raise UserError(
            f"{where}: {split}_labels are not the labels of --dataset in its own order; save the "
            "rows in that order"
        )
