"""Run the published ablations on any recipe, data set and budget, and print every table with the published column.

    denseclip ablate RECIPE.yaml --output_dir outputs/ablations --seeds 0 1 2 [--variants final gamma_one]
        [-- --dataset FOLDER --max_steps 500]

What follows `--` goes to every training run. Runs that are finished are not run again, an interrupted one goes on;
those of another recipe or budget are refused. The tables show the variants and seeds that were asked for.
`--launcher "accelerate launch --num_processes 8"` trains on several devices.

Ctrl-C or SIGTERM ends the run in progress at its next step, with a checkpoint, and starts no other; nor does a run
that fails. The same command then does what is left.
"""

import argparse
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
from tqdm.auto import tqdm

from ..files import write_atomically
from .arguments import RECIPES, HelpFormatter, log_to_terminal, one_sentence_errors, parse_arguments, recipe_file


TRAIN = "denseclip_hf.cli.train"
logger = logging.getLogger("ablate")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("recipe", type=Path, help="RECIPE.yaml, on top of which comes each variant's")
    parser.add_argument("--output_dir", type=Path, required=True, help="of all runs and the tables")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs of each variant")
    variants = sorted(path.stem for path in (RECIPES / "ablations").glob("*.yaml"))
    which = f"by default all: {', '.join(variants)}"
    parser.add_argument("--variants", nargs="+", choices=variants, default=variants, metavar="VARIANT", help=which)
    python = shlex.quote(sys.executable)
    parser.add_argument("--launcher", default=python, help="what starts a training, by default Python")
    own = list(sys.argv[1:] if argv is None else argv)
    flags = own[own.index("--") + 1 :] if "--" in own else []
    args = parser.parse_args(own[: own.index("--")] if "--" in own else own)
    args.flags = flags
    return args


def directory(args: argparse.Namespace, variant: str, seed: int) -> Path:
    """Where the run of one variant with one seed is."""
    return args.output_dir / variant / f"seed-{seed}"


def arguments(args: argparse.Namespace, variant: str, seed: int) -> list[str]:
    """What `denseclip train` is given for one run."""
    recipes = [args.recipe, recipe_file(f"ablations/{variant}.yaml")]
    return [*map(str, recipes), "--seed", str(seed), "--output_dir", str(directory(args, variant, seed)), *args.flags]


def refuse_another_recipe(args: argparse.Namespace, variant: str, seed: int) -> None:
    """Raise `ValueError`, or `OSError`, if there is a run already, of something else than what is asked for."""
    from ..training import (
        RECIPE_FILE,
        DataArguments,
        DenseCLIPTrainingArguments,
        ModelArguments,
        recipe_of,
        refuse_other_recipe,
    )

    folder = directory(args, variant, seed)
    if (folder / RECIPE_FILE).exists() or (folder / "eval_results.json").exists():
        kinds = [ModelArguments, DataArguments, DenseCLIPTrainingArguments]
        recipe = recipe_of(*parse_arguments(kinds, arguments(args, variant, seed)))
        recipe.pop("processes")  # the launcher decides it, not this process
        refuse_other_recipe(folder, recipe)


def run(command: list[str], log: Path) -> int:
    """
    The exit code of `command`, whose output goes to the file `log`.

    Ctrl-C and SIGTERM are handed on to all its processes, whatever launcher started them; once they have ended this
    raises [`TrainingStopped`].
    """
    from ..training import STOP_SIGNALS, TrainingStopped

    heard: list[int] = []  # schedulers repeat a signal, the first counts
    before = {number: signal.signal(number, lambda number, _: heard.append(number)) for number in STOP_SIGNALS}
    try:
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        while process.poll() is None and not heard:
            time.sleep(0.1)
        if heard:
            logger.warning("%s: waiting for the run in progress to end.", signal.Signals(heard[0]).name)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, heard[0])
            while is_at_work(process.pid):  # a launcher may end before its training
                time.sleep(0.1)
            raise TrainingStopped("Interrupted.", heard[0])
        return process.returncode
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_at_work(group: int) -> bool:
    """Whether a process of `group` is still running; zombies are not."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def train_all(args: argparse.Namespace, runs: list[tuple[str, int]]) -> None:
    """Do those of `runs` that are not done, one after the other; raises `RuntimeError` when one fails."""
    for variant, seed in tqdm(runs, desc="Ablations", unit="run"):
        output_dir = directory(args, variant, seed)
        if (output_dir / "eval_results.json").exists():
            continue
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        log, start = output_dir.parent / f"seed-{seed}.log", time.perf_counter()
        if run([*shlex.split(args.launcher), "-m", TRAIN, *arguments(args, variant, seed)], log):
            raise RuntimeError(f"{variant} with seed {seed} failed: see {log}.")
        logger.info("%s, seed %d: %.0f s", variant, seed, time.perf_counter() - start)


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    log_to_terminal()
    args = parse(argv)
    from ..training import ablation_json, ablation_tables, read_measurements

    runs = [(variant, seed) for seed in args.seeds for variant in args.variants]
    for variant, seed in runs:
        refuse_another_recipe(args, variant, seed)
    read_measurements(args.output_dir, args.variants, args.seeds)  # before training, to report damaged ones early
    train_all(args, runs)
    measured = read_measurements(args.output_dir, args.variants, args.seeds)
    tables = ablation_tables(measured)
    write_atomically(args.output_dir / "ablations.md", tables)
    write_atomically(args.output_dir / "ablations.json", json.dumps(ablation_json(measured), indent=2) + "\n")
    print(tables)
    print(f"The tables are in {args.output_dir.resolve()}: ablations.md and ablations.json")


if __name__ == "__main__":
    main()
