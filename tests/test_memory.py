"""Freed memory that is kept: blocks of the same size are taken again without new pages."""

import subprocess
import sys

import pytest
from conftest import ROOT

COUNT = """
import resource, torch
from models import memory

def faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.empty(size, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults({size})
print(memory.{function}(), before, faults({size}), faults({size}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
@pytest.mark.parametrize("function, size", [("keep_some", 24 * 2**20), ("keep_all", 100 * 2**20)])
def test_blocks_are_taken_again(function, size):
    code = COUNT.format(function=function, size=size)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    works, _, _, after = result.stdout.split()
    if works == "False":
        pytest.skip("another C library")
    assert int(after) < size // 4096 // 10  # less than a tenth of one block's pages, in four turns
