"""Train a segmenter: `python scripts/train.py RECIPE.yaml [--flag value ...]`, or flags alone; see `--help`.

On several devices: `accelerate launch scripts/train.py ...`. The directory it leaves is complete: weights, config,
image processor and tokenizer.
"""

import json
import logging
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from denseclip_hf import DenseCLIPTrainingArguments
from denseclip_hf.recipes import DataArguments, ModelArguments, make_trainer, parse_arguments


def main(argv: list[str] | None = None) -> dict:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model_args, data_args, args = parse_arguments([ModelArguments, DataArguments, DenseCLIPTrainingArguments], argv)
    trainer, data = make_trainer(model_args, data_args, args)
    output_dir = Path(args.output_dir)
    checkpoint = get_last_checkpoint(args.output_dir) if output_dir.is_dir() else None
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or checkpoint)
    metrics = trainer.evaluate() if data.validation is not None else {}
    trainer.save_model()
    if trainer.is_world_process_zero():
        names = list(data.id2label.values())
        for name, iou in zip(names, metrics.get("eval_per_category_iou", []), strict=False):
            print(f"{name:>24}  IoU {100 * iou:5.1f}")
        if metrics:
            print(f"{'mean':>24}  IoU {100 * metrics['eval_mean_iou']:5.1f}")
            numbers = {k: v for k, v in metrics.items() if not k.endswith("confusion_matrix")}
            (output_dir / "eval_results.json").write_text(json.dumps(numbers, indent=2) + "\n")
        print(f"The model is in {output_dir.resolve()}")
    trainer.end()
    return metrics


if __name__ == "__main__":
    main()
