import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest

from denseclip_hf.cli import ablate
from denseclip_hf.cli.arguments import parse_arguments
from denseclip_hf.training.ablations import (
    ROWS,
    VARIANTS,
    ablation_json,
    ablation_tables,
    read_measurements,
)
from denseclip_hf.training.run_directory import recipe_of
from helpers.forked import Forked
from helpers.training import KINDS


CONFIGS = Path(__file__).parents[2] / "configs"


def options(variant):
    files = [str(CONFIGS / "ade20k_rn50.yaml"), str(CONFIGS / "ablations" / f"{variant}.yaml"), "--bf16", "false"]
    model, _, args = parse_arguments(KINDS, files)
    return json.loads(model.config), args.text_encoder_lr_multiplier, args.image_encoder_lr_multiplier


def test_every_variant_is_a_recipe_and_every_recipe_a_variant():
    assert set(VARIANTS) == {path.stem for path in (CONFIGS / "ablations").glob("*.yaml")}


def test_variants_change_what_their_row_says_and_nothing_else():
    slide = {"inference_mode": "slide"}
    assert {variant: options(variant) for variant in VARIANTS} == {
        "final": (slide, 0.0, 0.1),
        "image_encoder_full_rate": (slide, 0.0, 1.0),
        "text_encoder_trained": (slide, 0.1, 0.1),
        "template_prompt": ({**slide, "num_context_tokens": 0}, 0.0, 0.1),
        "gamma_fixed": ({**slide, "gamma_learnable": False}, 0.0, 0.1),
        "gamma_one": ({**slide, "gamma_init": 1.0}, 0.0, 0.1),
        "baseline": ({**slide, "use_text_guidance": False}, 0.0, 0.1),
        "baseline_full_rate": ({**slide, "use_text_guidance": False}, 0.0, 1.0),
    }


def test_tables_put_the_measured_beside_the_published(tmp_path):
    for seed, iou in enumerate([0.40, 0.42]):
        run = tmp_path / "gamma_one" / f"seed-{seed}"
        run.mkdir(parents=True)
        (run / "eval_results.json").write_text(json.dumps({"eval_mean_iou": iou}))
    measured = read_measurements(tmp_path, VARIANTS, [0, 1])
    assert read_measurements(tmp_path, ["gamma_one"], [1, 7]) == {"gamma_one": [42.0]}
    tables = ablation_tables(measured)
    assert "| 1.0, learnable | 42.8 | 41.0 ± 1.4 (2) |" in tables
    assert "| 1e-4, fixed | 42.6 | - |" in tables
    entries = ablation_json(measured)
    assert len(entries) == len(ROWS) and entries[7]["measured"] == [40.0, 42.0]


def finished(folder, iou, flags, seed):
    """A finished run of `final` as `scripts/ablate.py` starts it."""
    files = [str(CONFIGS / "ablation_example.yaml"), str(CONFIGS / "ablations" / "final.yaml"), "--seed", str(seed)]
    folder = folder / "final" / f"seed-{seed}"
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps(recipe_of(*parse_arguments(KINDS, [*files, *flags]))))
    (folder / "eval_results.json").write_text(json.dumps({"eval_mean_iou": iou}))


def test_runs_of_another_recipe_or_of_no_known_one_are_not_reused(tmp_path, capsys):
    for seed, iou in ((0, 0.4), (7, 0.9)):
        finished(tmp_path, iou, ["--max_steps", "5"], seed)
    command = [str(CONFIGS / "ablation_example.yaml"), "--output_dir", str(tmp_path), "--variants", "final"]
    ablate.main([*command, "--seeds", "0", "--", "--max_steps", "5"])
    tables = capsys.readouterr().out
    assert "| 1e-4, learnable (final) | 43.5 | 40.0 (1) |" in tables  # not the seed that was not asked for
    with pytest.raises(SystemExit, match="^1$"):
        ablate.main([*command, "--seeds", "0", "--", "--max_steps", "9"])
    assert "max_steps 5 -> 9" in capsys.readouterr().err
    (tmp_path / "final" / "seed-0" / "recipe.json").unlink()
    with pytest.raises(SystemExit, match="^1$"):
        ablate.main([*command, "--seeds", "0", "--", "--max_steps", "5"])
    assert "recipe.json" in capsys.readouterr().err


# In place of a training: seed 0 may fail, the others go on until `go` is there; of a signal they end after a while.
STAND_IN = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.default_int_handler)
here, seed, end = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[-1]).name, time.monotonic() + 60
try:
    (here / f"{seed} started").touch()
    if seed == "seed-0" and (here / "fail").exists():
        sys.exit(1)
    while not (here / "go").exists() and time.monotonic() < end:
        time.sleep(0.01)
except KeyboardInterrupt:
    time.sleep(0.5)
(here / f"{seed} ended").touch()
"""


def start_ablations(folder, within=()):
    """`scripts/ablate.py` on seeds 0 to 3 of a variant, in a process group of its own as in a terminal."""
    launcher = shlex.join([*within, sys.executable, "-c", STAND_IN, str(folder)])
    command = [CONFIGS.parent / "scripts" / "ablate.py", CONFIGS / "ablation_example.yaml", "--launcher", launcher]
    return Forked([*command, "--output_dir", folder / "out", "--variants", "final", "--seeds", *"0123"])


@pytest.mark.slow
def test_a_failure_is_said_and_starts_nothing_else(tmp_path):
    (tmp_path / "fail").touch()
    process = start_ablations(tmp_path)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "seed 0" in said and "Traceback" not in said
    assert {file.name for file in tmp_path.glob("seed*")} == {"seed-0 started"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("send", "number", "within"),
    [
        (os.killpg, signal.SIGINT, ()),
        (os.kill, signal.SIGTERM, ("sh", "-c", '"$@"; exit', "sh")),  # ends before what it started
    ],
    ids=["Ctrl-C", "SIGTERM to a launcher"],
)
def test_after_a_signal_the_runs_in_progress_end_and_nothing_else_starts(tmp_path, send, number, within):
    process = start_ablations(tmp_path, within=within)
    try:
        while not (tmp_path / "seed-0 started").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        send(process.pid, number)
        said = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 128 + number and "Traceback" not in said
    assert {file.name for file in tmp_path.glob("seed*")} == {"seed-0 started", "seed-0 ended"}
