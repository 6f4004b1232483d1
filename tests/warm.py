"""A process that has imported what takes long, and forks a child for every program that a test runs.

A child is a process like any other: it has its own memory, folder, environment and output, and it can be killed.
What it spares is the start and the end: torch and torchvision take 4 s of a core, a fork some hundredths.
That a program imports by itself what it needs is seen where tests run it by `python -m`, `torchrun` and DVC.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = [
    "pipeline.stages.commands",
    "segment_anything.modeling",
    "torchvision.models",
    "torch._dynamo",
    "matplotlib.figure",
]
LONGEST_REQUEST = 2**17  # bytes: arguments and environment


class Child:
    """A program that runs, with the part of `subprocess.Popen` that tests need."""

    def __init__(self, report: socket.socket, out: int, err: int) -> None:
        self._report, self._out, self._err = report, out, err
        self.pid = int(report.recv(100))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, or minus the signal that ended it; None while it runs."""
        try:
            return self.wait(0)
        except BlockingIOError:
            return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._report.settimeout(timeout)
            self.returncode = int(self._report.recv(100))
            self._report.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; what it wrote to its two outputs."""
        self.wait(timeout)
        with os.fdopen(self._out) as out, os.fdopen(self._err) as err:
            out.seek(0)
            err.seek(0)
            return out.read(), err.read()

    def send_signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # it has ended
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(module: str, *arguments: object, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> Child:
    """Start what `python -m module arguments` would; variables that are read when torch is loaded are ours."""
    out, err = os.memfd_create("out"), os.memfd_create("err")
    request = [module, [str(argument) for argument in arguments], str(cwd), dict(os.environ if env is None else env)]
    report, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        socket.send_fds(_requests(), [json.dumps(request).encode()], [out, err, theirs.fileno()])
    return Child(report, out, err)


@functools.cache
def _requests() -> socket.socket:
    """The way to the warm process, which is started at the first use and ends when this process does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-m", "tests.warm", str(theirs.fileno())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()])

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def main() -> None:
    """Fork for every request; a child returns from here only when its program is done."""
    for module in MODULES:
        importlib.import_module(module)
    requests = socket.socket(fileno=int(sys.argv[1]))
    while True:
        message, handles, _, _ = socket.recv_fds(requests, LONGEST_REQUEST, 3)
        if not message:
            return
        if os.fork() == 0:
            break
        for handle in handles:
            os.close(handle)
        with suppress(ChildProcessError):  # there is none
            while os.waitpid(-1, os.WNOHANG)[0]:
                continue
    requests.close()
    _attend(*json.loads(message), *handles)


def _attend(
    module: str, arguments: Sequence[str], cwd: str, env: Mapping[str, str], out: int, err: int, report: int
) -> None:
    """Run a program in a child of this process; report its process id at once and its exit status at the end."""
    child = os.fork()
    if child:
        with suppress(BrokenPipeError):  # nobody is left who wants to know
            os.write(report, str(child).encode())
            _, status = os.waitpid(child, 0)
            os.write(report, str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    for handle in (out, err, report):
        os.close(handle)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
