"""What the trainer logs arrives in TensorBoard and trackio under the same names."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training import trainer_for


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
