"""Sweeps on Slurm, on a cluster of this one machine that the tests start."""

import os
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from socket import gethostname, socket

import pytest
from conftest import ROOT, run_script

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))) or os.geteuid() != 0,
    reason="needs slurmctld, slurmd and munged (Debian: slurm-wlm, munge), and root to start them",
)
CONF = """
ClusterName=small
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmdParameters=config_overrides
SlurmdTimeout=5
KillWait=5
ReturnToService=2
NodeName=node NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=all Nodes=ALL Default=YES
"""


def wait_until(holds, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@contextmanager
def daemon(folder: Path, *command: str):
    with open(folder / f"{command[0]}.log", "a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


class Cluster:
    def __init__(self, folder: Path):
        self.folder = folder

    def tell(self, *command) -> str:
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr

    def node(self):
        return daemon(self.folder, "slurmd", "-D", "-N", "node")

    def is_idle(self) -> bool:
        return not self.tell("squeue", "--noheader").strip()

    def sweep(self, root: Path, *words, **environment) -> str:
        line = ("bash", ROOT / "scripts/hypersearch.sh", *words)
        environment = {"SBATCH": "--time=5", "ROOT": str(root)} | environment
        return run_script(*line, cwd=self.folder, **environment).stdout


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o600)
    with socket() as one, socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in (one, other)]
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=gethostname(), ports=ports))
    files = ("socket", "key-file", "pid-file", "log-file", "seed-file")
    names = ("munge.socket", "key", "munge.pid", "munge.log", "munge.seed")
    munge = [f"--{option}={folder / name}" for option, name in zip(files, names, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        with daemon(folder, "munged", "--foreground", "--force", *munge):
            wait_until((folder / "munge.socket").exists)
            with daemon(folder, "slurmctld", "-D", "-c"):
                yield Cluster(folder)


def test_a_grid_is_one_command(cluster, tiny_npz, tmp_path):
    root = tmp_path / "my runs"
    words = ("NLL", "LS", "--", "--dataset", tiny_npz, "--model", "resnet8", "--epochs", 1)
    with cluster.node():
        assert "array job" in cluster.sweep(root, *words)
        wait_until(cluster.is_idle)
        assert len(list(root.glob("teachers/*/*/*/result.json"))) == 2
        assert "all complete" in cluster.sweep(root, *words)


def test_what_happens_to_a_run(cluster, tiny_npz, tmp_path):
    """It is requeued, started a second time, loses its node, and is told to end."""
    run = tmp_path / "teachers/tiny/resnet8/NLL_seed=42"
    words = ("NLL", "--", "--dataset", tiny_npz, "--model", "resnet8", "--epochs", 100000)

    def log() -> str:
        return "".join(file.read_text() for file in tmp_path.glob("logs/[0-9]*.log"))

    def start_now(task: str) -> None:  # Slurm has it wait for two minutes
        wait_until(lambda: "BeginTime" in cluster.tell("squeue"))
        cluster.tell("scontrol", "update", f"JobId={task}", "StartTime=now")

    with cluster.node() as node:
        task = cluster.sweep(tmp_path, *words).split()[2].strip(":") + "_1"
        wait_until((run / "checkpoint.pth").exists)
        cluster.tell("scontrol", "requeue", task)
        start_now(task)
        wait_until(lambda: log().count("going on after epoch") == 1)
        assert log().startswith("epoch   1/") and log().count("stopped by SIGTERM") == 1

        cluster.sweep(tmp_path, *words)
        wait_until(lambda: "is in use by another process" in log())

        process = int(cluster.tell("pgrep", "-of", f"train_teacher.py.*{tmp_path}/teachers"))
        keeper = int(cluster.tell("ps", "-o", "ppid=", "-p", process))
        for each in (node.pid, keeper, process):
            os.kill(each, signal.SIGKILL)
    with cluster.node():
        start_now(task)
        wait_until(lambda: log().count("going on after epoch") == 2)
        cluster.tell("scancel", "--batch", "--signal=TERM", task)
        wait_until(cluster.is_idle)
        assert log().count("stopped by SIGTERM") == 2
        assert "the same command goes on after epoch" in log().splitlines()[-1]
