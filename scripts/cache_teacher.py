"""Run a teacher on all 162 views of every training image, for sweeps over several seeds.

    python -m scripts.cache_teacher --dataset cifar100 --teacher_path calibrated_teachers/ \
        --teacher_cache cache
    accelerate launch --mixed_precision bf16 -m scripts.cache_teacher ...

A student that is then trained with the same teacher, data and precision, and with the same
--teacher_cache, never runs its teacher in training, whatever its seed.
"""

from argparse import Namespace

import torch
from accelerate import Accelerator
from tqdm import tqdm

from utils.data import Dataset
from utils.data.views import NUM_VIEWS, take_views, view_windows
from utils.evaluation import usual_batch_size
from utils.options import CommandLine, add_data, add_teacher, count
from utils.program import one_line_errors
from utils.teacher_cache import LogitFiles, view_name
from utils.teachers import Teacher, teacher_of
from utils.training import load_data, start


def options(argv: list[str] | None) -> Namespace:
    parser = CommandLine(
        prog="python -m scripts.cache_teacher",
        description="Keep a teacher's logits of every view of the training images. They take 162 x "
        "images x classes x 4 bytes (2 in half precision): CIFAR-10 292 MB, CIFAR-100 2.9 GB. What "
        "is there already is kept, so a stopped command goes on where it was.",
    )
    add_data(parser)
    add_teacher(parser, for_cache=True)
    size_help = "images per step (default: 1000, on a CPU 128)"
    parser.add_argument("--batch-size", type=count, help=size_help)
    parser.set_defaults(teacher_temperature=1.0)  # kept are the logits before any
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    accelerator = start()
    data = load_data(args, accelerator)
    teacher = teacher_of(args, data)
    teacher.to(accelerator.device)
    files = LogitFiles(args.teacher_cache, teacher, data, accelerator)
    batch_size = args.batch_size or usual_batch_size(accelerator.device)
    fill(files, teacher, data, accelerator, batch_size)
    accelerator.wait_for_everyone()
    accelerator.print(f"{files.folder}: all {NUM_VIEWS} views, {files.size / 1e6:,.1f} MB")
    accelerator.end_training()


def fill(
    files: LogitFiles, teacher: Teacher, data: Dataset, accelerator: Accelerator, batch_size: int
) -> None:
    """Write the views that the files lack; several processes take turns."""
    windows = view_windows(data.train.images.to(accelerator.device))
    mine = range(accelerator.process_index, NUM_VIEWS, accelerator.num_processes)
    missing = [view for view in mine if not files.has(view_name(view))]
    bar = tqdm(
        total=len(missing) * len(windows),
        unit="image",
        unit_scale=True,
        disable=None if accelerator.is_main_process else True,
    )
    with bar:
        for view in missing:
            logits = []
            for index in torch.arange(len(windows), device=windows.device).split(batch_size):
                images = take_views(windows, index, torch.full_like(index, view))
                with accelerator.autocast():
                    logits.append(teacher.logits(images))
                bar.update(len(index))
            files.write(view_name(view), torch.cat(logits))


if __name__ == "__main__":
    with one_line_errors("python -m scripts.cache_teacher"):
        main()
