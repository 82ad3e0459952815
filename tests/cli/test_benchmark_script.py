"""What `scripts/benchmark.py` says of the machine."""

import importlib.util
from pathlib import Path

import pytest
import torch


@pytest.mark.parametrize(
    ("device", "words"), [("cuda", "GPU cuda, "), ("cuda:0", "GPU cuda:0, "), ("cpu", " CPU, "), ("cpu:0", " CPU, ")]
)
def test_the_report_names_the_device_that_was_measured(monkeypatch, device, words):
    script = Path(__file__).parents[2] / "scripts" / "benchmark.py"
    spec = importlib.util.spec_from_file_location("benchmark_script", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device}")
    assert words in module.hardware(device)
