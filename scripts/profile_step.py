"""What a GPU does in a training step: kernels, the gaps between them, conversions of layout.

    python -m scripts.profile_step --model resnet20 --step graph

Profiles 20 steps as train_teacher.py runs them, on random images of CIFAR's shape. Without a GPU it
shows the CPU's operations instead.
"""

import sys
from pathlib import Path

if not __package__:  # started as `python scripts/profile_step.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import scripts  # noqa: F401  before torch

import math
import re
from argparse import Namespace
from collections import defaultdict
from typing import NamedTuple

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from models import check_name
from scripts.benchmarking.contenders import Job, ours, random_data, recipe_of
from utils.columns import text_table
from utils.program import RunFailed, one_line_errors
from utils.program.command_line import CommandLine, checked, count
from utils.program.processes import start
from utils.steps import MODES

STEPS = 20
WARM_UP = 5  # steps, in which a graph is captured
MOST = 12  # kernels that are listed
# cuDNN's kernels that only bring a tensor from one order of its dimensions into another.
CONVERSION = re.compile(r"nchwToNhwc|nhwcToNchw|convertTensor|transpose", re.IGNORECASE)


class Span(NamedTuple):
    """A kernel's name and when it ran, in microseconds."""

    name: str
    start: float
    end: float


def options(argv: list[str] | None) -> Namespace:
    parser = CommandLine(prog="python -m scripts.profile_step", description="Profile a step.")
    parser.add_argument("--model", type=checked(check_name), default="resnet8", help="of the zoo")
    parser.add_argument("--batch-size", type=count, default=128, help="images per training step")
    parser.add_argument(
        "--step", choices=MODES, default="auto", help="how a step is launched; see the scripts"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    accelerator = start()
    data = random_data((STEPS + WARM_UP) * args.batch_size)
    job = Job(accelerator, data, recipe_of(args.model, args.batch_size))
    train = ours(job, args.step)
    train(WARM_UP)
    on_gpu = accelerator.device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiled:
        train(STEPS)
    spans = spans_of(profiled.events(), on_gpu)
    if not spans:
        raise RunFailed("the profiler has recorded no kernel: this user may not read the counters")
    print(report(spans, STEPS))


def spans_of(events, on_gpu: bool) -> list[Span]:
    """The kernels among a profile's events; on a CPU the operations that Python has called."""
    spans = []
    for event in events:
        is_kernel = event.device_type == DeviceType.CUDA if on_gpu else event.cpu_parent is None
        if is_kernel:
            spans.append(Span(event.name, event.time_range.start, event.time_range.end))
    return spans


def report(spans: list[Span], steps: int) -> str:
    """The profile of that many steps as text."""
    whole = max(span.end for span in spans) - min(span.start for span in spans)
    busy = busy_time(spans)
    conversions = [span for span in spans if CONVERSION.search(span.name)]
    converting = sum(span.end - span.start for span in conversions)
    lines = [
        f"{len(spans) / steps:.1f} kernels a step, {whole / steps / 1000:.3f} ms a step, "
        f"of which {100 * (1 - busy / whole):.1f} % are gaps between kernels",
        f"{len(conversions) / steps:.1f} conversions of layout a step, "
        f"{100 * converting / whole:.1f} % of the time",
    ]

    # The kernels that take most of the time.
    times = defaultdict(float)
    calls = defaultdict(int)
    for span in spans:
        times[span.name] += span.end - span.start
        calls[span.name] += 1
    rows = []
    for kernel in sorted(times, key=times.get, reverse=True)[:MOST]:
        cells = [
            kernel[:60],
            f"{calls[kernel] / steps:.1f}",
            f"{times[kernel] / steps:.1f}",
            f"{100 * times[kernel] / whole:.1f} %",
        ]
        rows.append(cells)
    table = text_table(["kernel", "a step", "microseconds a step", "of the time"], rows)
    return "\n".join([*lines, "", table])


def busy_time(spans: list[Span]) -> float:
    """How long at least one kernel ran, in microseconds."""
    busy = 0.0
    until = -math.inf  # the end of what was counted
    for span in sorted(spans, key=lambda span: span.start):
        busy += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return busy


if __name__ == "__main__":
    with one_line_errors("python -m scripts.profile_step"):
        main()
