"""The process that a program runs in: its device and precision, and what all processes share."""

import ctypes
import os
from collections.abc import Callable
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
)

from utils.program.environment import (
    check_gpu,
    check_launch,
    cpu_is_asked,
    precision_asked,
    say_device,
)
from utils.program.errors import OneLineError
from utils.program.files import refused

# The others wait while the main process downloads, decodes or fits, for which NCCL would allow ten
# minutes.
PATIENCE = InitProcessGroupKwargs(timeout=timedelta(hours=4))
GRADIENTS = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
# As malloc.h numbers them.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def start(deterministic: bool = False, log_with: str | None = None) -> Accelerator:
    """The accelerator of this process: device, precision and processes as the launcher set them.

    Raises UserError where the launch asks for what there is not.
    """
    check_gpu()
    choose_kernels(deterministic)
    keep_freed_memory()

    # fp16 needs a GPU. A run says so when it opens its folder (precision_note).
    has_gpu = torch.cuda.is_available() and not cpu_is_asked()
    without_fp16 = precision_asked() == "fp16" and not has_gpu
    with refused(
        "accelerate cannot start",
        "mend the launch or `accelerate config`",
        (ValueError, ImportError, RuntimeError),
    ):
        accelerator = Accelerator(
            # Metal has no float64, in which losses are summed and metrics computed.
            cpu=torch.backends.mps.is_available(),
            mixed_precision="no" if without_fp16 else None,
            log_with=log_with,
            project_dir=".",  # the run folder, which is known later, replaces it
            kwargs_handlers=[PATIENCE, GRADIENTS],
        )
    check_launch(accelerator)
    say_device(accelerator)
    return accelerator


def choose_kernels(deterministic: bool) -> None:
    """Fast ones, or those that give the same bits in every run on the same GPU."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        # Else every new tensor is filled first, though none is read before it is written.
        torch.utils.deterministic.fill_uninitialized_memory = False
    # Said in either case: a run before it in this process may have asked for the other.
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    # TF32 keeps float32's range and is several times faster; CUDA convolutions use it already.
    torch.set_float32_matmul_precision("high")


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one, instead of giving it back.

    To fetch the pages of its tensors anew costs a small net a sixth of its time on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def on_main(accelerator: Accelerator, work: Callable):
    """Run `work` on the main process; its value, or its OneLineError, reaches every process."""
    value = None
    error = None
    if accelerator.is_main_process:
        try:
            value = work()
        except OneLineError as raised:
            error = raised

    outcome = [value, error]
    broadcast_object_list(outcome)  # in place
    value, error = outcome
    if error is not None:
        error.told = not accelerator.is_main_process
        raise error
    return value
