"""Runs that are broken off, and directories that are not theirs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_recipes import TINY, TINY_CLIP
from test_training import write_folder

from denseclip_hf.runs import one_sentence_errors, prepare_run, results_json


TRAIN = Path(__file__).parent.parent / "scripts" / "train.py"
RECIPE = {"learning_rate": 1.0, "seed": 1}


def test_a_new_run_keeps_its_recipe(tmp_path):
    assert prepare_run(tmp_path / "run", RECIPE) is None
    assert json.loads((tmp_path / "run" / "recipe.json").read_text()) == RECIPE
    assert prepare_run(tmp_path / "run", RECIPE) is None


def test_a_broken_off_run_goes_on_from_its_last_checkpoint(tmp_path):
    prepare_run(tmp_path, RECIPE)
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / ".writing" / "checkpoint-12").mkdir(parents=True)
    assert prepare_run(tmp_path, RECIPE) == str(tmp_path / "checkpoint-10")
    assert not (tmp_path / ".writing").exists()


def test_another_recipe_is_refused(tmp_path):
    prepare_run(tmp_path, RECIPE)
    with pytest.raises(ValueError, match="another recipe .seed 1 -> 2.: name a new output directory"):
        prepare_run(tmp_path, {**RECIPE, "seed": 2})


def test_a_finished_run_is_refused(tmp_path):
    prepare_run(tmp_path, RECIPE)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="finished run"):
        prepare_run(tmp_path, RECIPE)


def test_a_foreign_directory_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="not empty and holds no run"):
        prepare_run(tmp_path, RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_unwritable_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        prepare_run(tmp_path / "file" / "run", RECIPE)


def test_undefined_scores_are_null_in_json():
    text = results_json({"iou": [0.5, float("nan")], "mean": float("nan"), "matrix": torch.zeros(2)})
    assert json.loads(text) == {"iou": [0.5, None], "mean": None}


def test_scripts_end_in_one_sentence():
    @one_sentence_errors
    def main():
        raise ValueError("the mask is missing: add it.")

    with pytest.raises(SystemExit, match="^error: the mask is missing: add it.$"):
        main()


@pytest.fixture
def command(tmp_path):
    """A training run of 12 steps, three epochs, with augmentation and two workers; checkpoints every second step."""
    data = write_folder(tmp_path / "data", 9, ".png")
    recipe = {
        "clip_config": TINY_CLIP, "config": TINY, "crop_size": 64, "scale_long": 128, "max_steps": 12,
        "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2, "warmup_steps": 2,
        "use_cpu": True, "dataset": str(data), "dataloader_num_workers": 2, "report_to": "none", "learning_rate": 1e-3,
    }  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    return [sys.executable, str(TRAIN), str(tmp_path / "recipe.json"), "--output_dir"]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_killed_training_goes_on_to_the_same_weights(command, tmp_path):
    subprocess.run([*command, tmp_path / "whole"], check=True, env=ENVIRONMENT, timeout=200)
    killed = tmp_path / "killed"
    for wanted in ("checkpoint-4", "checkpoint-8"):  # two kills, each some steps after a checkpoint appears
        process = subprocess.Popen([*map(str, command), str(killed)], env=ENVIRONMENT, start_new_session=True)
        deadline = time.monotonic() + 150
        while not (killed / wanted).exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    subprocess.run([*command, killed], check=True, env=ENVIRONMENT, timeout=200)
    expected, weights = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", killed))
    assert expected.keys() == weights.keys()
    assert all(torch.equal(expected[name], weights[name]) for name in expected)
    losses = []
    for folder in (tmp_path / "whole", killed):
        history = json.loads((folder / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
        losses.append([entry["loss"] for entry in history if "loss" in entry])
    assert losses[0] == losses[1]
    again = subprocess.run([*command, killed], env=ENVIRONMENT, timeout=200, capture_output=True, text=True)
    assert again.returncode == 1 and "holds a finished run" in again.stderr and "Traceback" not in again.stderr
