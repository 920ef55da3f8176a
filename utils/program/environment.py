"""What a reader needs to repeat a run: versions, hardware, source, the command and its launcher."""

import os
import platform
import re
import shlex
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env

from utils.program import UserError, wheels
from utils.program.source import commit, training_code

PACKAGES = ("torch", "torchvision", "numpy", "accelerate")
CPU_INFO = Path("/proc/cpuinfo")
LAUNCHES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def environment(accelerator: Accelerator) -> dict:
    """Ready for JSON."""
    return {
        "versions": versions(),
        "git": commit(),
        "training_code": training_code(),
        "mixed_precision_asked": precision_asked(),
        "device": accelerator.device.type,
        "hardware": hardware_name(accelerator.device),
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str]:
    numbers = {"python": platform.python_version()}
    for package in PACKAGES:
        numbers[package] = version(package)
    return numbers


def precision_asked() -> str:
    """The precision that the launcher or `accelerate config` asks for: no, fp16, bf16 or fp8."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()


def precision_note(accelerator: Accelerator) -> str:
    """A line where the launcher asked for a precision that this machine does not have, or none."""
    if precision_asked() == "fp16" and accelerator.mixed_precision == "no":
        return "fp16 needs a GPU and there is none: this run computes in float32"
    on_cpu = accelerator.device.type == "cpu"
    if on_cpu and accelerator.mixed_precision == "bf16" and not has_bf16():
        return (
            "bf16: this processor has no instructions for it (AVX512_BF16, AMX) and is several "
            "times faster in float32, without --mixed_precision"
        )
    return ""


def has_bf16() -> bool:
    """Whether the processor computes in bfloat16 itself; where it does not say, it may."""
    return not CPU_INFO.exists() or "bf16" in CPU_INFO.read_text()


def has_amx() -> bool:
    """Whether processor and system say that they multiply matrices in bfloat16 (Intel's AMX)."""
    return CPU_INFO.exists() and "amx_bf16" in CPU_INFO.read_text()


def compiler_fault() -> str | None:
    """What torch.compile lacks here to compile for the CPU; None where all seems to be there."""
    compiler = os.environ.get("CXX", "g++")  # as torch chooses it
    words = shlex.split(compiler)
    if not words or shutil.which(words[0]) is None:
        return f"there is no C++ compiler {compiler!r} (the variable CXX names another)"
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").exists():
        return f"Python's headers are not in {headers} (Debian's package python3-dev)"
    return None


def command(words: Sequence[str], accelerator: Accelerator) -> str:
    """A script and its flags, with the launcher that gives it this precision and processes."""
    processes = accelerator.num_processes
    precision = accelerator.mixed_precision
    on_cpu = accelerator.device.type == "cpu"
    if processes == 1 and precision == "no":
        # Where there is a GPU, the same words alone would use it.
        launcher = ["ACCELERATE_USE_CPU=true"] if cpu_is_asked() else []
        launcher.append(os.path.basename(sys.executable))
    elif processes > 1 and on_cpu:
        launcher = [
            "ACCELERATE_USE_CPU=true",
            f"ACCELERATE_MIXED_PRECISION={precision}",
            "torchrun",
            "--nproc_per_node",
            str(processes),
        ]
    else:
        launcher = ["accelerate", "launch"]
        if on_cpu:
            launcher.append("--cpu")
        launcher += ["--num_processes", str(processes), "--mixed_precision", precision]
    return shlex.join([*launcher, *words])


def hardware_name(device: torch.device) -> str:
    """The name of what a run computes on, which need not be the GPU that is there."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    return f"{os.cpu_count()} cores, {processor()}"


def processor() -> str:
    names = []
    if CPU_INFO.exists():
        names = re.findall(r"model name\s*: (.*)", CPU_INFO.read_text())
    return names[0] if names else platform.processor()


def check_gpu() -> None:
    """Refuse a GPU that is there and that this build of torch cannot use.

    torch itself goes on: on the CPU, without a word, or up to the first kernel that it lacks.
    """
    driver = wheels.driver_version()
    if driver is None or cpu_is_asked():
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch warns of is said here, in one line
        fault = gpu_fault()
    if fault is None:
        return
    build = wheels.suitable(driver, wheels.capabilities())
    if build is None:
        way_out = "no build of torch suits the two: update the driver"
    else:
        index = f" of the wheel index {build.index}" if build.index else ""
        way_out = (
            f"bash setup_env.sh installs a build of torch{index} that suits "
            f"(pip: '{build.release}')"
        )
    raise UserError(
        f"there is an NVIDIA driver ({driver}), but {fault}; {way_out}; CUDA_VISIBLE_DEVICES= in "
        "front of the command, or --cpu of accelerate launch, goes on without GPU"
    )


def cpu_is_asked() -> bool:
    """Whether the launcher says so, or no GPU is to be seen."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = visible is not None and visible.strip() in ("", "-1")
    return hidden or parse_flag_from_env("ACCELERATE_USE_CPU")


def gpu_fault() -> str | None:
    """Why torch cannot use this process's GPU; None where it can."""
    if not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        where = f" with CUDA_VISIBLE_DEVICES={visible}" if visible else ""
        return f"torch {torch.__version__} finds no GPU{where}: {reason_without_gpu()}"

    architectures = torch.cuda.get_arch_list()
    # AMD's are not numbered so, and torch's own check is left to it.
    if not torch.version.cuda or not architectures:
        return None
    device = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
    major, minor = torch.cuda.get_device_capability(device)
    if any(runs_on(code, major, minor) for code in architectures):
        return None
    return (
        f"torch {torch.__version__} is built for {' '.join(architectures)}, not for "
        f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"
    )


def reason_without_gpu() -> str:
    """torch's own words, of which it says none until it is asked to start CUDA."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # the latter from a build without CUDA
        return str(error).strip().splitlines()[0].rstrip(".")
    return "it does not say why"


def runs_on(code: str, major: int, minor: int) -> bool:
    """Whether code such as sm_86 or compute_90 runs on a GPU of that compute capability."""
    kind, number = re.match(r"(sm|compute)_(\d+)", code).groups()
    built_major = int(number[:-1])
    built_minor = int(number[-1])
    if kind == "compute":  # the driver translates it for all later ones
        return (built_major, built_minor) <= (major, minor)
    return built_major == major and built_minor <= minor


def say_device(accelerator: Accelerator) -> None:
    """On the terminal, before the first minutes are spent: what this run computes on."""
    device = accelerator.device
    name = hardware_name(device)
    if accelerator.is_main_process:
        print(
            f"device: {device} ({name}), mixed precision: {accelerator.mixed_precision}, "
            f"processes: {accelerator.num_processes}",
            flush=True,
        )


def check_launch(accelerator: Accelerator) -> None:
    """Refuse what `accelerate config` or the environment asks for and this loop would not do.

    Each of these changes what is computed, and a config made for another project brings them in
    without a word.
    """
    state = accelerator.state
    unread = {
        "gradient accumulation": accelerator.gradient_accumulation_steps > 1,
        f"distributed type {state.distributed_type.value}": state.distributed_type not in LAUNCHES,
        "dynamo (--step compile does that)": state.dynamo_plugin.backend.value != "NO",
        "fp8": accelerator.mixed_precision == "fp8",
    }
    for what, is_asked in unread.items():
        if is_asked:
            raise UserError(
                f"accelerate is configured for {what}, which is not supported here: leave it out "
                "of the ACCELERATE_* variables, the launch command or `accelerate config`"
            )

    started = int(os.environ.get("WORLD_SIZE", 1))
    if "LOCAL_RANK" in os.environ and accelerator.num_processes < started:
        raise UserError(
            f"torchrun has started {started} processes that know nothing of each other, for there "
            "is no GPU; say ACCELERATE_USE_CPU=true, or start one"
        )
