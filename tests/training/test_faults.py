"""Processes are killed, signals come, files turn bad and disks fill up, each really: the run can be started again."""

import os
import re
import signal
import sys

import pytest

from helpers.running import Run, one_sentence, training_recipe


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="signals and limits as on Linux"),
    pytest.mark.xdist_group("faults"),
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return training_recipe(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def whole(recipe):
    """The run that nothing happens to."""
    run = Run(recipe.parent / "whole", [recipe])
    run.end()
    return run


def test_killed_while_a_checkpoint_is_written(recipe, whole, tmp_path):
    run = Run(tmp_path / "run", [recipe])
    run.end(code=-signal.SIGKILL, fault="in_checkpoint")
    assert run.checkpoints() == [2] and (run.folder / ".writing" / "checkpoint-4" / "model.safetensors").exists()
    assert "checkpoint-2" in run.end()
    assert run.ends_as(whole) and not (run.folder / ".writing").exists()


def test_killed_in_the_evaluation(recipe, whole, tmp_path):
    run = Run(tmp_path / "run", [recipe])
    run.end(code=-signal.SIGKILL, fault="in_evaluation")
    assert run.checkpoints()[-1] == 8 and run.ends_as(whole)
    run.end()
    assert run.ends_as(whole)
    results = [(each.folder / "eval_results.json").read_text() for each in (run, whole)]
    assert results[0] == results[1]


def test_killed_in_an_evaluation_within_training(recipe, tmp_path):
    """Whose loader draws random numbers, so the run that it has to end as is one with evaluations too."""
    arguments = [recipe, "--eval_strategy", "steps", "--eval_steps", "4"]
    whole, run = Run(tmp_path / "whole", arguments), Run(tmp_path / "run", arguments)
    whole.end()
    run.end(code=-signal.SIGKILL, fault="in_evaluation")
    assert run.checkpoints() == [2]
    run.end()
    assert run.ends_as(whole) and run.losses() == whole.losses()


def test_a_killed_worker_is_named(recipe, whole, tmp_path):
    run = Run(tmp_path / "run", [recipe])
    said = one_sentence(run.end(code=1, fault="worker"))
    assert "a process that reads data died" in said and "fewer workers" in said
    assert 2 in run.checkpoints() and not (run.folder / "model.safetensors").exists()
    run.end()
    assert run.ends_as(whole)


def test_a_file_that_turns_corrupt_is_named(whole, tmp_path):
    run = Run(tmp_path / "run", [training_recipe(tmp_path)])
    process = run.begin()
    pictures = {picture: picture.read_bytes() for picture in (tmp_path / "data" / "images").iterdir()}
    for picture, content in pictures.items():
        picture.write_bytes(content[:100])
    said = one_sentence(process.communicate(timeout=100)[0])
    assert process.returncode == 1
    assert re.fullmatch(r"error: \S+/images/\d.png cannot be read as an image .*", said)
    assert 2 in run.checkpoints()
    for picture, content in pictures.items():
        picture.write_bytes(content)
    run.end()
    assert run.ends_as(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_signals_save_a_checkpoint_and_end_training(recipe, whole, tmp_path, number):
    """To all processes, data-loader workers too, as terminals and schedulers send them."""
    run = Run(tmp_path / "run", [recipe])
    process = run.begin()
    os.killpg(process.pid, number)
    said = one_sentence(process.communicate(timeout=100)[0])
    assert process.returncode == 128 + number
    step = re.fullmatch(rf"stopped at step (\d+) \({number.name}\): the checkpoint is complete, .*", said)[1]
    assert run.checkpoints()[-1] == int(step)
    run.end()
    assert run.ends_as(whole) and run.losses() == whole.losses()


@pytest.mark.parametrize("fault, checkpoint", [("full_at_checkpoint", 2), ("full_at_end", 8)])
def test_a_full_disk_loses_nothing(recipe, whole, tmp_path, fault, checkpoint):
    run = Run(tmp_path / "run", [recipe])
    said = one_sentence(run.end(code=1, fault=fault))
    assert "could not be written" in said and "make room and start again with the same command" in said
    assert run.checkpoints()[-1] == checkpoint
    left = {path.name for path in run.folder.iterdir() if not path.name.startswith("checkpoint")}
    assert left - {".lock"} == {"recipe.json"}
    run.end()
    assert run.ends_as(whole)


def test_a_disk_that_fills_up(recipe, whole, small_disk):
    disk = small_disk("20m")
    run = Run(disk / "run", [recipe])
    process, filler = run.begin(), disk / "filler"
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(bytes(20_000_000))
    said = one_sentence(process.communicate(timeout=100)[0])
    assert process.returncode == 1 and "could not be written" in said
    filler.unlink()
    assert 2 in run.checkpoints() and not (run.folder / ".writing").exists()
    run.end()
    assert run.ends_as(whole)
