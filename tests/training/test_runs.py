"""Runs that are broken off, and directories that are not theirs."""

import json
import os
import signal
import sys

import pytest
import torch

from denseclip_hf.cli import train
from denseclip_hf.cli.arguments import parse_arguments
from denseclip_hf.files import OutputError
from denseclip_hf.training.checkpoints import check_whole, newest_whole_checkpoint, write_manifest
from denseclip_hf.training.run_directory import (
    check_checkpoint,
    exclusive_directory,
    prepare_run,
    recipe_of,
    results_json,
    write_recipe,
)
from helpers.forked import Forked
from helpers.running import Run, one_sentence, training_recipe
from helpers.training import KINDS, trainer_for, write_folder


RECIPE = {"learning_rate": 1.0, "seed": 1, "max_steps": 10}


def make_checkpoint(folder):
    folder.mkdir(parents=True)
    for name in ("trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).write_text(f"{name}: {folder.name}")
    write_manifest(folder)
    return folder


@pytest.fixture
def run(tmp_path):
    """A run of `RECIPE` that was broken off after its second step."""
    write_recipe(tmp_path, RECIPE)
    make_checkpoint(tmp_path / "checkpoint-2")
    (tmp_path / ".writing" / "checkpoint-4").mkdir(parents=True)
    return tmp_path


def test_a_broken_off_run_goes_on_and_loses_what_was_half_written(run):
    assert prepare_run(run, RECIPE, main_process=False) and (run / ".writing").exists()
    assert prepare_run(run, RECIPE) and not (run / ".writing").exists()


def test_a_run_that_never_trained_is_in_nobodys_way(tmp_path):
    assert not prepare_run(tmp_path / "new", RECIPE)
    write_recipe(tmp_path, RECIPE)
    assert not prepare_run(tmp_path, {**RECIPE, "seed": 2})


def test_another_recipe_is_refused(run):
    for change, said in (({"seed": 2}, "seed 1 -> 2"), ({"max_steps": 5}, "max_steps 10 -> 5")):
        with pytest.raises(ValueError, match=said):
            prepare_run(run, {**RECIPE, **change})


def test_what_an_earlier_version_did_not_write_down_is_no_other_recipe(run):
    assert prepare_run(run, {"learning_rate": 1.0, "new": True})


def test_a_finished_run_is_refused_unless_it_goes_on_for_longer(run, tmp_path_factory):
    """Without checkpoints there is nothing to go on from, and the model is not overwritten."""
    (run / "README.md").touch(), (run / "model.safetensors").touch()
    bare = tmp_path_factory.mktemp("bare")
    write_recipe(bare, RECIPE)
    (bare / "model.safetensors").touch()
    for folder in (run, bare):
        with pytest.raises(ValueError, match="finished"):
            prepare_run(folder, RECIPE)
    assert prepare_run(run, {**RECIPE, "max_steps": 20})


@pytest.mark.parametrize("content", [b"", b'{"seed": ', b"5", b"\xff"])
def test_a_damaged_recipe_is_refused_by_name(run, content):
    (run / "recipe.json").write_bytes(content)
    with pytest.raises(ValueError, match="recipe.json"):
        prepare_run(run, RECIPE)


def test_a_foreign_directory_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="no run of this program"), exclusive_directory(tmp_path):
        prepare_run(tmp_path, RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("missing", ["data", "clip"])
def test_a_start_that_fails_leaves_nothing(tmp_path, monkeypatch, capsys, missing):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    data = write_folder(tmp_path / "data", 6) if missing == "clip" else "no/where"
    flags = ["--dataset", str(data), "--clip", "no/where", "--output_dir", str(tmp_path / "runs" / "run")]
    with pytest.raises(SystemExit, match="^1$"):
        train.main(flags)
    assert "no/where" in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_a_directory_that_cannot_be_written_is_refused(tmp_path, small_disk):
    (tmp_path / "file").touch()
    for folder, reason in (
        (tmp_path / "file" / "run", "File exists|Not a directory"),
        (small_disk("32k") / "run", "space"),
    ):
        with pytest.raises(OutputError, match=reason), exclusive_directory(folder):
            raise AssertionError("it was entered")
        assert not folder.exists()


ENTER = """
import sys, time
from denseclip_hf.training.run_directory import exclusive_directory
try:
    with exclusive_directory(sys.argv[1]):
        print("in", flush=True)
        time.sleep(float(sys.argv[2]))
except ValueError as error:
    print(error)
"""


def test_two_runs_that_start_at_once_do_not_share_a_directory(tmp_path):
    """Nor does the refused one leave anything, and the directory is free again when the first has ended."""
    pytest.importorskip("fcntl")
    script = tmp_path / "enter.py"
    script.write_text(ENTER)
    starts = [Forked([script, tmp_path / "run", "3"]) for _ in range(4)]
    said = [start.communicate(timeout=60)[0] for start in starts]
    assert sorted("another run is writing" in text for text in said) == [False, True, True, True]
    assert "in" in Forked([script, tmp_path / "run", "0"]).communicate(timeout=60)[0]


# Damage: `check_whole` and the trainer's way to the newest checkpoint that is whole


DAMAGES = {
    "cut": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "a tail of zeros": lambda data: data[:-4] + bytes(4),
    "one bit": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "longer": lambda data: data + b"\0",
    "removed": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "file",
    ["manifest.json", "trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(run, caplog, file, damage):
    damaged = make_checkpoint(run / "checkpoint-4") / file
    if DAMAGES[damage] is None:
        damaged.unlink()
    else:
        damaged.write_bytes(DAMAGES[damage](damaged.read_bytes()))
    assert newest_whole_checkpoint(run) == str(run / "checkpoint-2")
    assert "checkpoint-4 is damaged" in caplog.text and file in caplog.text
    assert (run / "damaged-checkpoint-4").exists() and not (run / "checkpoint-4").exists()


def test_the_only_checkpoint_is_refused_where_it_is_damaged(run):
    (run / "checkpoint-2" / "optimizer.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="checkpoint-2 .*optimizer.pt"):
        newest_whole_checkpoint(run)
    assert (run / "checkpoint-2").exists()


@pytest.mark.parametrize(
    "file, what", [("optimizer.pt", "optimizer"), ("scheduler.pt", "scheduler"), ("rng_state.pth", "random state")]
)
def test_a_checkpoint_without_the_state_of_training_is_refused(run, file, what):
    (run / "checkpoint-2" / file).unlink(), (run / "checkpoint-2" / "manifest.json").unlink()
    write_manifest(run / "checkpoint-2")
    with pytest.raises(ValueError, match=what):
        check_whole(run / "checkpoint-2")


def test_the_trainer_resumes_from_no_damaged_checkpoint(tmp_path):
    trainer_for(tmp_path, save_strategy="steps", save_steps=2, evaluate=False).train()
    damaged = tmp_path / "checkpoint-4" / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ValueError, match="checkpoint-4 .*optimizer.pt"):
        trainer_for(tmp_path, evaluate=False).train(resume_from_checkpoint=str(damaged.parent))
    trainer = trainer_for(tmp_path, evaluate=False)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4 and (tmp_path / "damaged-checkpoint-4").exists()


# Recipes


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("dataloader_drop_last", "false"), ("lr_scheduler_kwargs", '{"power": 2}'), ("optim_args", "amsgrad=true"),
        ("ignore_data_skip", "true"), ("ignore_index", "0"), ("metric_for_best_model", "loss"),
    ],
)  # fmt: skip
def test_what_decides_the_result_is_part_of_the_recipe(flag, value):
    one, other = (recipe_of(*parse_arguments(KINDS, flags)) for flags in ([], [f"--{flag}", value]))
    assert [name for name in one if one[name] != other[name]] == [flag]


@pytest.mark.parametrize(
    "flags", [["--check_data", "false"], ["--dataloader_num_workers", "3"], ["--save_steps", "7"]]
)
def test_what_does_not_is_none(flags):
    assert recipe_of(*parse_arguments(KINDS, [])) == recipe_of(*parse_arguments(KINDS, flags))


def test_a_data_set_may_move_but_not_change(tmp_path):
    data = write_folder(tmp_path / "here", 3, ".png")

    def recipe(folder):
        return recipe_of(*parse_arguments(KINDS, ["--dataset", str(folder)]))

    make_checkpoint(tmp_path / "run" / "checkpoint-2")
    write_recipe(tmp_path / "run", recipe(data))
    moved = data.rename(tmp_path / "there")
    assert prepare_run(tmp_path / "run", recipe(moved))
    (moved / "masks" / "0.png").unlink()
    with pytest.raises(ValueError, match="dataset"):
        prepare_run(tmp_path / "run", recipe(moved))


def test_a_checkpoint_of_another_recipe_or_of_none_is_refused(tmp_path):
    checkpoint = tmp_path / "other" / "checkpoint-4"
    with pytest.raises(ValueError, match="checkpoint-4"):
        check_checkpoint(checkpoint, RECIPE)
    make_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="--model"):
        check_checkpoint(checkpoint, RECIPE)
    write_recipe(tmp_path / "other", RECIPE)
    check_checkpoint(checkpoint, RECIPE)
    with pytest.raises(ValueError, match="seed 1 -> 2"):
        check_checkpoint(checkpoint, {**RECIPE, "seed": 2})


