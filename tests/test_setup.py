"""setup_env.sh: which tool it takes, what it asks of it; a second time it has nothing to do."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

from utils.program import wheels

# A tool that notes how it was called and says where its environment lies.
STAND_IN = """#!/bin/sh
echo "$(basename "$0") $*" >>calls
case "$*" in
    "env list") cat environments ;;
    create*) echo "kd  /somewhere" >>environments ;;
    *sys.prefix*) echo "$PWD/environment" ;;
    *wheels.py*) echo "$BUILD" ;;
    venv*)
        mkdir -p .venv/bin
        printf '#!/bin/sh\\necho "$BUILD"\\n' >.venv/bin/python
        chmod +x .venv/bin/python ;;
esac
"""


@pytest.fixture
def setup(tmp_path):
    """Run a copy of the script among stand-ins for `tools`; what it printed and what it called."""
    shutil.copy(ROOT / "setup_env.sh", tmp_path)
    (tmp_path / "utils/program").mkdir(parents=True)
    shutil.copy(ROOT / "utils/program/wheels.py", tmp_path / "utils/program")
    (tmp_path / "requirements.txt").write_text("# nothing\n")
    (tmp_path / "environments").write_text("base  /somewhere\n")
    (tmp_path / "environment").mkdir()
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "cat", "cmp", "cp", "dirname", "basename", "grep", "mkdir", "chmod", "sh"):
        (tools / tool).symlink_to(shutil.which(tool))

    def run(*names: str, **environment) -> tuple[str, list[str]]:
        for name in names:
            (tools / name).write_text(STAND_IN)
            (tools / name).chmod(0o755)
        (tmp_path / "calls").write_text("")
        done = subprocess.run(
            ["bash", "setup_env.sh"],
            cwd=tmp_path,
            env={"PATH": str(tools), "HOME": str(tmp_path)} | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, (tmp_path / "calls").read_text().splitlines()

    return run


def test_conda_where_it_is_installed(setup):
    said, calls = setup("conda", "uv", BUILD="torch")
    assert "conda activate kd" in said
    assert "conda create --yes --name kd python=3.11" in calls
    install = "conda run --no-capture-output --name kd python -m pip install -r requirements.txt"
    assert calls[-1] == install
    said, calls = setup("conda", "uv", BUILD="torch")
    assert "conda activate kd" in said and "Installing" not in said
    assert not [call for call in calls if "create" in call or "install" in call]


def test_uv_where_there_is_no_conda(setup):
    said, calls = setup("uv")
    assert "source .venv/bin/activate" in said
    assert calls == [
        "uv venv --python >=3.11 .venv",
        "uv pip install --python .venv/bin/python -r requirements.txt",
    ]
    said, calls = setup("uv")
    assert "source .venv/bin/activate" in said and calls == []


def test_conda_can_be_declined_and_new_requirements_are_installed(setup, tmp_path):
    _, calls = setup("conda", "uv", KD_VENV="1")
    assert calls[0].startswith("uv venv")
    (tmp_path / "requirements.txt").write_text("# something else\n")
    said, calls = setup("conda", "uv", KD_VENV="1")
    assert "Installing" in said
    assert calls == ["uv pip install --python .venv/bin/python -r requirements.txt"]


def test_pip_where_there_is_neither(setup, tmp_path):
    """With a real interpreter, and nothing to install."""
    python = Path(os.path.realpath(shutil.which("python3")))
    (tmp_path / "bin/python3").symlink_to(python)
    said, _ = setup()
    assert "source .venv/bin/activate" in said and (tmp_path / ".venv/bin/pip").exists()
    said, _ = setup()
    assert "Installing" not in said


def test_an_older_driver_gets_a_torch_that_it_runs(setup):
    """uv from another index, pip from the ordinary one; where the GPU changes, anew."""
    said, calls = setup("uv", BUILD="cu126")
    assert "For this machine's NVIDIA driver and GPUs: --torch-backend cu126" in said
    install = "uv pip install --python .venv/bin/python -r requirements.txt"
    assert calls[-1] == f"{install} --torch-backend cu126"
    assert setup("uv", BUILD="cu126")[1] == []
    assert setup("uv", BUILD="")[1] == [install]
    said, calls = setup("conda", BUILD="torch<2.8")
    assert "Installing" in said and calls[-1].endswith("-r requirements.txt torch<2.8")


DRIVERS = {
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024": 535,
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build": 580,
}


@pytest.mark.parametrize("text", DRIVERS)
def test_the_driver_as_the_kernel_names_it(tmp_path, monkeypatch, text):
    monkeypatch.setattr(wheels, "DRIVER", tmp_path / "version")
    assert wheels.driver_version() is None
    (tmp_path / "version").write_text(f"{text}\nGCC version:  gcc version 12.2.0\n")
    assert wheels.driver_version() == DRIVERS[text]


@pytest.mark.parametrize(
    "driver, gpus, index",
    [
        (580, [90], ""),  # H100
        (580, [61], "cu126"),  # GTX 1080
        (580, [70, 80], "cu126"),  # V100 and A100
        (550, [80], "cu126"),
        (550, [], "cu126"),
        (570, [120], "cu128"),  # RTX 5090
        (580, [61, 120], None),
        (470, [80], None),
        (550, [35], None),
    ],
)
def test_what_suits_a_driver_and_gpus(driver, gpus, index):
    build = wheels.suitable(driver, gpus)
    assert (build and build.index) == index


def test_what_nvidia_smi_says(tmp_path, monkeypatch, capsys):
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert wheels.capabilities() == []
    tool.write_text("#!/bin/sh\necho 8.6\necho 12.0\n")
    tool.chmod(0o755)
    assert wheels.capabilities() == [86, 120]
    monkeypatch.setattr(wheels, "driver_version", lambda: 470)
    wheels.main("release")
    said = capsys.readouterr()
    assert said.out == "torch\n" and "update the driver" in said.err
    monkeypatch.setattr(wheels, "driver_version", lambda: None)
    wheels.main("index")
    assert capsys.readouterr().out == "\n"
