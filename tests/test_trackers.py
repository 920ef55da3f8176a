"""--log_with: what a tracker is told, and what happens where it is missing or fails."""

import json
from pathlib import Path

import pytest
import yaml
from accelerate import tracking
from accelerate.utils import LoggerType
from conftest import assert_same_run, command, fails, folder_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_student
import train_teacher
from utils.runs import Run
from utils.trackers import flat


class Killed(BaseException):
    """Stands in for SIGKILL within the process: nothing in the project catches it."""


@pytest.fixture
def killed_after_two_epochs(monkeypatch):
    """A context in which a run does not live longer."""
    save = Run.save

    def save_and_die(self, checkpoint, improved):
        save(self, checkpoint, improved)
        if len(checkpoint["history"]) == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", save_and_die)
        yield patch


def records_of(folder: Path) -> list[dict]:
    return list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))


def final_values(folder: Path) -> dict[str, float]:
    result = json.loads((folder / "result.json").read_text())
    return {
        f"test_{epoch}_{logits}/{metric}": value
        for epoch in ("best", "last")
        for logits, metrics in result[epoch]["test"].items()
        for metric, value in metrics.items()
    }


def test_tensorboard_reads_back_what_the_files_say(tiny_npz, tmp_path, killed_after_two_epochs):
    """Of a run that was killed and went on: no epoch twice, one set of settings."""
    line = command(tiny_npz, tmp_path, "--log_with", "tensorboard")
    with pytest.raises(Killed):
        train_teacher.main(line)
    killed_after_two_epochs.undo()
    train_teacher.main(line)
    folder = folder_of(tmp_path)

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for name in ("train_loss", "val_ece", "lr"):
        points = [(point.step, point.value) for point in events.Scalars(name)]
        wanted = [(record["epoch"], record[name]) for record in records_of(folder)]
        assert points == [pytest.approx(pair, rel=1e-6) for pair in wanted]
    for name, value in final_values(folder).items():
        [point] = events.Scalars(name)
        assert point.step == 3 and point.value == pytest.approx(value, rel=1e-6)
    [settings] = folder.glob("tensorboard/*/hparams.yml")
    told = yaml.safe_load(settings.read_text())
    assert told["run"] == folder.name and told["epochs"] == 3 and told["lr"] == 0.1


class Follower:
    """Stands in for a tracker of accelerate's, and for the network behind it."""

    name = "wandb"
    requires_logging_directory = False
    main_process_only = True
    fails_at = None
    told: list = []

    def __init__(self, project, **options):
        self.tell("start", project, options)

    def tell(self, what, *told):
        if self.fails_at == what:
            raise ConnectionError("no route\nto host")
        self.told.append((what, *told))

    def start(self):
        pass

    def store_init_configuration(self, values):
        self.tell("config", values)

    def log(self, values, step=None):
        self.tell("final" if "test_best_raw/top1" in values else "epoch", values, step)

    def finish(self):
        self.tell("finish")


@pytest.fixture
def follower(monkeypatch):
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.WANDB])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Follower)
    monkeypatch.setattr(Follower, "told", [])
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return Follower


def test_a_tracker_is_told_settings_epochs_and_the_table(follower, teacher, tiny_npz, tmp_path):
    flags = ("--teacher_path", str(teacher), "--log_with", "wandb")
    train_student.main(command(tiny_npz, tmp_path, *flags))
    folder = folder_of(tmp_path)
    (_, project, options), (_, config), *epochs, final, last = follower.told
    assert project == "calibration-transfer"
    assert options["name"] == f"tiny/resnet8/{folder.name}" and options["mode"] == "offline"
    assert options["tags"] == ["tiny", "resnet8", "KD"] and options["dir"] == str(folder)
    assert config["teacher.model"] == "resnet8" and config["Lambda"] == 0.9
    assert all(isinstance(value, str | bool | int | float) for value in config.values())
    assert epochs == [("epoch", record, record["epoch"]) for record in records_of(folder)]
    what, values, step = final
    assert (what, step) == ("final", 3) and final_values(folder).items() <= values.items()
    assert last == ("finish",)


def test_a_run_that_goes_on_tells_the_epochs_before(
    follower, tiny_npz, tmp_path, killed_after_two_epochs
):
    line = command(tiny_npz, tmp_path, "--log_with", "wandb")
    with pytest.raises(Killed):
        train_teacher.main(line)
    killed_after_two_epochs.undo()
    follower.told.clear()
    train_teacher.main(line)
    assert [told[-1] for told in follower.told if told[0] == "epoch"] == [1, 2, 3]
    follower.told.clear()
    train_teacher.main(line)
    assert not follower.told  # a finished run is only shown


@pytest.mark.parametrize("moment", ["start", "config", "epoch", "final", "finish"])
def test_a_tracker_that_fails_ends_no_run(
    follower, teacher, tiny_npz, tmp_path, monkeypatch, moment
):
    monkeypatch.setattr(Follower, "fails_at", moment)
    train_teacher.main(command(tiny_npz, tmp_path, "--log_with", "wandb"))
    folder = folder_of(tmp_path)
    assert_same_run(teacher, folder)
    log = (folder / "train_log.txt").read_text()
    said = "--log_with wandb: it has failed (no route to host); the run goes on without it"
    assert log.count(said) == log.count("has failed") == 1


def test_a_tracker_that_is_not_installed(tiny_npz, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tracking, "_available_trackers", [])
    line = command(tiny_npz, tmp_path, "--log_with", "mlflow")
    error = fails(capsys, tmp_path, train_teacher.main, line)
    assert error.endswith("--log_with mlflow: it is not installed; pip install mlflow\n")


def test_settings_are_flat():
    nested = {
        "lr": 0.1,
        "steps": [1, 2],
        "none": None,
        "teacher": {"model": "vgg8", "of": {"x": 1}},
    }
    assert flat(nested) == {
        "lr": 0.1,
        "steps": "[1, 2]",
        "none": "None",
        "teacher.model": "vgg8",
        "teacher.of.x": 1,
    }
