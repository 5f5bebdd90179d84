"""What worker processes do when they begin: leave Ctrl-C to the main process, and end with it."""

import atexit
import multiprocessing
import os
import signal
import threading


def start_worker() -> None:
    """For any pool: Ctrl-C is the main process's, and where that one is killed, this one ends too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def end_with_parent() -> None:
    """Watch the parent: a worker whose queue was cut off in the middle of an item would wait for the rest forever."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


class LeaveSignalsToMain:
    """Makes a loader's worker outlive Ctrl-C and SIGTERM, which reach whole process groups.

    The main process saves first. Once the main process exits, SIGTERM ends the worker, as multiprocessing expects.
    """

    def __init__(self):
        self.exiting = multiprocessing.RawValue("b", 0)
        atexit.register(setattr, self.exiting, "value", 1)  # runs before multiprocessing ends its children

    def __call__(self, worker: int) -> None:
        start_worker()
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if self.exiting.value else None)
