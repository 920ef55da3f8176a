"""How a program ends: errors in one line, exit codes, signals.

Ctrl-C and a cluster's preemption end a program at once, in one line.

To stop anywhere is safe, because to be killed is: what a resumed run goes on from is always whole
on disk (utils/runs.py). So a signal raises Stopped wherever the program is.
"""

import os
import re
import signal
import sys
import threading
import time
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PATIENCE = 3.0  # seconds for a call into C, which no exception can enter


class Stopped(KeyboardInterrupt):
    """A signal has asked the program to end. No Exception: no handler of faults may take it."""

    def __init__(self, number: int, advice: str = "the same command goes on"):
        super().__init__(f"stopped by {signal.Signals(number).name}; {advice}")
        self.number = number
        self.exit_code = 128 + number  # as shells have it


@contextmanager
def stop_on_signals(program: str):
    """Let SIGTERM and SIGINT raise Stopped in the main thread, which this must be called from.

    Where it does not come back from a call into C (a collective operation may wait for a process
    that is gone), the program is ended after PATIENCE seconds.
    """

    def stop(number, frame):
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)  # a second one does not wait
        raise Stopped(number)

    def insist():
        with open(reader, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] in SIGNALS:
                    time.sleep(PATIENCE)
                    leave(program, Stopped(number[0]))

    # What a shell has told a program in the background to ignore stays ignored.
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        if before[number] != signal.SIG_IGN:
            signal.signal(number, stop)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    wakeup = signal.set_wakeup_fd(writer)  # the number of each signal, when it comes
    threading.Thread(target=insist, daemon=True).start()
    try:
        yield
    except Stopped as stopped:
        leave(program, stopped)
    finally:
        signal.set_wakeup_fd(wakeup)
        os.close(writer)
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(program: str, stopped: Stopped) -> None:
    """Say it and end the process, without the goodbyes of libraries, which may wait for others."""
    if speaks():
        print(f"{program}: {stopped}", file=sys.stderr, flush=True)
    os._exit(stopped.exit_code)


def speaks() -> bool:
    """Whether this process says why the program ends: the first of each machine does."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


class UserError(Exception):
    """A mistake of the user's. The entry scripts print it as one line and exit with code 2."""

    exit_code = 2


class RunFailed(UserError):
    """A run that cannot go on though the command was right: printed as one line, exit code 1."""

    exit_code = 1


NO_MEMORY = re.compile("out of memory|can't allocate memory")  # torch on a GPU, and on the CPU


@contextmanager
def one_line_errors(program: str):
    """Turn a fault or a signal into one line on standard error and an exit code.

    2: a mistake of the user's, 1: a run that cannot go on, 128 + n: signal n.
    """
    for stream in (sys.stdout, sys.stderr):  # whatever is in a name, it can be printed
        stream.reconfigure(errors="backslashreplace")
    try:
        with stop_on_signals(program):
            yield
            sys.stdout.flush()
    except UserError as error:
        fail(program, str(error), error.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or NO_MEMORY.search(str(error))):
            raise
        message = f"{error}; give smaller batches, a smaller net or less data"
        fail(program, f"out of memory: {message}", RunFailed.exit_code)
    except OSError as error:  # a disk or a pipe that fails outside a run's files
        sys.stdout = None  # or Python would fail once more at the end, in what is left to print
        fail(program, str(error), RunFailed.exit_code)


def fail(program: str, message: str, code: int) -> None:
    if speaks():
        line = " ".join(message.split())
        line = "".join(letter if letter.isprintable() else "?" for letter in line)
        print(f"{program}: error: {line}", file=sys.stderr)
    sys.exit(code)
