"""scripts/hypersearch.sh: the grids, what is run, what is run again, what is said at the end."""

import json
import os
import shlex
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, run_script

from losses import loss_parameters
from utils.options import student_options, teacher_options
from utils.runs import label_of

pytestmark = pytest.mark.skipif(
    shutil.which("bash") is None or shutil.which("cksum") is None, reason="needs bash and coreutils"
)

# Stands for python: notes its call, and leaves what a run leaves, unless its temperature is 3.
STAND_IN = """#!/usr/bin/env bash
echo "$(date +%s%N) ${CUDA_VISIBLE_DEVICES:-none} $*" >>"$CALLS"
echo "$OMP_NUM_THREADS" >>"$CALLS.threads"
sleep "${PAUSE:-0}"
echo "$(date +%s%N) end" >>"$CALLS"
[[ $* != *"--T 3 "* || -n ${MENDED:-} ]] || { echo started; echo "script: error: T is 3"; exit 2; }
folder="$ROOT/$(cksum <<<"$*" | tr ' ' -)"
mkdir -p "$folder"
echo '{}' >"$folder/result.json"
printf '%s\\n' "epoch 1/1" "$folder" "a table"
"""


def hypersearch(*words, cwd, check=True, **environment) -> subprocess.CompletedProcess:
    return run_script(
        "bash", ROOT / "scripts/hypersearch.sh", *words, cwd=cwd, check=check, **environment
    )


def printed(*words, cwd, **environment) -> list[list[str]]:
    done = hypersearch("--print", *words, cwd=cwd, **environment)
    return [shlex.split(line) for line in done.stdout.splitlines()]


class Sweep:
    """A sweep whose runs take no time."""

    def __init__(self, folder: Path):
        self.folder, self.calls = folder, folder / "calls"
        stand_in = folder / "stand_in"
        stand_in.write_text(STAND_IN)
        stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
        self.environment = {"PYTHON": str(stand_in), "ROOT": str(folder / "runs")}
        self.environment |= {"CALLS": str(self.calls)}

    def __call__(self, *words, **environment) -> subprocess.CompletedProcess:
        self.calls.write_text("")
        return hypersearch(*words, cwd=self.folder, check=False, **self.environment, **environment)

    def started(self) -> list[list[str]]:
        lines = [line.split() for line in self.calls.read_text().splitlines()]
        return [words[1:] for words in lines if words[1] != "end"]

    def at_once(self) -> int:
        running = most = 0
        for line in sorted(self.calls.read_text().splitlines()):
            running += -1 if line.endswith(" end") else 1
            most = max(most, running)
        return most


@pytest.fixture
def sweep(tmp_path) -> Sweep:
    return Sweep(tmp_path)


