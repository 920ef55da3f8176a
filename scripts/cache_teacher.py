"""Run a teacher on all views of every training image, for sweeps over several seeds.

    python -m scripts.cache_teacher --dataset cifar100 --teacher_path calibrated_teachers/ \
        --teacher_cache cache
    accelerate launch --mixed_precision bf16 -m scripts.cache_teacher ...

A student of the same teacher, data and precision then never runs its teacher, whatever its seed.
"""

import sys
from pathlib import Path

if not __package__:  # started as `python scripts/cache_teacher.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import scripts  # noqa: F401  before torch

from argparse import Namespace

import torch

from utils.data import Split
from utils.data.shared import load_data
from utils.data.views import take_views, view_numbers, view_windows
from utils.evaluation import logits_of
from utils.flags import add_data
from utils.preflight import check_teacher
from utils.program import RunFailed, one_line_errors
from utils.program.bars import progress_bar
from utils.program.command_line import CommandLine, count
from utils.program.environment import precision_note
from utils.program.processes import on_main, start
from utils.settings import DataChoice, TeacherSource
from utils.teacher_flags import add_teacher
from utils.teachers.cache import open_cache
from utils.teachers.loading import load_nets


def options(argv: list[str] | None) -> Namespace:
    parser = CommandLine(
        prog="python -m scripts.cache_teacher",
        description="Keep a teacher's logits of every view of the training images: 162 x images x "
        "classes x 4 bytes (2 in half precision; half of it with --no-flip). What is there stays.",
    )
    add_data(parser)
    add_teacher(parser, for_cache=True)
    parser.add_argument(
        "--batch-size", type=count, help="images per step (default: 1000, on a CPU 128)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    accelerator = start()
    note = precision_note(accelerator)
    if note:
        accelerator.print(note)
    data = load_data(DataChoice.of(vars(args)), accelerator)
    # What is kept are the logits before any temperature.
    teacher = load_nets(TeacherSource.of(vars(args)), data)
    check_teacher(teacher, data)
    teacher.to(accelerator.device, accelerator.mixed_precision)
    files = open_cache(args.teacher_cache, teacher, data, accelerator)

    views = view_numbers(data.flip)
    missing = on_main(
        accelerator, lambda: [view for view in views if not files.verify(f"view={view}")]
    )
    if missing and files.fault:
        raise RunFailed(f"--teacher_cache: {files.folder} cannot be written to: {files.fault}")

    windows = view_windows(data.train.images.to(accelerator.device))
    every_image = torch.arange(len(windows), device=windows.device)
    for view in progress_bar(missing, "views", shown=accelerator.is_main_process):
        images = take_views(windows, every_image, torch.full_like(every_image, view))
        split = Split(images, data.train.labels)
        logits = logits_of(teacher.logits, split, accelerator, args.batch_size)
        if accelerator.is_main_process:
            files.write(f"view={view}", logits)
    accelerator.print(f"{files.folder}: all {len(views)} views")
    accelerator.end_training()


if __name__ == "__main__":
    with one_line_errors("python -m scripts.cache_teacher"):
        main()
