"""What an evaluation leaves behind. What the report says is tested where it is measured, in `test_evaluate.py`."""

import csv
import os

import pytest

from denseclip_hf.evaluation.report import build_report, save_report


SCORES = {
    "mean_iou": 0.5,
    "classes_in_mean_iou": 1,
    "per_category_iou": [0.5, float("nan")],
    "per_category_accuracy": [0.25, 1.0],
}
REPORT = build_report(SCORES, ['say "sky", or air', "road"])


def test_the_table_has_a_class_a_line(tmp_path):
    save_report(REPORT, tmp_path)
    rows = list(csv.reader((tmp_path / "evaluation.csv").open(newline="")))
    assert rows == [["class", "iou", "accuracy"], ['say "sky", or air', "0.5", "0.25"], ["road", "", "1.0"]]


def test_files_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    for name in ("evaluation.json", "evaluation.csv"):
        (tmp_path / name).write_text("an earlier one's")
    move = os.replace
    monkeypatch.setattr(
        os, "replace", lambda old, new: move(old, new) if new.suffix == ".json" else os.stat(new / "x")
    )
    with pytest.raises(NotADirectoryError):
        save_report(REPORT, tmp_path)
    assert (tmp_path / "evaluation.csv").read_text() == "an earlier one's"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["evaluation.csv", "evaluation.json"]
