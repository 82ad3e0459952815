"""Flags of dataclasses: what is accepted, refused and shown."""

import logging

import pytest

from denseclip_hf.cli.arguments import log_to_terminal, parse_arguments
from denseclip_hf.evaluation import EvaluationArguments
from helpers.training import KINDS


def shown(capsys, kinds, *argv, **options):
    """What is printed before the end."""
    with pytest.raises(SystemExit):
        parse_arguments(kinds, argv, **options)
    printed = capsys.readouterr()
    return printed.out + printed.err


@pytest.mark.parametrize(
    ("flags", "value"),
    [([], None), (["--do_reduce_labels"], True), (["--do-reduce-labels", "false"], False)],
)
def test_a_flag_that_may_be_unset_needs_no_value(flags, value):
    assert parse_arguments(KINDS, flags)[1].do_reduce_labels is value
    assert parse_arguments([EvaluationArguments], flags)[0].do_reduce_labels is value


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--max_stepz=3"], "`--max_steps`"),
        (["--qqq", "3"], "`--help`"),
        (["--max_steps", "3", "r.yaml"], "`r.yaml`"),
        (["--output_dir", "x"], "`--dataset`"),
        ([], "`--dataset` and `--output_dir`"),
    ],
)
def test_unknown_and_missing_flags_are_one_sentence(argv, named):
    with pytest.raises(ValueError, match=named) as error:
        parse_arguments(KINDS, argv, needed=["dataset", "output_dir"])
    assert "\n" not in str(error.value)


def test_what_is_needed_may_stand_in_a_recipe(tmp_path):
    (tmp_path / "r.yaml").write_text("dataset: streets\n")
    assert parse_arguments(KINDS, [str(tmp_path / "r.yaml")], needed=["dataset"])[1].dataset == "streets"


def test_help_begins_with_this_librarys_options(capsys):
    said = shown(capsys, KINDS, "--help", description="Train.\n\n    an example")
    assert said.splitlines()[0].endswith("[RECIPE.yaml ...] [--option VALUE ...]") and "\n    an example\n" in said
    order = ["What is trained", "--clip ", "What it is trained on", "--dataset ", "How it is trained", "--output_dir "]
    order += ["--image_encoder_lr_multiplier ", "Further options", "--adam_beta1 "]
    assert sorted(order, key=said.index) == order
    assert "--crop-size" not in said and "(default: None)" not in said and "(default: 512)" in said
    assert "--no_photometric" in said


def test_a_value_of_another_type_is_two_lines(capsys):
    assert len(shown(capsys, KINDS, "--max_steps", "x").splitlines()) == 2


def test_what_the_hub_says_is_said_once(monkeypatch):
    hub = logging.getLogger("huggingface_hub")  # whose own handler writes it too
    monkeypatch.setattr(hub, "propagate", True)
    log_to_terminal()
    assert hub.handlers and not hub.propagate
