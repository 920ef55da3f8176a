"""Runs in processes of their own that start at once: forked from one that has imported everything.

A test that kills, stops or limits a run needs a real process, but not the seconds that importing
torch takes. `Forks` talks to such a server (this file, as a program); a child runs an entry script
as `python SCRIPT` does, or a function "module:name".
"""

import contextlib
import importlib
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Forks:
    def __init__(self):
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        }
        pipe = subprocess.PIPE
        command = [sys.executable, __file__]
        self.server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.folder = tempfile.TemporaryDirectory()
        self.children = 0

    def ask(self, **request):
        self.server.stdin.write(json.dumps(request, default=str) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, command, cwd=".", hook=None, **environment) -> "Child":
        """`hook`: the name of a function below and its arguments, called before the command."""
        self.children += 1
        output = Path(self.folder.name, str(self.children))
        for suffix in (".out", ".err"):  # there to be read before the child has opened them
            output.with_suffix(suffix).touch()
        command = [str(part) for part in command]
        request = {"command": command, "cwd": cwd, "hook": hook, "environment": environment}
        return Child(self, self.ask(output=output, **request), output)

    def run(self, command, cwd=".", hook=None, **environment) -> "Child":
        child = self.start(command, cwd, hook, **environment)
        child.wait()
        return child

    def close(self):
        self.server.stdin.close()
        self.server.wait()
        self.folder.cleanup()


class Child:
    def __init__(self, forks: Forks, pid: int, output: Path):
        self.forks, self.pid, self.output, self.code = forks, pid, output, None

    def poll(self) -> int | None:
        """The exit code, as subprocess has it; None while it runs."""
        if self.code is None:
            self.code = self.forks.ask(poll=self.pid)
        return self.code

    def wait(self, seconds: float = 120) -> int:
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"it still ran after {seconds} s:\n{self.out}{self.err}")
            time.sleep(0.01)
        return self.code

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    @property
    def out(self) -> str:
        return self.output.with_suffix(".out").read_text()

    @property
    def err(self) -> str:
        return self.output.with_suffix(".err").read_text()


# What can be asked for before a command


def at_rename(count: int, when: str, action: str, *arguments) -> None:
    """Do something before or after the `count`-th file gets its name: files are written so."""
    rename, seen = os.replace, []

    def replace(*paths):
        seen.append(paths)
        if when == "after":
            rename(*paths)
        if len(seen) == count:
            globals()[action](*arguments)
        if when == "before":
            rename(*paths)

    os.replace = replace


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def limit_file_size(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def fill(file: str) -> None:
    """Fill the disk that `file` will lie on."""
    with contextlib.suppress(OSError), open(file, "wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))


def replace_by_file(folder: str) -> None:
    os.rename(folder, f"{folder}.away")
    Path(folder).touch()


def make_immutable(folder: str) -> None:
    subprocess.run(["chattr", "+i", folder], check=True)


def stream_to(number: int, path: str) -> None:
    os.dup2(os.open(path, os.O_WRONLY), number)


def note_writes(root: str, file: str) -> None:
    """List in `file` every path below `root` that the process creates, writes, renames, removes."""

    def note(event: str, arguments: tuple) -> None:
        writes = event in ("os.mkdir", "os.rename", "os.remove", "os.truncate")
        if event == "open":
            writes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writes and str(arguments[0]).startswith(root):
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "w") as notes:
                notes.write(f"{event} {arguments[0]}\n")

    sys.addaudithook(note)


# The server


def serve() -> None:
    import torch
    import torch._dynamo  # an optimiser imports it

    import train_student
    import train_teacher
    import utils.calibration.diagram  # noqa: F401

    torch.set_num_threads(1)
    assert train_teacher and train_student
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork() or become(request)
        print(json.dumps(answer), flush=True)


def become(request: dict) -> None:
    """In the child: run the command and leave."""
    output = request["output"]
    streams = ((os.devnull, os.O_RDONLY), (f"{output}.out", None), (f"{output}.err", None))
    for number, (path, flags) in enumerate(streams):
        file = os.open(path, os.O_WRONLY | os.O_CREAT if flags is None else flags)
        os.dup2(file, number)
    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    # The suite may run in the background, where shells have SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 0
    try:
        if request["hook"]:
            name, *arguments = request["hook"]
            globals()[name](*arguments)
        what, *arguments = request["command"]
        if what.endswith(".py"):
            sys.argv = [what, *arguments]
            runpy.run_path(str(ROOT / what), run_name="__main__")
        else:
            module, _, name = what.partition(":")
            getattr(importlib.import_module(module), name)(*arguments)
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stderr.flush()
        if sys.stdout is not None:
            sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
