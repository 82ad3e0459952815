"""The directory of a training run: kept from other runs, resumed where a run was interrupted, finished by a card."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from ..evaluation import without_nan
from ..files import complete_or_gone, make_directory, sync, write_atomically
from ..options import DataArguments, ModelArguments
from ..sharing import CARD
from .arguments import DenseCLIPTrainingArguments
from .checkpoints import WRITING_DIR, CheckpointingTrainer


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.json"
LOCK_FILE = ".lock"
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
HARMLESS_OPTIONS = ("check_data",)  # change neither the model nor the data
FILES = "dataset_files"  # a digest: a data set may move, with the files that it has
LENGTHS = ("max_steps", "num_train_epochs")


def recipe_of(
    model_args: ModelArguments, data_args: DataArguments, args: DenseCLIPTrainingArguments
) -> dict[str, Any]:
    """Everything that decides what a run computes, as JSON values; `args.world_size` included."""
    training = {name: getattr(args, name) for name in DECISIVE_ARGUMENTS}
    recipe = {**asdict(model_args), **asdict(data_args), **training, "processes": args.world_size}
    if getattr(data_args, "streaming", False):  # a stream's samples come in another order with other workers
        recipe["dataloader_num_workers"] = args.dataloader_num_workers
    for name in HARMLESS_OPTIONS:
        recipe.pop(name, None)
    recipe[FILES] = _fingerprint(recipe["dataset"])
    return json.loads(json.dumps(recipe, default=str))


def _fingerprint(dataset: str | None) -> str | None:
    """SHA-256 of names and sizes of the files in a folder; `None` for a name on the Hub."""
    folder = Path(dataset or "")
    if not dataset or not folder.is_dir():
        return None
    files = sorted((path.relative_to(folder).as_posix(), path.stat().st_size) for path in folder.rglob("*.*"))
    return hashlib.sha256(repr(files).encode()).hexdigest()


@contextmanager
def exclusive_directory(output_dir: str | os.PathLike) -> Iterator[None]:
    """
    The directory of a run, made where it is missing and kept from other processes meanwhile; a start that fails leaves
    none behind.

    Raises:
        OutputError: if it cannot be written.
        ValueError: if another process runs in it.
    """
    folder = Path(output_dir)
    new = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        make_directory(folder)
        with open(folder / LOCK_FILE, "w") as lock:
            _lock(lock, folder)
            try:
                yield
            finally:
                (folder / LOCK_FILE).unlink(missing_ok=True)
    finally:
        with suppress(OSError):  # something was written into it
            for path in new:
                path.rmdir()


def _lock(file: IO, folder: Path) -> None:
    """Lock `file` until it is closed or this process ends; workers do not inherit the lock."""
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = os.fstat(file.fileno()).st_nlink > 0  # else the run that had it has just ended
    except (BlockingIOError, PermissionError):
        free = False
    except OSError:
        logger.warning("The file system of %s has no locks: nothing keeps a second run out of it.", folder)
        return
    if not free:
        raise ValueError(
            f"another run is writing into {folder}: wait until it has ended, or name another output directory."
        )


def prepare_run(output_dir: str | os.PathLike, recipe: dict[str, Any], main_process: bool = True) -> bool:
    """
    Whether a run of `recipe` in `output_dir` goes on from a checkpoint; unfinished files of before are removed.

    Args:
        output_dir (`str` or `os.PathLike`): the run's directory.
        recipe (`dict`): of [`recipe_of`].
        main_process (`bool`): whether this is the process that clears up; it comes first, the others only read.

    Raises:
        ValueError: if it holds other things than this run's, a run of another recipe or a finished one.
    """
    folder = Path(output_dir)
    if main_process:
        shutil.rmtree(folder / WRITING_DIR, ignore_errors=True)  # an unfinished checkpoint
    if not folder.exists() or not set(os.listdir(folder)) - {LOCK_FILE, RECIPE_FILE}:  # new, or it never trained
        return False
    if not (folder / RECIPE_FILE).exists():
        raise ValueError(
            f"the output directory {folder} is not empty and holds no run of this program: name a new one, so that "
            "nothing is overwritten."
        )
    refuse_other_recipe(folder, recipe, may_grow=LENGTHS)
    checkpoint = get_last_checkpoint(str(folder))
    longer = any(recipe.get(name) != value for name, value in _recipe_in(folder).items() if name in LENGTHS)
    finished = (folder / CARD).exists() or ((folder / "model.safetensors").exists() and not checkpoint)
    if finished and not (longer and checkpoint):
        raise ValueError(
            f"{folder} holds a finished run of this recipe: name a new output directory to train again, or raise "
            "`--max_steps` to go on from its last checkpoint."
        )
    return checkpoint is not None


def write_recipe(output_dir: str | os.PathLike, recipe: dict[str, Any]) -> None:
    """Write `recipe` down for the runs that go on in `output_dir`."""
    write_atomically(Path(output_dir) / RECIPE_FILE, json.dumps(recipe, indent=2) + "\n")


def refuse_other_recipe(folder: Path, recipe: dict[str, Any], may_grow: Sequence[str] = ()) -> None:
    """
    Make sure that the run in `folder` is of `recipe`, but for what `may_grow`.

    Raises:
        OSError: if there is no recipe of a run there.
        ValueError: if it is damaged, or another.
    """
    before = _recipe_in(folder)
    # An option that an earlier version did not write down cannot be compared.
    different = [name for name in recipe if name in before and before[name] != recipe[name]]
    if recipe.get(FILES) and recipe[FILES] == before.get(FILES):
        different = [name for name in different if name != "dataset"]
    different = [name for name in different if not (name in may_grow and recipe[name] > before[name] > 0)]
    if different:
        changes = ", ".join(f"{name} {before[name]!r} -> {recipe[name]!r}" for name in different[:5])
        raise ValueError(
            f"{folder} holds a run of another recipe ({changes}): run that recipe, or name a new output directory, "
            "perhaps with `--model` to start from weights that are here."
        )


def _recipe_in(folder: Path) -> dict[str, Any]:
    file = folder / RECIPE_FILE
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is damaged ({error}), so its run may be of another recipe: name a new output directory."
        ) from error


def check_checkpoint(checkpoint: str | os.PathLike, recipe: dict[str, Any]) -> None:
    """
    Make sure that a run of `recipe` may go on from a checkpoint named by hand.

    Raises:
        ValueError: if there is none, or it is of a run of another recipe or of none that is known.
    """
    folder = Path(checkpoint).absolute()
    if not (folder / TRAINER_STATE_NAME).is_file() or not (folder.parent / RECIPE_FILE).is_file():
        raise ValueError(
            f"{checkpoint} is no checkpoint in a run with a {RECIPE_FILE}: give one such as "
            f"outputs/run/checkpoint-500, or start from its weights with `--model {checkpoint}`."
        )
    refuse_other_recipe(folder.parent, recipe, may_grow=LENGTHS)


def save_final_model(trainer: CheckpointingTrainer) -> None:
    """
    Save `trainer`'s model into its output directory: written aside, then moved, the weights last.

    Args:
        trainer ([`CheckpointingTrainer`]): whose training is over.

    Raises:
        OSError: if it cannot be written.
    """
    folder = Path(trainer.args.output_dir)
    writing = folder / WRITING_DIR
    with complete_or_gone(writing, "the final model", "the checkpoints" if get_last_checkpoint(str(folder)) else None):
        trainer.save_model(str(writing))
        trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        sync(*writing.iterdir())
        (folder / CARD).unlink(missing_ok=True)  # of an earlier end; writing a new card finishes this run
        for file in sorted(writing.iterdir(), key=lambda file: file.suffix == ".safetensors"):
            os.replace(file, folder / file.name)
        writing.rmdir()
        sync(folder)
    trainer.accelerator.wait_for_everyone()


def results_json(metrics: dict[str, Any]) -> str:
    """Numbers, texts and lists of numbers of `metrics` as JSON, NaN (an undefined score) as null."""
    kept = {key: value for key, value in metrics.items() if isinstance(value, (int, float, list, str))}
    return json.dumps(without_nan(kept), indent=2, allow_nan=False) + "\n"


__all__ = [
    "check_checkpoint",
    "prepare_run",
    "recipe_of",
    "refuse_other_recipe",
    "results_json",
    "exclusive_directory",
    "save_final_model",
    "write_recipe",
]
