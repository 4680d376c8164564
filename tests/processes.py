"""`python X.py ...` as a real process, forked from one that has torch already: 0.1 s instead of 2.

Run as a program, this file is the server: for each request on its socket it forks a child that becomes a plain run of a
script, with its own folder, environment, arguments, standard streams and signals, and that ends as Python ends.
"""

import atexit
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

LIMIT = 120  # seconds that any process may take, and any test


class Run:
    """A running `python X.py ...`: signal it, wait for its exit code, read what it said."""

    def __init__(self, wire, said, erred):
        self.wire, self.said, self.erred, self.code = wire, said, erred, None
        self.pid = json.loads(self.wire.readline())

    def out(self):
        return Path(self.said).read_text(errors="replace")

    def err(self):
        return Path(self.erred).read_text(errors="replace")

    def send(self, kind=signal.SIGINT):
        try:
            os.kill(self.pid, kind)
        except ProcessLookupError:
            pass  # it has ended: whoever asks for the code sees how

    def wait(self):
        """The exit code, as a shell's but negative for a signal. A process that hangs is killed and fails the test."""
        if self.code is None:
            try:
                self.code = json.loads(self.wire.readline())
            except TimeoutError:
                self.send(signal.SIGKILL)
                raise AssertionError(f"still running after {LIMIT} s:\n{self.out()}\n{self.err()}") from None
        return self.code

    def until(self, words):
        """Waits until it has said so; fails if it ends before, or takes too long."""
        begin = time.monotonic()
        while words not in self.out():
            assert time.monotonic() - begin < LIMIT, f"never said {words!r}:\n{self.out()}\n{self.err()}"
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:
                assert words in self.out(), f"ended before it said {words!r}:\n{self.out()}\n{self.err()}"
            time.sleep(0.005)
        return self


class Python:
    """The client's end; one server serves all tests."""

    def __init__(self, folder):
        self.path = str(folder / "socket")
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self.server = subprocess.Popen([sys.executable, __file__, self.path], env=os.environ | threads,
                                       stdin=subprocess.DEVNULL)
        begin = time.monotonic()
        while not Path(self.path).exists():
            assert self.server.poll() is None and time.monotonic() - begin < LIMIT
            time.sleep(0.01)

    def start(self, *argv, stdout=None, stderr=None, name="run", **env):
        """Starts `python argv` in this folder. stdout, stderr: a file descriptor, or "closed"; else NAME.out, NAME.err."""
        said, erred = Path(f"{name}.out").absolute(), Path(f"{name}.err").absolute()
        own = [open(path, "wb") for path in (said, erred)]
        fds = [own[k].fileno() if fd in (None, "closed") else fd for k, fd in enumerate((stdout, stderr))]
        wire = socket.socket(socket.AF_UNIX)
        wire.settimeout(LIMIT)
        wire.connect(self.path)
        request = dict(argv=list(map(str, argv)), env=env, cwd=os.getcwd(), closed=[stdout == "closed", stderr == "closed"])
        socket.send_fds(wire, [json.dumps(request).encode()], fds)
        for file in own:
            file.close()
        return Run(wire.makefile("r"), said, erred)

    def __call__(self, *argv, **how):
        """Runs `python argv` to its end: (exit code, what it said, what it said on stderr)."""
        run = self.start(*argv, **how)
        return run.wait(), run.out(), run.err()

    def ranks(self, *argv, count=2, **env):
        """As torchrun starts them: `count` processes of one run."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env |= dict(WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        return [self.start(*argv, name=f"rank{k}", **env, RANK=str(k), LOCAL_RANK=str(k)) for k in range(count)]

    def end(self):
        self.server.terminate()
        self.server.wait()


def serve(path):
    """Returns in each forked child, with its request; in the server itself, never."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".new")
    listener.listen(64)
    listener.settimeout(5)
    os.rename(path + ".new", path)
    parent = os.getppid()
    while os.getppid() == parent:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        try:
            wire, _ = listener.accept()
        except TimeoutError:
            continue
        message, fds, _, _ = socket.recv_fds(wire, 65536, 2)
        if not os.fork():
            pid = os.fork()
            if not pid:
                wire.close()
                listener.close()
                return json.loads(message), fds
            for fd in fds:  # or a pipe would never end
                os.close(fd)
            wire.sendall(f"{pid}\n".encode())
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with suppress(OSError):
                wire.sendall(f"{code}\n".encode())
            os._exit(0)
        wire.close()
        for fd in fds:
            os.close(fd)
    sys.exit()


def become(request, fds):
    """The standard streams, folder, environment and arguments of the request."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    sys.argv = request["argv"]
    for k, (name, fd, closed) in enumerate(zip(("stdout", "stderr"), fds, request["closed"]), 1):
        os.dup2(fd, k)
        os.close(fd)
        encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
        setattr(sys, name, open(k, "w", encoding=encoding, closefd=False, buffering=1 if os.isatty(k) or k == 2 else -1))
        if closed:
            os.close(k)
            setattr(sys, name, None)
    if "CLOCK" in os.environ:  # seconds that pass between two looks at the clock
        time.perf_counter = itertools.count(0, float(os.environ["CLOCK"])).__next__


def end(code):
    """As Python ends, but for taking torch apart, which lasts a second: what is left in the streams is written, or 120."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream:
                stream.flush()
        except OSError:
            code = 120
    os._exit(code)


if __name__ == "__main__":
    import argparse  # noqa: F401  what the scripts import is here already

    import numpy  # noqa: F401
    import torch._dynamo  # noqa: F401  an optimiser imports it: a second
    import torch.distributed  # noqa: F401

    request, fds = serve(sys.argv[1])
    become(request, fds)
    import runpy
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        if "WHOLE" in os.environ:  # ends as Python does, torch taken apart
            raise
        end(stop.code or 0)
