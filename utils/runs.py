"""Run folders: names, the lock, atomic files, what a run was started with, its log.

    {checkpoint}/{dataset}/{model}/{run name}/
        config.json  train_log.txt  metrics.jsonl  checkpoint.pth  model_best.pth  model_last.pth
        predictions.npz  reliability.png  result.json

`checkpoint.pth` is what a resumed run goes on from; `metrics.jsonl` and `model_best.pth` are copies
of what it holds and are written after it. `result.json` comes last: its presence means complete.
"""

import errno
import fcntl
import json
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from utils import files
from utils.data import Dataset
from utils.environment import environment, precision_note
from utils.program import RunFailed, Stopped, UserError
from utils.source import finished_line, resumed_line
from utils.tables import result_table

# What a run, and what reads it afterwards, leaves in its folder.
OURS = (
    *("result.json", "config.json", "train_log.txt", "metrics.jsonl", "checkpoint.pth"),
    *("model_best.pth", "model_last.pth", "predictions.npz", "reliability.png"),
    *("posthoc.json", "evaluation_*.json", "tensorboard"),
)
UNKNOWN_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # on Lustre, some NFS
# What readers rely on, wherever its metrics are.
RESULT = {"model", "dataset", "fingerprint", "num_classes", "loss", "loss_parameters", "label"}
RESULT |= {"seed", "split_seed", "settings", "best", "last"}


def number_text(value: float) -> str:
    """3.0 and 3 are both `3`; every digit that distinguishes two values is kept."""
    return str(int(value)) if value == int(value) else repr(value)


def label_of(name: str, parameters: dict[str, float]) -> str:
    """`FL+MDCA`, {gamma: 3, beta: 1} -> `FL+MDCA_gamma=3_beta=1`."""
    return "_".join([name, *(f"{key}={number_text(value)}" for key, value in parameters.items())])


def identity_of(args: Namespace, data: Dataset, loss: str, parameters: dict, label: str) -> dict:
    """What a net is: stands in every checkpoint and result, and names the run folder.

    `label` says how it was trained, but for the seeds: `FL+MDCA_gamma=3_beta=1`.
    """
    chosen = {name: getattr(args, name) for name in ("model", "seed", "split_seed")}
    known = {"dataset": data.name, "mean": list(data.mean), "std": list(data.std)}
    known |= {name: getattr(data, name) for name in ("num_classes", "flip", "fingerprint")}
    return chosen | known | {"loss": loss, "loss_parameters": parameters, "label": label}


def arguments_of(args: Namespace) -> dict:
    """The values of all flags, ready for JSON."""
    derived = ("settings", "notes")
    return {name: value for name, value in vars(args).items() if name not in derived}


def is_complete(result) -> bool:
    """Whether it is the result of a finished run."""
    return isinstance(result, dict) and result.keys() >= RESULT


def finished_run(args: Namespace, dataset: str) -> tuple[Path, dict] | None:
    """Folder and result of the finished run that these very arguments made, if there is one."""
    for path in Path(args.checkpoint, dataset, args.model).glob("*/result.json"):
        with suppress(UserError):
            config = files.read_json(path.with_name("config.json"), "")
            result = files.read_json(path, "")
            if config.get("arguments") == arguments_of(args) and is_complete(result):
                return path.parent, result
    return None


def shown_result(folder: Path, result: dict) -> str:
    """Of a run that was finished before this command: when, by which code, and its table."""
    config = files.read_json(folder / "config.json", "--overwrite starts the run anew")
    return f"{finished_line(folder, config, result)}\n{folder}\n{result_table(result)}"


def on_main(accelerator: Accelerator, work: Callable):
    """Run `work` on the main process; its value, or its UserError, reaches every process."""
    outcome = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except UserError as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        outcome[1].told = not accelerator.is_main_process
        raise outcome[1]
    return outcome[0]


