"""What `pip install` brings works without the clone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from denseclip_hf.example import make_example_clip, make_example_dataset


ROOT = Path(__file__).parents[2]


def run(*command, folder, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_installed_wheel_trains_and_predicts_by_its_command(tmp_path):
    pip = ["-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, ROOT, folder=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    site, here = tmp_path / "site", tmp_path / "here"
    run(*pip, "install", "--no-deps", "--target", site, wheel, folder=tmp_path)
    here.mkdir()
    make_example_dataset(here / "data", 12, 2)
    make_example_clip(here / "clip")

    def denseclip(*arguments):
        return run(site / "bin" / "denseclip", *arguments, folder=here, PYTHONPATH=str(site))

    where = run("-c", "import denseclip_hf; print(denseclip_hf.__file__)", folder=here, PYTHONPATH=str(site))
    assert where.startswith(str(site))
    options = ["--clip", "clip", "--dataset", "data", "--output_dir", "run", "--max_steps", "2", "--warmup_steps", "1"]
    denseclip("train", "configs/example.yaml", *options)
    image = "data/val/images/0000.jpg"
    assert "1 segmented" in denseclip("predict", image, "--model", "run", "--output_dir", "out")
