"""What a reader needs to repeat a run: versions, hardware, source, the command and its launcher."""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from utils.program import UserError

PACKAGES = ("torch", "torchvision", "numpy", "accelerate")
LAUNCHES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def environment(accelerator: Accelerator) -> dict:
    """Ready for JSON."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": command(accelerator),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in PACKAGES},
        "git": commit or "unknown",
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "threads": torch.get_num_threads(),
    }


def command(accelerator: Accelerator) -> str:
    """What was typed, with the launcher that makes the same precision and processes of it."""
    processes, precision = accelerator.num_processes, accelerator.mixed_precision
    on_cpu = accelerator.device.type == "cpu"
    if processes == 1 and precision == "no":
        launcher = [os.path.basename(sys.executable)]
    elif processes > 1 and on_cpu:
        launcher = ["ACCELERATE_USE_CPU=true", f"ACCELERATE_MIXED_PRECISION={precision}"]
        launcher += ["torchrun", "--nproc_per_node", str(processes)]
    else:
        launcher = ["accelerate", "launch", *(["--cpu"] if on_cpu else [])]
        launcher += ["--num_processes", str(processes), "--mixed_precision", precision]
    return shlex.join([*launcher, *sys.argv])


def cpu_name() -> str:
    return f"{os.cpu_count()} cores, {processor()}"


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor()


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
    for what, asked in unread.items():
        if asked:
            where = "the ACCELERATE_* variables, the launch command or `accelerate config`"
            fault = f"accelerate is configured for {what}, which is not supported here"
            raise UserError(f"{fault}: leave it out of {where}")
    started = int(os.environ.get("WORLD_SIZE", 1))
    if "LOCAL_RANK" in os.environ and accelerator.num_processes < started:
        fault = f"torchrun has started {started} processes that know nothing of each other"
        way_out = "say ACCELERATE_USE_CPU=true, or start one"
        raise UserError(f"{fault}, for there is no GPU; {way_out}")
