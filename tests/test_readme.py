"""The README's Python blocks run as they stand, and the shapes in their comments are true."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[str(i) for i in range(len(BLOCKS))])
def test_python_blocks_run(block):
    result = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    printed = re.findall(r"torch\.Size\(\[(.*?)\]\)", result.stdout)
    claimed = re.findall(r"\((\d+(?:, \d+)+)\)", block.split("print(")[1]) if "print(" in block else []
    assert printed == claimed


def test_folders_and_files_of_the_tree_are_there():
    tree = re.search(r"## What is where\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    folder = ROOT
    for line in tree.splitlines():
        name = line.split()[0]
        folder = folder if line.startswith(" ") else ROOT
        assert (folder / name).exists(), name
        folder = ROOT / name if name.endswith("/") else folder
