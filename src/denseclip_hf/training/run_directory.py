"""The directory of a training run: refused where something would be lost, resumed where a run was broken off."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from ..evaluation import without_nan
from ..files import asked_by_pickle, complete_or_gone, make_directory, sync, write_atomically
from ..model.loading_denseclip import reason_of
from .arguments import DenseCLIPTrainingArguments


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


logger = logging.getLogger(__name__)

_locks: dict[Path, int] = {}  # file descriptors, by directory

RECIPE_FILE = "recipe.json"
MANIFEST_FILE = "manifest.json"
# What a run needs to go on as if nothing had happened, beside its weights; DeepSpeed keeps it in a folder of its own.
STATE_FILES = {
    "optimizer": ("optimizer*", "global_step*"),
    "scheduler": ("scheduler.pt", "global_step*"),
    "random state": ("rng_state*.pth",),
}
WRITING_DIR = ".writing"
# What of the training arguments decides the weights; the rest (logging, workers, ...) may differ when a run goes on.
DECISIVE_ARGUMENTS = (
    "learning_rate", "weight_decay", "max_steps", "num_train_epochs", "warmup_steps", "lr_scheduler_type",
    "lr_scheduler_kwargs", "optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon",
    "per_device_train_batch_size", "auto_find_batch_size", "gradient_accumulation_steps", "max_grad_norm",
    "label_smoothing_factor", "neftune_noise_alpha", "train_sampling_strategy", "dataloader_drop_last",
    "ignore_data_skip", "seed", "data_seed", "bf16", "fp16", "mixed_precision", "tf32", "metric_for_best_model",
    "greater_is_better", "load_best_model_at_end", "image_encoder_lr_multiplier", "text_encoder_lr_multiplier",
    "min_learning_rate", "poly_power", "warmup_start_ratio", "exempt_norms_and_biases",
)  # fmt: skip
HARMLESS_OPTIONS = ("check_data",)  # of the model and the data


def recipe_of(model_args: Any, data_args: Any, args: DenseCLIPTrainingArguments) -> dict[str, Any]:
    """Everything that decides what a run computes, as JSON values; `args.world_size` included."""
    training = {name: getattr(args, name) for name in DECISIVE_ARGUMENTS}
    recipe = {**asdict(model_args), **asdict(data_args), **training, "processes": args.world_size}
    if getattr(data_args, "streaming", False):  # a stream's samples come in another order with other workers
        recipe["dataloader_num_workers"] = args.dataloader_num_workers
    for name in HARMLESS_OPTIONS:
        recipe.pop(name, None)
    return json.loads(json.dumps(recipe, default=str))


def prepare_run(output_dir: str | os.PathLike, recipe: dict[str, Any], main_process: bool = True) -> str | None:
    """
    Make sure that `output_dir` can be that of a run of `recipe` and say which checkpoint it goes on from, if any.

    Nothing is written yet, so that a start that fails leaves nothing: see [`begin_run`].

    Args:
        output_dir (`str` or `os.PathLike`): the run's directory.
        recipe (`dict`): of [`recipe_of`].
        main_process (`bool`): whether this is the process that clears up; it comes first, the others only read.

    Returns:
        Path of the last complete checkpoint, or `None` for a new run.

    Raises:
        OutputError: if the directory cannot be written.
        ValueError: if it holds other things than this run's, or a run of another recipe.
    """
    folder = Path(output_dir)
    if main_process:
        _check_writable(folder)
        shutil.rmtree(folder / WRITING_DIR, ignore_errors=True)  # a checkpoint that was broken off
    if not folder.exists() or os.listdir(folder) in ([], [RECIPE_FILE]):  # new, or ended before it trained
        return None
    if not (folder / RECIPE_FILE).exists():
        raise ValueError(
            f"the output directory {folder} is not empty and holds no run of this program: name a new one, so that "
            "nothing is overwritten."
        )
    if changes := changes_of_recipe(folder, recipe):
        raise ValueError(
            f"{folder} holds a run of another recipe ({changes}): name a new output directory, or run that recipe."
        )
    if (folder / "model.safetensors").exists():
        raise ValueError(f"{folder} holds a finished run of this recipe: name a new output directory to train again.")
    checkpoint = newest_whole_checkpoint(folder, main_process)
    if checkpoint is not None:
        logger.info("Going on from %s.", checkpoint)
    return checkpoint


def newest_whole_checkpoint(folder: Path, main_process: bool = True) -> str | None:
    """
    The last checkpoint of the run in `folder` that is as it was written; `None` if there never was one.

    The main process moves damaged ones aside, with a warning, so that none counts as the newest again.

    Raises:
        ValueError: if all are damaged, or the last one lacks what a run needs to go on.
    """
    damaged: ValueError | None = None
    while checkpoint := get_last_checkpoint(str(folder)):
        try:
            check_whole(checkpoint)
        except DamagedCheckpoint as error:
            if not main_process or len(list(folder.glob("checkpoint-*"))) == 1:
                raise
            damaged = error
            aside = folder / f"damaged-{Path(checkpoint).name}"
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(checkpoint, aside)
            logger.warning("%s It is now %s, and the checkpoint before it is taken.", error, aside)
        else:
            return checkpoint
    if damaged is not None:
        raise damaged
    return None


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not as it was written."""


