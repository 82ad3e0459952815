"""`accelerate launch` on two processes of the CPU (gloo): as one process does; and one of them is killed."""

import os
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from helpers.forked import free_port
from helpers.running import TRAIN, Run, one_sentence, training_recipe
from helpers.training import NO_DROPOUT, TINY


pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("launch")]


def launcher(*options):
    options = options or ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--dynamo_backend", "no"]
    options = [*options, "--mixed_precision", "no", "--main_process_port", "0"]
    return [sys.executable, "-m", "accelerate.commands.launch", *map(str, options)]


def ranks(folder, recipe):
    """The two processes of a run as a launcher would start them, without one."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    return [Run(folder, [recipe], **address, RANK=rank, LOCAL_RANK=rank) for rank in "01"]


def end_both(runs, codes=(0, 0), fault=None):
    """What each of them said."""
    with ThreadPoolExecutor() as pool:
        said = [pool.submit(run.end, code, fault) for run, code in zip(runs, codes, strict=True)]
    return [future.result() for future in said]


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


def assert_same_steps(run, expected):
    torch.testing.assert_close(torch.tensor(run.losses()), torch.tensor(expected.losses()), atol=2e-4, rtol=1e-3)
    weights, expected = run.weights(), expected.weights()
    assert weights.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], atol=1e-5, rtol=0, msg=name)


def test_launched_training_equals_one_process_with_the_doubled_batch(recipe, launched):
    one = Run(recipe.parent / "one", [recipe, "--per_device_train_batch_size", "4"])
    one.end()
    assert_same_steps(launched, one)


def test_a_killed_process_ends_the_others_and_the_run_goes_on(launched, recipe, tmp_path):
    run = Run(tmp_path / "run", [recipe], launcher())
    assert "Signal 9 (SIGKILL) received" in run.end(code=1, fault="rank")
    assert run.ended - (tmp_path / "run.killed").stat().st_mtime < 60
    assert run.checkpoints() == [2, 4] and not (run.folder / "model.safetensors").exists()
    end_both(ranks(run.folder, recipe))
    assert run.ends_as(launched) and run.losses() == launched.losses()


def test_without_a_launcher_the_others_say_so(recipe, tmp_path):
    """A launcher ends them itself, often before they can say anything."""
    runs = ranks(tmp_path / "run", recipe)
    said = one_sentence(end_both(runs, (1, -signal.SIGKILL), fault="rank")[0])
    assert runs[0].ended - (tmp_path / "run.killed").stat().st_mtime < 60
    assert said.startswith("error: another process of this run is gone") and "start the same command again" in said


def test_fsdp_takes_the_same_steps(recipe, launched, tmp_path):
    """FSDP2 as configs/accelerate/fsdp2.yaml says, but in float32."""
    config = TRAIN.parent.parent / "configs" / "accelerate" / "fsdp2.yaml"
    run = Run(tmp_path / "run", [recipe], launcher("--config_file", config, "--num_processes", "2"))
    run.end(fault="fsdp")
    assert_same_steps(run, launched)


def test_a_signal_to_one_process_stops_all_at_the_same_step(launched, recipe, tmp_path):
    runs = ranks(tmp_path / "run", recipe)
    with ThreadPoolExecutor() as pool:
        processes = list(pool.map(Run.begin, runs))
    os.kill(processes[1].pid, signal.SIGTERM)
    said, _ = (process.communicate(timeout=100)[0] for process in processes)
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2, said
    step = int(re.search(r"stopped at step (\d+) \(SIGTERM\): the checkpoint is complete", said)[1])
    assert runs[0].checkpoints()[-1] == step
    end_both(ranks(runs[0].folder, recipe))
    assert runs[0].ends_as(launched)
