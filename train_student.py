"""Distil a teacher into a student, which inherits its accuracy and its calibration.

    python train_student.py --dataset cifar100 --model resnet8 --teacher_path calibrated_teachers/ \
        --T 4 --Lambda 0.9

Arguments -> data -> teacher, student -> distillation loss -> fit -> result, in a run folder below
--checkpoint. --teacher_path is a run folder of train_teacher.py or a third party's weights.
"""

import utils  # noqa: F401  before torch

# isort: split
import torch

from losses import build_distillation
from models import build_model
from utils.evaluation import conclude, inspect_teacher
from utils.objectives import Distillation
from utils.options import check_run, parameters_of, student_options
from utils.preflight import check_net, check_teacher
from utils.program import UserError, one_line_errors
from utils.runs import Run, finished_run, identity_of, label_of, shown_result
from utils.tables import result_table
from utils.teachers import teacher_of
from utils.training import fit, load_data, start


def main(argv: list[str] | None = None) -> None:
    args = student_options(argv)
    accelerator = start(args.deterministic, args.log_with)
    data = load_data(args, accelerator)
    check_run(args, data, accelerator)
    check_net(args, data, accelerator)
    try:
        teacher = teacher_of(args, data)
    except UserError:
        finished = finished_run(args, data.name)
        if finished is None:
            raise
        accelerator.print(shown_result(*finished))  # what it is, wherever its teacher has gone
        return
    check_teacher(teacher, data)
    teacher.to(accelerator.device)

    parameters, naming = parameters_of(args.distill, args)
    label = f"{label_of(args.distill, naming)}_from_{teacher.model}_{teacher.label}"
    run = Run(args, identity_of(args, data, args.distill, naming, label), accelerator, teacher)
    objective = None
    # Before the run has a folder, for cache and teacher may be refused.
    if args.overwrite or run.result() is None:
        loss = build_distillation(args.distill, **parameters)
        objective = Distillation(loss, teacher, data, accelerator, args.seed, args.teacher_cache)
        about_teacher = inspect_teacher(teacher, data, accelerator, args.test_batch_size, objective)
    with run.opened(args, data):
        if run.result() is None:
            run.say(about_teacher)
            torch.manual_seed(args.seed)
            student = build_model(args.model, data.num_classes)
            history = fit(run, accelerator, student, objective, data, args)
            conclude(run, accelerator, student, data, history, args.test_batch_size, teacher)
            run.say(f"{run.folder}\n{result_table(run.result())}")
        else:
            run.say_finished()


if __name__ == "__main__":
    with one_line_errors("train_student.py"):
        main()
