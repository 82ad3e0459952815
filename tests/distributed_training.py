"""Trains a tiny model on as many processes as it is started on; test_distributed.py compares what comes out."""

import json
import sys
from pathlib import Path

import torch
from conftest import tiny_model
from test_training import NO_DROPOUT, pictures, trainer_for


def main(output_dir: str, batch_size: str) -> None:
    model = tiny_model("resnet", **NO_DROPOUT)
    trainer = trainer_for(output_dir, model, pictures(10), max_steps=5, per_device_train_batch_size=int(batch_size))
    trainer.train()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        result = {"losses": losses, "matrix": metrics["eval_confusion_matrix"].tolist(), "loss": metrics["eval_loss"]}
        Path(output_dir, "result.json").write_text(json.dumps(result))
        torch.save(trainer.model.state_dict(), Path(output_dir, "weights.pt"))
    trainer.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
