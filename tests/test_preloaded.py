"""Forks of a Python with the libraries end as programs of their own do, and every script starts without them too."""

import os
import signal
import subprocess
import time

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
        ("sys.excepthook = lambda *_: sys.stderr.write('hooked')\n1 / 0", 1, "hooked"),
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
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(program, 0)
            time.sleep(0.05)


def test_interrupts_end_forks_as_programs(tmp_path, run_script):
    handler = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # which is not there where tests ignore it
    (tmp_path / "script.py").write_text(f"import os, signal\n{handler}\nos.kill(os.getpid(), signal.SIGINT)\n")
    results = [run_script(tmp_path / "script.py", check=False, fresh=fresh) for fresh in (False, True)]
    assert [result.returncode for result in results] == [-signal.SIGINT] * 2
    assert all("KeyboardInterrupt" in result.stderr for result in results)


def test_forks_draw_other_random_numbers(tmp_path, run_script):
    (tmp_path / "script.py").write_text("import random, numpy as np\nprint(random.random(), np.random.rand())\n")
    drawn = [run_script(tmp_path / "script.py").stdout.split() for _ in range(2)]
    assert drawn[0][0] != drawn[1][0] and drawn[0][1] != drawn[1][1]


@pytest.mark.parametrize("script", ["main.py", "main_moe.py", "main_simmim_pt.py", "main_simmim_ft.py"])
def test_every_script_starts_by_itself(run_script, script):
    assert f"usage: {script}" in run_script(script, "--help", fresh=True).stdout