def test_undefined_scores_are_null_in_json():
    text = results_json({"iou": [0.5, float("nan")], "mean": float("nan"), "matrix": torch.zeros(2)})
    assert json.loads(text) == {"iou": [0.5, None], "mean": None}


# Whole commands


def test_a_checkpoint_of_another_run_is_not_gone_on_from_unasked(run, tmp_path_factory, capsys):
    folder = tmp_path_factory.mktemp("other") / "run"
    flags = ["--resume_from_checkpoint", str(run / "checkpoint-2"), "--learning_rate", "0.5", "--dataset", "d"]
    with pytest.raises(SystemExit, match="^1$"):
        train.main([*flags, "--output_dir", str(folder)])
    assert "learning_rate 1.0 -> 0.5" in capsys.readouterr().err and not folder.exists()


@pytest.mark.slow
def test_killed_training_goes_on_to_the_same_weights_and_then_for_longer(tmp_path):
    recipe = training_recipe(tmp_path)
    whole, killed = Run(tmp_path / "whole", [recipe]), Run(tmp_path / "killed", [recipe])
    whole.end()
    for wanted in ("checkpoint-2", "checkpoint-4"):  # two kills, each some steps after a checkpoint appears
        process = killed.begin(wanted)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    Run(killed.folder, [recipe], [sys.executable]).end()  # with a hash seed of its own
    assert killed.ends_as(whole) and killed.losses() == whole.losses()
    assert "holds a finished run" in one_sentence(killed.end(code=1))
    said = Run(killed.folder, [recipe, "--max_steps", "10"]).end()
    assert "Going on from" in said and killed.checkpoints() == [2, 4, 6, 8, 10] and len(killed.losses()) == 10
    assert "| Steps | 10 |" in (killed.folder / "README.md").read_text()
