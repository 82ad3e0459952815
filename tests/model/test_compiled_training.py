"""`torch_compile` in training: the same steps, and checkpoints that know nothing of it."""

import pytest
import torch
from safetensors.torch import load_file

from helpers.models import tiny_model
from helpers.training import NO_DROPOUT, trainer_for


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_compiled_training_equals_eager(tmp_path):
    """With the backend that traces but does not generate code: that part is PyTorch's."""
    runs = []
    for name, options in {"eager": {}, "compiled": {"torch_compile_backend": "aot_eager"}}.items():
        saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
        trainer = trainer_for(tmp_path / name, tiny_model("resnet", **NO_DROPOUT), evaluate=False, **saving, **options)
        trainer.train()
        runs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 0, "nothing was compiled"
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)
    saved = [load_file(tmp_path / name / "checkpoint-2" / "model.safetensors") for name in ("eager", "compiled")]
    assert saved[0].keys() == saved[1].keys()

    again = trainer_for(tmp_path / "again", tiny_model("resnet", seed=9, **NO_DROPOUT), max_steps=3, evaluate=False)
    again.train(resume_from_checkpoint=str(tmp_path / "compiled" / "checkpoint-2"))
    assert again.state.log_history[-2]["loss"] == pytest.approx(runs[0][2], rel=1e-4)
