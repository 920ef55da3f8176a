"""Distil a teacher into a student, which inherits its accuracy and its calibration.

    python train_student.py --dataset cifar100 --model resnet8 --teacher_path calibrated_teachers/ \
        --T 4 --Lambda 0.9

Arguments -> data -> teacher, student -> distillation loss -> fit -> result, in a run folder below
--checkpoint. --teacher_path is a run folder of train_teacher.py or a third party's weights.
"""

from argparse import Namespace

import torch
from accelerate import Accelerator

from losses.distillation import distillation_loss
from models import build_model
from utils.data import Dataset
from utils.data.views import Batch
from utils.evaluation import conclude, inspect_teacher
from utils.options import check_steps, student_options
from utils.program import one_line_errors
from utils.runs import Run, identity_of, label_of
from utils.steps import BatchLoss
from utils.tables import result_table
from utils.teacher_cache import CachedTeacher, LogitFiles
from utils.teachers import Teacher, teacher_of
from utils.training import AroundEpoch, fit, load_data, start, untouched


def main(argv: list[str] | None = None) -> None:
    args = student_options(argv)
    accelerator = start(args)
    data = load_data(args, accelerator)
    check_steps(args, data, accelerator.num_processes)
    teacher = teacher_of(args, data)
    teacher.to(accelerator.device)

    parameters = {"T": args.T, "Lambda": args.Lambda}
    label = f"{label_of('KD', parameters)}_from_{teacher.model}_{teacher.label}"
    run = Run(args, identity_of(args, data, "KD", parameters, label), accelerator, teacher)
    batch_loss, around_epoch = build_batch_loss(args, teacher, data, accelerator)
    with run.opened(args, data):
        if not run.finished:
            run.say(inspect_teacher(teacher, data, accelerator, args.test_batch_size))
            torch.manual_seed(args.seed)
            student = build_model(args.model, data.num_classes)
            history = fit(run, accelerator, student, batch_loss, data, args, around_epoch)
            conclude(run, accelerator, student, data, history, args.test_batch_size, teacher)
        run.say(f"{run.folder}\n{result_table(run.result())}")


def build_batch_loss(
    args: Namespace, teacher: Teacher, data: Dataset, accelerator: Accelerator
) -> tuple[BatchLoss, AroundEpoch]:
    """For `fit`: the student's loss on a batch, and what has to happen around each epoch.

    The teacher runs only where the cache lacks the epoch.
    """

    def teach(batch: Batch) -> torch.Tensor:
        with accelerator.autocast():
            return teacher.logits(batch.images)

    around_epoch = untouched
    if args.teacher_cache:
        files = LogitFiles(args.teacher_cache, teacher, data, accelerator)
        teach = CachedTeacher(teach, files, args.seed)
        around_epoch = teach.epoch

    def batch_loss(student_logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        teacher_logits = teacher.tempered(teach(batch))
        return distillation_loss(student_logits, teacher_logits, batch.labels, args.T, args.Lambda)

    return batch_loss, around_epoch


if __name__ == "__main__":
    with one_line_errors("train_student.py"):
        main()
