"""setup_env.sh: which tool it takes, what it asks of it; a second time it has nothing to do."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

# A tool that notes how it was called and says where its environment lies.
STAND_IN = """#!/bin/sh
echo "$(basename "$0") $*" >>calls
case "$*" in
    "env list") cat environments ;;
    create*) echo "kd  /somewhere" >>environments ;;
    *sys.prefix*) echo "$PWD/environment" ;;
    venv*) mkdir -p .venv/bin && : >.venv/bin/python && chmod +x .venv/bin/python ;;
esac
"""


@pytest.fixture
def setup(tmp_path):
    """Run a copy of the script among stand-ins for `tools`; what it printed and what it called."""
    shutil.copy(ROOT / "setup_env.sh", tmp_path)
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
    said, calls = setup("conda", "uv")
    assert "conda activate kd" in said
    assert "conda create --yes --name kd python=3.11" in calls
    install = "conda run --no-capture-output --name kd python -m pip install -r requirements.txt"
    assert calls[-1] == install
    said, calls = setup("conda", "uv")
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
