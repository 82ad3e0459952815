"""Training commands that tests start, disturb and start again."""

import json
import os
import subprocess
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from denseclip_hf.training.tokenizer import learn_tokenizer
from helpers.forked import Forked
from helpers.training import TINY, TINY_CLIP, write_folder


TRAIN = Path(__file__).parents[2] / "scripts" / "train.py"
FAULTY = Path(__file__).parent / "faulty_training.py"
TESTS = str(Path(__file__).parents[1])
PATHS = os.pathsep.join([TESTS, *filter(None, [os.environ.get("PYTHONPATH")])])
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}


def training_recipe(folder, **options):
    """A recipe of 8 steps, two epochs, with augmentation and two workers; checkpoints every second step."""
    data = write_folder(folder / "data", 9, ".png")
    learn_tokenizer(["sky", "road", "car"], vocab_size=540).save_pretrained(folder / "tokenizer")
    recipe = {
        "clip_config": TINY_CLIP, "config": TINY, "tokenizer": str(folder / "tokenizer"), "crop_size": 64,
        "scale_long": 128, "max_steps": 8, "per_device_train_batch_size": 2, "save_strategy": "steps",
        "save_steps": 2, "warmup_steps": 2, "logging_steps": 1, "use_cpu": True, "dataset": str(data),
        "dataloader_num_workers": 2, "report_to": "none", "learning_rate": 1e-3, "disable_tqdm": True, **options,
    }  # fmt: skip
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return folder / "recipe.json"


class Run:
    """
    `scripts/train.py` with its arguments, writing into `folder`.

    Args:
        folder (`Path`): the output directory.
        arguments (sequence): recipes and flags.
        launcher (sequence, *optional*): what starts the script; by default it is run itself.
        environment (`str`): more variables, which make it one of several processes.
    """

    def __init__(self, folder, arguments, launcher=None, **environment):
        self.folder, self.launcher = folder, launcher
        self.alone, self.environment = not (launcher or environment), ENVIRONMENT | environment
        self.arguments = [*map(str, arguments), "--output_dir", str(folder)]

    def end(self, code=0, fault=None):
        """Run to its end, with a fault of faulty_training.py if named; returns what it said."""
        done = self._start(fault)
        try:
            said = done.communicate(timeout=500)[0]
        finally:
            done.kill()
        self.ended = time.time()
        assert done.returncode == code, said
        return said

    def begin(self, wanted="checkpoint-2"):
        """Start it in a process group of its own and wait for a checkpoint."""
        process = self._start()
        deadline = time.monotonic() + 500
        while not (self.folder / wanted).exists():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise AssertionError(process.communicate(timeout=60))
            time.sleep(0.01)
        return process

    def _start(self, fault=None):
        script = [str(TRAIN)] if fault is None and self.alone else [str(FAULTY), fault or "none"]
        if self.launcher is None:
            return Forked([*script, *self.arguments], self.environment)
        return subprocess.Popen(
            [*self.launcher, *script, *self.arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def checkpoints(self):
        """Steps of the checkpoints there are."""
        return sorted(int(path.name.partition("-")[2]) for path in self.folder.glob("checkpoint-*"))

    def losses(self):
        """The loss of each step."""
        state = json.loads((self.folder / f"checkpoint-{self.checkpoints()[-1]}" / "trainer_state.json").read_text())
        return [entry["loss"] for entry in state["log_history"] if "loss" in entry]

    def weights(self):
        return load_file(self.folder / "model.safetensors")

    def ends_as(self, other):
        """Whether the final weights are those of another run, bit for bit."""
        expected, weights = other.weights(), self.weights()
        assert expected.keys() == weights.keys()
        return all(torch.equal(expected[name], weights[name]) for name in expected)


def one_sentence(said):
    """The last line of what a script said, which must hold no traceback."""
    assert "Traceback" not in said, said
    return said.strip().splitlines()[-1]
