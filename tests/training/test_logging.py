"""What the trainer logs to TensorBoard."""

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
