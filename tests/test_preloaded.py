"""Forks of a Python with the libraries end as programs of their own do, and every script starts without them too."""

import signal
import subprocess
import time
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "code, status, errors",
    [
        ("print(sys.argv[1:], os.getcwd())", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('no')", 1, "no\n"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
        ("threading.Thread(target=lambda: (time.sleep(0.1), print(end='late'))).start()", 0, ""),
        ("assert len(os.listdir('/proc/self/task')) == 1", 0, ""),
    ],
)
def test_forks_end_as_programs_do(tmp_path, run_script, code, status, errors):
    script = tmp_path / "script.py"
    script.write_text(f"import os, signal, sys, threading, time\n{code}\n")
    results = [run_script(script, "one", "two three", check=False, fresh=fresh) for fresh in (False, True)]
    assert [(result.returncode, result.stderr) for result in results] == [(status, errors)] * 2
    assert results[0].stdout == results[1].stdout


def test_uncaught_errors_have_their_traceback(tmp_path, run_script):
    (tmp_path / "script.py").write_text("1 / 0\n")
    result = run_script(tmp_path / "script.py", check=False)
    assert result.returncode == 1 and result.stderr.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals_reach_the_fork(tmp_path, preloaded_python, number):
    script = tmp_path / "script.py"
    script.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n")
    command = [preloaded_python["PYTHON_EXEC"], str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=preloaded_python) as process:
        program = int(process.stdout.readline())
        process.send_signal(number)
        assert process.wait(30) == -number
    deadline = time.monotonic() + 30
    while Path(f"/proc/{program}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("script", ["main.py", "main_moe.py", "main_simmim_pt.py", "main_simmim_ft.py"])
def test_every_script_starts_by_itself(run_script, script):
    assert f"usage: {script}" in run_script(script, "--help", fresh=True).stdout
