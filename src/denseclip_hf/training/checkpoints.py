"""A `Trainer` whose checkpoints are complete or absent, and say so when they are damaged."""

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import CONFIG_NAME

from ..files import complete_or_gone, sync
from ..sharing import CARD, add_code, write_card
from .adapters import load_added_adapter
from .arguments import NO_PUSH
from .run_directory import WRITING_DIR, reading_checkpoint, write_manifest


class CheckpointingTrainer(Trainer):
    """`Trainer` that writes a checkpoint aside and then moves it, with image processor and tokenizer in it."""

    model: Any
    args: Any
    image_processor: Any = None
    tokenizer: Any = None

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        folder = Path(str(output_dir or self.args.output_dir))
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle that nothing reads, with `hub_token` in it
        for part in (self.image_processor, self.tokenizer):
            if part is not None:
                part.save_pretrained(folder)

    def save_model(self, output_dir=None, _internal_call: bool = False):
        """[`Trainer.save_model`]; a whole model gets a card if it has none and, with `save_code`, the model's code."""
        super().save_model(output_dir, _internal_call)
        folder = Path(str(output_dir or self.args.output_dir))
        if self.args.save_code and not _internal_call and self.args.should_save:
            add_code(folder)
        asked_for = not _internal_call and folder.name != WRITING_DIR  # a run writes its own card at its end
        if asked_for and self.args.should_save and (folder / CONFIG_NAME).is_file() and not (folder / CARD).exists():
            write_card(folder, base_model=self.model.config.clip_config.name_or_path or None)

    def push_to_hub(self, *args, **kwargs):
        """Raises `ValueError`: what is pushed is chosen by `scripts/push_to_hub.py`."""
        raise ValueError(NO_PUSH)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with reading_checkpoint(resume_from_checkpoint):
            if getattr(self.model, "_hf_peft_config_loaded", False):
                load_added_adapter(self.model, resume_from_checkpoint)
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with reading_checkpoint(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with reading_checkpoint(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self):
        if getattr(self.model, "_hf_peft_config_loaded", False):
            load_added_adapter(self.model, str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _get_output_dir(self, trial):
        return self._writing_dir or super()._get_output_dir(trial)

    _writing_dir: str | None = None

    def _save_checkpoint(self, model, trial):
        """Write into a folder beside the checkpoints, then rename: a kill leaves the previous one usable."""
        run_dir = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        writing = run_dir / WRITING_DIR
        self._writing_dir = str(writing)
        try:
            with complete_or_gone(writing, f"the checkpoint of step {self.state.global_step}", "those before it"):
                super()._save_checkpoint(model, trial)
                if self.state.best_global_step:  # on every process: each loads the best model at the end
                    best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
                    if best.exists() or best.name == name:
                        self.state.best_model_checkpoint = str(best)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self._publish(writing, run_dir, name)
        finally:
            self._writing_dir = None
        self.accelerator.wait_for_everyone()

    def _publish(self, writing: Path, run_dir: Path, name: str) -> None:
        """Move a complete checkpoint to where it belongs, and remove those that are too many."""
        self.state.save_to_json(str(writing / name / "trainer_state.json"))
        write_manifest(writing / name)
        shutil.rmtree(run_dir / name, ignore_errors=True)
        os.replace(writing / name, run_dir / name)
        sync(run_dir)
        shutil.rmtree(writing)
        rotate_checkpoints(
            output_dir=str(run_dir),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=False,
        )


__all__ = ["CheckpointingTrainer"]
