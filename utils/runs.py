"""One run: its folder, the lock, what it was started with, its files and its log.

`checkpoint.pth` is what a resumed run goes on from; `metrics.jsonl` and `model_best.pth` are copies
of what it holds and are written after it. `result.json` comes last: its presence means complete.
utils/run_files.py lists all files.
"""

import errno
import fcntl
import json
import os
import shutil
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from models.own import is_own, own_net
from utils.columns import result_table
from utils.data import Dataset
from utils.program import RunFailed, Stopped, UserError, files
from utils.program.environment import command, environment, precision_note
from utils.program.processes import on_main
from utils.program.source import finished_line, resumed_line
from utils.run_files import OURS, differences, is_complete
from utils.run_identity import identity_of, run_name, settings_of
from utils.settings import Experiment
from utils.teachers.teacher import Teacher

UNKNOWN_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # on Lustre, some NFS


def show_run_without_teacher(
    experiment: Experiment, data: Dataset, accelerator: Accelerator
) -> dict | None:
    """Print and return the result of the finished run that this very command made, if there is one.

    Its teacher is not looked at: it may have gone.
    """
    finished = finished_run(experiment, data, accelerator)
    if finished is None or experiment.run.overwrite:
        return None
    folder, result = finished
    accelerator.print(f"{finished_note(folder, result)}\n{folder}\n{result_table(result)}")
    return result


def finished_run(
    experiment: Experiment, data: Dataset, accelerator: Accelerator
) -> tuple[Path, dict] | None:
    """Folder and result of such a run, whoever taught it."""
    identity = identity_of(experiment, data, teacher=None)
    settings = without_teacher(settings_of(experiment, identity, accelerator, teacher=None))
    root = Path(experiment.run.checkpoint, identity["dataset"], identity["model"])
    for path in root.glob("*/result.json"):
        with suppress(UserError):
            config = files.read_json(path.with_name("config.json"), "")
            result = files.read_json(path, "")
            is_same = has_arguments(config, experiment.arguments) and is_complete(result)
            if is_same and not differences(without_teacher(result["settings"]), settings):
                return path.parent, result
    return None


def has_arguments(config: dict, arguments: dict) -> bool:
    """Whether a run was started with these arguments, --overwrite apart.

    One of an older version lacks the flags that are new, which change nothing there.
    """
    before = config.get("arguments", {})
    same = all(arguments.get(flag) == before[flag] for flag in before if flag != "overwrite")
    return bool(before) and same


def without_teacher(settings: dict) -> dict:
    """What a run's settings say of all but its teacher."""
    return {key: settings[key] for key in settings if key not in ("teacher", "label")}


def finished_note(folder: Path, result: dict) -> str:
    """When a run was finished before this command, and by which code."""
    config = files.read_json(folder / "config.json", "--overwrite starts the run anew")
    note = finished_line(folder, config, result)
    settings = result["settings"]
    if "patience" in settings and result["last"]["epoch"] < settings["epochs"]:
        note += (
            f"\nby --patience {settings['patience']} it stopped after epoch "
            f"{result['last']['epoch']} of {settings['epochs']}"
        )
    return note


