"""Train a segmenter, by recipe files first and flags on top of them, or by flags alone.

    denseclip train configs/ade20k_rn50.yaml --dataset path/to/data_set --output_dir outputs/run

The directory it leaves is complete: weights, config, image processor, tokenizer and card. The same command goes on
from the last checkpoint of an interrupted run. On several devices: `accelerate launch -m denseclip_hf.cli.train ...`.
Every option of transformers' TrainingArguments is a flag too: `--help_all` lists them.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

from ..files import write_atomically
from ..options import DataArguments, ModelArguments, TrainingOptions
from .arguments import log_to_terminal, one_sentence_errors, parse_arguments


@one_sentence_errors
def main(argv: list[str] | None = None) -> dict:
    log_to_terminal()
    argv = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(argv):
        parse_arguments([ModelArguments, DataArguments, TrainingOptions], ["--help"], description=__doc__)
    from ..training import (  # with torch, which help does without
        DenseCLIPTrainingArguments,
        check_checkpoint,
        exclusive_directory,
        make_trainer,
        prepare_run,
        recipe_of,
        results_json,
        save_final_model,
        write_recipe,
        write_training_card,
    )

    kinds = [ModelArguments, DataArguments, DenseCLIPTrainingArguments]
    argv = ["--help" if flag == "--help_all" else flag for flag in argv]
    model_args, data_args, args = parse_arguments(kinds, argv, needed=["dataset", "output_dir"], description=__doc__)
    output_dir, recipe = Path(args.output_dir), recipe_of(model_args, data_args, args)
    with exclusive_directory(output_dir) if args.process_index == 0 else nullcontext():
        with args.main_process_first(desc="looking at the output directory"):
            if args.resume_from_checkpoint:
                check_checkpoint(args.resume_from_checkpoint, recipe)
            goes_on = prepare_run(output_dir, recipe, main_process=args.local_process_index == 0)
        trainer, data = make_trainer(model_args, data_args, args)
        if args.local_process_index == 0:
            write_recipe(output_dir, recipe)
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or goes_on)
        save_final_model(trainer)  # before the evaluation, which may fail
        metrics = trainer.evaluate() if data.validation is not None else {}
        if trainer.is_world_process_zero():
            if metrics:
                write_atomically(output_dir / "eval_results.json", results_json(metrics))
            write_training_card(output_dir, model_args, data_args, args, data, metrics)
            for name, iou in zip(data.id2label.values(), metrics.get("eval_per_category_iou", []), strict=False):
                print(f"{name:>24}  IoU {100 * iou:5.1f}")
            if metrics:
                print(f"{'mean':>24}  IoU {100 * metrics['eval_mean_iou']:5.1f}")
            print(f"The model is in {output_dir.resolve()}")
    trainer.end()
    return metrics


if __name__ == "__main__":
    main()
