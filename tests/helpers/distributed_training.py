"""Trains a tiny model on as many processes as it is started on; test_distributed.py compares what comes out."""

import json
import sys
import weakref
from pathlib import Path

import torch

from denseclip_hf.transforms import AugmentedStream
from helpers.batch_norm import synchronize_trainers_batch_norms
from helpers.images import pictures
from helpers.models import tiny_model
from helpers.training import NO_DROPOUT, trainer_for


def main(output_dir: str, options: str) -> None:
    synchronize_trainers_batch_norms()
    # With an epsilon that keeps Adam from blowing up what rounding leaves of gradients near zero.
    chosen = {"max_steps": 5, "adam_epsilon": 1e-4, **json.loads(options)}
    samples, stream = pictures(10), chosen.pop("stream", False)
    for index, sample in enumerate(samples):
        sample["image"].filename = str(index)
    model = tiny_model("resnet", **NO_DROPOUT)
    trainer = trainer_for(output_dir, model, samples, **chosen)
    if stream:
        trainer.train_dataset = AugmentedStream(samples, trainer.train_dataset.transform)
    seen, compute_loss = [], trainer.compute_loss

    def note(model, inputs, *args, **kwargs):
        seen.append(inputs["name"])
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = note
    trainer.train()
    metrics = trainer.evaluate()
    result = {
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "seen": seen,
        "best": trainer.state.best_model_checkpoint,
        "matrix": metrics["eval_confusion_matrix"].tolist(),
        "loss": metrics["eval_loss"],
        "num_images": metrics["eval_num_images"],
    }
    Path(output_dir, f"result-{trainer.args.process_index}.json").write_text(json.dumps(result))
    torch.save(trainer.model.state_dict(), Path(output_dir, f"weights-{trainer.args.process_index}.pt"))
    wrapper = weakref.ref(trainer.model_wrapped)
    trainer.end()
    assert wrapper() in (None, trainer.model)  # else its end may come when there is no group of processes any more


if __name__ == "__main__":
    main(*sys.argv[1:])
