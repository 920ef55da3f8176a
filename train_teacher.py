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
from utils.evaluation import conclude
from utils.objectives import Objective
from utils.options import check_run, parameters_of, teacher_options
from utils.preflight import check_net
from utils.program import one_line_errors
from utils.runs import Run, identity_of, label_of
from utils.tables import result_table
from utils.training import fit, load_data, start


def main(argv: list[str] | None = None) -> None:
    args = teacher_options(argv)
    accelerator = start(args.deterministic, args.log_with)
    data = load_data(args, accelerator)
    check_run(args, data, accelerator)
    check_net(args, data, accelerator)

    parameters, naming = parameters_of(args.loss, args)
    label = label_of(args.loss, naming)
    run = Run(args, identity_of(args, data, args.loss, naming, label), accelerator)
    with run.opened(args, data):
        if run.result() is None:
            torch.manual_seed(args.seed)
            net = build_model(args.model, data.num_classes)
            objective = Objective(build_loss(args.loss, **parameters))
            history = fit(run, accelerator, net, objective, data, args)
            conclude(run, accelerator, net, data, history, args.test_batch_size)
            run.say(f"{run.folder}\n{result_table(run.result())}")
        else:
            run.say_finished()


if __name__ == "__main__":
    with one_line_errors("train_teacher.py"):
        main()
