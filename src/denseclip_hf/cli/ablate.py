"""Run the published ablations on any recipe, data set and budget, and print every table with the published column.

    denseclip ablate RECIPE.yaml --output_dir outputs/ablations --seeds 0 1 2 [--variants final gamma_one]
        [-- --dataset FOLDER --max_steps 500]

What follows `--` goes to every training run. Runs that are finished are not run again, one that was broken off goes
on; those of another recipe or budget are refused. The tables show the variants and seeds that were asked for.
`--launcher "accelerate launch --num_processes 8"` trains on several devices.

After Ctrl-C, SIGTERM or a failed run no other run starts. Either signal ends those in progress at their next step,
with a checkpoint; after a failure they go on to their end. The same command then does what is left.
"""

import argparse
import json
import logging
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from types import FrameType

import psutil
from tqdm.auto import tqdm

from ..files import write_atomically
from ..training import DenseCLIPTrainingArguments
from ..training.ablations import VARIANTS, ablation_json, ablation_tables, read_measurements
from ..training.recipe import DataArguments, ModelArguments
from ..training.run_directory import RECIPE_FILE, changes_of_recipe, recipe_of
from ..training.stopping import TrainingStopped
from .arguments import HelpFormatter, log_to_terminal, one_sentence_errors, parse_arguments, recipe_file


TRAIN = "denseclip_hf.cli.train"
logger = logging.getLogger("ablate")
stopping = threading.Event()  # by Ctrl-C or SIGTERM


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("recipe", type=Path, help="RECIPE.yaml, on top of which comes each variant's")
    parser.add_argument("--output_dir", type=Path, required=True, help="of all runs and the tables")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs of each variant")
    which = f"by default all: {', '.join(VARIANTS)}"
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="VARIANT", help=which)
    python = shlex.quote(sys.executable)
    parser.add_argument("--launcher", default=python, help="what starts a training, by default Python")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
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
    """Raise `ValueError` if there is a run already, of something else than what is asked for."""
    folder = directory(args, variant, seed)
    if (folder / RECIPE_FILE).exists():
        kinds = [ModelArguments, DataArguments, DenseCLIPTrainingArguments]
        recipe = recipe_of(*parse_arguments(kinds, arguments(args, variant, seed)))
        recipe.pop("processes")  # of the launcher's run, not of this one
        if changes := changes_of_recipe(folder, recipe):
            raise ValueError(f"{folder} holds a run of another recipe ({changes}): name a new `--output_dir`.")
    elif (folder / "eval_results.json").exists():
        raise ValueError(f"{folder} holds results without their {RECIPE_FILE}: name a new `--output_dir`.")


def train(args: argparse.Namespace, variant: str, seed: int) -> float:
    """Run one variant with one seed unless it is done; returns the seconds it took."""
    output_dir = directory(args, variant, seed)
    if (output_dir / "eval_results.json").exists():
        return 0.0
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    command = [*shlex.split(args.launcher), "-m", TRAIN, *arguments(args, variant, seed)]
    start = time.perf_counter()
    with open(output_dir.parent / f"seed-{seed}.log", "w") as log:
        if stopping.is_set():
            raise RuntimeError("Not started.")
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        if stopping.is_set():  # in between, when there was nothing to tell yet
            process.terminate()
        process.wait()
    if process.returncode:
        raise RuntimeError(f"{variant} with seed {seed} failed: see {log.name}.")
    return time.perf_counter() - start


def train_all(args: argparse.Namespace, runs: list[tuple[str, int]]) -> None:
    """Run `args.parallel` of `runs` at a time; after Ctrl-C or a failure, which is said at once, no other starts."""
    waiting = iter(runs)
    running: dict[Future[float], tuple[str, int]] = {}
    with ThreadPoolExecutor(args.parallel) as pool, tqdm(desc="Ablations", unit="run", total=len(runs)) as progress:
        try:
            # Only what can start now is handed over, so that nothing is queued when something goes wrong.
            while True:
                free = args.parallel - len(running)
                running |= {pool.submit(train, args, *run): run for run in islice(waiting, free)}
                if not running:
                    break
                for job in wait(running, return_when=FIRST_COMPLETED).done:
                    logger.info("%s, seed %d: %.0f s", *running.pop(job), job.result())
                    progress.update()
        except BaseException as error:  # Ctrl-C and SIGTERM too
            if isinstance(error, KeyboardInterrupt):
                stopping.set()
            if running or isinstance(error, KeyboardInterrupt):  # also where only the launcher has ended yet
                logger.warning("%s The runs in progress are waited for.", str(error) or "Interrupted.")
            raise


@contextmanager
def handing_on_sigterm() -> Iterator[None]:
    """The runs in progress hear SIGTERM too, as they do Ctrl-C from the terminal, and are waited for."""
    told = []

    def tell(number: int, frame: FrameType | None) -> None:
        if stopping.is_set():  # schedulers repeat it
            return
        stopping.set()
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if any(TRAIN in part for part in process.cmdline()):
                    process.terminate()
                    told.append(process)
        raise TrainingStopped("Terminated.", number)

    before = signal.signal(signal.SIGTERM, tell)
    try:
        yield
    finally:
        psutil.wait_procs(told)  # a launcher may have ended before its training
        signal.signal(signal.SIGTERM, before)


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    log_to_terminal()
    args = parse(argv)
    runs = [(variant, seed) for seed in args.seeds for variant in args.variants]
    for variant, seed in runs:
        refuse_another_recipe(args, variant, seed)
    read_measurements(args.output_dir, args.variants, args.seeds)  # damaged ones are better known before than after
    with handing_on_sigterm():
        train_all(args, runs)
    measured = read_measurements(args.output_dir, args.variants, args.seeds)
    tables = ablation_tables(measured)
    write_atomically(args.output_dir / "ablations.md", tables)
    write_atomically(args.output_dir / "ablations.json", json.dumps(ablation_json(measured), indent=2) + "\n")
    print(tables)
    print(f"The tables are in {args.output_dir.resolve()}: ablations.md and ablations.json")


if __name__ == "__main__":
    main()
