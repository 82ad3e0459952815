"""Checkpoints that are whole or absent: written aside, listed in a manifest, then moved; verified on resume."""

import json
import logging
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints
from transformers.utils import CONFIG_NAME

from ..files import complete_or_gone, sha256_of, sync, write_atomically
from ..sharing import CARD, add_code, write_card
from .adapters import load_added_adapter
from .arguments import NO_PUSH


logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
WRITING_DIR = ".writing"
# What a run needs to go on as if nothing had happened, beside its weights; DeepSpeed keeps it in a folder of its own.
STATE_FILES = {
    "optimizer": ("optimizer*", "global_step*"),
    "scheduler": ("scheduler.pt", "global_step*"),
    "random state": ("rng_state*.pth",),
}


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
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def check_whole(checkpoint: str | os.PathLike) -> None:
    """
    Make sure that `checkpoint` is as it was written and holds all that a run needs to go on.

    Raises:
        DamagedCheckpoint: naming a file that is missing or other than it was written.
        ValueError: if it was written without the state of optimizer, scheduler or random numbers.
    """
    folder = Path(checkpoint)
    try:
        files = dict(json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8")))
        wrong = [name for name, entry in files.items() if _described(folder / name) != entry]
    except (OSError, TypeError, ValueError):
        files, wrong = {}, [MANIFEST_FILE]
    if wrong or not files:
        what = ", ".join(wrong[:3]) or MANIFEST_FILE
        raise DamagedCheckpoint(
            f"{checkpoint} is damaged ({what} is missing or not as it was written): remove it, and go on from the one "
            "before."
        )
    names = {name.split("/")[0] for name in files}
    missing = [
        what for what, patterns in STATE_FILES.items() if not any(fnmatch(n, p) for n in names for p in patterns)
    ]
    if missing:
        raise ValueError(
            f"{checkpoint} was written without {', '.join(missing)}, so the run cannot go on as it was: start from "
            f"its weights with `--model {checkpoint}`, and train without `--save_only_model` to be able to go on."
        )


def newest_whole_checkpoint(folder: Path, main_process: bool = True) -> str | None:
    """
    The last checkpoint of the run in `folder` that is as it was written; `None` if there never was one.

    The main process moves damaged ones aside, with a warning, so that none counts as the newest again.

    Raises:
        ValueError: if all are damaged, or the last one lacks what a run needs to go on.
    """
    while checkpoint := get_last_checkpoint(str(folder)):
        try:
            check_whole(checkpoint)
        except DamagedCheckpoint as error:
            if not main_process or len(list(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))) == 1:
                raise
            aside = folder / f"damaged-{Path(checkpoint).name}"
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(checkpoint, aside)
            logger.warning("%s It is now %s, and the checkpoint before it is taken.", error, aside)
        else:
            logger.info("Going on from %s.", checkpoint)
            return checkpoint
    return None


class CheckpointingTrainer(Trainer):
    """`Trainer` that writes a checkpoint aside and then moves it, with image processor and tokenizer in it."""

    model: Any
    args: Any
    image_processor: Any = None
    tokenizer: Any = None

    def save_model(self, output_dir=None, _internal_call: bool = False):
        """[`Trainer.save_model`]; a whole model gets a card if it has none and, with `save_code`, the model's code."""
        super().save_model(output_dir, _internal_call)
        if not self.args.should_save:
            return
        folder = Path(str(output_dir or self.args.output_dir))
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle that nothing reads, with `hub_token` in it
        for part in (self.image_processor, self.tokenizer):
            if part is not None:
                part.save_pretrained(folder)
        if _internal_call:
            return
        if self.args.save_code:
            add_code(folder)
        in_a_run = folder.name == WRITING_DIR  # the run writes its card at the end
        if not in_a_run and (folder / CONFIG_NAME).is_file() and not (folder / CARD).exists():
            parts = (self.model.config.backbone_config, self.model.config.clip_config)
            write_card(folder, base_model=[part.name_or_path for part in parts if part is not None])

    def push_to_hub(self, *args, **kwargs):
        """Raises `ValueError`: what is pushed is chosen by `denseclip push`."""
        raise ValueError(NO_PUSH)

    # Trainer loads adapters of `peft.get_peft_model` alone, not those that `model.add_adapter` made.

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if getattr(self.model, "_hf_peft_config_loaded", False):
            load_added_adapter(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if getattr(self.model, "_hf_peft_config_loaded", False):
            load_added_adapter(self.model, str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _find_best_checkpoint(self, run_dir: Path, being_written: str | None = None) -> None:
        """The best checkpoint lies in this run's directory, wherever that was when it was written."""
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if name == being_written or (run_dir / name).exists():
            self.state.best_model_checkpoint = str(run_dir / name)

    def _save_checkpoint(self, model, trial):
        """Write into a folder beside the checkpoints, then rename: a kill leaves the previous one usable."""
        run_dir, output_dir = Path(self._get_output_dir(trial)), self.args.output_dir
        writing, name = run_dir / WRITING_DIR, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            with complete_or_gone(writing, f"the checkpoint of step {self.state.global_step}", "those before it"):
                self.args.output_dir = str(writing)
                super()._save_checkpoint(model, trial)
                written = Path(self._get_output_dir(trial)) / name
                self._find_best_checkpoint(run_dir, name)  # on every process: each loads the best model at the end
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self.state.save_to_json(str(written / "trainer_state.json"))
                    write_manifest(written)
                    shutil.rmtree(run_dir / name, ignore_errors=True)
                    os.replace(written, run_dir / name)
                    sync(run_dir)
                    shutil.rmtree(writing)
        finally:
            self.args.output_dir = output_dir
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )
        self.accelerator.wait_for_everyone()


__all__ = ["CheckpointingTrainer", "DamagedCheckpoint", "check_whole", "newest_whole_checkpoint", "write_manifest"]
