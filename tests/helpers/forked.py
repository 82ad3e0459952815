"""Scripts in processes of their own, forked from one that has imported what takes them longer than their work."""

import itertools
import multiprocessing
import os
import resource
import runpy
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch


SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["denseclip_hf.training.recipe", "denseclip_hf.evaluation.measurement", "denseclip_hf.training.card"]
)

PORTS = itertools.count(20_000 + 1000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]))


class Forked:
    """
    A Python script that leads a process group of its own, with the interface of `subprocess.Popen`.

    Unlike in a new interpreter, what libraries read from the environment when they are imported is as in the first
    test that forks, hash seeds are equal, and nothing runs at exit.

    Args:
        command (sequence): the script and its arguments.
        environment (`dict`, *optional*): all of its environment variables; by default this process's.
        largest_file (`int`, *optional*): bytes, as if the disk ended there.
    """

    def __init__(self, command, environment=None, largest_file=None):
        self._said = b""
        reader, writer = SERVER.Pipe(duplex=False)
        arguments = [*map(str, command)], os.getcwd(), dict(environment or os.environ), largest_file, writer
        self._process = SERVER.Process(target=_run, args=arguments)
        self._process.start()
        writer.close()
        self._reading = threading.Thread(target=self._read, args=(reader,), daemon=True)
        self._reading.start()
        self.pid, self.kill = self._process.pid, self._process.kill

    def _read(self, reader):
        with reader:
            while part := os.read(reader.fileno(), 2**16):
                self._said += part

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("the script", timeout)
        return self.returncode

    def communicate(self, timeout=None):
        end = None if timeout is None else time.monotonic() + timeout
        self.wait(timeout)
        self._reading.join(None if end is None else max(0, end - time.monotonic()))
        if self._reading.is_alive():  # a process that it started holds on to its output
            raise subprocess.TimeoutExpired("the script", timeout)
        return self._said.decode(), None


def run_script(*command, **options):
    """Exit code and all that a script said."""
    script = Forked(command, **options)
    try:
        said = script.communicate(timeout=300)[0]
    finally:
        script.kill()
    return script.returncode, said


def run_ranks(processes, *command, **environment):
    """Exit codes of a script in several processes, started as `torchrun` does, or in just one; and what each said."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    if processes > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(processes)}
    started = []
    for rank in map(str, range(processes)):
        ranks = {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
        started.append(Forked(command, environment | ranks))
    try:
        said = [script.communicate(timeout=150)[0] for script in started]
    finally:
        for script in started:
            script.kill()
    return [script.returncode for script in started], said


def free_port():
    """A port that nobody takes before it is used: the system gives away higher ones, the other workers their own."""
    for port in PORTS:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return str(port)


def _run(command, folder, environment, largest_file, said):
    os.setsid()
    os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2), said.close()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    multiprocessing.set_start_method(None, force=True)  # the script's data loaders are not the server's business
    sys.argv = command
    sys.path[0] = str(Path(command[0]).parent)
    runpy.run_path(command[0], run_name="__main__")
