"""A Python that starts at once: a fork of one that has imported the libraries, which takes a fresh one seconds.

`serve` is the one that forks. As a command this file takes what Python takes (a script, or ``-m`` and a module, and
arguments), has a fork run it with its own folder, environment and files, passes signals on, and ends as the fork ends.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading

# What scripts import besides the project's own modules. With OMP_NUM_THREADS=1 none of it starts a thread, which forks
# would lack.
LIBRARIES = (
    *("torch", "torch._dynamo", "torch.distributed.run", "torch.utils.tensorboard", "torchvision.transforms"),
    *("timm.data", "timm.optim", "scipy.interpolate", "cv2", "yacs.config"),
)
ADDRESS = "PRELOADED_PYTHON"  # the variable that says where `serve` listens


def serve(address: str) -> list[str]:
    """Fork for every caller, until standard input ends. Returns in the forks: what they are to run."""
    for name in LIBRARIES:
        importlib.import_module(name)
    if os.path.exists("/proc/self/task"):
        assert len(os.listdir("/proc/self/task")) == 1, "forks would lack the libraries' threads"
    gc.freeze()  # a collection would write to all of it, and have it copied
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
                os._exit(0)
            caller, _ = listener.accept()
            if os.fork() == 0:
                break
            caller.close()
    return attend(caller)


def attend(caller: socket.socket) -> list[str]:
    """Start the program, tell its number, then how it ended; it dies with its caller. Returns in the program."""
    _, files, _, _ = socket.recv_fds(caller, 1, 3)
    request = json.loads(caller.makefile().readline())
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer)
    program = os.fork()
    if program == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        caller.close()
        become(request, files)
        return request["arguments"]
    with contextlib.suppress(BrokenPipeError):  # then the caller has ended, which the next lines see
        caller.sendall(f"{program}\n".encode())
    for file in files:
        os.close(file)
    if caller in select.select([caller, reader], [], [])[0]:
        os.kill(program, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        caller.sendall(f"{status}\n".encode())
    os._exit(0)


def become(request: dict, files: list[int]) -> None:
    sys.modules["numpy"].random.seed()  # not that of all forks; Python's own is drawn anew by itself
    os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)


def run(arguments: list[str]) -> None:
    """Run Python's ``arguments`` in this process."""
    if arguments[0] == "-u":
        sys.stdout.reconfigure(line_buffering=True)
        arguments = arguments[1:]
    if arguments[0] == "-m":
        sys.argv, sys.path[0] = arguments[1:], os.getcwd()
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.abspath(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")


def call(arguments: list[str]) -> None:
    """Have ``arguments`` run by `serve`, and end as they end."""
    program, early = 0, []

    def pass_on(number: int, _) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(program, number) if program else early.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ[ADDRESS])
        request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
        socket.send_fds(server, [b"\n"], [0, 1, 2])
        server.sendall(json.dumps(request).encode() + b"\n")
        answers = server.makefile()
        program = int(answers.readline())
        for number in early:
            pass_on(number, None)
        status = int(answers.readline())
    if status < 0:
        end_by(-status)
    sys.exit(status)


def end_by(number: int) -> None:
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def run_and_end(arguments: list[str]) -> None:
    """End as Python does, but free nothing: all that this process shares would be copied first."""
    status = 0
    try:
        run(arguments)
    except SystemExit as end:
        status = end.code
    except BaseException as err:
        sys.excepthook(*sys.exc_info())
        status = -signal.SIGINT if isinstance(err, KeyboardInterrupt) else 1
    if not isinstance(status, int | None):
        sys.stderr.write(f"{status}\n")
        status = 1
    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if status == -signal.SIGINT:
        end_by(signal.SIGINT)
    os._exit((status or 0) & 0xFF)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        run_and_end(serve(sys.argv[2]))
    else:
        call(sys.argv[1:])