class TestGrids:
    def test_students(self, tmp_path):
        commands = printed("students", "--", "--teacher_path", "my teacher", cwd=tmp_path)
        options = [student_options(words[2:]) for words in commands]
        grid = {(args.T, args.Lambda) for args in options}
        assert grid == {
            (T, Lambda) for T in (1, 1.5, 2, 3, 4, 5, 10, 20) for Lambda in (0.9, 0.95, 1)
        }
        assert len(options) == 24
        assert {args.teacher_path for args in options} == {"my teacher"}
        assert {words[1] for words in commands} == {"train_student.py"}

    def test_teachers(self, tmp_path):
        commands = printed("teachers", "--", "--model", "resnet8", cwd=tmp_path)
        options = [teacher_options(words[2:]) for words in commands]
        betas = {}
        for args in options:
            betas.setdefault(args.loss, []).append((args.gamma, args.beta))
        assert {loss: len(found) for loss, found in betas.items()} == {
            **{"NLL": 1, "LS": 1, "FL": 5, "NLL+MDCA": 3, "FL+MDCA": 15, "NLL+MMCE": 5}
        }
        assert set(betas["FL+MDCA"]) == {(g, b) for g in range(1, 6) for b in (1, 5, 10)}
        assert [beta for _, beta in betas["NLL+MMCE"]] == [1, 2, 3, 4, 5]
        assert {args.alpha for args in options} == {0.1}

    def test_seeds_and_the_seed_in_a_path(self, tmp_path):
        words = ("students", "--seeds", 3, "--", "--teacher_path", "runs/NLL_seed={seed}")
        commands = printed(*words, cwd=tmp_path, T="4", Lambda="0.9 1")
        options = [student_options(words[2:]) for words in commands]
        assert len({tuple(words) for words in commands}) == 6
        assert {args.seed for args in options} == {42, 43, 44}
        assert all(args.teacher_path == f"runs/NLL_seed={args.seed}" for args in options)

    def test_what_follows_wins(self, tmp_path):
        words = ("NLL", "--", "--checkpoint", "elsewhere", "--exp_name", "a")
        [command] = printed(*words, cwd=tmp_path)
        args = teacher_options(command[2:])
        assert (args.checkpoint, args.exp_name) == ("elsewhere", "a")

    def test_words_reach_the_command_as_they_are(self, tmp_path):
        odd = "a b'c\"d$HOME;*"
        [command] = printed("NLL", "--", "--dataset", odd, cwd=tmp_path)
        assert command[-1] == odd

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ("FLMDCA", "no grid FLMDCA.*FL+MDCA"),
            ("NLL --seeds", "--seeds"),
            ("NLL --seeds x", "--seeds 'x'"),
            ("NLL --seeds 0", "--seeds '0'"),
            ("", "Grids of runs"),
        ],
    )
    def test_mistakes(self, tmp_path, words, said):
        done = hypersearch(*words.split(), cwd=tmp_path, check=False)
        assert done.returncode == 2 and not done.stdout
        assert all(part in done.stderr for part in said.split(".*"))

    def test_help(self, tmp_path):
        done = hypersearch("--help", cwd=tmp_path)
        assert "--seeds" in done.stdout and "GPUS" in done.stdout and "#" not in done.stdout


