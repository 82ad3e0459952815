"""How every command ends that cannot do what it was asked for: in one sentence."""

import pytest

from denseclip_hf import DenseCLIPConfig
from denseclip_hf.cli import train
from denseclip_hf.cli.arguments import one_sentence_errors, sentence_of


def test_training_without_a_directory_is_refused(capsys):
    with pytest.raises(SystemExit, match="^1$"):
        train.main(["--dataset", "streets"])
    assert capsys.readouterr().err == "error: give `--output_dir`, by flag or recipe: see `--help`.\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError("the mask is missing"), 1), (ImportError("the mask is missing"), 1), (KeyboardInterrupt(), 130)],
)
def test_commands_end_in_one_sentence_and_as_shells_expect(capsys, error, code):
    @one_sentence_errors
    def main():
        raise error

    with pytest.raises(SystemExit, match=f"^{code}$"):
        main()
    assert capsys.readouterr().err == ("error: the mask is missing\n" if code == 1 else "")


def test_options_of_another_kind_end_in_one_sentence(capsys):
    with pytest.raises(SystemExit):
        one_sentence_errors(DenseCLIPConfig)(temperature="warm")
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "temperature" in said and said.count("\n") == 1


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
