"""Versions, hardware and source that a reader needs to repeat a run."""

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


def environment() -> dict:
    """Versions, hardware and source that a reader needs to repeat a run."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": shlex.join([os.path.basename(sys.executable), *sys.argv]),
        "versions": {"python": platform.python_version()}
        | {
            package: version(package) for package in ("torch", "torchvision", "numpy", "accelerate")
        },
        "git": commit or "unknown",
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{os.cpu_count()} cores, {names[0] if names else platform.processor()}"
