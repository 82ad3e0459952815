"""Ending a training run early without losing it: SIGTERM and Ctrl-C finish the step and save a checkpoint first.

An evaluation that is due after that step, or already runs, comes before the checkpoint.

transformers' own `enable_jit_checkpoint` hears SIGTERM only, waits three seconds and lets each process stop at a step
of its own, on which the others wait for ever.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children, parent_process
from multiprocessing.util import Finalize

import torch
from torch import distributed
from transformers import TrainerCallback


logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingStopped(KeyboardInterrupt):
    """Training ended by a signal, its checkpoint complete. `exit_code` is 128 + the signal's number, as in shells."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.exit_code = 128 + number


class StopCallback(TrainerCallback):
    """
    Ends training at the end of the step in which SIGTERM or Ctrl-C arrives at any of its processes.

    While [`listening`], signals are only noted. After a step all processes agree on whether one has come; if so, a
    checkpoint is saved and [`TrainingStopped`] raised. Further signals change nothing: launchers repeat them.
    """

    def __init__(self) -> None:
        self.received = 0  # a signal's number, 0 while there is none
        self.agreed = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals instead of dying of them (in the main thread; elsewhere Python allows no handlers)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.received = self.agreed = 0
        Finalize(None, _end_workers, exitpriority=0)
        before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.received:  # no step came after it: let it do what it does outside of training
            signal.raise_signal(self.received)

    def _receive(self, number: int, frame: object) -> None:
        self.received = self.received or number

    def on_step_end(self, args, state, control, **kwargs):
        self.agreed = self.received
        if args.world_size > 1:
            number = torch.tensor(self.received, device=args.device)
            distributed.all_reduce(number, distributed.ReduceOp.MAX)
            self.agreed = int(number)
        if self.agreed:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        """Once the checkpoint that was asked for is there: raises [`TrainingStopped`]."""
        if self.agreed:
            name = signal.Signals(self.agreed).name
            message = (
                f"stopped at step {state.global_step} ({name}): the checkpoint is complete, and the same command goes "
                "on from it."
            )
            if state.is_world_process_zero:
                logger.warning(message)
            raise TrainingStopped(message, self.agreed)


def leave_signals_to_main_process(worker_id: int) -> None:
    """
    `worker_init_fn` of a data loader: its workers go on at Ctrl-C and SIGTERM, so that the main process can finish its
    step.

    A terminal sends Ctrl-C to every process of a command, a scheduler SIGTERM. SIGTERM from the main process, by which
    it ends its workers, is obeyed.
    """
    sys.excepthook = lambda *_: None  # a thread that hands tensors over would print that the main process has ended
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_main_process, daemon=True).start()


def _obey_main_process() -> None:
    main = parent_process()
    while main is not None:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == main.pid:
            os._exit(0)


def _end_workers() -> None:
    """
    At the end of the main process, before it waits for its daemons.

    A worker that has just been forked still has the handler of [`StopCallback`], which only notes SIGTERM; the main
    process would wait for it for ever.
    """
    workers = [child for child in active_children() if child.daemon]
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(1)
        worker.kill()


__all__ = ["StopCallback", "TrainingStopped", "leave_signals_to_main_process"]
