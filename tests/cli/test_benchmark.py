import json
import sys
from pathlib import Path

import pytest
import torch

from denseclip_hf import benchmark_tasks
from denseclip_hf.benchmark_tasks import BASELINE, TASKS, Settings
from denseclip_hf.benchmarking import floating_point_operations, matrix_speed, training_step
from helpers.models import tiny_model


sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import benchmark


PRESETS = ["denseclip-rn50", "denseclip-vit-b16"]


@pytest.fixture
def tiny(monkeypatch):
    """The tasks measure tiny models of few classes on small pictures."""

    def build(preset, num_labels=3, **options):
        return tiny_model("vit" if "vit" in preset else "resnet", num_labels=num_labels, **options)

    monkeypatch.setattr(benchmark_tasks, "build_model", build)
    monkeypatch.setattr(benchmark_tasks, "IMAGE_SIZES", dict.fromkeys(PRESETS, 64))
    monkeypatch.setattr(benchmark_tasks, "WIDE_PICTURE", (64, 128))
    monkeypatch.setattr(benchmark_tasks, "CLASS_COUNTS", (3, 5))
    monkeypatch.setattr(benchmark_tasks, "matrix_speed", lambda device: 1e12)


def rows_of(task, compiled=False):
    return TASKS[task](Settings(PRESETS, 2, "cpu", compiled))


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("task", ["inference", "slide"])
def test_all_ways_of_inference_are_compared_with_the_original(task):
    rows = rows_of(task)
    ways = [BASELINE, f"{BASELINE}, bf16", "ours, eager", "ours, optimized", "ours, optimized, bf16"]
    assert [row["case"] for row in rows] == ways * 2
    for row in rows:
        assert float(row["times faster"]) == 1 if row["case"] == BASELINE else float(row["times faster"]) > 0
        assert float(row["largest difference"]) < (0.1 if "bf16" in row["case"] else 1e-4)


@pytest.mark.usefixtures("tiny")
def test_all_ways_of_training_begin_with_the_same_loss():
    rows = rows_of("training")
    assert [row["case"] for row in rows] == [BASELINE, f"{BASELINE}, bf16", "ours", "ours, bf16"] * 2
    for first in (0, 4):
        expected, *others = [float(row["first loss"]) for row in rows[first : first + 4]]
        assert others[1] == pytest.approx(expected, abs=1e-4)  # ours; the others are in bf16
        assert others == pytest.approx([expected] * 3, rel=2e-2)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_compiled_models_are_measured_too(monkeypatch):
    monkeypatch.setattr(benchmark_tasks.torch, "compile", lambda model, **options: model)
    for task in ("inference", "slide", "training"):
        cases = [row["case"] for row in rows_of(task, compiled=True)]
        assert len([case for case in cases if case.endswith(", compiled")]) == 4
    assert all(row["compiled"] for row in rows_of("throughput", compiled=True))


@pytest.mark.usefixtures("tiny")
def test_throughput_is_a_share_of_the_matrix_speed():
    rows = rows_of("throughput")
    assert [row["case"] for row in rows] == ["inference", "training"] * 2
    assert all(row["pictures/s"] > 0 and row["of the matrix speed"].endswith("%") for row in rows)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_costs_by_part_classes_and_size():
    parts = rows_of("parts")
    assert len(parts) == 10 and all(row["text tower"] == 0 for row in parts if not row["case"].startswith(BASELINE))
    assert [(row["classes"], row["case"]) for row in rows_of("classes")] == [
        (count, case) for count in (3, 5) for case in ("ours", BASELINE)
    ]
    assert len(rows_of("sizes")) == 12
    assert all(row["ours"] <= row["the original's way"] for row in rows_of("flops"))


def test_a_backward_pass_has_twice_the_operations_of_a_forward_pass():
    layer, x = torch.nn.Linear(8, 4), torch.randn(2, 8, requires_grad=True)
    assert floating_point_operations(lambda: layer(x)) == 2 * 2 * 8 * 4
    assert floating_point_operations(lambda: layer(x).sum().backward()) == 3 * 2 * 2 * 8 * 4
    assert matrix_speed("cpu", 64) > 0


def test_a_training_step_under_autocast_keeps_its_weights_in_float32(kind):
    model = tiny_model(kind)
    before = model.decode_head.classifier.weight.clone()
    assert training_step(model, 64, dtype=torch.bfloat16)() > 0
    after = model.decode_head.classifier.weight
    assert after.dtype == torch.float32 and not torch.equal(before, after)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_the_script_writes_its_tables_after_every_task(tmp_path, capsys):
    arguments = ["--tasks", "flops", "sizes", "--rounds", "1", "--output_dir", str(tmp_path), "--device", "cpu"]
    assert benchmark.main(arguments) == 0
    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert report["tasks"].keys() == {"flops", "sizes"} and "cores" in report["hardware"]
    tables = (tmp_path / "benchmark.md").read_text()
    assert "| what | published GMAC |" in tables and tables.count("###") == 2
    assert str(tmp_path) in capsys.readouterr().out
