"""Runs that are broken off, and directories that are not theirs."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from denseclip_hf.cli import train
from denseclip_hf.cli.arguments import one_sentence_errors, parse_arguments, sentence_of
from denseclip_hf.files import OutputError
from denseclip_hf.training.run_directory import (
    begin_run,
    check_checkpoint,
    finish_run,
    keep_others_out,
    prepare_run,
    recipe_of,
    results_json,
    write_manifest,
)
from helpers.running import Run, one_sentence, training_recipe
from helpers.training import KINDS, trainer_for, write_folder


RECIPE = {"learning_rate": 1.0, "seed": 1}


def make_checkpoint(folder):
    folder.mkdir(parents=True)
    for name in ("trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).write_text(f"{name}: {folder.name}")
    write_manifest(folder)
    return folder


def test_processes_after_the_main_one_remove_nothing(tmp_path):
    begin_run(tmp_path / "run", RECIPE)
    make_checkpoint(tmp_path / "run" / "checkpoint-2")
    (tmp_path / "run" / ".writing").mkdir()
    assert prepare_run(tmp_path / "run", RECIPE, main_process=False).endswith("checkpoint-2")
    assert (tmp_path / "run" / ".writing").exists()


def test_a_new_run_keeps_its_recipe_once_it_begins(tmp_path):
    assert prepare_run(tmp_path / "new" / "run", RECIPE) is None and not list(tmp_path.iterdir())
    begin_run(tmp_path / "new" / "run", RECIPE)
    assert json.loads((tmp_path / "new" / "run" / "recipe.json").read_text()) == RECIPE
    assert prepare_run(tmp_path / "new" / "run", RECIPE) is None


@pytest.mark.parametrize("missing", ["data", "clip"])
def test_a_start_that_fails_leaves_nothing(tmp_path, monkeypatch, capsys, missing):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    data = write_folder(tmp_path / "data", 6) if missing == "clip" else "no/where"
    flags = ["--dataset", str(data), "--clip", "no/where", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="^1$"):
        train.main(flags)
    assert "no/where" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_training_without_a_directory_is_refused(capsys):
    with pytest.raises(SystemExit, match="^1$"):
        train.main(["--dataset", "streets"])
    assert capsys.readouterr().err == "error: give `--output_dir`, by flag or recipe: see `--help`.\n"


def test_a_broken_off_run_goes_on_from_its_last_checkpoint(tmp_path):
    begin_run(tmp_path, RECIPE)
    for step in (2, 10):
        make_checkpoint(tmp_path / f"checkpoint-{step}")
    (tmp_path / ".writing" / "checkpoint-12").mkdir(parents=True)
    assert prepare_run(tmp_path, RECIPE) == str(tmp_path / "checkpoint-10")
    assert not (tmp_path / ".writing").exists()


def test_a_run_that_ended_before_it_trained_is_in_nobodys_way(tmp_path):
    begin_run(tmp_path, RECIPE)
    assert prepare_run(tmp_path, {**RECIPE, "seed": 2}) is None


def test_another_recipe_is_refused(tmp_path):
    begin_run(tmp_path, RECIPE)
    make_checkpoint(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="another recipe .seed 1 -> 2.: name a new output directory"):
        prepare_run(tmp_path, {**RECIPE, "seed": 2})


@pytest.mark.parametrize("content", [b"", b'{"seed": ', b"5", b'"text"', b"\xff"])
def test_a_damaged_recipe_is_refused_by_name(tmp_path, content):
    (tmp_path / "recipe.json").write_bytes(content)
    make_checkpoint(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="recipe.json is damaged .*: name a new output directory"):
        prepare_run(tmp_path, RECIPE)


@pytest.mark.parametrize("content", [b"", b'{"epoch": ', b"\xff", b"5", b"null", b"[]", b"{}"])
@pytest.mark.parametrize("file", ["trainer_state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, file, content):
    begin_run(tmp_path, RECIPE)
    checkpoint = make_checkpoint(tmp_path / "checkpoint-2")
    (checkpoint / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"checkpoint-2 is damaged .*{file}"):
        prepare_run(tmp_path, RECIPE)
    with pytest.raises(ValueError, match=f"checkpoint-2 is damaged .*{file}"):
        check_checkpoint(checkpoint, RECIPE)
    assert checkpoint.exists()


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
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(tmp_path, caplog, file, damage):
    begin_run(tmp_path, RECIPE)
    make_checkpoint(tmp_path / "checkpoint-2")
    damaged = make_checkpoint(tmp_path / "checkpoint-4") / file
    if DAMAGES[damage] is None:
        damaged.unlink()
    else:
        damaged.write_bytes(DAMAGES[damage](damaged.read_bytes()))
    assert prepare_run(tmp_path, RECIPE) == str(tmp_path / "checkpoint-2")
    assert "checkpoint-4 is damaged" in caplog.text and file in caplog.text
    assert (tmp_path / "damaged-checkpoint-4").exists() and not (tmp_path / "checkpoint-4").exists()


@pytest.mark.parametrize(
    "file, what", [("optimizer.pt", "optimizer"), ("scheduler.pt", "scheduler"), ("rng_state.pth", "random state")]
)
def test_a_checkpoint_without_the_state_of_training_is_refused(tmp_path, file, what):
    begin_run(tmp_path, RECIPE)
    checkpoint = make_checkpoint(tmp_path / "checkpoint-2")
    (checkpoint / file).unlink(), (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint)
    with pytest.raises(ValueError, match=f"without {what}, .*--model"):
        prepare_run(tmp_path, RECIPE)


def test_the_recipe_of_a_run_that_began_first_stays(tmp_path):
    begin_run(tmp_path, RECIPE)
    make_checkpoint(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="another recipe"):
        begin_run(tmp_path, {**RECIPE, "seed": 2})
    with pytest.raises(ValueError, match="another run began"):
        begin_run(tmp_path, RECIPE)
    assert json.loads((tmp_path / "recipe.json").read_text()) == RECIPE


def test_what_an_earlier_version_did_not_write_down_is_no_other_recipe(tmp_path):
    begin_run(tmp_path, RECIPE)
    make_checkpoint(tmp_path / "checkpoint-2")
    assert prepare_run(tmp_path, {"learning_rate": 1.0, "new": True}) == str(tmp_path / "checkpoint-2")


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


def test_a_checkpoint_of_another_recipe_or_of_none_is_refused(tmp_path):
    checkpoint = tmp_path / "other" / "checkpoint-4"
    with pytest.raises(ValueError, match="checkpoint-4 is no checkpoint: give a directory such as"):
        check_checkpoint(checkpoint, RECIPE)
    make_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="lies in no run with a recipe.json, .* `--model .*checkpoint-4`"):
        check_checkpoint(checkpoint, RECIPE)
    (tmp_path / "other" / "recipe.json").write_text(json.dumps(RECIPE))
    check_checkpoint(checkpoint, RECIPE)
    with pytest.raises(ValueError, match="checkpoint-4 is of another recipe .seed 1 -> 2.: run that recipe, or start"):
        check_checkpoint(checkpoint, {**RECIPE, "seed": 2})


def test_a_finished_run_is_refused(tmp_path):
    begin_run(tmp_path, RECIPE)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="holds a finished run of this recipe: name a new output directory"):
        prepare_run(tmp_path, RECIPE)


def test_a_foreign_directory_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(
        ValueError, match="not empty and holds no run of this program: name a new one, so that nothing"
    ):
        prepare_run(tmp_path, RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_unwritable_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="output directory .*file cannot be written .File exists.: name another"):
        prepare_run(tmp_path / "file" / "run", RECIPE)


def test_a_full_disk_is_refused_before_anything_starts(small_disk):
    disk = small_disk("32k")
    with pytest.raises(OutputError, match="cannot be written .No space left on device.: make room there, or name"):
        prepare_run(disk / "run", RECIPE)
    assert not (disk / "run").exists()


def test_undefined_scores_are_null_in_json():
    text = results_json({"iou": [0.5, float("nan")], "mean": float("nan"), "matrix": torch.zeros(2)})
    assert json.loads(text) == {"iou": [0.5, None], "mean": None}


def test_scripts_end_in_one_sentence(capsys):
    @one_sentence_errors
    def main():
        raise ValueError("the mask is missing: add it.")

    with pytest.raises(SystemExit, match="^1$"):
        main()
    assert capsys.readouterr().err == "error: the mask is missing: add it.\n"


@pytest.mark.parametrize(
    ("last", "sentence"),
    [
        ("ValueError: a.png is cut off: copy it again", "a.png is cut off: copy it again"),
        ("ValueError: a.png is cut off (bad: 3)\nplease try later", "a.png is cut off (bad: 3)\nplease try later"),
        ("PIL.UnidentifiedImageError: a.png\n\nsee above", "a.png\n\nsee above"),
        ("ValueError", "ValueError"),
        ("ValueError: ", "ValueError:"),
    ],
)
def test_what_a_worker_says_is_kept_whole(last, sentence):
    trace = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\n    raise {"a: b": 1}'
    cause = "OSError: broken pipe\n\nThe above exception was the direct cause of the following exception:\n"
    text = f"Caught ValueError in DataLoader worker process 0.\nOriginal {trace}\n{cause}\n{trace}\n{last}"
    assert sentence_of(ValueError(text)) == sentence


def test_an_error_without_a_message_is_called_by_its_name():
    assert sentence_of(ValueError()) == "ValueError" and sentence_of(OSError(" \n")) == "OSError"


def test_scripts_end_at_ctrl_c_as_shells_expect():
    @one_sentence_errors
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="^130$"):
        main()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid(), reason="only root can become somebody else")
def test_a_directory_without_permission_is_refused_as_anybody_but_root(tmp_path):
    """In a process of its own, which gives up root's rights."""
    folder = tmp_path / "run"
    folder.mkdir()
    tmp_path.chmod(0o755), folder.chmod(0o555)
    code = "from denseclip_hf.training.run_directory import os, prepare_run; os.setuid(65534); prepare_run(%r, {})"
    said = subprocess.run([sys.executable, "-c", code % str(folder)], capture_output=True, text=True).stderr
    assert re.search(r"OutputError: the output directory \S+ cannot be written \(.*\): name another\.$", said, re.M)
    assert not list(folder.iterdir())


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_not_gone_on_from_unasked(tmp_path):
    recipe = training_recipe(tmp_path, max_steps=2)
    Run(tmp_path / "one", [recipe]).end()
    flags = ["--resume_from_checkpoint", tmp_path / "one" / "checkpoint-2", "--learning_rate", "0.5"]
    said = one_sentence(Run(tmp_path / "other", [recipe, *flags]).end(code=1))
    assert "is of another recipe (learning_rate 0.001 -> 0.5)" in said and not (tmp_path / "other").exists()