class TestRuns:
    def test_it_says_what_failed_and_repeats_only_that(self, sweep):
        values = {"T": "1 3 4", "Lambda": "0.9 1"}
        first = sweep("students", "--", "--model", "resnet8", **values)
        assert first.returncode == 1 and len(sweep.started()) == 6
        *_, last = first.stdout.splitlines()
        assert last == "runs: 4 complete, 2 failed, 0 missing"
        assert first.stdout.count("script: error: T is 3") == 2
        second = sweep("students", "--", "--model", "resnet8", **values)
        assert second.returncode == 1 and len(sweep.started()) == 2
        third = sweep("students", "--", "--model", "resnet8", MENDED="1", **values)
        assert third.returncode == 0 and len(sweep.started()) == 2
        assert "runs: 6 complete, 0 failed, 0 missing" in third.stdout
        assert "scripts.report" in third.stdout
        fourth = sweep("students", "--", "--model", "resnet8", **values)
        assert fourth.returncode == 0 and not sweep.started()

    def test_a_deleted_run_is_made_again(self, sweep):
        sweep("NLL", "LS")
        [one, _] = sorted((sweep.folder / "runs").glob("*/result.json"))
        one.unlink()
        assert sweep("NLL", "LS").returncode == 0
        assert len(sweep.started()) == 1

    def test_other_arguments_are_other_runs(self, sweep):
        sweep("NLL", "--", "--model", "resnet8")
        assert sweep("NLL", "--", "--model", "resnet14").returncode == 0
        assert len(sweep.started()) == 1

    def test_one_job_is_the_default(self, sweep):
        sweep("NLL", "LS", PAUSE="0.3")
        assert sweep.at_once() == 1
        assert {words[0] for words in sweep.started()} == {"0"}

    @pytest.mark.parametrize("gpus", ["2 3", "2,3"])
    def test_a_job_for_each_gpu(self, sweep, gpus):
        sweep("NLL", "LS", GPUS=gpus, PAUSE="1")
        assert sweep.at_once() == 2
        assert {words[0] for words in sweep.started()} == {"2", "3"}

    def test_two_jobs_on_one_gpu(self, sweep):
        sweep("NLL", "LS", GPUS="0 0", PAUSE="1")
        assert sweep.at_once() == 2
        assert {words[0] for words in sweep.started()} == {"0"}

    @pytest.mark.parametrize("gpus", ["0", "0 0", "0,1", "0 0 0 0 0 0 0 0 0"])
    def test_jobs_share_the_cores(self, sweep, gpus):
        sweep("NLL", GPUS=gpus, OMP_NUM_THREADS="")
        jobs = len(gpus.replace(",", " ").split())
        threads = Path(f"{sweep.calls}.threads").read_text().split()
        assert threads == [str(max(1, len(os.sched_getaffinity(0)) // jobs))]
        sweep("LS", GPUS=gpus, OMP_NUM_THREADS="3")
        assert Path(f"{sweep.calls}.threads").read_text().split()[1] == "3"

    def test_missing_where_the_scheduler_did_not_come_to_it(self, sweep, tmp_path):
        broken = tmp_path / "bin"
        broken.mkdir()
        (broken / "simple_gpu_scheduler").write_text("#!/bin/sh\nexit 1\n")
        (broken / "simple_gpu_scheduler").chmod(0o755)
        (broken / "simple_hypersearch").symlink_to(shutil.which("simple_hypersearch"))
        done = sweep("NLL", "LS", PATH=f"{broken}:{os.environ['PATH']}")
        assert done.returncode == 1
        assert "runs: 0 complete, 0 failed, 2 missing" in done.stdout


def test_a_real_sweep_of_teachers_and_students(tmp_path, tiny_npz):
    """A blank in the root's name; each student from the teacher of its seed; then the report."""
    root = tmp_path / "my runs"
    common = ("--dataset", tiny_npz, "--model", "resnet8", "--epochs", 1)
    common += ("--train-batch-size", 64)
    done = hypersearch("NLL", "--", *common, cwd=tmp_path, ROOT=str(root))
    assert "runs: 1 complete" in done.stdout
    path = root / "teachers" / "tiny" / "resnet8" / "NLL_seed={seed}"
    done = hypersearch(
        *("students", "--", *common, "--teacher_path", path),
        **{"cwd": tmp_path, "ROOT": str(root), "T": "1 4", "Lambda": "0.9", "GPUS": "0 0"},
    )
    assert "runs: 2 complete" in done.stdout
    results = sorted(root.glob("students/*/*/*/result.json"))
    assert [json.loads(path.read_text())["settings"]["T"] for path in results] == [1, 4]
    from scripts import report

    report.main([str(root), "--out", str(tmp_path / "out")])
    assert "T=4 Lambda=0.9" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_the_papers_experiments(tmp_path, dataset):
    """Every loss for four nets, then two students of every teacher, in commands that are valid."""
    script = ROOT / f"scripts/{dataset}.sh"
    environment = {"PYTHON": "echo python", "SEEDS": "1", "ROOT": "runs"}
    done = run_script("bash", script, "--epochs", "2", cwd=tmp_path, **environment)
    lines = [line.split()[1:] for line in done.stdout.splitlines()]
    teachers = [teacher_options(line[1:]) for line in lines if line[0] == "train_teacher.py"]
    students = [student_options(line[1:]) for line in lines if line[0] == "train_student.py"]
    assert len({(one.loss, one.model) for one in teachers}) == 24 == len(teachers)
    assert len({(one.teacher_path, one.model) for one in students}) == 24 == len(students)
    assert all(one.epochs == 2 and one.dataset == dataset for one in teachers + students)
    folders = set()
    for one in teachers:
        parameters = {name: getattr(one, name) for name in loss_parameters(one.loss)}
        name = f"{label_of(one.loss, parameters)}_seed={one.seed}"
        folders.add(f"{one.checkpoint}/{dataset}/{one.model}/{name}")
    assert {str(one.teacher_path) for one in students} <= folders
