"""Arguments, parameter groups, the trainer and the directory of a run.

In: a recipe and a data set. Out: checkpoints, and a directory with the trained model, its results and its card.
"""

from ..options import DataArguments, ModelArguments
from .ablations import ablation_json, ablation_tables, read_measurements
from .arguments import DenseCLIPTrainingArguments
from .card import write_training_card
from .optimizer import parameter_groups, poly_learning_rate
from .recipe import make_trainer
from .run_directory import (
    RECIPE_FILE,
    check_checkpoint,
    exclusive_directory,
    prepare_run,
    recipe_of,
    refuse_other_recipe,
    results_json,
    save_final_model,
    write_recipe,
)
from .stopping import STOP_SIGNALS, TrainingStopped
from .tokenizer import MAX_TOKENS, learn_tokenizer
from .trainer import DenseCLIPTrainer


__all__ = [
    "MAX_TOKENS",
    "RECIPE_FILE",
    "STOP_SIGNALS",
    "DataArguments",
    "DenseCLIPTrainer",
    "DenseCLIPTrainingArguments",
    "ModelArguments",
    "TrainingStopped",
    "ablation_json",
    "ablation_tables",
    "check_checkpoint",
    "exclusive_directory",
    "learn_tokenizer",
    "make_trainer",
    "parameter_groups",
    "poly_learning_rate",
    "prepare_run",
    "read_measurements",
    "recipe_of",
    "refuse_other_recipe",
    "results_json",
    "save_final_model",
    "write_recipe",
    "write_training_card",
]
