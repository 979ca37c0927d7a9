"""Processes of the command line that start in milliseconds: forked from a server that has imported everything.

Starting Python and importing torch takes seconds of CPU time per process, and the tests start hundreds. The first
test that needs a process starts the server, which imports the modules and then waits. It runs no thread pool and
computes nothing, so that a forked process is in the state of a fresh one. Each process has the arguments,
environment, working directory, streams, session and signal handlers of a fresh process. It waits for its threads and
runs its exit handlers, but skips the finalisation of the interpreter, which takes seconds.

JLT_TESTS_FORK=0 starts real processes instead, as on every system but Linux.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

FORKS = sys.platform == "linux" and os.environ.get("JLT_TESTS_FORK", "1") != "0"
POLL_SECONDS = 0.01

# In a separate process: the code `plant` of a test, and then the command line as `python -m jlt` runs it.
FRESH = """
import sys
THREADS
exec(sys.argv.pop(1))
from jlt.cli.main import main
sys.exit(main())
"""

PRELOADED = """
sklearn.datasets torch._dynamo torch._inductor.test_operators torch.distributed torch.distributed.fsdp torch.nn.parallel
torch.onnx torch.profiler diffusers.models.autoencoders.autoencoder_kl_flux2 matplotlib.backends.backend_svg
"""
"""Modules that commands import on demand, in addition to all modules of the package."""


class Forked:
    """A forked process with the interface of `subprocess.Popen`; its output can be read after it has ended."""

    def __init__(self, server: socket.socket, request: dict[str, Any]) -> None:
        self.returncode: int | None = None
        self.stdout, self.stderr = io.StringIO(), io.StringIO()
        self._files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        self._status, theirs = os.pipe()
        places = [theirs, *(file.fileno() for file in self._files)]
        socket.send_fds(server, [json.dumps(request).encode()], places)
        os.close(theirs)
        self.pid = self._read()

    def _read(self) -> int:
        content = b""
        while not content.endswith(b"\n"):
            more = os.read(self._status, 1)
            assert more, "the server of test processes has ended"
            content += more
        return int(content)

    def poll(self) -> int | None:
        try:
            return self.wait(timeout=0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("jlt", timeout or 0)
            self.returncode = self._read()
            os.close(self._status)
            for file, stream in zip(self._files, (self.stdout, self.stderr), strict=True):
                with file:
                    file.seek(0)
                    stream.write(file.read())
                stream.seek(0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self.stdout.read(), self.stderr.read()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def assume_rates() -> None:
    """Replace the measurement of the machine's matrix rate by a constant: it takes a fifth of a second per training."""
    from jlt.runtime.environment import SMALLEST_MATMUL
    from jlt.training import meter

    meter.RATE_SIZE["cpu"] = SMALLEST_MATMUL
    meter.matmul_rate = lambda *_, **__: 1e11


_servers: dict[str, socket.socket] = {}


def start(
    arguments: list[str],
    environment: Mapping[str, str] | None = None,
    plant: str = "",
    threads: int | None = 1,
    preload: str = "",
) -> Forked | subprocess.Popen[str]:
    """Start `jlt` with these arguments in a new session, after the code `plant`, which may exit.

    `threads` is the number of torch threads; None leaves PyTorch's default. `preload` is a library that the process
    has loaded before all others.
    """
    environment = dict(os.environ if environment is None else environment)
    if not FORKS:
        set_threads = f"__import__('torch').set_num_threads({threads})" if threads else ""
        command = [sys.executable, "-c", FRESH.replace("THREADS", set_threads), plant, *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    if preload not in _servers:
        _servers[preload], theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import forked; "
            code += f"del sys.path[0]; forked.serve({theirs.fileno()})"
            server = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={**os.environ, "LD_PRELOAD": preload},
            )
        atexit.register(_end, server, _servers[preload])
    request = {
        "arguments": arguments,
        "environment": environment,
        "plant": plant,
        "threads": threads,
        "folder": str(Path.cwd()),
    }
    return Forked(_servers[preload], request)


def _end(server: subprocess.Popen[bytes], connection: socket.socket) -> None:
    connection.close()
    server.wait(timeout=20)


def serve(place: int) -> None:
    """Fork a process for each request until the tests end."""
    import importlib
    import pkgutil

    import jlt
    from jlt.images.digits import Digits

    own = [module.name for module in pkgutil.walk_packages(jlt.__path__, "jlt.") if module.name != "jlt.__main__"]
    for name in [*own, *PRELOADED.split()]:
        importlib.import_module(name)
    assume_rates()
    # The images are read once, and every process inherits them.
    Digits()
    with contextlib.redirect_stdout(None):
        # The parser of the command line reads docstrings from source files, and caches them.
        importlib.import_module("jlt.cli.main").main(["train", "digits", "--print-config"])
    # The garbage collector would otherwise write to every page that the processes share.
    gc.collect()
    gc.freeze()
    connection = socket.socket(fileno=place)
    statuses: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([connection], [], [], POLL_SECONDS if statuses else None)
        while statuses and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            status = statuses.pop(ended[0])
            os.write(status, f"{os.waitstatus_to_exitcode(ended[1])}\n".encode())
            os.close(status)
        if not ready:
            continue
        content, places, _, _ = socket.recv_fds(connection, 2**20, 3)
        if not content:
            # Processes that a failed test did not end.
            for left in statuses:
                os.kill(left, signal.SIGKILL)
            return
        pid = os.fork()
        if pid == 0:
            connection.close()
            for status in statuses.values():
                os.close(status)
            _work(json.loads(content), places)
        statuses[pid] = places[0]
        for stream in places[1:]:
            os.close(stream)
        os.write(places[0], f"{pid}\n".encode())


def _work(request: dict[str, Any], places: list[int]) -> NoReturn:
    """Become the requested process, and run the command line."""
    import numpy as np
    import torch

    from jlt.cli.main import main

    os.setsid()
    status, stdout, stderr = places
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (stdout, 1), (stderr, 2)):
        os.dup2(source, target)
    for place in (status, stdout, stderr, nothing):
        os.close(place)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Separately started processes do not share the state of the generator either.
    np.random.seed()
    if request["threads"]:
        torch.set_num_threads(request["threads"])
    sys.argv = ["jlt", *request["arguments"]]
    code = 1
    try:
        exec(request["plant"], {"__name__": "__main__"})
        code = main()
    except SystemExit as leave:
        code = int(leave.code or 0)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