class Run:
    """One run folder. Under several processes only the main one touches it."""

    def __init__(
        self,
        experiment: Experiment,
        data: Dataset,
        accelerator: Accelerator,
        teacher: Teacher | None = None,
    ):
        self.experiment = experiment
        self.data = data
        self.accelerator = accelerator
        self.is_main = accelerator.is_main_process
        self.identity = identity_of(experiment, data, teacher)
        self.settings = settings_of(experiment, self.identity, accelerator, teacher)
        self.name = run_name(experiment, self.identity, teacher)
        root = Path(experiment.run.checkpoint, self.identity["dataset"], self.identity["model"])
        self.folder = root / self.name
        self.lock = None  # the descriptor of the locked file, while the folder is open
        self.epochs = None  # how many the checkpoint holds, once this process has written it

    def config(self) -> dict:
        """What config.json holds."""
        sizes = {
            name: len(split.labels)
            for name, split in (
                ("train", self.data.train),
                ("val", self.data.val),
                ("test", self.data.test),
            )
        }
        return {
            **self.identity,
            "settings": self.settings,
            "arguments": self.experiment.arguments,
            "images": sizes,
            "image_side": self.data.side,
            "class_names": self.data.class_names,
            "command": command(self.experiment.words, self.accelerator),
            **environment(self.accelerator),
        }

    @contextmanager
    def opened(self):
        """Create or re-enter the folder, and hold its lock. Raises UserError, on all processes."""
        config = self.config()
        try:
            on_main(self.accelerator, lambda: self._open(config))
            for note in (*self.experiment.notes, precision_note(self.accelerator)):
                if note:
                    self.say(note)
            yield
            self.accelerator.end_training()  # the processes part here
        except RunFailed as failed:
            self.log(str(failed))
            raise
        except Stopped as stopped:
            if self.epochs is not None:
                command = "the same command"
                if self.experiment.run.overwrite:
                    command += " without --overwrite"  # which would remove the checkpoint
                stopped = Stopped(stopped.number, f"{command} goes on after epoch {self.epochs}")
            self.log(str(stopped))
            raise stopped from None
        finally:
            if self.lock is not None:
                os.close(self.lock)

    def _open(self, config: dict) -> None:
        try:
            with files.unmade_on_failure(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            self._lock()
            self._clear()
        except OSError as error:
            raise UserError(
                f"--checkpoint: cannot write {error.filename or self.folder} ({error.strerror}); "
                "name a folder that you may write to"
            ) from None

        path = self.folder / "config.json"
        has_checkpoint = (self.folder / "checkpoint.pth").exists()
        is_finished = (self.folder / "result.json").exists()
        if not (has_checkpoint or is_finished):
            # A start that has kept no epoch leaves nothing that its config.json would be true of.
            files.write_json(path, config)
        elif not path.exists():
            kept = "a checkpoint" if has_checkpoint else "a result"
            raise UserError(
                f"{self.folder} has {kept} but no config.json; --overwrite starts it anew"
            )
        else:
            before = self._config_of_same_settings()
            changed = "" if is_finished else resumed_line(before)
            if changed:
                self.say(changed)
        self._keep_own_net()

    def _keep_own_net(self) -> None:
        """A copy of the file of --model FILE.py:function."""
        model = self.experiment.recipe.model
        copy = self.folder / "net.py"
        if is_own(model) and not copy.exists():
            with files.atomic(copy) as file:
                file.write(own_net(model).content)

    def _lock(self) -> None:
        """The system drops the lock when its process dies, so a stale one cannot be left over."""
        self.lock = os.open(self.folder / ".lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.folder} is in use by another process that runs the same command; wait for "
                "it, or give --exp_name"
            ) from None
        except OSError as error:
            if error.errno not in UNKNOWN_LOCKS:
                raise
            self.say(f"{self.folder}: no locks here, so start this command only once at a time")

    def _clear(self) -> None:
        """Remove what a killed process was writing, and with --overwrite all that a run wrote."""
        patterns = [".*.tmp"]
        if self.experiment.run.overwrite:
            patterns += OURS
        for pattern in patterns:
            for path in self.folder.glob(pattern):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def _config_of_same_settings(self) -> dict:
        """The run's config.json. Raises UserError where this command has other settings."""
        path = self.folder / "config.json"
        way_out = "copy it from where it is whole, or --overwrite starts the run anew"
        config = files.read_json(path, way_out)
        before = config.get("settings")
        if not isinstance(before, dict):
            raise UserError(f"{path} has no settings; {way_out}")

        differing = differences(before, self.settings)
        if differing:
            raise UserError(
                f"{self.folder} was started with other settings ({'; '.join(differing)}); "
                "--exp_name NAME keeps both, --overwrite starts it anew"
            )
        return config

    def is_finished(self) -> bool:
        """Whether there is nothing to train: never with --overwrite. Raises as `result`."""
        return not self.experiment.run.overwrite and self.result() is not None

    def show_finished(self) -> dict:
        """Say that the run is not trained again, and show and return its result."""
        with self.opened():
            self.say(finished_note(self.folder, self.result()))
            tracker = self.experiment.run.log_with
            if tracker:
                self.say(f"--log_with {tracker}: it is told nothing of a run that is finished")
            return self.show_result()

    def show_result(self) -> dict:
        """Say what the run has measured; the content of its result.json."""
        result = self.result()
        self.say(f"{self.folder}\n{result_table(result)}")
        return result

    def result(self) -> dict | None:
        """The content of result.json; None before. Raises UserError where it is damaged."""
        return on_main(self.accelerator, self._read_result)

    def _read_result(self) -> dict | None:
        path = self.folder / "result.json"
        if not path.exists():
            return None
        way_out = "delete it, and the same command makes it again"
        result = files.read_json(path, way_out)
        if not is_complete(result):
            raise UserError(f"{path} is not whole; {way_out}")
        return result

    def say(self, text: str) -> None:
        """Print a line above the progress bar and keep it in train_log.txt."""
        if self.is_main:
            tqdm.write(text)
            sys.stdout.flush()  # a log that is read while the run goes on
        self.log(text)

    def log(self, text: str) -> None:
        """Append to train_log.txt, without which a run can go on."""
        if not self.is_main:
            return
        path = self.folder / "train_log.txt"
        try:
            with open(path, "a") as log:
                log.write(text + "\n")
        except OSError as error:
            tqdm.write(f"this line is missing in {path}: {error.strerror}", file=sys.stderr)

    def load(self, file: str) -> dict | None:
        """A .pth file of the run, on every process; None where there is none yet.

        Raises UserError where it is damaged or another run's.
        """
        path = self.folder / file
        way_out = "--overwrite starts the run anew"
        if not on_main(self.accelerator, path.exists):
            return None
        saved = files.read_torch(path, way_out)
        # A checkpoint has its identity in the best epoch's snapshot.
        identity = saved.get("best", saved)
        is_ours = isinstance(identity, dict) and all(
            identity.get(key) == value for key, value in self.identity.items()
        )
        if not is_ours:
            raise UserError(f"{path} comes from another run; {way_out}")
        return saved

    def save(self, checkpoint: dict, improved: bool) -> None:
        """Write the checkpoint, then the files that repeat a part of it for the reader.

        A resumed run calls this too: a kill may have fallen between the two.
        """
        if not self.is_main:
            return
        files.write_torch(self.folder / "checkpoint.pth", checkpoint)
        self.epochs = len(checkpoint["history"])
        if improved:
            files.write_torch(self.folder / "model_best.pth", checkpoint["best"])
        with files.atomic(self.folder / "metrics.jsonl", "w") as file:
            for record in checkpoint["history"]:
                file.write(json.dumps(record) + "\n")

    def save_last(self, snapshot: dict) -> None:
        if self.is_main:
            files.write_torch(self.folder / "model_last.pth", snapshot)
        self.accelerator.wait_for_everyone()