@pytest.mark.slow
def test_killed_training_goes_on_to_the_same_weights(tmp_path):
    recipe = training_recipe(tmp_path)
    python = [sys.executable]  # with hash seeds of its own
    whole, killed = Run(tmp_path / "whole", [recipe], python), Run(tmp_path / "killed", [recipe], python)
    whole.end()
    for wanted in ("checkpoint-4", "checkpoint-8"):  # two kills, each some steps after a checkpoint appears
        process = killed.begin(wanted)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    killed.end()
    assert killed.ends_as(whole) and killed.losses() == whole.losses()
    assert "holds a finished run" in one_sentence(killed.end(code=1))


def test_a_directory_is_free_again_when_its_run_has_ended(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    keep_others_out(tmp_path)
    keep_others_out(tmp_path)  # as a script does that is started again in the same process
    other = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finish_run(trainer_for(tmp_path))
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.raises(ValueError, match="another run is writing into"):
        keep_others_out(tmp_path)
    os.close(other)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_damaged_checkpoint_to_resume_from_is_named(tmp_path, file):
    trainer_for(tmp_path / "run", save_strategy="steps", save_steps=2, evaluate=False).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    whole = (checkpoint / file).read_bytes()
    for content in (whole[: len(whole) // 2], b""):
        (checkpoint / file).write_bytes(content)
        with pytest.raises(ValueError, match=f"checkpoint-2 is damaged .{file} .*: remove it"):
            trainer_for(tmp_path / "run", evaluate=False).train(resume_from_checkpoint=str(checkpoint))
