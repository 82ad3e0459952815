"""Scripts in processes of their own, forked from one that has imported what takes them longer than their work."""

import multiprocessing
import os
import resource
import runpy
import subprocess
import sys
import threading
from multiprocessing.reduction import DupFd
from pathlib import Path


SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["denseclip_hf.recipes", "denseclip_hf.measurement", "denseclip_hf.training_card"])


class Forked:
    """
    A Python script that leads a process group of its own, with the interface of `subprocess.Popen`.

    Args:
        command (sequence): the script and its arguments.
        environment (`dict`, *optional*): all of its environment variables; by default this process's.
        largest_file (`int`, *optional*): bytes, as if the disk ended there.
    """

    def __init__(self, command, environment=None, largest_file=None):
        self._said = b""
        pipe, end = os.pipe()
        arguments = [*map(str, command)], dict(environment or os.environ), largest_file, DupFd(end)
        self._process = SERVER.Process(target=_run, args=arguments)
        self._process.start()
        os.close(end)
        self._reader = threading.Thread(target=self._read, args=(pipe,), daemon=True)
        self._reader.start()
        self.pid, self.kill = self._process.pid, self._process.kill

    def _read(self, pipe):
        with open(pipe, "rb", buffering=0) as file:
            while part := file.read(2**16):
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
        self.wait(timeout)
        self._reader.join(timeout)
        return self._said.decode(), None


def run_script(*command, largest_file=None):
    """Exit code and all that a script said."""
    script = Forked(command, largest_file=largest_file)
    said = script.communicate(timeout=300)[0]
    return script.returncode, said


def _run(command, environment, largest_file, said):
    os.setsid()
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    pipe = said.detach()
    os.dup2(pipe, 1), os.dup2(pipe, 2), os.close(pipe)
    multiprocessing.set_start_method(None, force=True)  # the script's data loaders are not the server's business
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    sys.path[0] = str(Path(command[0]).parent)
    runpy.run_path(command[0], run_name="__main__")
