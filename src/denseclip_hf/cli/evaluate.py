"""Measure a model on a data set, by flags; recipe files may come first.

    denseclip evaluate --model outputs/run --dataset path/to/data_set [--inference_mode slide]
    denseclip evaluate configs/zero_shot/ade20k.yaml --dataset path/to/ADEChallengeData2016

The second measures words on a CLIP that nobody trained to segment.

On several devices: `accelerate launch -m denseclip_hf.cli.evaluate ...`.
The published multi-scale protocol: `--scales 0.5 0.75 1 1.25 1.5 1.75 --flip`.
"""

import json
import logging
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..options import DatasetArguments, EvaluationArguments, WordOptions
from .arguments import log_to_terminal, one_sentence_errors, parse_arguments


logger = logging.getLogger(__name__)

# Options that default to the values used in training: the evaluation's name and training's.
AS_TRAINED = {"split": "validation_split"} | {k.name: k.name for k in fields(DatasetArguments) if k.name != "dataset"}


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    log_to_terminal()
    kinds = [EvaluationArguments, WordOptions]
    args, options = parse_arguments(kinds, argv, needed=["model", "dataset"], description=__doc__)
    from accelerate import PartialState

    from ..evaluation import report_table

    report = evaluate(args, options)
    if PartialState().is_main_process:
        print(report_table(report))
        print(f"Results are in {args.output_dir}")


def evaluate(args: EvaluationArguments, options: WordOptions | None = None) -> dict[str, Any]:
    """[`measure`], with the data read as in training on it, and the result put into the card of a local model."""
    from accelerate import PartialState

    from ..evaluation import measure
    from ..sharing import CARD, add_results

    report = measure(as_trained(args), options)
    card = Path(args.model) / CARD
    of_classes = args.update_card and args.max_images is None and args.words is None
    if of_classes and card.is_file() and PartialState().is_main_process:
        try:
            add_results(args.model, report)
            logger.info("The result is in the model's card %s.", card)
        except (OSError, ValueError) as error:  # a card that somebody broke is no reason to lose the report
            logger.warning("The model's card %s stays as it is: %s", card, error)
    return report


def as_trained(args: EvaluationArguments) -> EvaluationArguments:
    """`args`; what of `AS_TRAINED` they leave open is from the recipe of a model trained on the same data."""
    from ..training import RECIPE_FILE

    folder = Path(args.model).resolve()
    if re.fullmatch(r"checkpoint-\d+", folder.name) and not (folder / RECIPE_FILE).exists():
        folder = folder.parent  # the run's
    try:
        recipe = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))
        here, there = Path(args.dataset or "").resolve(), Path(recipe["dataset"]).resolve()
        if here != there:
            if here.name == there.name:
                logger.warning("The model was trained on %s, so flags alone say how %s is read.", there, here)
            return args
    except (OSError, ValueError, TypeError, KeyError):  # no recipe, or not one of ours
        return args
    taken = {name: recipe.get(trained) for name, trained in AS_TRAINED.items() if getattr(args, name) is None}
    taken = {name: value for name, value in taken.items() if value is not None}
    logger.info("As the model was trained on this data: %s.", taken)
    return replace(args, **taken)


if __name__ == "__main__":
    main()
