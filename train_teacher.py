"""Train a classifier with a calibration-aware loss. It can serve as a teacher.

    python train_teacher.py --dataset cifar100 --model resnet56 --loss FL+MDCA --gamma 3 --beta 1
    accelerate launch --mixed_precision fp16 train_teacher.py --model resnet110 --loss NLL

Arguments -> data -> net -> loss -> fit -> result, in a run folder below --checkpoint.
"""

import utils  # noqa: F401  before torch

# isort: split
import torch

from losses import build_loss
from models import build_model
from utils.conclusion import conclude
from utils.data.shared import load_data
from utils.options import teacher_options
from utils.preflight import check_net, check_run
from utils.program import one_line_errors
from utils.program.processes import start
from utils.runs import Run
from utils.tasks import ClassificationTask
from utils.training import fit


def main(argv: list[str] | None = None) -> dict:
    """Train what the command line asks for; the content of its result.json."""
    experiment = teacher_options(argv)
    recipe = experiment.recipe
    accelerator = start(experiment.run.deterministic, experiment.run.log_with)
    data = load_data(experiment.data, accelerator)
    check_run(experiment, data, accelerator)
    check_net(recipe, data, accelerator)

    run = Run(experiment, data, accelerator)
    if run.is_finished():
        return run.show_finished()

    with run.opened():
        torch.manual_seed(recipe.seed)
        net = build_model(recipe.model, data.num_classes)
        loss = build_loss(experiment.loss.name, **experiment.loss.parameters)
        task = ClassificationTask(net, loss, data)
        history = fit(run, task)
        conclude(run, task.net, history)
        return run.show_result()


if __name__ == "__main__":
    with one_line_errors("train_teacher.py"):
        main()