class Run:
    """One run folder. Under several processes only the main one touches it.

    `settings` is what the result depends on: a run that was started with others is refused.
    """

    def __init__(self, args: Namespace, identity: dict, accelerator: Accelerator, teacher=None):
        self.settings = args.settings | {
            **{key: identity[key] for key in ("fingerprint", "label", "mean", "std", "flip")},
            "mixed_precision": accelerator.mixed_precision,
            "processes": accelerator.num_processes,
        }
        seeds = f"seed={args.seed}"
        if teacher is not None:
            known = teacher.identity  # where it lies and what it is said to be change no number
            self.settings["teacher"] = {k: known[k] for k in known.keys() - {"path", "loss"}}
            if known["seed"] not in (None, args.seed):
                seeds = f"teacher-seed={known['seed']}_{seeds}"
        parts = filter(None, (identity["label"], seeds, args.exp_name))
        self.name = files.safe_name("_".join(parts))
        self.folder = Path(args.checkpoint, identity["dataset"], identity["model"], self.name)
        self.identity = identity
        self.accelerator = accelerator
        self.is_main = accelerator.is_main_process
        self.lock = None
        self.epochs = None  # in the checkpoint

    @contextmanager
    def opened(self, args: Namespace, data: Dataset):
        """Create or re-enter the folder, and hold its lock. Raises UserError, on all processes."""
        sizes = {name: len(getattr(data, name).labels) for name in ("train", "val", "test")}
        config = self.identity | {"settings": self.settings, "arguments": arguments_of(args)}
        config |= {"images": sizes, "class_names": data.class_names}
        config |= environment(self.accelerator)
        try:
            on_main(self.accelerator, lambda: self._open(config, args.overwrite))
            for note in (*args.notes, precision_note(self.accelerator)):
                if note:
                    self.say(note)
            yield
            self.accelerator.end_training()  # the processes part here
        except RunFailed as failed:
            self.log(str(failed))
            raise
        except Stopped as stopped:
            if self.epochs is not None:
                advice = f"the same command goes on after epoch {self.epochs}"
                stopped = Stopped(stopped.number, advice)
            self.log(str(stopped))
            raise stopped from None
        finally:
            if self.lock is not None:
                os.close(self.lock)

    def _open(self, config: dict, overwrite: bool) -> None:
        try:
            with files.unmade_on_failure(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            self._lock()
            for pattern in (".*.tmp", *(OURS if overwrite else ())):
                for file in self.folder.glob(pattern):
                    shutil.rmtree(file) if file.is_dir() else file.unlink()
        except OSError as error:
            fault = f"cannot write {error.filename or self.folder} ({error.strerror})"
            raise UserError(f"--checkpoint: {fault}; name a folder that you may write to") from None
        if (self.folder / "config.json").exists():
            before = self._refuse_other_settings()
            unfinished = not (self.folder / "result.json").exists()
            if unfinished and (self.folder / "checkpoint.pth").exists():
                changed = resumed_line(before)
                if changed:
                    self.say(changed)
        elif (self.folder / "checkpoint.pth").exists():
            fault = "has a checkpoint but no config.json"
            raise UserError(f"{self.folder} {fault}; --overwrite starts it anew")
        else:
            files.write_json(self.folder / "config.json", config)

    def _lock(self) -> None:
        """The system drops the lock when its process dies, so a stale one cannot be left over."""
        self.lock = os.open(self.folder / ".lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fault = "is in use by another process that runs the same command"
            raise UserError(f"{self.folder} {fault}; wait for it, or give --exp_name") from None
        except OSError as error:
            if error.errno not in UNKNOWN_LOCKS:
                raise
            self.say(f"{self.folder}: no locks here, so start this command only once at a time")

    def _refuse_other_settings(self) -> dict:
        """The run's config.json, where it was started with the settings of this command."""
        path = self.folder / "config.json"
        way_out = "copy it from where it is whole, or --overwrite starts the run anew"
        config = files.read_json(path, way_out)
        before = config.get("settings")
        if not isinstance(before, dict):
            raise UserError(f"{path} has no settings; {way_out}")
        keys = sorted(before.keys() | self.settings.keys())
        pairs = ((key, before.get(key), self.settings.get(key)) for key in keys)
        differing = [f"{key} was {old} and is {new}" for key, old, new in pairs if old != new]
        if differing:
            fault = f"was started with other settings ({'; '.join(differing)})"
            way_out = "--exp_name NAME keeps both, --overwrite starts it anew"
            raise UserError(f"{self.folder} {fault}; {way_out}")
        return config

    def say_finished(self) -> None:
        """Print what a run that was finished before has left, and that nothing was trained."""
        result = self.result()
        if self.is_main:
            self.say(shown_result(self.folder, result))

    def result(self) -> dict | None:
        """Of a finished run; None before. Raises UserError where it is damaged."""
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
        path = self.folder / "train_log.txt"
        if self.is_main:
            try:
                with open(path, "a") as log:
                    log.write(text + "\n")
            except OSError as error:
                tqdm.write(f"this line is missing in {path}: {error.strerror}", file=sys.stderr)

    def load(self, file: str) -> dict | None:
        """A .pth file of the run, on every process; None where there is none yet."""
        path, way_out = self.folder / file, "--overwrite starts the run anew"
        if not on_main(self.accelerator, path.exists):
            return None
        saved = files.read_torch(path, way_out)
        net = saved.get("best", saved)
        whose = {key: net.get(key) for key in self.identity} if isinstance(net, dict) else None
        if whose != self.identity:
            raise UserError(f"{path} comes from another run; {way_out}")
        return saved

    def save(self, checkpoint: dict, improved: bool) -> None:
        """Write the checkpoint, then the files that repeat a part of it for the reader.

        A resumed run calls this too: a kill may have fallen between the two.
        """
        if self.is_main:
            files.write_torch(self.folder / "checkpoint.pth", checkpoint)
            self.epochs = len(checkpoint["history"])
            if improved:
                files.write_torch(self.folder / "model_best.pth", checkpoint["best"])
            with files.atomic(self.folder / "metrics.jsonl", "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in checkpoint["history"])

    def save_last(self, snapshot: dict) -> None:
        if self.is_main:
            files.write_torch(self.folder / "model_last.pth", snapshot)
        self.accelerator.wait_for_everyone()
