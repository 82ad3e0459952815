"""`accelerate launch` on two processes of the CPU (gloo): as one process does; and one of them is killed."""

import json
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

from helpers.forked import free_port
from helpers.running import TRAIN, Run, one_sentence, training_recipe
from helpers.training import NO_DROPOUT, TINY


pytestmark = pytest.mark.slow


def launcher(*options):
    options = options or ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--dynamo_backend", "no"]
    options = [*options, "--mixed_precision", "no", "--main_process_port", "0"]
    return [sys.executable, "-m", "accelerate.commands.launch", *map(str, options)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """With an epsilon that keeps Adam from blowing up what rounding leaves of gradients near zero."""
    options = {"config": {**TINY, **NO_DROPOUT}, "max_steps": 6, "adam_epsilon": 1e-4}
    return training_recipe(tmp_path_factory.mktemp("launch"), **options)


@pytest.fixture(scope="module")
def launched(recipe):
    run = Run(recipe.parent / "launched", [recipe], launcher())
    run.end()
    return run


def test_launched_training_equals_one_process_with_the_doubled_batch(recipe, launched):
    one = Run(recipe.parent / "one", [recipe, "--per_device_train_batch_size", "4"])
    one.end()
    torch.testing.assert_close(torch.tensor(launched.losses()), torch.tensor(one.losses()), atol=2e-4, rtol=1e-3)
    expected, weights = one.weights(), launched.weights()
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], atol=1e-5, rtol=0, msg=name)


def test_launched_evaluation_equals_one_process(launched, recipe, tmp_path):
    options = ["--model", launched.folder, "--dataset", recipe.parent / "data", "--device", "cpu"]
    losses, reports = [], []
    for start in (None, launcher()):
        folder = tmp_path / str(len(reports))
        run = Run(folder, [*options, "--split", "train"], start, script=TRAIN.parent / "evaluate.py")
        run.end()
        report = json.loads((folder / "evaluation.json").read_text())
        losses.append(report["metrics"].pop("loss", 0.0))
        reports.append(json.dumps(report))  # NaN, the score of what never occurs, equals itself there
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert reports[0] == reports[1]


def test_a_killed_process_ends_the_others_and_the_run_goes_on(launched, recipe, tmp_path):
    run = Run(tmp_path / "run", [recipe], launcher())
    assert "Signal 9 (SIGKILL) received" in run.end(code=1, fault="rank")
    assert run.ended - (tmp_path / "run.killed").stat().st_mtime < 60
    assert run.checkpoints() == [2, 4] and not (run.folder / "model.safetensors").exists()
    run.end()
    assert run.ends_as(launched) and run.losses() == launched.losses()


def test_without_a_launcher_the_others_say_so(recipe, tmp_path):
    """A launcher ends them itself, often before they can say anything."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    first, second = (
        Run(tmp_path / "run", [recipe], [sys.executable], **address, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in (0, 1)
    )
    with ThreadPoolExecutor() as pool:
        killed = pool.submit(second.end, code=-signal.SIGKILL, fault="rank")
        said = one_sentence(first.end(code=1, fault="rank"))
        killed.result()
    assert first.ended - (tmp_path / "run.killed").stat().st_mtime < 60
    assert said.startswith("error: another process of this run is gone") and "start the same command again" in said


def test_fsdp_takes_the_same_steps(recipe, launched, tmp_path):
    """FSDP2 as configs/accelerate/fsdp2.yaml says, but in float32."""
    config = TRAIN.parent.parent / "configs" / "accelerate" / "fsdp2.yaml"
    start = launcher("--config_file", config, "--num_processes", "2")
    run = Run(tmp_path / "run", [recipe], start)
    run.end(fault="fsdp")
    torch.testing.assert_close(torch.tensor(run.losses()), torch.tensor(launched.losses()), atol=2e-4, rtol=1e-3)
    expected, weights = launched.weights(), run.weights()
    assert weights.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], atol=1e-5, rtol=0, msg=name)


def test_a_signal_to_one_process_stops_all_at_the_same_step(launched, recipe, tmp_path):
    run = Run(tmp_path / "run", [recipe], launcher())
    process = run.begin()
    psutil.Process(process.pid).children()[-1].terminate()
    said = process.communicate(timeout=100)[0]
    step = int(re.search(r"stopped at step (\d+) \(SIGTERM\): the checkpoint is complete", said)[1])
    assert process.returncode == 1 and run.checkpoints()[-1] == step
    run.end()
    assert run.ends_as(launched)
