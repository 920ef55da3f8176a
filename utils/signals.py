"""Ctrl-C and a cluster's preemption end a program at once, in one line.

To stop anywhere is safe, because to be killed is: what a resumed run goes on from is always whole
on disk (utils/runs.py). So a signal raises Stopped wherever the program is.
"""

import os
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
