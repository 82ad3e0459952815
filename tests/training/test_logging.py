"""What the trainer logs: names in TensorBoard and trackio, and the memory of the process."""

import subprocess
import sys

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers.training import trainer_for


def test_tensorboard_receives_every_rate(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer_for(tmp_path / "out", report_to=["tensorboard"], max_steps=2).train()
    events = EventAccumulator(str(next((tmp_path / "events").rglob("events.*")).parent))
    events.Reload()
    names = set(events.Tags()["scalars"])
    wanted = {"loss", "decode_loss", "auxiliary_loss", "pixel_accuracy", "images_per_second", "grad_norm"}
    assert {f"train/{name}" for name in wanted} | {"train/learning_rate/image_encoder"} <= names


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process begins at nought by itself")
def test_peak_memory_is_the_process_s_own():
    """Linux begins a new program's `ru_maxrss` at that of what started it."""
    ballast = np.ones(2**30, dtype=np.uint8)
    code = "from denseclip_hf.training.callbacks import peak_memory\nbefore = peak_memory('cpu')\n"
    code += "held = bytearray(b'1' * 2**28)\nprint(before, peak_memory('cpu'))"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    before, after = map(int, result.stdout.split())
    assert 2**26 < before < ballast.nbytes and 2**28 <= after - before < 2**30