def write_manifest(checkpoint: Path) -> None:
    """Sync all files of `checkpoint` to the disk, then write down their sizes and SHA-256."""
    paths = sorted(checkpoint.rglob("*"))
    sync(*paths)
    files = {path.relative_to(checkpoint).as_posix(): _described(path) for path in paths if path.is_file()}
    write_atomically(checkpoint / MANIFEST_FILE, json.dumps(files, indent=2))


def _described(path: Path) -> dict[str, Any] | None:
    """Size and SHA-256 of a file; `None` if there is none."""
    if not path.is_file():
        return None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def check_whole(checkpoint: str | os.PathLike) -> None:
    """
    Make sure that `checkpoint` is as it was written and holds all that a run needs to go on.

    Raises:
        DamagedCheckpoint: naming a file that is missing or other than it was written.
        ValueError: if it was written without the state of optimizer, scheduler or random numbers.
    """
    folder = Path(checkpoint)
    remedy = "remove it, and go on from the one before."
    try:
        files = dict(json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8")))
        missing = [what for what, patterns in STATE_FILES.items() if not any(_in(files, p) for p in patterns)]
        wrong = [name for name, entry in files.items() if _described(folder / name) != entry]
    except (OSError, TypeError, ValueError) as error:
        raise DamagedCheckpoint(f"{checkpoint} is damaged ({MANIFEST_FILE}: {error}): {remedy}") from error
    if wrong or not files:
        what = ", ".join(wrong[:3]) or MANIFEST_FILE
        raise DamagedCheckpoint(f"{checkpoint} is damaged ({what} is missing or not as it was written): {remedy}")
    if missing:
        raise ValueError(
            f"{checkpoint} was written without {', '.join(missing)}, so the run cannot go on as it was: start from "
            f"its weights with `--model {checkpoint}`, and train without `--save_only_model` to be able to go on."
        )


def _in(files: dict[str, Any], pattern: str) -> bool:
    return any(fnmatch(name.split("/")[0], pattern) for name in files)


def _check_writable(folder: Path) -> None:
    """As [`make_directory`], but makes nothing."""
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
    except OSError:  # not even that may be known
        there = folder
    make_directory(there)


def keep_others_out(output_dir: str | os.PathLike) -> None:
    """
    Let no other process do this with `output_dir` until [`finish_run`]; where there is none yet, or no lock: nothing.

    Raises:
        ValueError: if another process has done so.
    """
    folder = Path(output_dir)
    if fcntl is None or not folder.is_dir() or folder.absolute() in _locks:
        return
    try:
        lock = os.open(folder, os.O_RDONLY)
    except PermissionError:  # of which `prepare_run` has more to say
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise ValueError(
            f"another run is writing into {folder}: wait until it has ended, or name another output directory."
        ) from error
    except OSError:  # a file system without locks
        os.close(lock)
    else:
        _locks[folder.absolute()] = lock


def _let_go() -> None:
    """At the end of a run, and in a worker, which may live a while longer than the process that has the locks."""
    for lock in _locks.values():
        os.close(lock)
    _locks.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_let_go)


def begin_run(output_dir: str | os.PathLike, recipe: dict[str, Any], lock: bool = True) -> None:
    """
    Make the directory of a new run, keep others out of it, and only then write `recipe` into it.

    Args:
        output_dir (`str` or `os.PathLike`): the run's directory.
        recipe (`dict`): of [`recipe_of`].
        lock (`bool`): whether this process is the one that holds the lock, the first of all machines.

    Raises:
        OutputError: if it cannot be written.
        ValueError: if another run began there meanwhile.
    """
    make_directory(output_dir)
    if lock:
        keep_others_out(output_dir)
        if prepare_run(output_dir, recipe) is not None:
            raise ValueError(f"another run began in {output_dir} meanwhile: start again to go on from its checkpoint.")
    write_atomically(Path(output_dir) / RECIPE_FILE, json.dumps(recipe, indent=2) + "\n")


