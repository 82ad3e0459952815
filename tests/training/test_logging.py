"""What the trainer logs: names in TensorBoard and trackio, and the memory of the process."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from denseclip_hf.training.callbacks import peak_memory
from helpers.training import trainer_for


def test_tensorboard_receives_every_rate(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer_for(tmp_path / "out", report_to=["tensorboard"], max_steps=2).train()
    events = EventAccumulator(str(next((tmp_path / "events").rglob("events.*")).parent))
    events.Reload()
    names = set(events.Tags()["scalars"])
    wanted = {"loss", "decode_loss", "auxiliary_loss", "pixel_accuracy", "images_per_second", "grad_norm"}
    assert {f"train/{name}" for name in wanted} | {"train/learning_rate/image_encoder"} <= names


def test_trackio_receives_every_rate(tmp_path, monkeypatch):
    """Kept in files below TRACKIO_DIR; no network."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    trainer_for(tmp_path / "out", report_to=["trackio"], max_steps=2, project="tests", run_name="tiny").train()
    (run,) = SQLiteStorage.get_run_records("tests")
    lines = SQLiteStorage.get_logs("tests", run["name"], run_id=run["id"])
    wanted = {"loss", "decode_loss", "auxiliary_loss", "pixel_accuracy", "images_per_second", "grad_norm"}
    assert {f"train/{name}" for name in wanted} | {"train/learning_rate/image_encoder"} <= set().union(*lines)
    assert [line["train/global_step"] for line in lines if "train/loss" in line] == [1, 2]


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


def test_peak_memory_without_what_only_unix_has(monkeypatch):
    """On Windows, with neither /proc nor the module `resource`."""
    monkeypatch.setattr("denseclip_hf.training.callbacks.Path", lambda name: Path("/nowhere") / name.lstrip("/"))
    monkeypatch.setitem(sys.modules, "resource", None)
    windows = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=7))
    monkeypatch.setattr("denseclip_hf.training.callbacks.psutil.Process", lambda: windows)
    assert peak_memory("cpu") == 7
