"""Two processes on the CPU (gloo) must do what one does with the doubled batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch


SCRIPT = Path(__file__).parent / "distributed_training.py"


def run(output_dir, processes, batch_size):
    """Start the script on `processes` processes and return what the first one wrote."""
    output_dir.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = {"WORLD_SIZE": str(processes)} if processes > 1 else {}
    started = []
    for rank in range(processes):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), **world} if world else {}
        command = [sys.executable, str(SCRIPT), str(output_dir), str(batch_size)]
        started.append(subprocess.Popen(command, env={**common, **ranks}))
    try:
        assert [process.wait(timeout=150) for process in started] == [0] * processes
    finally:
        for process in started:
            process.kill()
    weights = torch.load(output_dir / "weights.pt", weights_only=True)
    return json.loads((output_dir / "result.json").read_text()), weights


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    """Ten pictures in global batches of four: the incomplete last batch is left out alike."""
    one, weights_of_one = run(tmp_path / "one", 1, 4)
    two, weights_of_two = run(tmp_path / "two", 2, 2)
    assert len(one["losses"]) == 5
    # Logged losses are averaged over processes, so they are the whole batch's.
    torch.testing.assert_close(torch.tensor(two["losses"]), torch.tensor(one["losses"]), atol=2e-4, rtol=1e-3)
    for name, expected in weights_of_one.items():
        torch.testing.assert_close(
            weights_of_two[name], expected, atol=3e-4, rtol=1e-2, msg=lambda m, n=name: f"{n}: {m}"
        )
    # Every picture counted once, on however many processes.
    assert sum(map(sum, two["matrix"])) == sum(map(sum, one["matrix"]))
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-2)
