"""Distil a teacher into a student, which inherits its accuracy and its calibration.

    python train_student.py --dataset cifar100 --model resnet8 --teacher_path calibrated_teachers/ \
        --T 4 --Lambda 0.9

Arguments -> data -> teacher, student -> distillation loss -> fit -> result, in a run folder below
--checkpoint. --teacher_path is a run folder of train_teacher.py or a third party's weights. A file
of logits teaches as well: --teacher_logits.
"""

import utils  # noqa: F401  before torch

# isort: split
import torch

from losses import build_distillation
from models import build_model
from utils.conclusion import conclude
from utils.data.shared import load_data
from utils.features import feature_term
from utils.options import student_options
from utils.preflight import check_net, check_run
from utils.preparing import prepare_teacher
from utils.program import UserError, one_line_errors
from utils.program.processes import start
from utils.runs import Run, show_run_without_teacher
from utils.tasks import DistillationTask
from utils.teachers.loading import load_teacher
from utils.training import fit


def main(argv: list[str] | None = None) -> dict:
    """Distil what the command line asks for; the content of its result.json."""
    experiment = student_options(argv)
    recipe = experiment.recipe
    accelerator = start(experiment.run.deterministic, experiment.run.log_with)
    data = load_data(experiment.data, accelerator)
    check_run(experiment, data, accelerator)
    check_net(recipe, data, accelerator)
    try:
        teacher = load_teacher(experiment.teacher, data)
    except UserError:
        # A finished run is shown wherever its teacher has gone.
        result = show_run_without_teacher(experiment, data, accelerator)
        if result is None:
            raise
        return result

    run = Run(experiment, data, accelerator, teacher)
    if run.is_finished():
        return run.show_finished()

    # Before the run has a folder: the cache or the teacher may be refused.
    loss = build_distillation(experiment.loss.name, **experiment.loss.parameters)
    answers, about_teacher = prepare_teacher(teacher, loss, experiment, data, accelerator)

    with run.opened():
        run.say(about_teacher)
        torch.manual_seed(recipe.seed)
        student = build_model(recipe.model, data.num_classes)
        features = feature_term(experiment.loss, student, teacher, data, accelerator)
        task = DistillationTask(student, loss, teacher, answers, data, features)
        history = fit(run, task)
        conclude(run, task.net, history, teacher)
        return run.show_result()


if __name__ == "__main__":
    with one_line_errors("train_student.py"):
        main()
