"""Processes that compute together, by gloo: started once, then given functions to run on every one of them."""

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 240  # a task that takes longer has gone wrong, even where many tests share few cores


class Team:
    """``size`` processes in one group; `run` calls a function in all of them and gives their results by rank.

    They are forks of one that has imported `preloaded.LIBRARIES`.
    """

    def __init__(self, size: int, folder: Path):
        context = mp.get_context("forkserver")
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, f"file://{folder}/store", theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def send(self, function: Callable, *arguments: Any) -> None:
        for pipe in self.pipes:
            pipe.send((function, arguments))

    def answer(self, rank: int) -> Any:
        """What the function returned there. Raises ``AssertionError`` with its traceback where it failed."""
        assert self.pipes[rank].poll(SECONDS), f"process {rank} does not answer"
        good, value = self.pipes[rank].recv()
        assert good, value
        return value

    def run(self, function: Callable, *arguments: Any) -> list[Any]:
        self.send(function, *arguments)
        answers, failures = [], []
        for rank in range(len(self.pipes)):
            try:
                answers.append(self.answer(rank))
            except AssertionError as err:
                failures.append(f"process {rank}: {err}")
        if failures:
            self.stop()  # they no longer agree on where they are
            raise AssertionError("\n".join(failures))
        return answers

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, size: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    np.random.seed()  # not that of all forks
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    timeout = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timeout)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:  # the tests have ended
            os._exit(0)  # as `distributed.leave`; the others may be gone already
        torch.manual_seed(rank)  # as in training, generators differ
        try:
            pipe.send((True, function(*arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
