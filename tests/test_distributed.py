"""How processes of a group end: together and with their exit code, or at once, and never while Python is taken down.

Functions named ``on_...`` run in every process of a `Team`.
"""

import atexit
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from team import Team

import distributed


class Leaves:
    """Writes a file when Python, taking itself down, frees it."""

    def __init__(self, path: Path):
        self.write = path.write_text  # by then `open` is gone from builtins, not from here

    def __del__(self):
        self.write("taken down")


def on_leaving(folder: Path, code: int, at_once: bool) -> None:
    path = folder / f"{distributed.rank()}"
    atexit.register(path.with_suffix(".exit").write_text, "at exit")
    on_leaving.kept = Leaves(path.with_suffix(".down"))
    for group in (dist.new_group([0, 1]), dist.group.WORLD):
        for _ in range(4):  # their tensors are left to threads of gloo
            dist.all_reduce(torch.ones(10000), group=group, async_op=True)
    distributed.leave(code + distributed.rank(), at_once)


@pytest.mark.parametrize("code, at_once", [(0, False), (3, False), (5, True)])
def test_processes_end_with_their_code_and_leave_python_standing(code, at_once, tmp_path):
    team = Team(2, tmp_path)
    team.send(on_leaving, tmp_path, code, at_once)
    for process in team.processes:
        process.join(60)
    assert [process.exitcode for process in team.processes] == [code, code + 1]
    left = {path.name for path in tmp_path.iterdir() if path.name != "store"}
    assert left == (set() if at_once else {"0.exit", "1.exit"})


def on_losing_another() -> str:
    dist.barrier()
    if distributed.rank() == 1:
        os._exit(3)
    try:
        dist.all_reduce(torch.ones(3))
    except RuntimeError as err:
        assert distributed.others_are_lost(err)
        return distributed.has_ended(err)
    return "nothing happened"


def test_the_loss_of_another_process_is_told_in_one_line(tmp_path):
    team = Team(2, tmp_path)
    try:
        team.send(on_losing_another)
        message = team.answer(0)
    finally:
        team.stop()
    assert message.startswith("has ended, or has not answered in time; ") and "\n" not in message
    assert not distributed.others_are_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_single_process_ends_as_any_other():
    for code in (0, 143):
        with pytest.raises(SystemExit) as end:
            distributed.leave(code)
        assert end.value.code == code
