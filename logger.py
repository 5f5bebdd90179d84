"""One log per rank in the output folder, coloured lines and a progress bar on the main process's terminal."""

import logging
import sys
import time
from datetime import timedelta
from pathlib import Path

from termcolor import colored

FORMAT = "[%(asctime)s %(name)s] (%(filename)s %(lineno)d): %(levelname)s %(message)s"
DATE_FORMAT = "%Y-%m-%d %H:%M:%S"
CLEAR_LINE = "\r\033[K"


MODULES = ("data", "models.trial")  # whose own loggers write to the run's log


def create_logger(output_dir: str, dist_rank: int = 0, name: str = "") -> logging.Logger:
    """A logger to ``output_dir/log_rank{dist_rank}.txt`` and, on rank 0, to stdout (official ``logger.py``).

    What ``MODULES`` log goes there too. Calling it again with the same name replaces the handlers instead of doubling
    every line.
    """
    logger = logging.getLogger(name)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    if dist_rank == 0:
        coloured = colored("[%(asctime)s %(name)s]", "green") + colored("(%(filename)s %(lineno)d)", "yellow")
        console = _ConsoleHandler(sys.stdout)
        console.setLevel(logging.INFO)
        console.setFormatter(logging.Formatter(coloured + ": %(levelname)s %(message)s", DATE_FORMAT))
        logger.addHandler(console)
    path = Path(output_dir) / f"log_rank{dist_rank}.txt"
    file = logging.FileHandler(path, mode="a", encoding="utf-8", errors="backslashreplace")  # names may be any bytes
    file.setFormatter(logging.Formatter(FORMAT, DATE_FORMAT))
    logger.addHandler(file)
    for module in map(logging.getLogger, MODULES):
        module.setLevel(logging.INFO)
        module.propagate = False
        module.handlers = list(logger.handlers)
    return logger


class _ConsoleHandler(logging.StreamHandler):
    """Wipes an unfinished progress bar before a line is written over it."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(CLEAR_LINE)
            sys.stderr.flush()
        super().emit(record)


class ProgressBar:
    """``label [=====>    ] 12/40 01:20 left`` on stderr, drawn on an interactive terminal of the main process only."""

    def __init__(self, label: str, total: int, enabled: bool = True, start: int = 0, width: int = 30):
        self.label, self.total, self.first, self.width = label, total, start, width
        self.enabled = enabled and sys.stderr.isatty()
        self.began = time.monotonic()
        self.drawn = 0.0

    def update(self, done: int) -> None:
        now = time.monotonic()
        if not self.enabled or (now - self.drawn < 0.1 and done < self.total):
            return
        self.drawn = now
        filled = self.width * done // max(self.total, 1)
        seconds = (now - self.began) / max(done - self.first, 1) * (self.total - done)
        bar = "=" * filled + ">" * (filled < self.width) + " " * (self.width - filled - 1)
        sys.stderr.write(f"{CLEAR_LINE}{self.label} [{bar}] {done}/{self.total} {timedelta(seconds=int(seconds))} left")
        sys.stderr.flush()

    def close(self) -> None:
        if self.enabled:
            sys.stderr.write(CLEAR_LINE)
            sys.stderr.flush()
