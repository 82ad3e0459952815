"""Runs that are broken off, and directories that are not theirs."""

import json
import os
import signal

import pytest
import torch
from running import Run, one_sentence, training_recipe

from denseclip_hf.runs import one_sentence_errors, prepare_run, results_json


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


def test_a_run_that_ended_before_it_trained_is_in_nobodys_way(tmp_path):
    prepare_run(tmp_path, RECIPE)
    other = {**RECIPE, "seed": 2}
    assert prepare_run(tmp_path, other) is None
    assert json.loads((tmp_path / "recipe.json").read_text()) == other


def test_another_recipe_is_refused(tmp_path):
    prepare_run(tmp_path, RECIPE)
    (tmp_path / "checkpoint-2").mkdir()
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


@pytest.mark.slow
def test_killed_training_goes_on_to_the_same_weights(tmp_path):
    recipe = training_recipe(tmp_path)
    whole, killed = Run(tmp_path / "whole", [recipe]), Run(tmp_path / "killed", [recipe])
    whole.end()
    for wanted in ("checkpoint-4", "checkpoint-8"):  # two kills, each some steps after a checkpoint appears
        process = killed.begin(wanted)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    killed.end()
    assert killed.ends_as(whole) and killed.losses() == whole.losses()
    assert "holds a finished run" in one_sentence(killed.end(code=1))
