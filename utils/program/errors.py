"""How a program ends: errors in one line, exit codes, signals; and what it survives.

To stop anywhere is safe, because to be killed is: what a resumed run goes on from is always whole
on disk (utils/runs.py). So a signal raises Stopped wherever the program is.
"""

import os
import re
import signal
import sys
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path

# What torch, cuBLAS and cuDNN say on a GPU, and torch on the CPU.
NO_MEMORY = re.compile(
    "out of memory|ALLOC_FAILED|[Uu]nable to find an engine to execute|can't allocate memory"
)
BUSY = re.compile("busy or unavailable")  # a GPU that another process has for itself
NO_PEER = re.compile("gloo|NCCL|Connection (closed|reset)")


class OneLineError(Exception):
    """What ends a program with its message as one line, and no traceback."""

    exit_code = 1
    told = False  # by another process already


class UserError(OneLineError):
    """A mistake of the user's, which every process meets: exit code 2."""

    exit_code = 2


class RunFailed(OneLineError):
    """A run that cannot go on though the command was right: exit code 1."""


class Stopped(KeyboardInterrupt):
    """A signal has asked the program to end. No Exception: no handler of faults may take it."""

    def __init__(self, number: int, advice: str = "give the same command again"):
        super().__init__(f"stopped by {signal.Signals(number).name}; {advice}")
        self.number = number
        self.exit_code = 128 + number  # as shells have it


class Lasting:
    """A stream whose failure is not the program's: what cannot be written any more is dropped."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, act, *arguments) -> None:
        try:
            act(*arguments)
        except OSError:  # the reader, the terminal or the disk is gone
            with suppress(OSError):  # a notebook's stream may have no file below it
                # From here on, all that is written to it is dropped without a fault.
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)


@contextmanager
def one_line_errors(program: str):
    """Turn a fault or a signal into one line on standard error and an exit code.

    2: a mistake of the user's, 1: a run that cannot go on, 128 + n: signal n. KD_TRACEBACK=1 shows
    where a fault was met. Output that fails, or was closed from the start, ends nothing. A notebook
    that runs a program gets back its streams and what it does at a signal.
    """
    with lasting_streams(), stopping_at_signals():
        try:
            yield
        except Stopped as stopped:
            fail(program, str(stopped), stopped.exit_code, told=not is_first())
        except UserError as error:
            # All processes meet it; the first one tells it.
            fail(program, f"error: {error}", error.exit_code, told=error.told or not is_first())
        except RunFailed as error:
            # Whichever process has met it tells it, for the first may not know.
            fail(program, f"error: {error}", error.exit_code, told=error.told)
        except (MemoryError, RuntimeError) as error:
            message = message_of(error)
            if message is None:
                raise
            fail(program, f"error: {message}", RunFailed.exit_code)
        except OSError as error:
            fail(program, f"error: {error}; KD_TRACEBACK=1 shows where", RunFailed.exit_code)


def message_of(error: MemoryError | RuntimeError) -> str | None:
    """What is said of a machine that has no more memory or has lost a process; None of a bug."""
    if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
        return f"out of memory: {error}; give smaller batches, a smaller net or less data"
    if BUSY.search(str(error)):
        return f"{error}".partition("\n")[0] + "; choose another GPU by CUDA_VISIBLE_DEVICES"
    if NO_PEER.search(str(error)):
        return (
            f"{error}; if another process has ended, its message says why; the same command goes on"
        )
    return None


@contextmanager
def lasting_streams():
    """Standard output and error that cannot fail, and can print whatever is in a name."""
    stdout = sys.stdout
    stderr = sys.stderr
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        if hasattr(stream, "reconfigure"):  # a notebook's has not, and prints everything
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Lasting(stream))
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout = stdout
        sys.stderr = stderr


def is_first() -> bool:
    """Whether this is the first process of its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def fail(program: str, message: str, code: int, told: bool = False) -> None:
    """End the program with this line, unless another process prints it."""
    if not told:
        if os.environ.get("KD_TRACEBACK"):
            traceback.print_exc()
        one_line = " ".join(message.split())
        line = "".join(letter if letter.isprintable() else "?" for letter in one_line)
        print(f"{program}: {line}", file=sys.stderr, flush=True)
    sys.exit(code)


@contextmanager
def stopping_at_signals():
    """SIGTERM and SIGINT raise Stopped in the main thread; a terminal that goes away does not."""

    def stop(number, frame):
        for other in (signal.SIGTERM, signal.SIGINT):
            signal.signal(other, signal.SIG_DFL)  # a second one does not wait
        raise Stopped(number)

    before = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        # What a shell has told a program in the background to ignore stays ignored.
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, stop)
    before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # it was not set from Python
                signal.signal(number, handler)


def stop_while_importing() -> None:
    """Have a signal end a program of ours in one line while torch is imported, too.

    An exception there would be shown with the traceback of the imports, or be swallowed by one of
    them. Nothing has begun yet, so there is nothing to leave in order.
    """
    program = own_program()
    if program is None:
        return

    def leave(number, frame):
        if is_first() and sys.stderr is not None:
            os.write(sys.stderr.fileno(), f"{program}: {Stopped(number)}\n".encode())
        os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, leave)


def own_program() -> str | None:
    """The program of ours that this process is, as its messages name it.

    None where our code is only imported: in a notebook, a test, another project.
    """
    root = Path(__file__).resolve().parents[2]
    words = iter(sys.orig_argv[1:])
    for word in words:
        if word == "-m":
            module = next(words, "")
            return f"python -m {module}" if module.startswith("scripts.") else None
        if word.startswith("-"):  # an option of Python
            continue
        path = Path(word).resolve()
        if path.suffix != ".py":
            return None
        if path.parent == root / "scripts":
            return f"python -m scripts.{path.stem}"
        return path.name if path.parent == root else None
    return None
