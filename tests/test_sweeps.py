"""The sweeps of scripts/: their commands, what is run, what again, what is said at the end."""

import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_script, wait_for

from losses import BASES, DISTILLATIONS, FEATURES, TERMS, loss_names
from scripts import report
from scripts.sweep import schedule
from utils.data import dataset_label
from utils.options import student_options, teacher_options
from utils.program import UserError
from utils.run_files import label_of

pytestmark = pytest.mark.skipif(
    shutil.which("bash") is None or shutil.which("cksum") is None, reason="needs bash and coreutils"
)

# Stands for python: notes its call, and leaves what a run leaves, unless its temperature is 3.
STAND_IN = """#!/usr/bin/env bash
echo "$(date +%s%N) ${CUDA_VISIBLE_DEVICES:-none} $*" >>"$CALLS"
echo "$OMP_NUM_THREADS" >>"$CALLS.threads"
trap 'sleep 1; echo "train_teacher.py: stopped by SIGINT; the same command goes on"; exit 130' INT
sleep "${PAUSE:-0}"
echo "$(date +%s%N) end" >>"$CALLS"
[[ $* != *"--T 3 "* || -n ${MENDED:-} ]] || { echo started; echo "train_student.py: error: T is 3"
    echo "CalledProcessError: as a launcher says it"; exit 2; }
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
        losses = [experiment.loss.parameters for experiment in options]
        grid = [(values["T"], values["Lambda"]) for values in losses]
        assert grid == [
            (T, Lambda) for T in (1, 1.5, 2, 3, 4, 5, 10, 20) for Lambda in (0.9, 0.95, 1)
        ]
        assert all(experiment.teacher.paths == ("my teacher",) for experiment in options)
        sample = ("students", "--n-samples", 5, "--sampling-mode", "shuffled_grid")
        drawn = printed(*sample, "--", "--teacher_path", "my teacher", cwd=tmp_path)
        assert all(words in commands for words in drawn) and drawn != commands[:5]
        assert drawn == printed(*sample, "--", "--teacher_path", "my teacher", cwd=tmp_path)

    def test_every_distillation_and_loss_has_a_grid(self, tmp_path):
        names = [*DISTILLATIONS, "LSKD+AT"]
        commands = printed(*names, "--", "--teacher_path", "t", cwd=tmp_path)
        assert {student_options(words[2:]).loss.name for words in commands} == {*names}
        commands = printed(*loss_names(), "--n-samples", 1, cwd=tmp_path)
        assert [teacher_options(words[2:]).loss.name for words in commands] == loss_names()

    def test_teachers(self, tmp_path):
        commands = printed("teachers", "--", "--model", "resnet8", cwd=tmp_path)
        grids = {}
        for words in commands:
            loss = teacher_options(words[2:]).loss
            grids.setdefault(loss.name, []).append(tuple(loss.parameters.values()))
        assert grids == {
            **{"NLL": [()], "LS": [(0.1,)], "FL": [(g,) for g in (1, 2, 3, 4, 5)]},
            "NLL+MDCA": [(b,) for b in (1, 5, 10)],
            "FL+MDCA": [(g, b) for g in (1, 2, 3, 4, 5) for b in (1, 5, 10)],
            "NLL+MMCE": [(b,) for b in (1, 2, 3, 4, 5)],
        }

    def test_seeds_and_the_seed_in_a_path(self, tmp_path):
        words = ("students", "--seeds", 3, "--", "--teacher_path", "runs/NLL_seed={seed}")
        commands = printed(*words, cwd=tmp_path, T="4", Lambda="0.9 1")
        options = [student_options(words[2:]) for words in commands]
        assert len({tuple(words) for words in commands}) == 6
        assert {experiment.recipe.seed for experiment in options} == {42, 43, 44}
        for experiment in options:
            assert experiment.teacher.paths == (f"runs/NLL_seed={experiment.recipe.seed}",)

    def test_other_braces_than_the_seeds_stay(self, tmp_path):
        words = ("KD", "--", "--teacher_path", "{T}/{a,b}/{seed}", "--dataset", "my{data}.npz")
        done = hypersearch("--print", *words, cwd=tmp_path, T="4", Lambda="1", ROOT="my{0}runs")
        words = run_script("bash", "-c", f"printf '%s\\n' {done.stdout}", cwd=tmp_path)
        command = words.stdout.splitlines()
        assert command[-4:] == ["--teacher_path", "{T}/{a,b}/42", "--dataset", "my{data}.npz"]
        assert "my{0}runs/students" in command and command[-8:-4][1::2] == ["1", "42"]

    def test_what_follows_reaches_the_command_as_it_is_and_wins(self, tmp_path):
        odd = "a b'c\"d$HOME;*é"
        for locale in ("C", "C.UTF-8"):
            words = ("NLL", "--", "--wd", "0", "--dataset", odd)
            [command] = printed(*words, cwd=tmp_path, LC_ALL=locale)
            assert command[-1] == odd and teacher_options(command[2:-2]).recipe.weight_decay == 0

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ("FLMDCA", "no grid FLMDCA.*FL+MDCA"),
            ("NLL --seeds", "--seeds"),
            ("NLL --seeds x", "--seeds 'x'"),
            ("NLL --n-samples 0", "--n-samples '0'"),
            ("NLL --sampling-mode some", "--sampling-mode.*some"),
            ("", "Grids of runs"),
            ("NLL --frob", "--frob"),
            ("NLL -- --epoch 2", "train_teacher.py: '--epoch'.*--epochs"),
            ("NLL -- --help", "--help"),
            ("FL+MDCA -- --gamma 3", "--gamma: the sweep sets this flag itself.*gamma=..."),
            ("KD DKD -- --teacher_path t --T=4", "--T=4: the sweep sets this flag itself"),
            ("NLL -- --seed 3", "--seed: the sweep sets this flag itself.*--seeds N"),
            ("NLL -- --checkpoint there", "--checkpoint: the sweep sets this.*ROOT="),
            ("NLL -- --overwrite", "--overwrite: ROOT="),
            ("NLL -- -n", "'-n'"),
            ("NLL NLL+MbLS -- --margin 3", "train_teacher.py: --margin 3 has no effect"),
        ],
    )
    def test_mistakes(self, tmp_path, words, said):
        done = hypersearch(*words.split(), cwd=tmp_path, check=False)
        assert done.returncode == 2 and not done.stdout
        assert all(part in done.stderr for part in said.split(".*"))

    def test_a_line_break(self, tmp_path):
        done = hypersearch("NLL", "--", "--exp_name", "a\nb", cwd=tmp_path, check=False)
        assert done.returncode == 2 and "is no command of one line" in done.stderr
        assert "Traceback" not in done.stderr

    def test_settings_that_are_the_same_run(self, tmp_path):
        words = ("students", "--", "--teacher_path", "t")
        done = hypersearch(*words, cwd=tmp_path, check=False, T="4 4.0", Lambda="1")
        assert done.returncode == 2 and "the same run" in done.stderr
        assert not list(tmp_path.iterdir())

    def test_a_flag_without_a_grid_takes_the_values_in_front(self, tmp_path):
        words = ("DKD", "--", "--teacher_path", "t")
        commands = printed(*words, cwd=tmp_path, T="1 4", beta="8")
        assert [student_options(words[2:]).loss.parameters["T"] for words in commands] == [1, 4]

    def test_values_in_front_that_no_grid_reads(self, tmp_path):
        done = hypersearch("--print", "LS", cwd=tmp_path, gamma="1 2")
        assert "gamma=1 2 in front has no effect on LS" in done.stderr


EVERY_SCRIPT = sorted(path for path in [*ROOT.glob("*.sh"), *ROOT.glob("scripts/*.sh")])


@pytest.mark.parametrize("script", EVERY_SCRIPT, ids=lambda path: path.name)
@pytest.mark.parametrize("word", ["--help", "-h"])
def test_every_script_has_help_and_starts_nothing(tmp_path, script, word):
    done = run_script("bash", script, word, cwd=tmp_path)
    # The whole comment at its head, and nothing else.
    lines = [line for line in script.read_text().splitlines() if not line.startswith("#!")]
    head = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert done.stdout.splitlines() == [line.removeprefix("#").removeprefix(" ") for line in head]
    assert head and not done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", EVERY_SCRIPT, ids=lambda path: path.name)
def test_no_script_takes_words_that_it_does_not_know(tmp_path, script):
    """test.sh hands its words to pytest, which refuses them."""
    if script.name == "test.sh":
        pytest.skip("its words are pytest's")
    done = run_script("bash", script, "--frobnicate", cwd=tmp_path, check=False)
    assert done.returncode == 2 and not done.stdout
    assert re.match(rf"{script.name}: error: .*\n$", done.stderr), done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--epoch 2", "train_teacher.py: '--epoch'.*--epochs"),
        ("teachers", "'teachers'"),
        ("--seed 3", "--seed.*SEEDS="),
        ("--model=resnet8", "--model=resnet8.*TEACHERS="),
        ("--loss FL", "--loss.*hypersearch.sh"),
        ("--T 3", "--T.*T=... in front"),
        ("--gamma 3", "--gamma.*hypersearch.sh"),
        ("--exp-name x", "--exp-name.*ROOT="),
        ("--dataset x", "--dataset.*DATASET="),
        ("--checkpoint x", "--checkpoint.*ROOT="),
        ("--teacher_select last", "'--teacher_select'.*train_student.py"),
        ("--overwrite", "--overwrite.*ROOT="),
    ],
)
def test_flags_that_a_grid_sets_itself_or_no_script_has(tmp_path, words, said):
    line = ("bash", ROOT / "scripts/cifar10.sh", *words.split())
    done = run_script(*line, cwd=tmp_path, check=False)
    assert done.returncode == 2 and not done.stdout
    assert re.search(said, done.stderr) and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_grid_of_the_paper_takes_one_temperature(tmp_path):
    line = ("bash", ROOT / "scripts/cifar10.sh", "--print")
    done = run_script(*line, cwd=tmp_path, check=False, T="1 4")
    assert done.returncode == 2
    assert "T='1 4': this sweep takes one value, hypersearch.sh several" in done.stderr


class TestRuns:
    @pytest.mark.long
    def test_it_says_what_failed_and_repeats_only_that(self, sweep):
        values = {"T": "1 3 4", "Lambda": "0.9 1"}
        first = sweep("students", "--", "--teacher_path", "t", **values)
        assert first.returncode == 1 and len(sweep.started()) == 6
        assert "runs: 4 complete, 2 failed, 0 stopped, 0 missing\n" in first.stdout
        assert first.stdout.count("train_student.py: error: T is 3") == 2
        second = sweep("students", "--", "--teacher_path", "t", **values)
        assert second.returncode == 1 and len(sweep.started()) == 2
        assert second.stderr.startswith("4 of 6 runs are complete from before: not trained again\n")
        third = sweep("students", "--", "--teacher_path", "t", MENDED="1", **values)
        assert third.returncode == 0 and len(sweep.started()) == 2
        assert "runs: 6 complete, 0 failed, 0 stopped, 0 missing" in third.stdout
        assert "scripts.report" in third.stdout

    def test_it_says_how_many_have_ended_and_when_the_last_may(self, sweep):
        done = sweep("students", "--", "--teacher_path", "t", T="1 3 4", Lambda="1", PAUSE="0.2")
        told = re.findall(r"^(\d) of 3 runs have ended(.*)$", done.stderr, re.MULTILINE)
        assert [number for number, _ in told] == ["1", "2", "3"]
        expected = r"; about 0:00:0\d left, until \w+ \d\d:\d\d"
        assert [bool(re.fullmatch(expected, end)) for _, end in told] == [True, True, False]
        assert not list((sweep.folder / "runs/logs").glob("ended-*"))

    def test_a_deleted_run_and_one_with_other_arguments_are_made(self, sweep):
        sweep("NLL", "LS")
        [one, _] = sorted((sweep.folder / "runs").glob("*/result.json"))
        one.unlink()
        assert sweep("NLL", "LS").returncode == 0 and len(sweep.started()) == 1
        assert sweep("NLL", "--", "--wd", 0).returncode == 0 and len(sweep.started()) == 1

    @pytest.mark.parametrize("gpus", [None, "2 3", "2,3", "0 0"])
    def test_a_job_for_each_gpu(self, sweep, gpus):
        sweep("NLL", "LS", PAUSE="1", OMP_NUM_THREADS="", **({"GPUS": gpus} if gpus else {}))
        words = (gpus or "0").replace(",", " ").split()
        assert sweep.at_once() == len(words)
        assert {call[0] for call in sweep.started()} == set(words)
        threads = Path(f"{sweep.calls}.threads").read_text().split()
        assert threads == 2 * [str(max(1, len(os.sched_getaffinity(0)) // len(words)))]

    @pytest.mark.parametrize("slurm", [{}, {"SBATCH": ""}])
    def test_a_place_where_nothing_can_be_written(self, sweep, tmp_path, slurm):
        (tmp_path / "runs").write_text("a file")
        done = sweep("NLL", PATH=path_with(tmp_path, "sbatch", "echo 7"), **slurm)
        assert done.returncode == 2 and "array job" not in done.stdout
        assert f"ROOT={tmp_path}/runs: its folder cannot be made" in done.stderr

    def test_gpus_without_a_number(self, sweep):
        done = sweep("NLL", GPUS=" ")
        assert done.returncode == 2 and "GPUS=' ': give a number" in done.stderr

    def test_without_the_scheduler(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "simple_gpu_scheduler.scheduler", None)
        with pytest.raises(UserError, match="pip install -r requirements.txt"):
            schedule("0")

    @pytest.mark.parametrize("names", [["NLL"], ["NLL", "LS", "Brier"]])
    def test_ctrl_c_stops_what_runs_and_starts_nothing_more(self, sweep, names):
        """As a terminal does it: the signal goes to the sweep and to its runs."""
        process = subprocess.Popen(
            ["bash", ROOT / "scripts/hypersearch.sh", *names],
            cwd=sweep.folder,
            env=os.environ | sweep.environment | {"PAUSE": "30"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        wait_for(Path(f"{sweep.calls}.threads"))
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 1 and len(sweep.started()) == 1
        missing = len(names) - 1
        assert f"runs: 0 complete, 0 failed, 1 stopped, {missing} missing" in stdout
        assert "hypersearch.sh: stopped by SIGINT" in stderr and "Traceback" not in stderr

    def test_slurm(self, sweep, tmp_path):
        """The list of what is missing and an array job over it."""
        note = 'echo "$*" >>"$CALLS"; echo 7; SLURM_ARRAY_TASK_ID=2 bash'
        path = path_with(tmp_path, "sbatch", note)
        sweep("NLL")
        done = sweep("NLL", "LS", "Brier", SBATCH="--gres=gpu:1 --time=1", PATH=path)
        assert done.returncode == 0 and "array job 7" in done.stdout.splitlines()[0]
        submitted, *_ = sweep.calls.read_text().splitlines()
        assert "--gres=gpu:1 --time=1" in submitted and "--array 1-2 --requeue" in submitted
        assert [words[5] for words in sweep.started()[1:]] == ["Brier"]  # its second task
        assert len(sweep("NLL", "LS", "Brier") and sweep.started()) == 1

    @pytest.mark.parametrize("slurm", [False, True])
    def test_a_variable_in_front_of_python(self, sweep, tmp_path, slurm):
        """As `ACCELERATE_USE_CPU=true torchrun`; here, where the stand-in notes its calls."""
        calls = tmp_path / "other calls"
        stand_in = sweep.environment["PYTHON"]
        sweep.environment["PYTHON"] = f"CALLS={shlex.quote(str(calls))} {stand_in}"
        environment = {"PATH": path_with(tmp_path, "sbatch", "SLURM_ARRAY_TASK_ID=1 bash >&2")}
        if slurm:
            environment["SBATCH"] = ""
        sweep("NLL", "--", "--data_dir", "it's mine", **environment)
        [call, _] = calls.read_text().splitlines()
        assert call.endswith(" --seed 42 --data_dir it's mine") and not sweep.started()
        [log] = (tmp_path / "runs/logs").glob("[0-9]*.log")
        assert log.read_text().startswith("epoch 1/1\n")


def path_with(folder: Path, name: str, script: str) -> str:
    """A PATH on which this program is found first."""
    (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
    (folder / name).chmod(0o755)
    return f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.mark.long
def test_a_real_sweep_of_teachers_and_students(tmp_path, tiny_npz):
    """A root below the caller's folder, a teacher of the student's seed, then the report."""
    words = "--model resnet8 --epochs 1 --train-batch-size 64"
    shared = ("--dataset", tiny_npz, *words.split(" "))
    hypersearch("NLL", "--", *shared, cwd=tmp_path, ROOT="my runs")
    taught = ("--teacher_path", "my runs/teachers/tiny/resnet8/NLL_seed={seed}")
    values = {"T": "1 4", "Lambda": "0.9", "GPUS": "0 0"}
    done = hypersearch("students", "--", *shared, *taught, cwd=tmp_path, ROOT="my runs", **values)
    assert "runs: 2 complete" in done.stdout
    results = sorted(tmp_path.glob("my runs/students/*/*/*/result.json"))
    assert [json.loads(path.read_text())["loss_parameters"]["T"] for path in results] == [1, 4]
    report.main([str(tmp_path / "my runs"), "--out", str(tmp_path / "out")])
    assert "T=4 Lambda=0.9" in (tmp_path / "out" / "report.md").read_text()


def folder_of(experiment) -> str:
    label = label_of(experiment.loss.name, experiment.loss.parameters)
    place = f"{experiment.run.checkpoint}/{dataset_label(experiment.data.dataset)}"
    return f"{place}/{experiment.recipe.model}/{label}_seed={experiment.recipe.seed}"


def grid(script: str, *words, cwd, **environment) -> tuple[list, list]:
    """Options of the teachers and of the students that a script prints, teachers first."""
    file = ROOT / f"scripts/{script}.sh"
    done = run_script("bash", file, "--print", *words, cwd=cwd, ROOT="my runs", **environment)
    lines = [shlex.split(line)[1:] for line in done.stdout.splitlines()]
    teachers = [teacher_options(line[1:]) for line in lines if "teacher.py" in line[0]]
    students = [student_options(line[1:]) for line in lines[len(teachers) :]]
    folders = {folder_of(teacher) for teacher in teachers}
    assert len(folders) == len(teachers)
    assert all(folders.issuperset(student.teacher.paths) for student in students)
    return teachers, students


@pytest.mark.parametrize(
    ("script", "nets", "pairs", "batch_size"),
    [("cifar10", 7, 10, 128), ("cifar100", 7, 10, 128), ("tiny_imagenet", 3, 2, 256)],
)
def test_the_papers_experiments(tmp_path, script, nets, pairs, batch_size):
    """Six losses for every net, then every student of every teacher, in commands that are valid."""
    teachers, students = grid(script, "--epochs", "20", cwd=tmp_path, SEEDS="1 2")
    assert len({folder_of(teacher).rsplit("_seed")[0] for teacher in teachers}) == 6 * nets
    assert len({(*run.teacher.paths, run.recipe.model) for run in students}) == 2 * 6 * pairs
    for run in teachers + students:
        assert (run.recipe.epochs, run.data.dataset) == (20, script)
        recipe = run.recipe
        assert (recipe.lr, recipe.weight_decay, recipe.train_batch_size) == (0.1, 1e-4, batch_size)
    assert {(run.loss.name, *run.loss.parameters.values()) for run in students} == {("KD", 2, 0.9)}
    assert {run.recipe.seed for run in teachers} == {1, 2}


def test_the_baselines(tmp_path):
    teachers, students = grid("baselines", "--epochs", "2", cwd=tmp_path, DATASET="my data.npz")
    losses = {*BASES, *(f"NLL+{term}" for term in TERMS), "FL+MDCA"}
    for model in ("resnet14", "resnet8"):
        assert {run.loss.name for run in teachers if run.recipe.model == model} == losses
    assert len(teachers) == 2 * len(losses) + 2
    assert len(students) == len(losses) + 2 + len(DISTILLATIONS) - 1 + len(FEATURES)
    with_features = {f"KD+{term}" for term in FEATURES}
    assert {run.loss.name for run in students} == {*DISTILLATIONS, *with_features}
    assert {run.loss.parameters["T"] for run in students if run.loss.name in with_features} == {4}
    assert max(len(run.teacher.paths) for run in students) == 3
    assert sum(run.teacher.temperature == "auto" for run in students) == 1


def test_a_failed_run_ends_no_grid(sweep, tmp_path):
    stand_in = tmp_path / "stand_in"
    stand_in.write_text(STAND_IN.replace("--T 3 ", "--loss FL "))
    environment = sweep.environment | {"STUDENTS": "resnet8", "TEACHERS": "resnet8"}
    environment |= {"PATH": path_with(tmp_path, "python", f'exec {sys.executable} "$@"')}
    done = run_script(
        "bash", ROOT / "scripts/baselines.sh", cwd=tmp_path, check=False, **environment
    )
    assert done.returncode == 1
    # The net is asked for as teacher and as student, and trained once.
    assert re.findall("runs: .*", done.stdout) == [
        "runs: 14 complete, 1 failed, 0 stopped, 0 missing",
        "runs: 23 complete, 0 failed, 0 stopped, 0 missing",
    ]
