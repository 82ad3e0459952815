"""Two processes on the CPU (gloo) must do what one does with the doubled batch."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.forked import run_ranks


pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[1] / "helpers" / "distributed_training.py"


def run(output_dir, processes, batch_size, **options):
    """Start the script on `processes` processes and return what each of them wrote, results and weights."""
    output_dir.mkdir()
    options = json.dumps({"per_device_train_batch_size": batch_size, **options})
    codes, said = run_ranks(processes, SCRIPT, output_dir, options)
    assert codes == [0] * processes, said
    results = [json.loads((output_dir / f"result-{rank}.json").read_text()) for rank in range(processes)]
    return results, [torch.load(output_dir / f"weights-{rank}.pt", weights_only=True) for rank in range(processes)]


def column(result, key):
    return torch.tensor([entry[key] for entry in result["log"]])


def assert_same_training(one, two):
    """Losses, what else is logged, and the final weights, which all processes share."""
    (result_of_one,), (expected,) = one
    results, weights = two
    for key in ("loss", "decode_loss", "auxiliary_loss", "pixel_accuracy", "learning_rate/decoder"):
        assert len(column(results[0], key)) == 5
        torch.testing.assert_close(column(results[0], key), column(result_of_one, key), atol=2e-4, rtol=1e-3, msg=key)
    for name, value in expected.items():
        torch.testing.assert_close(weights[0][name], value, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(weights[0][name], weights[1][name]), name


def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    """Ten pictures in global batches of four: the incomplete last batch is shared."""
    one = run(tmp_path / "one", 1, 4, dataloader_drop_last=False)
    two = run(tmp_path / "two", 2, 2, dataloader_drop_last=False)
    assert [len(names) for names in two[0][1]["seen"]] == [2, 2, 1, 2, 2]
    assert_same_training(one, two)
    # Every picture counted once, on however many processes.
    (expected,), (result, _) = one[0], two[0]
    assert sum(map(sum, result["matrix"])) == sum(map(sum, expected["matrix"]))
    assert result["num_images"] == expected["num_images"] == 10
    assert result["loss"] == pytest.approx(expected["loss"], abs=1e-2)


def test_processes_share_a_stream(tmp_path):
    one = run(tmp_path / "one", 1, 4, stream=True)
    two = run(tmp_path / "two", 2, 2, stream=True)
    first_pass = sum((sum(result["seen"], [])[:5] for result in two[0]), [])
    assert sorted(first_pass) == sorted(map(str, range(10)))  # each picture once
    assert_same_training(one, two)


def test_all_processes_end_with_the_best_model(tmp_path):
    """The loss as a score that shall be high makes an early checkpoint the best."""
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 1e-2}
    results, weights = run(tmp_path / "two", 2, 2, **options)
    best = {result["best"] for result in results}
    assert len(best) == 1 and Path(*best).parent == tmp_path / "two" and Path(*best).name != "checkpoint-5"
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    saved = load_file(Path(*best) / "model.safetensors")
    assert saved.keys() == weights[0].keys() and all(torch.equal(saved[name], weights[0][name]) for name in saved)
