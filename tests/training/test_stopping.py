"""Signals in training, sent to this very process; test_faults.py sends them to real runs."""

import os
import signal
import threading

import pytest
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback

from denseclip_hf.training.stopping import StopCallback, TrainingStopped, leave_signals_to_main_process
from helpers.forked import Forked
from helpers.training import trainer_for


class SignalAt(TrainerCallback):
    """Sends a signal to this process in the middle of a step, and whether training's end was announced."""

    def __init__(self, step, number):
        self.step, self.number, self.ended = step, number, False

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)
            os.kill(os.getpid(), self.number)  # launchers repeat signals

    def on_train_end(self, args, state, control, **kwargs):
        self.ended = True


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_and_saves(tmp_path, number, code):
    trainer, sender = trainer_for(tmp_path, max_steps=4, evaluate=False), SignalAt(2, number)
    trainer.add_callback(sender)
    handler = signal.getsignal(number)
    with pytest.raises(TrainingStopped, match=f"step 2 .{number.name}.*checkpoint is complete") as stop:
        trainer.train()
    assert stop.value.exit_code == code and sender.ended and signal.getsignal(number) is handler
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_signal_after_the_last_step_does_what_it_always_does():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever an earlier test's libraries left
    try:
        with pytest.raises(KeyboardInterrupt), StopCallback().listening():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_train_without_handlers():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def listen():
        with StopCallback().listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [before]


def test_workers_leave_signals_to_the_main_process():
    loader = iter(DataLoader(range(8), num_workers=1, worker_init_fn=leave_signals_to_main_process))
    next(loader)
    (worker,) = loader._workers
    for number in ("INT", "TERM"):  # from another process, as a terminal or scheduler sends it
        os.system(f"kill -{number} {worker.pid}")
    assert len(list(loader)) == 7
    loader = iter(DataLoader(range(800), num_workers=1, worker_init_fn=leave_signals_to_main_process))
    next(loader)
    (worker,) = loader._workers
    worker.terminate()
    worker.join(timeout=30)
    assert worker.exitcode == 0


class Signalled(IterableDataset):
    """A caller's own stream, read by a worker that hears SIGTERM meanwhile."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        os.system(f"kill -TERM {os.getpid()}")
        while True:
            yield from self.samples


def test_workers_of_a_callers_stream_leave_signals_to_the_main_process(tmp_path):
    trainer = trainer_for(tmp_path, dataloader_num_workers=1, max_steps=2)
    samples = [trainer.train_dataset[index] for index in range(4)]
    trainer.train_dataset = Signalled([{key: sample[key] for key in ("pixel_values", "labels")} for sample in samples])
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_worker_that_was_just_forked_does_not_keep_the_command_from_ending(tmp_path):
    (tmp_path / "script.py").write_text(
        "import sys, time\n"
        "from multiprocessing import get_context\n"
        "from denseclip_hf.training.stopping import StopCallback\n"
        "with StopCallback().listening():\n"
        "    get_context('fork').Process(target=time.sleep, args=(1000,), daemon=True).start()\n"
        "    sys.exit(3)\n"
    )
    script = Forked([tmp_path / "script.py"])
    try:
        assert script.wait(timeout=60) == 3
    finally:
        script.kill()
