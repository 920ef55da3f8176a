"""Which build of torch suits the NVIDIA driver and the GPUs of this machine.

Needs nothing but Python, for setup_env.sh asks before anything is installed:

    python utils/program/wheels.py index     cu126, or nothing where torch's ordinary build suits
    python utils/program/wheels.py release   for pip, which has one index: torch<2.8, or torch
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

DRIVER = Path("/proc/driver/nvidia/version")


class Build(NamedTuple):
    """Wheels of torch that are built for one CUDA."""

    index: str  # its name among torch's own indexes of wheels; none is the ordinary one
    release: str  # the releases of which the ordinary index has this build, as pip takes them
    driver: int  # the oldest that runs it
    oldest: int  # compute capabilities, major and minor digit: 75 is 7.5
    newest: int


# In order of preference. A driver of 525 runs every CUDA 12; the newest build of torch for GPUs
# before 7.5 (Maxwell, Pascal, Volta) is that of CUDA 12.6, whose code ends at Hopper.
BUILDS = (
    Build(index="", release="torch", driver=580, oldest=75, newest=129),  # CUDA 13
    Build(index="cu126", release="torch<2.8", driver=525, oldest=50, newest=99),
    Build(index="cu128", release="torch<2.11", driver=525, oldest=75, newest=129),
)


def driver_version() -> int | None:
    """The major number of the kernel's NVIDIA driver; None where there is none."""
    try:
        version = re.search(r"NVRM version:.*?\s(\d+)\.\d+", DRIVER.read_text())
    except OSError:
        return None
    return int(version[1]) if version else None


def capabilities() -> list[int]:
    """The compute capabilities of all GPUs, 75 for 7.5. Empty where nvidia-smi cannot say."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [int(major + minor) for major, minor in re.findall(r"(\d+)\.(\d)", answer.stdout)]


def suitable(driver: int, gpus: list[int]) -> Build | None:
    """The first build that runs with this driver on all GPUs; None where none does."""
    for build in BUILDS:
        runs = all(build.oldest <= capability <= build.newest for capability in gpus)
        if driver >= build.driver and runs:
            return build
    return None


def main(what: str) -> None:
    driver = driver_version()
    build = BUILDS[0] if driver is None else suitable(driver, capabilities())
    if build is None:
        build = BUILDS[0]
        print(
            f"No build of torch runs with the NVIDIA driver {driver} on this machine's GPUs: "
            "update the driver. Until then CUDA_VISIBLE_DEVICES= in front of a command trains "
            "on the CPU.",
            file=sys.stderr,
        )
    print(getattr(build, what))


if __name__ == "__main__":
    main(sys.argv[1])
