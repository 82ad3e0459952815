"""The benchmark compares what gives equal results."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from helpers.models import EOS, SOS, tiny_config, tiny_model


@pytest.fixture
def benchmark(monkeypatch):
    """The script, with tiny models in place of the published ones."""
    path = Path(__file__).parents[2] / "scripts" / "benchmark.py"
    spec = importlib.util.spec_from_file_location("benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    no_dropout = {"context_decoder_dropout": 0.0, "decode_head_dropout": 0.0, "drop_path_rate": 0.0}
    tokens = [[SOS, index % 90, EOS] for index in range(150)]

    def tiny(name, **options):
        mode = options["inference_mode"]
        return tiny_config(num_labels=150, class_token_ids=tokens, inference_mode=mode, **no_dropout)

    monkeypatch.setattr(module.DenseCLIPConfig, "from_preset", tiny)
    monkeypatch.setattr(module, "IMAGE_SIZES", {"denseclip-rn50": 64})
    return module


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_the_originals_way_gives_the_same_results(benchmark, kind, mode):
    model, images = tiny_model(kind, inference_mode=mode), torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        ours = model(images).logits
        theirs = benchmark.work_like_the_original(model)(images).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_both_ways_of_training_have_the_same_losses(benchmark):
    ways = ("ours", benchmark.ORIGINAL)
    ours, theirs = (benchmark.training_step("denseclip-rn50", way, 150, {}, "cpu") for way in ways)
    for _ in range(3):
        assert ours() == pytest.approx(theirs(), rel=1e-4)


@pytest.mark.slow
def test_tables_are_written(benchmark, tmp_path, capsys):
    benchmark.main(["--tasks", "slide", "--presets", "denseclip-rn50", "--rounds", "1", "--output_dir", str(tmp_path)])
    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert [row["case"] for row in report["tasks"]["slide"]] == [benchmark.ORIGINAL, "eager", "optimized"]
    assert (tmp_path / "benchmark.md").read_text().count("###") == 1 and "Results are in" in capsys.readouterr().out