def changes_of_recipe(folder: Path, recipe: dict[str, Any]) -> str:
    """In words, what `recipe` changes about that of the run in `folder`; empty if nothing. Raises `ValueError`."""
    file = folder / RECIPE_FILE
    try:
        before = dict(json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is damaged ({error}), so whether that run is of this recipe cannot be told: name a new output "
            "directory."
        ) from error
    # An option that an earlier version did not write down cannot be compared.
    different = [name for name in recipe if name in before and before[name] != recipe[name]]
    return ", ".join(f"{name} {before[name]!r} -> {recipe[name]!r}" for name in different[:5])


def check_checkpoint(checkpoint: str | os.PathLike, recipe: dict[str, Any]) -> None:
    """
    Make sure that a run of `recipe` may go on from a checkpoint named by hand.

    Raises:
        ValueError: if there is none, or it is of a run of another recipe or of none that is known.
    """
    folder = Path(checkpoint).absolute()
    if not (folder / TRAINER_STATE_NAME).is_file():
        raise ValueError(f"{checkpoint} is no checkpoint: give a directory such as outputs/run/checkpoint-500.")
    check_whole(checkpoint)
    if not (folder.parent / RECIPE_FILE).is_file():
        raise ValueError(
            f"{checkpoint} lies in no run with a {RECIPE_FILE}, so whether it is of this recipe cannot be told: start "
            f"from its weights with `--model {checkpoint}`."
        )
    if changes := changes_of_recipe(folder.parent, recipe):
        raise ValueError(
            f"{checkpoint} is of another recipe ({changes}): run that recipe, or start from its weights with `--model "
            f"{checkpoint}`."
        )


@contextmanager
def reading_checkpoint(checkpoint: str | os.PathLike) -> Iterator[None]:
    """Whatever fails while a checkpoint of a run is read raises a `ValueError` of one sentence instead."""
    try:
        yield
    except Exception as error:  # damaged files fail in any of many ways
        wanted = asked_by_pickle(error)
        reason = f"its pickle asks for {wanted}" if wanted else reason_of(error)
        raise ValueError(
            f"{checkpoint} cannot be resumed ({reason}): if it is damaged, remove it, and go on from the one before."
        ) from error


def finish_run(trainer: Any, complete: Callable[[Path], Any] | None = None) -> None:
    """
    Save `trainer`'s model into its output directory: written aside, then moved, the weights last.

    Args:
        trainer ([`DenseCLIPTrainer`]): whose training is over.
        complete (`Callable`, *optional*): called on the main process with the directory it is written to, to put
            results and card beside the weights.

    Raises:
        OSError: if it cannot be written.
    """
    folder = Path(trainer.args.output_dir)
    writing = folder / WRITING_DIR
    with complete_or_gone(writing, "the final model", "the checkpoints" if get_last_checkpoint(str(folder)) else None):
        trainer.save_model(str(writing))
        trainer.accelerator.wait_for_everyone()
        if complete is not None and trainer.is_world_process_zero():
            complete(writing)
    if trainer.is_world_process_zero():
        sync(*writing.iterdir())
        for file in sorted(writing.iterdir(), key=lambda file: file.suffix == ".safetensors"):
            os.replace(file, folder / file.name)
        writing.rmdir()
        sync(folder)
    _let_go()


def results_json(metrics: dict[str, Any]) -> str:
    """Numbers, texts and lists of numbers of `metrics` as JSON, NaN (an undefined score) as null."""
    kept = {key: value for key, value in metrics.items() if isinstance(value, (int, float, list, str))}
    return json.dumps(without_nan(kept), indent=2, allow_nan=False) + "\n"


__all__ = [
    "DamagedCheckpoint",
    "begin_run",
    "changes_of_recipe",
    "check_checkpoint",
    "check_whole",
    "finish_run",
    "keep_others_out",
    "newest_whole_checkpoint",
    "prepare_run",
    "reading_checkpoint",
    "recipe_of",
    "results_json",
    "write_manifest",
]
