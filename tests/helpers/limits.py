"""Bounds on the time and memory that one input may take."""

import resource
import signal
from contextlib import contextmanager, suppress
from pathlib import Path


SECONDS, BYTES = 60, 2 << 30  # of one input: far above what any needs


def peak_memory():
    """The most bytes that this process has held at a time since the peak was last cleared."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Hangs(BaseException):
    """Not an `Exception`, so that nothing catches it on its way."""


@contextmanager
def memory_bounded(most):
    """Fails if what runs in it ever holds `most` bytes more than there were before."""
    with suppress(OSError):  # on Linux, where the peak begins anew
        Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory()
    try:
        yield
    finally:
        grown = peak_memory() - before
        assert grown < most, f"it took {grown / 2**20:.0f} MiB"


@contextmanager
def result_or_sentence():
    """Lets `ValueError` and `OSError` with words pass, and nothing that hangs or fills the memory."""

    def too_long(*_):
        raise Hangs

    old = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        with memory_bounded(BYTES):
            yield
    except (ValueError, OSError) as error:
        assert str(error).strip(), repr(error)
    except SystemExit as error:  # argparse, which has told why
        assert error.code == 2
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
